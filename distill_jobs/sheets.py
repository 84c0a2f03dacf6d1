"""Contact sheets: teacher and student side by side on the same noise, one sheet per step count."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distill_jobs.contenders import TEACHER, Contender
from distill_jobs.data.digits import CLASSES, class_condition
from distill_jobs.recipe import Recipe

CELL_COLUMNS = 5
ENLARGE = 6
GAP_PX = 12
LABEL_PX = 150
HEADER_PX = 28
FONT_PX = 14


def write_sheets(folder: Path, recipe: Recipe, everyone: Sequence[Contender]) -> None:
    """One PNG per student: rows reference teacher, teacher at the same steps, student; columns its guidance.

    everyone: the contenders, the reference first. A cell shows one image of every class; the noise of a
    class is the same in every cell.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[tuple[Contender, tuple[float, ...]], list[Tensor]] = {}
    for student in (c for c in everyone if c.exported):
        twins = [c for c in everyone if c.title == TEACHER and c.steps == student.steps]
        shown = list(dict.fromkeys([everyone[0], *twins, student]))
        scales = student.scales_of(recipe.evaluation)
        for contender in shown:
            if (contender, scales) not in drawn:
                drawn[contender, scales] = _images(contender, recipe, scales)
        labels = [f"{c.title}, {c.steps} step{'s' if c.steps > 1 else ''}" for c in shown]
        sheet = compose_sheet([drawn[c, scales] for c in shown], labels, scales)
        sheet.save(folder / f"{f'{student.name}_' if student.name else ''}steps_{student.steps}.png")


def compose_sheet(rows: Sequence[Sequence[Tensor]], labels: Sequence[str], scales: Sequence[float]) -> Image.Image:
    """A labelled sheet. rows: for each label, one (n, 1, h, w) block of images in -1 … 1 for each scale."""
    blocks = [[_block(cell) for cell in row] for row in rows]
    height, width = blocks[0][0].shape
    size = (LABEL_PX + len(scales) * (width + GAP_PX), HEADER_PX + len(labels) * (height + GAP_PX))
    sheet = Image.new("L", size, 255)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_PX)
    for column, scale in enumerate(scales):
        draw.text((LABEL_PX + column * (width + GAP_PX), 6), f"guidance {scale:g}", fill=0, font=font)
    for row, label in enumerate(labels):
        top = HEADER_PX + row * (height + GAP_PX)
        draw.text((8, top + height // 2 - FONT_PX // 2), label, fill=0, font=font)
        for column, block in enumerate(blocks[row]):
            sheet.paste(Image.fromarray(block), (LABEL_PX + column * (width + GAP_PX), top))
    return sheet


def _images(contender: Contender, recipe: Recipe, scales: Sequence[float]) -> list[Tensor]:
    """One image of every class, (10, C, h, w), for each guidance; seeds 0 … 9."""
    unet, condition = contender.load(), class_condition(torch.arange(CLASSES))
    return [contender.draw(contender.network(unet, scale), recipe, condition, range(CLASSES)) for scale in scales]


def _block(images: Tensor) -> NDArray[np.uint8]:
    """(H, W) grey levels of (n, 1, h, w) images, CELL_COLUMNS a row with a line between, each pixel enlarged."""
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()[:, 0]
    levels = np.pad(levels, ((0, 0), (0, 1), (0, 1)), constant_values=255)
    n, height, width = levels.shape
    grid = levels.reshape(n // CELL_COLUMNS, CELL_COLUMNS, height, width).transpose(0, 2, 1, 3)
    flat = grid.reshape(n // CELL_COLUMNS * height, CELL_COLUMNS * width)
    return flat.repeat(ENLARGE, axis=0).repeat(ENLARGE, axis=1)
