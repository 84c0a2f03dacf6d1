"""A picture of images in labelled columns: what went in, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ENLARGE = 6
GAP_PX = 6
HEADER_PX = 24
FONT_PX = 13


def column_sheet(columns: Mapping[str, Tensor]) -> Image.Image:
    """columns: by heading, (n, 1, h, w) images in -1 … 1, the same n for all; row i shows image i of each."""
    blocks = {heading: _levels(images) for heading, images in columns.items()}
    rows, height, width = next(iter(blocks.values())).shape
    sheet = Image.new("L", (GAP_PX + len(blocks) * (width + GAP_PX), HEADER_PX + rows * (height + GAP_PX)), 255)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_PX)
    for column, (heading, images) in enumerate(blocks.items()):
        left = GAP_PX + column * (width + GAP_PX)
        draw.text((left, 5), heading, fill=0, font=font)
        for row in range(rows):
            sheet.paste(Image.fromarray(images[row]), (left, HEADER_PX + row * (height + GAP_PX)))
    return sheet


def _levels(images: Tensor) -> np.ndarray:
    """(n, H, W) uint8 of (n, 1, h, w), each pixel enlarged."""
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()[:, 0]
    return levels.repeat(ENLARGE, axis=1).repeat(ENLARGE, axis=2)
