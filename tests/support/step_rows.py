"""Random rows for step graphs of the toy's shapes, and the manifest entry that describes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.manifest import (
    CLEAN_ESTIMATE,
    COEFFICIENTS,
    CONDITION,
    GUIDANCE,
    KNOWN,
    LATENT,
    MASK,
    NEXT_LATENT,
    NOISE,
    TIMESTEP,
    GraphSpec,
    Parity,
    TensorSpec,
)

LATENT_PX = 8
WIDTH = 16
_IMAGE = (-1, 1, LATENT_PX, LATENT_PX)
INPUTS: dict[str, tuple[int, ...]] = {
    LATENT: _IMAGE,
    TIMESTEP: (-1,),
    GUIDANCE: (-1,),
    CONDITION: (-1, 1, WIDTH),
    COEFFICIENTS: (-1, 9),
    NOISE: _IMAGE,
    KNOWN: _IMAGE,
    MASK: _IMAGE,
}
OUTPUTS = (NEXT_LATENT, CLEAN_ESTIMATE)


def step_spec(file: Path) -> GraphSpec:
    """The manifest entry of a step graph with latents (1, 8, 8) and conditions (1, 16)."""
    return GraphSpec(
        file=file.name,
        inputs=tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in INPUTS.items()),
        outputs=tuple(TensorSpec(name=name, dtype="float32", shape=_IMAGE) for name in OUTPUTS),
        parity=Parity(reference="none", max_abs_error=0, mean_abs_error=0, rows=0),
    )


def random_rows(batch: int, seed: int) -> dict[str, NDArray[Any]]:
    """Inputs of such a graph: timesteps 0 … 999, w 0 … 14, soft masks, the rest normal and unclipped."""
    rng = np.random.default_rng(seed)
    rows = {name: rng.standard_normal((batch, *shape[1:]), dtype=np.float32) for name, shape in INPUTS.items()}
    rows[TIMESTEP] = rng.integers(0, 1000, batch).astype(np.float32)
    rows[GUIDANCE] = rng.uniform(0, 14, batch).astype(np.float32)
    rows[MASK] = rng.random(rows[MASK].shape, dtype=np.float32)
    rows[COEFFICIENTS][:, 2] = 3e38
    return rows
