"""Pixels to PNG, JPEG or WebP files that carry the parameters they were made with, as two texts.

One is JSON and complete, for whoever makes the image again here; the other AUTOMATIC1111's, which other tools read.
Settings are the fast ones: PNG compress_level 1, JPEG quality 95, WebP method 0.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from server.request import DenoiseRequest, OutputFormat

JSON_KEYWORD = "halfstep"
INFOTEXT_KEYWORD = "parameters"
_EXIF_IMAGE_DESCRIPTION = 0x010E
_EXIF_SOFTWARE = 0x0131
_EXIF_IFD = 0x8769
_EXIF_USER_COMMENT = 0x9286
_SOFTWARE = "halfstep"
_DEFAULT_QUALITY = {"jpeg": 95, "webp": 90}
_PNG_LEVEL = 1


@dataclass(frozen=True)
class Encoding:
    """How to write a file. parameters, infotext: stored in it. compression: 0 … 100, None for the default.

    JPEG and WebP take compression as their quality, 100 the best, as OpenAI counts it. PNG loses nothing at
    any value, so there it is refused earlier.
    """

    format: OutputFormat
    compression: int | None
    parameters: str
    infotext: str


def encoding_of(request: DenoiseRequest, seed: int, engine: str) -> Encoding:
    """The file of one image of a request: everything needed to make it again."""
    parameters: dict[str, Any] = {
        "task": request.task,
        "prompt": request.prompt,
        "model": request.model,
        "seed": seed,
        "guidance_scale": request.guidance_scale,
        "steps": request.steps,
        "sampler": request.sampler,
        "size": f"{request.width}x{request.height}",
        "engine": engine,
    }
    if request.effective_strength is not None:
        parameters["strength"] = request.effective_strength
    if request.source_prompt is not None:
        inversion = {"source_prompt": request.source_prompt, "encoder_steps": request.encoder_steps}
        parameters |= {"mode": request.mode, **inversion}
    text = json.dumps(parameters, ensure_ascii=True)
    return Encoding(request.output_format, request.output_compression, text, infotext(request, seed))


def infotext(request: DenoiseRequest, seed: int) -> str:
    """What AUTOMATIC1111's tools read of one image of a request.

    Source: AUTOMATIC1111/stable-diffusion-webui, modules/processing.py, ``create_infotext``.
    """
    fields: dict[str, Any] = {
        "Steps": request.steps,
        "Sampler": request.sampler,
        "CFG scale": request.guidance_scale,
        "Seed": seed,
        "Size": f"{request.width}x{request.height}",
        "Model": request.model,
    }
    if request.effective_strength is not None:
        fields["Denoising strength"] = request.effective_strength
    fields["Version"] = _SOFTWARE
    return f"{request.prompt}\n" + ", ".join(f"{name}: {_quoted(value)}" for name, value in fields.items())


def encode(pixels: NDArray[np.uint8], encoding: Encoding) -> bytes:
    """pixels: (H, W, 3) uint8 RGB."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    buffer = io.BytesIO()
    image.save(buffer, **_options(encoding))
    return buffer.getvalue()


def _options(encoding: Encoding) -> dict[str, Any]:
    if encoding.format == "png":
        return {"format": "PNG", "compress_level": _PNG_LEVEL, "pnginfo": _png_text(encoding)}
    quality = encoding.compression
    if quality is None:
        quality = _DEFAULT_QUALITY[encoding.format]
    options: dict[str, Any] = {"quality": quality, "exif": _exif(encoding)}
    if encoding.format == "jpeg":
        return {"format": "JPEG", **options}
    return {"format": "WEBP", "method": 0, **options}


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def _png_text(encoding: Encoding) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text(INFOTEXT_KEYWORD, encoding.infotext)
    info.add_text(JSON_KEYWORD, encoding.parameters)
    info.add_text("Software", _SOFTWARE)
    return info


def _exif(encoding: Encoding) -> Image.Exif:
    exif = Image.Exif()
    exif[_EXIF_IMAGE_DESCRIPTION] = encoding.parameters
    exif.get_ifd(_EXIF_IFD)[_EXIF_USER_COMMENT] = b"UNICODE\0" + encoding.infotext.encode("utf-16-be")
    exif[_EXIF_SOFTWARE] = _SOFTWARE
    return exif
