"""Noise that belongs to the request: counter-based, per row, independent of batch companions.

Philox is keyed by the row's seed and addressed by (step, purpose), so any worker, batch or retry draws the
same bytes. Source: Salmon et al. 2011 (counter-based generators); numpy.random.Philox.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

MAX_SEED = 2**53 - 1
"""Largest seed: every integer up to it survives JSON in any language."""


class Purpose(IntEnum):
    """What a draw is for; part of its address."""

    INITIAL = 0  # starting noise, entry noise of edits, and the noise of known regions
    STEP = 1
    VAE = 2


def row_noise(seed: int, shape: tuple[int, ...], purpose: Purpose, step: int = 0) -> NDArray[np.float32]:
    """Standard normal noise of one row, ``shape`` without a batch axis.

    Raises: ValueError when the seed is outside 0 … 2^53 - 1.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be 0 … {MAX_SEED}, not {seed}")
    bits = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=np.array([0, step, purpose, 0], np.uint64))
    return np.random.Generator(bits).standard_normal(shape, dtype=np.float32)
