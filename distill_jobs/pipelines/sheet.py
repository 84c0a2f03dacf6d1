"""Contact sheets of coloured pictures, to be looked at."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP_PX = 4
LABEL_PX, LABEL_FONT_PX = 16, 11
CELLS = 4
"""Prompts side by side on a sheet of prompts."""


def levels(pictures: Tensor) -> NDArray[np.uint8]:
    """(n, H, W, 3) grey levels of (n, 3, H, W) pictures in -1 … 1."""
    rounded = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return np.asarray(rounded.permute(0, 2, 3, 1))


def contact_sheet(rows: Sequence[Tensor]) -> Image.Image:
    """Rows of pictures, each (n, 3, S, S) in -1 … 1."""
    step, columns = rows[0].shape[-1] + GAP_PX, max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * step, len(rows) * step), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(levels(row)):
            sheet.paste(Image.fromarray(picture), (x * step, y * step))
    return sheet


def prompt_sheet(prompts: Sequence[str], titles: Sequence[str], drawn: Sequence[Tensor]) -> Image.Image:
    """For each prompt its words, and below them what each model drew of it.

    titles: of the models, written above every column; drawn: of each model (prompts, 3, S, S) in -1 … 1.
    """
    side, font = drawn[0].shape[-1], ImageFont.load_default(LABEL_FONT_PX)
    wide, high = len(drawn) * (side + GAP_PX) + 3 * GAP_PX, side + LABEL_PX + GAP_PX
    top = 2 * LABEL_PX
    size = (min(CELLS, len(prompts)) * wide, top + -(-len(prompts) // CELLS) * high)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column in range(min(CELLS, len(prompts))):
        for place, title in enumerate(titles):
            told = title.replace(", ", ",\n", 1)
            draw.text((column * wide + place * (side + GAP_PX), 0), told, fill="gray", font=font, spacing=0)
    of_models = [levels(pictures) for pictures in drawn]
    for index, prompt in enumerate(prompts):
        x, y = index % CELLS * wide, top + index // CELLS * high
        draw.text((x, y), _fitting(prompt, font, wide - 3 * GAP_PX), fill="black", font=font)
        for place, pictures in enumerate(of_models):
            sheet.paste(Image.fromarray(pictures[index]), (x + place * (side + GAP_PX), y + LABEL_PX))
    return sheet


def _fitting(words: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """As much of the words as fits, without accents: Pillow's own font has none."""
    words = unicodedata.normalize("NFKD", words).encode("ascii", "ignore").decode()
    if font.getlength(words) <= width:
        return words
    while words and font.getlength(f"{words}…") > width:
        words = words[:-1]
    return f"{words}…"
