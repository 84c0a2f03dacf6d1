"""Jobs that edit and inpaint: files inside the JSON body, against a real process."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support.pictures import file_of, mask_file, photo
from tests.support.serving import serving

JOBS = "/v1/jobs"
BOX = (16, 16, 40, 48)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def white_mask() -> bytes:
    """The native mask: white inside BOX, black around it."""
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, BOX)
    return file_of(mask)


PHOTO = b64(file_of(photo()))
WHITE = b64(white_mask())


@pytest.fixture(scope="module")
def http(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    log = tmp_path_factory.mktemp("job-edits") / "log"
    with serving([toy_bundle], log=log) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def made(http: httpx.Client, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    """The job, ended."""
    answer = http.post(JOBS, json={"prompt": "three", **fields}, headers={"prefer": "wait=60", **(headers or {})})
    assert (answer.status_code, answer.json().get("status")) == (200, "succeeded"), answer.text
    return dict(answer.json())


def pixels(http: httpx.Client, job: dict[str, Any], index: int = 0) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(http.get(job["images"][index]["url"]).content)).convert("RGB"))


@pytest.mark.parametrize("mask", [white_mask(), mask_file(BOX)], ids=["white", "transparent"])
def test_an_inpainting_keeps_every_pixel_outside_the_mask(http: httpx.Client, mask: bytes) -> None:
    job = made(http, task="inpaint", image=PHOTO, mask=b64(mask), n=2)
    inside = np.zeros((64, 64), np.bool_)
    inside[BOX[1] : BOX[3], BOX[0] : BOX[2]] = True
    for k in range(2):
        got = pixels(http, job, k)
        assert (got[~inside] == np.asarray(photo())[~inside]).all()
        assert (got[inside] != np.asarray(photo())[inside]).any()
    assert (job["task"], job["strength"], job["mode"]) == ("inpaint", 1.0, "noise")


def test_an_edit_is_that_of_the_openai_api(http: httpx.Client) -> None:
    fields = {"seed": 5, "steps": 4, "strength": 0.6}
    job = made(http, task="edit", image=PHOTO, **fields)
    form = {name: str(value) for name, value in {"prompt": "three", **fields}.items()}
    files = {"image": ("a.png", file_of(photo()))}
    direct = http.post("/v1/images/edits", data=form, files=files).json()["data"][0]["b64_json"]
    assert http.get(job["images"][0]["url"]).content == base64.b64decode(direct)
    assert (job["task"], job["strength"], job["step"]) == ("edit", 0.5, 2)


def test_a_data_url_is_the_file_it_holds(http: httpx.Client) -> None:
    plain = made(http, task="edit", image=PHOTO, seed=3)
    url = made(http, task="edit", image=f"data:image/png;base64,{PHOTO}", seed=3)
    assert (pixels(http, plain) == pixels(http, url)).all()


def test_base64_may_come_in_lines(http: httpx.Client) -> None:
    lines = base64.encodebytes(base64.b64decode(PHOTO)).decode()
    assert "\n" in lines.strip()
    assert made(http, task="edit", image=lines)["status"] == "succeeded"


def test_null_is_left_out_and_a_job_without_an_image_has_no_strength(http: httpx.Client) -> None:
    job = made(http, task=None, image=None, mask=None, strength=None, mode=None, source_prompt=None)
    assert (job["task"], job["strength"], job["mode"]) == ("text_to_image", None, None)


def test_a_key_stands_for_the_files_too(http: httpx.Client) -> None:
    key = {"idempotency-key": "edits"}
    first = made(http, key, task="edit", image=PHOTO)
    assert made(http, key, task="edit", image=PHOTO)["id"] == first["id"]
    other = {"prompt": "three", "task": "edit", "image": b64(file_of(photo(seed=1)))}
    assert http.post(JOBS, json=other, headers=key).json()["error"]["code"] == "idempotency_key_reuse"


EDIT = {"task": "edit", "image": PHOTO}
INPAINT = {"task": "inpaint", "image": PHOTO, "mask": WHITE}
NOTHING = b64(file_of(Image.new("L", (64, 64), 0)))
SMALL = b64(file_of(Image.new("L", (32, 32), 255)))
BAD: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "edit without image": ({"task": "edit"}, 422, "missing_field", "image"),
    "inpaint without image": ({"task": "inpaint", "mask": WHITE}, 422, "missing_field", "image"),
    "inpaint without mask": ({"task": "inpaint", "image": PHOTO}, 422, "missing_field", "mask"),
    "image of no task": ({"image": PHOTO}, 422, "unsupported_value", "image"),
    "mask of text": ({"task": "text_to_image", "mask": WHITE}, 422, "unsupported_value", "mask"),
    "mask of edit": ({**EDIT, "mask": WHITE}, 422, "unsupported_value", "mask"),
    "strength of text": ({"strength": 0.5}, 422, "unsupported_value", "strength"),
    "mode of text": ({"mode": "noise"}, 422, "unsupported_value", "mode"),
    "source_prompt of text": ({"source_prompt": "two"}, 422, "unsupported_value", "source_prompt"),
    "source_prompt of noise": ({**EDIT, "source_prompt": "two"}, 422, "unsupported_value", "source_prompt"),
    "invert without source": ({**EDIT, "mode": "invert"}, 422, "missing_field", "source_prompt"),
    "invert of inpaint": ({**INPAINT, "mode": "invert"}, 422, "unsupported_value", "mask"),
    "no strength": ({**EDIT, "strength": 0}, 422, "out_of_range", "strength"),
    "too much strength": ({**EDIT, "strength": 1.01}, 422, "out_of_range", "strength"),
    "strength as text": ({**EDIT, "strength": "1"}, 422, "invalid_type", "strength"),
    "address": ({"task": "edit", "image": "http://127.0.0.1:9/canary.png"}, 422, "invalid_image", "image"),
    "file address": ({"task": "edit", "image": "file:///etc/passwd"}, 422, "invalid_image", "image"),
    "data URL without base64": ({"task": "edit", "image": "data:image/png,canary"}, 422, "invalid_image", "image"),
    "no letters of base64": ({"task": "edit", "image": "\u00e4canary"}, 422, "invalid_image", "image"),
    "nothing": ({"task": "edit", "image": ""}, 422, "invalid_image", "image"),
    "a number": ({"task": "edit", "image": 7}, 422, "invalid_type", "image"),
    "GIF": ({"task": "edit", "image": b64(file_of(photo(), "GIF"))}, 415, "unsupported_image_type", "image"),
    "mask of no pixels": ({**INPAINT, "mask": NOTHING}, 422, "empty_mask", "mask"),
    "mask of another size": ({**INPAINT, "mask": SMALL}, 422, "mask_size_mismatch", "mask"),
    "size": ({**EDIT, "size": "63x64"}, 422, "out_of_range", "size"),
    "model": ({**EDIT, "model": "canary"}, 404, "model_not_found", "model"),
}


@pytest.mark.parametrize(("fields", "status", "code", "param"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_named(
    http: httpx.Client, fields: dict[str, Any], status: int, code: str, param: str
) -> None:
    answer = http.post(JOBS, json={"prompt": "three", **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert "canary" not in answer.text


def test_a_file_over_the_limit_is_413(http: httpx.Client) -> None:
    large = b64(b"\x89PNG\r\n\x1a\n" + bytes(8 * 1024 * 1024))
    answer = http.post(JOBS, json={"prompt": "three", "task": "edit", "image": large})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "image_too_large")
