"""Captioned images as training reads them: cached latents, with the autoencoder's noise drawn afresh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from distill_jobs.data.captioned import Captioned
from distill_jobs.data.framing import pixels_of
from distill_jobs.data.latent_cache import LatentCache
from distill_jobs.data.source import Batch, Condition
from distill_jobs.draws import Draw, Draws
from distill_jobs.pipelines.vae import Encoded


@dataclass(frozen=True)
class LatentSource:
    """Rows of a cache: every epoch a fresh permutation of all images.

    entries: the images that the cache was made of, and perhaps could not read all of; side_px: of framed ones.
    """

    cache: LatentCache
    shape: tuple[int, int, int]
    entries: Sequence[Captioned]
    side_px: int

    def batch(self, draws: Draws, update: int, size: int) -> Batch:
        def read(update: int) -> tuple[Encoded, Condition]:
            return self.cache.rows(draws.indices(update, size, len(self.cache)))

        encoded, condition = draws.ahead(update, f"{size} rows", read)
        noise = draws.normal(update, tuple(encoded.mean.shape), Draw.LATENT)
        return Batch(encoded.sample(noise), condition)

    def means(self, draws: Draws, update: int, size: int) -> Tensor:
        """(B, C, h, w) the latents of an update's rows without the autoencoder's noise."""
        encoded, _ = self.cache.rows(draws.indices(update, size, len(self.cache)))
        return encoded.mean

    def pixels(self, draws: Draws, update: int, size: int) -> Tensor:
        """(B, 3, H, W) the images of an update's rows, in -1 … 1."""
        picked = self.cache.images(draws.indices(update, size, len(self.cache)))
        return pixels_of([self.entries[index] for index in picked], self.side_px)

    def captions(self, draws: Draws, update: int, size: int) -> list[str]:
        """Those of an update's rows."""
        picked = self.cache.images(draws.indices(update, size, len(self.cache)))
        return [self.entries[index].caption for index in picked]

    def null(self, size: int) -> Condition:
        return self.cache.null.expand(size)
