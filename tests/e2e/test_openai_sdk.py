"""The openai SDK, unchanged, against a real server process."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
from itertools import pairwise
from pathlib import Path

import openai
import pytest
from openai import OpenAI
from PIL import Image

from tests.support.keys import write_key_file
from tests.support.serving import ServerProcess, serving


def decoded(b64: str | None) -> Image.Image:
    assert b64 is not None
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def test_generate_with_defaults(sdk: OpenAI) -> None:
    answer = sdk.images.generate(prompt="seven")
    assert answer.data is not None
    image = decoded(answer.data[0].b64_json)
    assert (image.format, image.size, image.mode) == ("PNG", (64, 64), "RGB")
    assert (answer.size, answer.output_format, answer.background) == ("64x64", "png", "opaque")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_our_fields_through_extra_body(sdk: OpenAI) -> None:
    fields = {"guidance_scale": 3.5, "steps": 8, "seed": 40}
    answer = sdk.images.generate(prompt="seven", n=3, extra_body=fields).model_dump()
    assert [image["seed"] for image in answer["data"]] == [40, 41, 42]
    assert (answer["seed"], answer["guidance_scale"], answer["steps"]) == (40, 3.5, 8)
    assert answer["model"] == "toy-digits"
    assert answer["engine"]
    assert set(answer["timing"]) == {"queue", "condition", "steps", "decode", "encode"}


def test_aliases_mean_the_same(sdk: OpenAI) -> None:
    ours = sdk.images.generate(prompt="7", extra_body={"guidance_scale": 3, "steps": 2, "seed": 5}).model_dump()
    aliased = {"guidance": 3, "num_inference_steps": 2, "seed": 5}
    theirs = sdk.images.generate(prompt="7", extra_body=aliased).model_dump()
    assert ours["data"] == theirs["data"]


def test_image_k_can_be_made_alone(sdk: OpenAI) -> None:
    together = sdk.images.generate(prompt="three", n=4, extra_body={"seed": 100}).model_dump()["data"]
    alone = sdk.images.generate(prompt="three", extra_body={"seed": 102}).model_dump()["data"]
    assert together[2]["b64_json"] == alone[0]["b64_json"]


def test_a_seed_is_drawn_and_returned(sdk: OpenAI) -> None:
    first, second = (sdk.images.generate(prompt="one").model_dump() for _ in range(2))
    assert first["seed"] != second["seed"]
    again = sdk.images.generate(prompt="one", extra_body={"seed": first["seed"]}).model_dump()
    assert again["data"] == first["data"]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_formats_carry_their_parameters(sdk: OpenAI, kind: str) -> None:
    answer = sdk.images.generate(prompt="two", output_format=kind, extra_body={"seed": 1})  # type: ignore[call-overload]
    image = decoded(answer.data[0].b64_json)
    assert image.format == kind.upper()
    text = image.text["halfstep"] if kind == "png" else image.getexif()[0x010E]
    parameters = json.loads(text)
    assert (parameters["prompt"], parameters["seed"], parameters["steps"]) == ("two", 1, 4)


def test_output_compression_is_honoured(sdk: OpenAI) -> None:
    sizes = [
        len(
            sdk.images.generate(prompt="two", output_format="jpeg", output_compression=q, extra_body={"seed": 1})
            .data[0]
            .b64_json  # type: ignore[index, arg-type]
        )
        for q in (0, 40, 100)
    ]
    assert all(low < high for low, high in pairwise(sizes))


def test_errors_are_typed_and_name_the_field(sdk: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.images.generate(prompt="seven", extra_body={"steps": 3})
    assert (refused.value.param, refused.value.code) == ("steps", "out_of_range")
    assert refused.value.request_id
    with pytest.raises(openai.BadRequestError) as unknown:
        sdk.images.generate(prompt="a cat")
    assert (unknown.value.param, unknown.value.code) == ("prompt", "unknown_prompt")
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.images.generate(prompt="seven", model="dall-e-3")
    assert missing.value.code == "model_not_found"


def test_models_are_listed_with_what_they_can_do(sdk: OpenAI) -> None:
    ids = [model.id for model in sdk.models.list()]
    assert ids == ["toy-digits", "toy-poison", "toy-slow"]
    model = sdk.models.retrieve("toy-digits").model_dump()
    assert model["guidance_scale"] == {"min": 1.0, "max": 5.0, "default": 2.0}
    assert model["steps"] == {"trained": [1, 2, 4, 8], "default": 4}
    assert (model["sizes"], model["tasks"], model["owned_by"]) == (
        ["64x64"],
        ["text_to_image", "edit", "inpaint"],
        "halfstep",
    )
    assert "seven" in model["prompts"]
    assert model["decoder"] == "own"


def test_a_stream_sends_previews_then_the_image(sdk: OpenAI) -> None:
    fields = {"seed": 3, "steps": 8}
    events = list(sdk.images.generate(prompt="five", stream=True, partial_images=3, extra_body=fields))
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    plain = sdk.images.generate(prompt="five", extra_body=fields)
    assert plain.data is not None
    assert events[-1].b64_json == plain.data[0].b64_json
    previews = {event.b64_json for event in events[:3]}
    assert len(previews) == 3
    assert decoded(events[0].b64_json).size == (64, 64)


def test_a_failure_in_a_stream_is_an_error_event(sdk: OpenAI) -> None:
    with pytest.raises(openai.APIError, match="no usable image"):
        list(sdk.images.generate(prompt="six", model="toy-poison", stream=True))


def assert_draws(line: str, folder: Path, **environment: str) -> None:
    """line: of curl, as the server printed it."""
    subprocess.run(line, shell=True, check=True, cwd=folder, timeout=60, env={**os.environ, **environment})
    assert Image.open(folder / "image.png").size == (64, 64)


def test_the_printed_curl_line_works(server: ServerProcess, tmp_path: Path) -> None:
    assert_draws(next(line for line in server.output.splitlines() if "curl" in line), tmp_path)


def test_the_printed_curl_line_works_with_a_key(toy_bundle: Path, tmp_path: Path) -> None:
    keys = write_key_file(tmp_path / "keys.json")
    with serving([toy_bundle], "--api-keys", str(tmp_path / "keys.json"), log=tmp_path / "log") as locked:
        line = next(line for line in locked.output.splitlines() if "curl" in line)
        assert_draws(line, tmp_path, HALFSTEP_API_KEY=keys["a"])
