"""Decoded pictures of a latent run beside those of its data, in the features of a local Inception or CLIP."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill_jobs.features import FeatureSpace
from distill_jobs.metrics import coverage, frechet_distance, precision_recall
from distill_jobs.pipelines.decoders import DECODED_ROWS

TEXT_AGREEMENT = "text_agreement"


@dataclass(frozen=True)
class PictureJudge:
    """What measures pictures of captions.

    real: (n, D) features of the data's images of these captions; told: (n, D) embeddings of the captions, or None
    where the space has no words; decode: (B, C, h, w) latents to (B, 3, H, W) pictures in -1 … 1.
    """

    space: FeatureSpace
    real: Tensor
    told: Tensor | None
    decode: Callable[[Tensor], Tensor]

    @classmethod
    def of(
        cls,
        space: FeatureSpace,
        samples: int,
        batches: Iterable[tuple[Tensor, list[str]]],
        decode: Callable[[Tensor], Tensor],
    ) -> PictureJudge:
        """batches: images of the data, (B, 3, H, W) in -1 … 1, with their captions, at least ``samples`` in all."""
        real, captions = [], list[str]()
        for images, own in batches:
            real.append(space.of(images))
            captions += own
        told = None if space.told is None else space.told(captions[:samples])
        return cls(space, torch.cat(real)[:samples], told, decode)

    def measure(self, latents: Tensor) -> dict[str, float]:
        """Of the pictures in latents: (n, C, h, w), one a caption; a part at a time, for pictures are large."""
        parts = torch.split(latents, DECODED_ROWS)
        features = torch.cat([self.space.of(self.decode(part)) for part in parts])
        real, drawn = self.real.numpy(), features.numpy()
        precision, recall = precision_recall(real, drawn)
        found = {
            "frechet_distance": frechet_distance(drawn, real),
            "precision": precision,
            "recall": recall,
            "coverage": coverage(real, drawn),
        }
        if self.told is not None:
            found[TEXT_AGREEMENT] = float(torch.cosine_similarity(features, self.told).mean())
        return found
