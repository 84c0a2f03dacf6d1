"""Inputs a graph could meet in service, drawn from a seed: for warming, measuring and comparing engines."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.calls import row_shape
from engines.condition import Tokenizer
from engines.framing import whole_image
from engines.guidance import weight_from_scale
from engines.manifest import (
    COEFFICIENTS,
    GRID,
    GUIDANCE,
    IMAGE,
    MASK,
    TIME_IDS,
    TIMESTEP,
    TOKENS,
    BundleManifest,
    Size,
    StudentSpec,
    TensorSpec,
)
from engines.sampler import Step


def example_inputs(
    manifest: BundleManifest, tokenizer: Tokenizer, graph: str, rows: int, seed: int = 0, size: Size | None = None
) -> dict[str, NDArray[Any]]:
    """Inputs of ``graph`` for a batch of ``rows``, of images of one size: the first, unless told otherwise.

    Steps come from the plans of the graph's students and encoders, w from the trained range, tokens from known
    prompts, masks are soft, images noise; everything else is standard normal. Row i is the same whatever ``rows``
    is.
    """
    at = size or manifest.sizes[0]
    drawn = [_row(manifest, tokenizer, graph, np.random.default_rng([seed, i]), i, at) for i in range(rows)]
    return {name: np.stack([row[name] for row in drawn]) for name in drawn[0]}


def _row(
    manifest: BundleManifest, tokenizer: Tokenizer, graph: str, rng: np.random.Generator, index: int, size: Size
) -> dict[str, NDArray[Any]]:
    plans = [(student, manifest.plan(student)) for student in manifest.students]
    plans += [(encoder, manifest.inversion(encoder)) for encoder in manifest.encoders]
    steps = [(student, step) for student, plan in plans if student.graph == graph for step in plan]
    student, step = steps[index % len(steps)] if steps else (None, None)
    inputs = manifest.graphs[graph].inputs
    return {spec.name: _value(spec, manifest, tokenizer, rng, index, size, student, step) for spec in inputs}


def _value(
    spec: TensorSpec,
    manifest: BundleManifest,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    index: int,
    size: Size,
    student: StudentSpec | None,
    step: Step | None,
) -> NDArray[Any]:
    if spec.name == TOKENS:
        known = tokenizer.known()
        return tokenizer.encode(known[index % len(known)])
    if spec.name == GUIDANCE:
        low, high = weight_from_scale(manifest.guidance.min), weight_from_scale(manifest.guidance.max)
        return np.float32(rng.uniform(low, high)) * np.ones((), np.float32)
    shape = row_shape(spec, size)
    if spec.name == IMAGE:
        return rng.integers(0, 256, shape, dtype=np.uint8)
    if spec.name == MASK:
        return rng.random(shape, dtype=np.float32)
    fixed: dict[str, Any] = {TIME_IDS: whole_image(size)}
    if step is not None and student is not None:
        fixed |= {TIMESTEP: step.timestep, COEFFICIENTS: step.row, GRID: student.grid or 0}
    if spec.name in fixed:
        return np.asarray(fixed[spec.name], np.float32)
    return rng.standard_normal(shape, dtype=np.float32)
