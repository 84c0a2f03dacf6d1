"""Pixels to PNG, JPEG or WebP files that carry the parameters they were made with.

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

PNG_KEYWORD = "parameters"
_EXIF_IMAGE_DESCRIPTION = 0x010E
_EXIF_SOFTWARE = 0x0131
_SOFTWARE = "halfstep"
_DEFAULT_QUALITY = {"jpeg": 95, "webp": 90}
_PNG_LEVEL = 1


@dataclass(frozen=True)
class Encoding:
    """How to write a file. parameters: JSON text stored in it. compression: 0 … 100, None for the default.

    JPEG and WebP take compression as their quality, 100 the best, as OpenAI counts it. PNG loses nothing at
    any value, so there it is refused earlier.
    """

    format: OutputFormat
    compression: int | None
    parameters: str


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
    return Encoding(request.output_format, request.output_compression, text)


def encode(pixels: NDArray[np.uint8], encoding: Encoding) -> bytes:
    """pixels: (H, W, 3) uint8 RGB."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    buffer = io.BytesIO()
    image.save(buffer, **_options(encoding))
    return buffer.getvalue()


def _options(encoding: Encoding) -> dict[str, Any]:
    if encoding.format == "png":
        return {"format": "PNG", "compress_level": _PNG_LEVEL, "pnginfo": _png_text(encoding.parameters)}
    quality = encoding.compression
    if quality is None:
        quality = _DEFAULT_QUALITY[encoding.format]
    options: dict[str, Any] = {"quality": quality, "exif": _exif(encoding.parameters)}
    if encoding.format == "jpeg":
        return {"format": "JPEG", **options}
    return {"format": "WEBP", "method": 0, **options}


def _png_text(parameters: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text(PNG_KEYWORD, parameters)
    info.add_text("Software", _SOFTWARE)
    return info


def _exif(parameters: str) -> Image.Exif:
    exif = Image.Exif()
    exif[_EXIF_IMAGE_DESCRIPTION] = parameters
    exif[_EXIF_SOFTWARE] = _SOFTWARE
    return exif
