"""Inpainting as a data transform: random masks, and what a network sees of an image behind one.

The layout is stable-diffusion-inpainting's: latent | mask | masked latent, mask 1 where the image is generated.
Sources: Suvorov et al. 2022 (boxes and strokes); Rombach et al. 2022 (the layout).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill_jobs.data.source import Batch, Condition, Source
from distill_jobs.draws import Draw, Draws
from distill_jobs.sections import InpaintingSection
from engines.masks import HIDDEN

STROKE_POINTS = 4
NUMBERS = 2 + 2 * STROKE_POINTS
LEAST_RADIUS, RADII = 0.75, (1 / 16, 3 / 16)
"""Of a stroke: in cells, so that it always holds one; and in shorter sides."""


@dataclass(frozen=True)
class MaskedSource:
    """An image-space source whose rows come with a random mask and the image without what the mask hides."""

    source: Source
    kinds: InpaintingSection

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.source.shape

    def batch(self, draws: Draws, update: int, size: int) -> Batch:
        data = self.source.batch(draws, update, size)
        _, height, width = self.shape
        masks = random_masks(draws.uniforms(update, (size, NUMBERS), Draw.MASK), self.kinds, height, width)
        return replace(data, extra=seen_channels(data.x, masks))

    def null(self, size: int) -> Condition:
        return self.source.null(size)


def seen_channels(images: Tensor, masks: Tensor) -> Tensor:
    """(B, 1 + C, h, w): the mask, and the image in grey where the mask is 1. images: (B, C, h, w)."""
    return torch.cat([masks, torch.where(masks > 0, HIDDEN, images)], dim=1)


def random_masks(numbers: Tensor, kinds: InpaintingSection, height: int, width: int) -> Tensor:
    """(B, 1, h, w) float32 masks, each a box, a stroke or the whole image, and none empty.

    numbers: (B, NUMBERS) uniform in [0, 1), all that a mask depends on.
    """
    kind, size, at = numbers[:, 0], numbers[:, 1], numbers[:, 2:]
    boxes, strokes = _boxes(at, height, width), _strokes(at, size, height, width)
    whole = torch.ones_like(boxes)
    is_box, is_stroke = kind < kinds.boxes, (kind >= kinds.boxes) & (kind < kinds.boxes + kinds.strokes)
    chosen = torch.where(_wide(is_box), boxes, torch.where(_wide(is_stroke), strokes, whole))
    return chosen[:, None].to(torch.float32)


def half_masks(rows: int, height: int, width: int) -> Tensor:
    """(rows, 1, h, w) float32: the upper, lower, left and right half hidden in turn."""
    halves = torch.zeros(4, 1, height, width)
    halves[0, :, : height // 2] = halves[1, :, height // 2 :] = 1
    halves[2, :, :, : width // 2] = halves[3, :, :, width // 2 :] = 1
    return halves[torch.arange(rows) % 4]


def _boxes(u: Tensor, height: int, width: int) -> Tensor:
    """(B, h, w) bool: rectangles of 1 × 1 to h × w cells, wherever they fit. u: (B, at least 4)."""

    def spans(length: Tensor, place: Tensor, side: int) -> Tensor:
        cells = (length * side).floor() + 1
        first = (place * (side - cells + 1)).floor()
        at = torch.arange(side)
        return (at >= first[:, None]) & (at < (first + cells)[:, None])

    return spans(u[:, 0], u[:, 1], height)[:, :, None] & spans(u[:, 2], u[:, 3], width)[:, None, :]


def _strokes(u: Tensor, size: Tensor, height: int, width: int) -> Tensor:
    """(B, h, w) bool: cells near a line through random points. u: (B, 2·STROKE_POINTS); size: (B,)."""
    sides = torch.tensor([height, width], dtype=u.dtype)
    points = u.reshape(-1, STROKE_POINTS, 2) * sides
    low, high = (min(height, width) * radius for radius in RADII)
    radius = (low + (high - low) * size).clamp(min=LEAST_RADIUS)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cells = torch.stack([rows, columns], dim=-1).to(u.dtype) + 0.5  # (h, w, 2) centres
    near = torch.zeros(len(u), height, width, dtype=torch.bool)
    for start, end in zip(points[:, :-1].unbind(1), points[:, 1:].unbind(1), strict=True):
        along = (end - start)[:, None, None]
        offset = cells - start[:, None, None]
        share = ((offset * along).sum(-1) / along.square().sum(-1).clamp(min=1e-9)).clamp(0, 1)
        distance = (offset - share[..., None] * along).norm(dim=-1)
        near |= distance <= _wide(radius)
    return near


def _wide(values: Tensor) -> Tensor:
    """(B,) → (B, 1, 1)."""
    return values[:, None, None]
