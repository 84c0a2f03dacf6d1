"""Images as callers send them, good and bad."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

SIZE = (64, 64)


def photo(size: tuple[int, int] = SIZE, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth random colours: nothing that a resize or JPEG would destroy."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def mask_file(box: tuple[int, int, int, int] = (16, 16, 40, 48), size: tuple[int, int] = SIZE) -> bytes:
    """OpenAI's mask: transparent inside box (left, top, right, bottom)."""
    mask = Image.new("RGBA", size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), box)
    return file_of(mask)


def png_claiming(width: int, height: int) -> bytes:
    """A valid header of that size, and hardly any pixels."""
    return _png(width, height, 8, 2, b"\0")


def black_png(depth: int, colour: int) -> bytes:
    """A PNG of this many bits a channel. colour: 0 grey, 2 RGB."""
    width, height = SIZE
    row_bytes = 1 + width * depth * (1 + colour) // 8
    return _png(width, height, depth, colour, bytes(height * row_bytes))


def with_chunk(png: bytes, kind: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    return png[:33] + _chunk(kind, data) + png[33:]


def jpeg_of_scans(count: int) -> bytes:
    """A progressive JPEG that decodes, its last scan so often that there are ``count``."""
    jpeg = file_of(photo(), "JPEG", progressive=True)
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + last * (count - jpeg.count(b"\xff\xda")) + jpeg[-2:]


def _png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
