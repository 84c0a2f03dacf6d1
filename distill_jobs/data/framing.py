"""Encoded images to square tensors: turned upright, the shorter side resized, the middle cut out."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from distill_jobs.data.captioned import Captioned
from distill_jobs.errors import DataError

DEEP_TO_BYTE = 65535 / 255


@dataclass(frozen=True)
class Framed:
    """pixels: (3, S, S) float32 in -1 … 1; time_ids: (6,) what SDXL is told of the framing.

    time_ids: original height and width, top and left of the cut in the resized image, target height and width.
    """

    pixels: Tensor
    time_ids: Tensor


def framed(entry: Captioned, side: int) -> Framed:
    """The image of an entry, framed. Raises: DataError with its name."""
    try:
        return frame(entry.read(), side)
    except DataError as error:
        raise DataError(f"{entry.name}: {error}") from None


def frame(data: bytes, side: int) -> Framed:
    """Decode and frame an image; transparency becomes white. Raises: DataError when it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = _upright(Image.open(io.BytesIO(data)))
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombWarning,
        Image.DecompressionBombError,
    ) as error:
        raise DataError(f"not an image that can be read: {error}") from None
    width, height = image.size
    shrink = side / min(width, height)
    wide, high = max(side, round(width * shrink)), max(side, round(height * shrink))
    left, top = (wide - side) // 2, (high - side) // 2
    square = image.resize((wide, high), Image.Resampling.LANCZOS).crop((left, top, left + side, top + side))
    pixels = torch.from_numpy(np.asarray(square, np.float32)).permute(2, 0, 1) / 127.5 - 1
    return Framed(pixels.contiguous(), torch.tensor([height, width, top, left, side, side], dtype=torch.float32))


def _upright(image: Image.Image) -> Image.Image:
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I;16"):  # convert("RGB") would clip it at 255
        turned = Image.fromarray(np.round(np.asarray(turned) / DEEP_TO_BYTE).astype(np.uint8))
    if turned.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {turned.mode} have no largest value; save it with 8 or 16 bits")
    if turned.has_transparency_data:
        turned = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned)
    return turned.convert("RGB")
