"""Contact sheets of coloured pictures, to be looked at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

GAP_PX = 4


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
