"""What training reads: clean rows and their conditions, addressed by update so that a resume reads the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distill_jobs.draws import Draws


@dataclass(frozen=True)
class Condition:
    """What a network is told about each row besides z_t and t.

    tokens: (B, T, D) for cross-attention; pooled: (B, P) and time_ids: (B, 6) are SDXL's added conditions, or
    None where the network takes none.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | Tensor) -> Condition:
        """The chosen rows, as a Condition."""
        return self._map(lambda part: part[rows])

    def to(self, device: torch.device | str) -> Condition:
        return self._map(lambda part: part.to(device))

    def expand(self, rows: int) -> Condition:
        """One row repeated, without a copy."""
        return self._map(lambda part: part.expand(rows, *part.shape[1:]))

    def framed_as(self, other: Condition) -> Condition:
        """These rows with the time ids of ``other``: guidance drops what is shown, never how it is framed."""
        return Condition(self.tokens, self.pooled, other.time_ids)

    def where(self, chosen: Tensor, other: Condition) -> Condition:
        """These rows where ``chosen``: (B,) bool is true, ``other``'s elsewhere."""

        def mix(here: Tensor | None, there: Tensor | None) -> Tensor | None:
            if here is None or there is None:
                return None
            return torch.where(chosen.reshape(-1, *([1] * (here.dim() - 1))), here, there)

        tokens = mix(self.tokens, other.tokens)
        assert tokens is not None
        return Condition(tokens, mix(self.pooled, other.pooled), mix(self.time_ids, other.time_ids))

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """The rows of several conditions of the same kind, in order."""

        def join(parts: Sequence[Tensor | None]) -> Tensor | None:
            present = [part for part in parts if part is not None]
            return torch.cat(present) if present else None

        return Condition(
            torch.cat([c.tokens for c in conditions]),
            join([c.pooled for c in conditions]),
            join([c.time_ids for c in conditions]),
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        pooled, time_ids = (None if part is None else change(part) for part in (self.pooled, self.time_ids))
        return Condition(change(self.tokens), pooled, time_ids)


@dataclass(frozen=True)
class Batch:
    """The data of one update.

    x: (B, C, h, w) clean images or latents; extra: (B, K, h, w) channels that the network sees beside z_t and
    that guidance never drops (an inpainting mask, 1 where the image is generated, and the masked image), or None.
    """

    x: Tensor
    condition: Condition
    extra: Tensor | None = None


class Source(Protocol):
    """A data set as training reads it. shape: (C, h, w) of x."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    def batch(self, draws: Draws, update: int, size: int) -> Batch:
        """The rows of an update: a function of its arguments alone, which makes the update the data cursor."""
        ...

    def null(self, size: int) -> Condition:
        """The empty condition, ``size`` rows of it."""
        ...
