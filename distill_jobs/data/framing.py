"""Encoded images to square tensors: turned upright, the shorter side resized, the middle cut out."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from distill_jobs.data.captioned import Captioned
from distill_jobs.errors import DataError

DEEP_TO_BYTE = 65535 / 255
MOST_PIXELS = 89_478_485
"""Of an image as it comes and as it is resized: what Pillow warns of, which a process may have changed."""
THREADS = min(8, os.cpu_count() or 1)
"""At once: decoding and resizing let other threads run."""


@dataclass(frozen=True)
class Framed:
    """pixels: (3, S, S) float32 in -1 … 1; time_ids: (6,) what SDXL is told of the framing.

    time_ids: original height and width, top and left of the cut in the resized image, target height and width.
    """

    pixels: Tensor
    time_ids: Tensor


def pixels_of(entries: Sequence[Captioned], side: int) -> Tensor:
    """(B, 3, S, S) the images of entries, framed. Raises: DataError with the name of one that cannot be read."""
    [found] = framed_batches(entries, side, len(entries))
    for each in found:
        if isinstance(each, DataError):
            raise each
    return torch.stack([each.pixels for each in found if isinstance(each, Framed)])


def framed_batches(entries: Sequence[Captioned], side: int, rows: int) -> Iterator[list[Framed | DataError]]:
    """The image of each entry, framed, or why there is none; ``rows`` at a time.

    The next batch is decoded while the caller has one, and no more than that is held.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        begun = (
            pool.map(partial(_framed_or_error, side=side), entries[first : first + rows])
            for first in range(0, len(entries), rows)
        )
        coming = next(begun, None)
        while (batch := coming) is not None:
            coming = next(begun, None)
            yield list(batch)


def _framed_or_error(entry: Captioned, side: int) -> Framed | DataError:
    try:
        return framed(entry, side)
    except DataError as error:
        return error


def framed(entry: Captioned, side: int) -> Framed:
    """The image of an entry, framed. Raises: DataError with its name."""
    try:
        return frame(entry.read(), side)
    except DataError as error:
        raise DataError(f"{entry.name}: {error}") from None


def frame(data: bytes, side: int) -> Framed:
    """Decode and frame an image; transparency becomes white. Raises: DataError when it cannot be read."""
    try:
        opened = Image.open(io.BytesIO(data))
        if opened.width * opened.height > MOST_PIXELS:
            raise DataError(f"an image of {opened.width} × {opened.height} pixels; scale it down")
        image = _upright(opened)
    except UnidentifiedImageError:  # whose message is of the buffer
        raise DataError("not an image that can be read: it has no format that is known") from None
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
    if wide * high > MOST_PIXELS:
        raise DataError(f"an image of {width} × {height} pixels, too narrow for a square of {side}; cut it")
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
