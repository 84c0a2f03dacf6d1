"""Captioned images for inpainting networks: latents with a random mask, and the latent of what the mask leaves.

What a mask leaves is encoded as it is drawn, since the autoencoder sees the edge of the mask; so these rows cost an
encoder pass each, and read their images again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill_jobs.data.latents import LatentSource
from distill_jobs.data.masks import NUMBERS, random_masks
from distill_jobs.data.source import Batch, Condition
from distill_jobs.draws import Draw, Draws
from distill_jobs.sections import InpaintingSection
from engines.masks import HIDDEN


@dataclass(frozen=True)
class MaskedLatentSource:
    """Rows of ``source`` behind masks. encode: latents (B, C, h, w) of pixels (B, 3, H, W), on the CPU."""

    source: LatentSource
    kinds: InpaintingSection
    encode: Callable[[Tensor], Tensor]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.source.shape

    def batch(self, draws: Draws, update: int, size: int) -> Batch:
        _, height, width = self.shape
        masks = random_masks(draws.uniforms(update, (size, NUMBERS), Draw.MASK), self.kinds, height, width)
        seen = self.seen(self.pixels(draws, update, size), masks)
        return replace(self.source.batch(draws, update, size), extra=seen)

    def pixels(self, draws: Draws, update: int, size: int) -> Tensor:
        """(B, 3, H, W) the images of an update's rows, in -1 … 1."""
        return self.source.pixels(draws, update, size)

    def null(self, size: int) -> Condition:
        return self.source.null(size)

    def seen(self, pixels: Tensor, masks: Tensor) -> Tensor:
        """(B, 1 + C, h, w): the mask, and the latent of the image in grey where the mask is 1.

        pixels: (B, 3, H, W); masks: (B, 1, h, w).
        """
        hidden = masks.repeat_interleave(self.source.side_px // masks.shape[-2], dim=-2)
        hidden = hidden.repeat_interleave(self.source.side_px // masks.shape[-1], dim=-1)
        return torch.cat([masks, self.encode(torch.where(hidden > 0, HIDDEN, pixels))], dim=1)

    def blank(self) -> Tensor:
        """(1, 1 + C, h, w): what a network sees of an image that is hidden as a whole."""
        _, height, width = self.shape
        pixels = torch.zeros(1, 3, self.source.side_px, self.source.side_px)
        return self.seen(pixels, torch.ones(1, 1, height, width))
