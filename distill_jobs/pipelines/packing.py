"""The condition of a latent model as the one tensor that bundles carry.

Tokens come first. Where a network takes a pooled embedding (SDXL) it follows them, zero-padded to whole rows, so
that a prompt's condition stays one array wherever it is kept, batched or sent. Time ids are no part of it: they
follow from the size of an image, and are an input of the step graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from distill_jobs.data.source import Condition
from distill_jobs.pipelines.folder import PipelineFolder


@dataclass(frozen=True)
class Packing:
    """tokens, width: of the text encoders' output; pooled: width of the pooled embedding; side_px: of images."""

    tokens: int
    width: int
    pooled: int | None
    side_px: int

    @classmethod
    def of(cls, folder: PipelineFolder) -> Packing:
        return cls(folder.tokens, folder.width, folder.pooled_width, folder.size_px)

    @property
    def rows(self) -> int:
        """Rows of a packed condition."""
        return self.tokens if self.pooled is None else self.tokens + -(-self.pooled // self.width)

    @property
    def time_ids(self) -> Tensor | None:
        """(1, 6) of a whole image: its own size, nothing cut off."""
        return None if self.pooled is None else whole_image(self.side_px)

    def pack(self, tokens: Tensor, pooled: Tensor | None = None) -> Tensor:
        """(B, rows, D) of tokens: (B, T, D) and pooled: (B, P)."""
        if pooled is None or self.pooled is None:
            return tokens
        extra = self.rows - self.tokens
        filled = pad(pooled, (0, extra * self.width - self.pooled))
        return torch.cat([tokens, filled.reshape(-1, extra, self.width)], dim=1)

    def unpack(self, packed: Tensor) -> Condition:
        """The condition in packed: (B, rows, D); of whole images of the trained size."""
        if self.pooled is None:
            return Condition(packed)
        pooled = packed[:, self.tokens :].flatten(1)[:, : self.pooled]
        time_ids = whole_image(self.side_px).to(packed.device).expand(packed.shape[0], 6)
        return Condition(packed[:, : self.tokens], pooled, time_ids)


def whole_image(side_px: int) -> Tensor:
    """(1, 6) time ids: original height and width, top and left of the cut, target height and width."""
    side = float(side_px)
    return torch.tensor([[side, side, 0.0, 0.0, side, side]])
