"""Edits and inpainting over HTTP, with the OpenAI SDK and by hand, against a real process."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from server.api.multipart import MAX_PARTS, MAX_TEXT_BYTES
from tests.support.pictures import file_of, mask_file, photo
from tests.support.serving import serving

URL = "/v1/images/edits"
PHOTO = file_of(photo())
BOX = (16, 16, 40, 48)


@pytest.fixture(scope="module")
def url(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving([toy_bundle], log=tmp_path_factory.mktemp("edits") / "log") as server:
        yield server.url


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def sdk(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def pixels(b64: str | None) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64 or ""))).convert("RGB"))


def post(http: httpx.Client, files: dict[str, bytes] | None = None, **fields: Any) -> httpx.Response:
    parts = {"image": PHOTO} if files is None else files
    return http.post(URL, data={"prompt": "seven", **fields}, files={k: (k, v) for k, v in parts.items()})


def test_the_sdk_edits(sdk: openai.OpenAI) -> None:
    answer = sdk.images.edit(image=("a.png", PHOTO), prompt="seven", n=2, extra_body={"seed": 5, "strength": 0.5})
    assert answer.data is not None
    assert len(answer.data) == 2
    assert answer.size == "64x64"
    assert (pixels(answer.data[0].b64_json) != pixels(answer.data[1].b64_json)).any()


def test_the_sdk_inpaints_and_the_rest_stays_exactly(sdk: openai.OpenAI) -> None:
    answer = sdk.images.edit(image=("a.png", PHOTO), mask=("m.png", mask_file(BOX)), prompt="three")
    assert answer.data is not None
    got, sent = pixels(answer.data[0].b64_json), np.asarray(photo())
    inside = np.zeros((64, 64), np.bool_)
    inside[BOX[1] : BOX[3], BOX[0] : BOX[2]] = True
    assert (got[~inside] == sent[~inside]).all()
    assert (got[inside] != sent[inside]).any()


def test_a_file_under_another_name_is_refused_by_that_name(http: httpx.Client) -> None:
    error = post(http, {"image": PHOTO, "file": PHOTO}).json()["error"]
    assert (error["code"], error["param"]) == ("unknown_field", "file")
    assert "image[]" in error["message"]


def test_texts_that_are_wrong_are_named(http: httpx.Client) -> None:
    def part(name: str, text: bytes) -> bytes:
        return b"--x\r\nContent-Disposition: form-data; name=" + name.encode() + b"\r\n\r\n" + text + b"\r\n"

    for text, expected in (
        (b"\xff", (400, "invalid_encoding", "prompt")),
        (b"a" * 70_000, (413, "payload_too_large", "prompt")),
    ):
        kind = {"content-type": "multipart/form-data; boundary=x"}
        answer = http.post(URL, content=part("prompt", text) + b"--x--\r\n", headers=kind)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == expected


@pytest.mark.parametrize("strength", [".5", "5e-1", "0.50", "+0.5"])
def test_numbers_are_read_as_json_and_python_write_them(http: httpx.Client, strength: str) -> None:
    answer = post(http, strength=strength)
    assert (answer.status_code, answer.json().get("strength")) == (200, 0.5)


def test_the_sdk_streams_previews_of_an_edit(sdk: openai.OpenAI) -> None:
    stream = sdk.images.edit(
        image=("a.png", PHOTO), prompt="seven", stream=True, partial_images=2, extra_body={"strength": 1}
    )
    kinds = [event.type for event in stream]
    assert kinds == ["image_edit.partial_image", "image_edit.partial_image", "image_edit.completed"]


def test_the_effective_strength_is_reported(http: httpx.Client) -> None:
    assert post(http, strength="0.6", steps="4").json()["strength"] == 0.5
    assert post(http, strength="0.01", steps="4").json()["strength"] == 0.25
    assert post(http, steps="4").json()["strength"] == 0.75
    masked = post(http, {"image": PHOTO, "mask": mask_file(BOX)}, steps="4").json()
    assert (masked["task"], masked["strength"]) == ("inpaint", 1.0)


def test_an_empty_text_is_a_field_left_out_and_image_may_be_a_list(http: httpx.Client) -> None:
    answer = post(http, {"image[]": PHOTO}, n="", stream="false", size="auto", seed="3")
    assert answer.status_code == 200
    assert answer.json()["seed"] == 3


def test_the_same_edit_gives_the_same_bytes_in_company(http: httpx.Client) -> None:
    alone = post(http, seed="9", strength="0.5").json()["data"][0]["b64_json"]
    several = post(http, seed="8", strength="0.5", n="3").json()["data"]
    assert several[1]["b64_json"] == alone


def test_models_list_the_tasks(http: httpx.Client) -> None:
    assert http.get("/v1/models").json()["data"][0]["tasks"] == ["text_to_image", "edit", "inpaint"]


@pytest.mark.parametrize(
    ("fields", "files", "status", "code", "param"),
    [
        ({"strength": "0"}, None, 400, "out_of_range", "strength"),
        ({"strength": "1.0001"}, None, 400, "out_of_range", "strength"),
        ({"strength": "much"}, None, 400, "invalid_type", "strength"),
        ({"n": "1.5"}, None, 400, "invalid_type", "n"),
        ({"seed": "9" * 64}, None, 400, "out_of_range", "seed"),
        ({"seed": "9" * 65}, None, 400, "invalid_type", "seed"),
        ({"guidance_scale": "9" * 64}, None, 400, "out_of_range", "guidance_scale"),
        ({"stream": "maybe"}, None, 400, "invalid_type", "stream"),
        ({"colour": "red"}, None, 400, "unknown_field", "colour"),
        ({"mode": "invert"}, None, 400, "missing_field", "source_prompt"),
        ({"mode": "invert", "source_prompt": "two"}, None, 400, "unsupported_value", "mode"),
        ({"mode": "invert", "source_prompt": ""}, None, 400, "missing_field", "source_prompt"),
        ({"source_prompt": "two"}, None, 400, "unsupported_value", "source_prompt"),
        ({"mode": "invert", "strength": "0.5"}, None, 400, "unsupported_value", "strength"),
        ({"size": "63x64"}, None, 400, "out_of_range", "size"),
        ({"model": "other"}, None, 404, "model_not_found", "model"),
        ({}, {}, 415, "unsupported_media_type", None),
        ({}, {"mask": mask_file(BOX)}, 400, "missing_field", "image"),
        ({}, {"image": b""}, 400, "invalid_image", "image"),
        ({}, {"image": b"http://example.com/a.png"}, 400, "invalid_image", "image"),
        ({}, {"image": file_of(photo(), "GIF")}, 415, "unsupported_image_type", "image"),
        ({}, {"image": PHOTO, "image[]": PHOTO}, 400, "duplicate_part", "image"),
        ({}, {"image": PHOTO, "mask": mask_file((0, 0, 0, 0))}, 400, "empty_mask", "mask"),
        ({}, {"image": PHOTO, "mask": mask_file(BOX, (32, 32))}, 400, "mask_size_mismatch", "mask"),
        ({}, {"image": PHOTO, "mask": PHOTO}, 400, "opaque_mask", "mask"),
        ({"user": "x" * (MAX_TEXT_BYTES + 1)}, None, 413, "payload_too_large", "user"),
        ({f"f{k}": "1" for k in range(MAX_PARTS)}, None, 413, "too_many_parts", None),
    ],
)
def test_what_is_wrong_is_named(
    http: httpx.Client,
    fields: dict[str, str],
    files: dict[str, bytes] | None,
    status: int,
    code: str,
    param: str | None,
) -> None:
    answer = post(http, files, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)


def in_base64(text: str) -> bytes:
    """A form whose prompt is said to be encoded, beside a good image."""
    head = "--x\r\nContent-Disposition: form-data; name=prompt\r\nContent-Transfer-Encoding: base64\r\n\r\n"
    image = b"\r\n--x\r\nContent-Disposition: form-data; name=image; filename=a.png\r\n\r\n" + PHOTO
    return (head + text).encode() + image + b"\r\n--x--\r\n"


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=" + "b" * 300, b""),
        ("multipart/form-data; boundary=x", b"no boundary at all"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data; name=prompt\r\n\r\nseven"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\nno name\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", in_base64("c2V2ZW4=")),
        ("multipart/form-data; boundary=xxxxxxxxxx", b"\r\n--xxxxxxxxx" * 20_000),
    ],
)
def test_a_broken_form_is_said_so(http: httpx.Client, kind: str, body: bytes) -> None:
    answer = http.post(URL, content=body, headers={"content-type": kind})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_multipart")
    assert ("no boundary" in answer.json()["error"]["message"]) is ("boundary=" not in kind)


def test_a_file_that_nobody_chose_is_left_out_and_an_empty_one_is_not(http: httpx.Client) -> None:
    """Browsers send a file field without a file as no bytes under an empty name."""
    answers = [
        http.post(URL, data={"prompt": "seven"}, files={"image": ("a.png", PHOTO), "mask": (name, b"")})
        for name in (None, "", "mask.png")
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 400]
    assert answers[0].json()["task"] == "edit"
    assert answers[2].json()["error"]["param"] == "mask"


def test_a_file_name_is_discarded(http: httpx.Client) -> None:
    name = "../../etc/passwd\x00.png"
    answer = http.post(URL, data={"prompt": "seven"}, files={"image": (name, PHOTO)})
    assert answer.status_code == 200
