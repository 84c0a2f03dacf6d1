"""Files hold their pixels and parameters, and compression does what it says."""

from __future__ import annotations

import io
import json
import re
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from server.encoding import encode, encoding_of
from server.request import DenoiseRequest, OutputFormat

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def request(output_format: OutputFormat, compression: int | None = None) -> DenoiseRequest:
    return DenoiseRequest(
        model="m",
        prompt="sieben é",
        seed=3,
        guidance_scale=2.5,
        steps=4,
        width=64,
        height=48,
        output_format=output_format,
        output_compression=compression,
    )


def encoded(output_format: OutputFormat, compression: int | None = None) -> bytes:
    return encode(PIXELS, encoding_of(request(output_format, compression), seed=4, engine="fake"))


def test_png_is_lossless() -> None:
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encoded("png")))), PIXELS)


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_parameters_make_the_image_again(output_format: OutputFormat) -> None:
    image = Image.open(io.BytesIO(encoded(output_format)))
    text = image.text["halfstep"] if output_format == "png" else image.getexif()[0x010E]
    assert json.loads(text) == {
        "task": "text_to_image",
        "prompt": "sieben é",
        "model": "m",
        "seed": 4,
        "guidance_scale": 2.5,
        "steps": 4,
        "sampler": "deterministic",
        "size": "64x48",
        "engine": "fake",
    }


def read_as_webui(image: Image.Image) -> tuple[str, dict[str, str]]:
    """Prompt and fields, as AUTOMATIC1111's ``parse_generation_parameters`` finds them."""
    text = image.info.get("parameters")
    if text is None:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment.startswith(b"UNICODE\0")
        text = comment[8:].decode("utf-16-be")
    *lines, last = text.strip().split("\n")
    fields = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(fields) >= 3
    return "\n".join(lines), {name: json.loads(value) if value[:1] == '"' else value for name, value in fields}


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("prompt", ["sieben é", "a cat, (sitting: here)\nand 一只猫 \U0001f600"])
def test_other_tools_read_the_parameters(output_format: OutputFormat, prompt: str) -> None:
    fields = {"prompt": prompt, "model": "m: the, second", "output_format": output_format}
    wanted = request(output_format).model_copy(update=fields)
    image = Image.open(io.BytesIO(encode(PIXELS, encoding_of(wanted, seed=4, engine="fake"))))
    assert read_as_webui(image) == (
        prompt,
        {
            "Steps": "4",
            "Sampler": "deterministic",
            "CFG scale": "2.5",
            "Seed": "4",
            "Size": "64x48",
            "Model": "m: the, second",
            "Version": "halfstep",
        },
    )


def test_an_edit_says_how_much_of_the_steps_was_run() -> None:
    """Not what was asked for, which the trained steps round."""
    edit = request("png").model_copy(update={"task": "edit", "strength": 0.6})
    encoding = encoding_of(edit, seed=4, engine="fake")
    assert json.loads(encoding.parameters)["strength"] == 0.5
    assert "Denoising strength: 0.5," in encoding.infotext


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_less_compression_is_a_larger_file(output_format: OutputFormat) -> None:
    sizes = [len(encoded(output_format, quality)) for quality in (0, 50, 100)]
    assert all(low < high for low, high in pairwise(sizes))


@pytest.mark.parametrize(("output_format", "quality"), [("jpeg", 95), ("webp", 90)])
def test_the_quality_by_default(output_format: OutputFormat, quality: int) -> None:
    assert encoded(output_format) == encoded(output_format, quality) != encoded(output_format, quality - 1)


def test_the_same_pixels_give_the_same_bytes() -> None:
    assert encoded("webp") == encoded("webp")
