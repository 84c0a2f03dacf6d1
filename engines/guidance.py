"""The one place where the public guidance_scale meets the paper's guidance weight.

Public: ``guidance_scale`` s, with s = 1 meaning guidance off (diffusers, and everywhere users look).
Inside graphs and formulas: w = s - 1 >= 0.
Source: Ho & Salimans 2022; Meng et al. 2023, eq. 3 (x_w = (1 + w) x_c - w x_null).
"""

from __future__ import annotations

from typing import Any

Array = Any  # numpy or torch: plain operators serve both


def weight_from_scale(guidance_scale: float) -> float:
    """w for a public guidance_scale."""
    return guidance_scale - 1.0


def combine(conditional: Array, unconditional: Array, w: Array) -> Array:
    """Guided prediction (1 + w)·conditional - w·unconditional.

    The weights sum to one, so the same combination holds for x-, epsilon- and v-predictions.
    conditional, unconditional: (B, ...), same shape; w: a float or broadcastable to it.
    """
    return conditional + w * (conditional - unconditional)
