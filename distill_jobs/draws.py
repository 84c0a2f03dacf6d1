"""All randomness of training, addressed by (seed, phase, update, purpose): a resumed job draws the same bytes.

There is no generator state to save: the update number is the whole cursor, of the data too.
"""

from __future__ import annotations

import zlib
from enum import IntEnum
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


class Draw(IntEnum):
    """What a draw is for; part of its address."""

    NOISE = 0
    TIME = 1
    GUIDANCE = 2
    DROPOUT = 3
    ORDER = 4


class Draws:
    """Random numbers of one training phase."""

    def __init__(self, seed: int, phase: str) -> None:
        self._key = np.array([seed, zlib.crc32(phase.encode())], np.uint64)
        self._order = lru_cache(maxsize=2)(self._permutation)

    def indices(self, update: int, batch: int, rows: int) -> Tensor:
        """(batch,) int64 data rows of this update: every epoch is a fresh permutation of all ``rows``."""
        positions = np.arange(update * batch, (update + 1) * batch)
        picked = [self._order(int(p) // rows, rows)[int(p) % rows] for p in positions]
        return torch.tensor(np.array(picked, np.int64))

    def normal(self, update: int, shape: tuple[int, ...], purpose: Draw = Draw.NOISE) -> Tensor:
        """Standard normal float32."""
        return torch.from_numpy(self._generator(update, purpose).standard_normal(shape, dtype=np.float32))

    def uniform(self, update: int, rows: int, purpose: Draw) -> Tensor:
        """(rows,) float64 in [0, 1), independent."""
        return torch.from_numpy(self._generator(update, purpose).random(rows))

    def stratified(self, update: int, rows: int, purpose: Draw) -> Tensor:
        """(rows,) float64 in [0, 1): one in each of ``rows`` equal cells, shuffled. Uniform, with less variance."""
        generator = self._generator(update, purpose)
        return torch.from_numpy((generator.permutation(rows) + generator.random(rows)) / rows)

    def _permutation(self, epoch: int, rows: int) -> np.ndarray:
        return self._generator(epoch, Draw.ORDER).permutation(rows)

    def _generator(self, update: int, purpose: Draw) -> np.random.Generator:
        counter = np.array([0, update, purpose, 0], np.uint64)
        return np.random.Generator(np.random.Philox(key=self._key, counter=counter))
