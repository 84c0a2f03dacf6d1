"""Glyphs without a font: patterns of blocks, each in a plain colour."""

from __future__ import annotations

import numpy as np
from PIL import Image

from distill_jobs.data.glyphs import EmojiName, Glyph

SHADES = {"cherry": (200, 20, 20), "lemon": (240, 210, 30), "leaf": (30, 160, 50), "sky": (30, 110, 220)}
BLOCKS, BLOCK_PX = 5, 20


def glyph(
    name: str, shade: tuple[int, int, int], *, group: str = "Food", subgroup: str = "food-fruit", pattern: int = 0
) -> Glyph:
    """pattern: which blocks are drawn; the corners always are."""
    drawn = np.random.default_rng(pattern).random((BLOCKS, BLOCKS)) < 0.5
    drawn[:: BLOCKS - 1, :: BLOCKS - 1] = True
    alpha = np.kron(drawn, np.ones((BLOCK_PX, BLOCK_PX))).astype(np.uint8) * 255
    picture = Image.new("RGBA", (BLOCKS * BLOCK_PX, BLOCKS * BLOCK_PX), (*shade, 255))
    picture.putalpha(Image.fromarray(alpha))
    return Glyph(EmojiName(name, name, group, subgroup), picture)


def glyphs(count: int) -> tuple[Glyph, ...]:
    """``count`` of them, each with its own name and pattern."""
    shades = list(SHADES.items())
    chosen = [shades[index % len(shades)] for index in range(count)]
    return tuple(glyph(f"{word} {index}", shade, pattern=index) for index, (word, shade) in enumerate(chosen))
