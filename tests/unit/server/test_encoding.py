"""Files hold their pixels and parameters, and compression does what it says."""

from __future__ import annotations

import io
import json
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
    text = image.text["parameters"] if output_format == "png" else image.getexif()[0x010E]
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


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_less_compression_is_a_larger_file(output_format: OutputFormat) -> None:
    sizes = [len(encoded(output_format, quality)) for quality in (0, 50, 100)]
    assert all(low < high for low, high in pairwise(sizes))


def test_the_same_pixels_give_the_same_bytes() -> None:
    assert encoded("webp") == encoded("webp")
