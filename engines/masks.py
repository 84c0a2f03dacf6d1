"""A mask on its way through inpainting: pixels to latent cells, and known pixels back over the result."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engines.manifest import Size

Pixels = NDArray[np.uint8]
Generated = NDArray[np.bool_]
"""(H, W), True where the image is generated."""

HIDDEN_LEVEL = 128
"""Grey level that a network for inpainting sees where the image is to be generated."""

HIDDEN = HIDDEN_LEVEL / 127.5 - 1
"""The same in an image-space latent."""

FEATHER = 1 / 128
"""Width of the blend inside a mask's edge, in shorter sides of the image; at least one pixel."""


def latent_mask(generated: Generated, size: Size) -> NDArray[np.float32]:
    """(1, h, w) for the step graph: 1 in every cell any of whose pixels is generated."""
    rows, columns = size.height // size.latent_height, size.width // size.latent_width
    cells = generated.reshape(size.latent_height, rows, size.latent_width, columns)
    return np.asarray(np.any(cells, axis=(1, 3)), np.float32)[None]


def hide(known: Pixels, generated: Generated, size: Size) -> Pixels:
    """The image (H, W, 3) with every cell that is generated painted in HIDDEN_LEVEL, the known part of it too."""
    rows, columns = size.height // size.latent_height, size.width // size.latent_width
    cells = latent_mask(generated, size)[0] > 0
    painted = cells.repeat(rows, axis=0).repeat(columns, axis=1)
    return np.where(painted[..., None], np.uint8(HIDDEN_LEVEL), known)


def blank(size: Size) -> Pixels:
    """The image (H, W, 3) of which nothing is known."""
    return np.full((size.height, size.width, 3), HIDDEN_LEVEL, np.uint8)


def paste_known(drawn: Pixels, known: Pixels, generated: Generated) -> Pixels:
    """The image (H, W, 3): known pixels exactly as they are outside the mask, blended in just inside its edge."""
    weight = _feathered(generated)[..., None]
    mixed = np.rint(weight * drawn + (1 - weight) * known).astype(np.uint8)
    return np.where(generated[..., None], mixed, known)


def _feathered(generated: Generated) -> NDArray[np.float32]:
    """(H, W) share of the drawn image: 0 outside the mask, rising to 1 over the feather's width inside it."""
    width = max(1, round(FEATHER * min(generated.shape)))
    inside, layers = generated, generated.astype(np.float32)
    for _ in range(width):
        inside = _eroded(inside)
        layers += inside
    return layers / np.float32(width + 1)


def _eroded(inside: Generated) -> Generated:
    """What is left when every pixel beside one outside leaves; the image's border is no edge."""
    padded = np.pad(inside, 1, mode="edge")
    height, width = inside.shape
    kept = inside.copy()
    for dy in range(3):
        for dx in range(3):
            kept &= padded[dy : dy + height, dx : dx + width]
    return kept
