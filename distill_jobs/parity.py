"""The proof that an exported graph computes what its module does: rows for it, and the comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill_jobs.graphs import StepGraph
from distill_jobs.half_weights import round_weights, rounding
from distill_jobs.lowered import lowered_parity
from distill_jobs.onnx_export import ExportError, check_parity, reference_outputs, write_graph
from distill_jobs.sections import StoredWeights
from distill_jobs.sizes import BundleSizes, Shape
from engines.guidance import weight_from_scale
from engines.manifest import (
    COEFFICIENTS,
    CONDITION,
    GRID,
    GUIDANCE,
    KNOWN,
    LATENT,
    MASK,
    MASKED,
    NOISE,
    TIME_IDS,
    TIMESTEP,
    GraphSpec,
    GuidanceRange,
    Lowered,
    Parity,
    TensorSpec,
)
from engines.sampler import SamplerPlan

STEP_LIMIT = 1e-4
IN_FLOAT32 = "keep weights in float32: export.weights of the recipe, --weights of an import"
PARITY_BATCHES = (1, 3, 8, 20)
PARITY_ROWS = sum(PARITY_BATCHES)
FEW_BATCHES = (1, 2)
LOWERED: tuple[Lowered, ...] = ("bfloat16", "float16")
LOWERED_ROWS = 2
PATCH = 8
"""Positions along a side of what is flat in the latents that are decoded."""
LARGE_LATENT = 64 * 64
"""Positions from which a row takes gigabytes and a minute, so that few are checked: those of 512² images."""


def parity_rows(
    plan: SamplerPlan, guidance: GuidanceRange, shape: tuple[int, int, int], conditions: Tensor
) -> list[Tensor]:
    """Random inputs of a step graph, in its order: the plan's steps in turn, w over the whole range.

    conditions: one a row. Every second row is inpainted under a random mask.
    """
    rows = len(conditions)
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn((rows, *shape), generator=generator)

    steps = [plan.steps[i % len(plan)] for i in range(rows)]
    low, high = weight_from_scale(guidance.min), weight_from_scale(guidance.max)
    mask = torch.randint(0, 2, (rows, 1, *shape[1:]), generator=generator).float()
    mask[::2] = 1
    return [
        normal(),
        torch.tensor([float(step.timestep) for step in steps]),
        torch.linspace(low, high, rows)[torch.randperm(rows, generator=generator)],
        conditions,
        torch.stack([torch.tensor(step.row) for step in steps]),
        normal(),
        normal(),
        mask,
    ]


def shared_parity_rows(
    plans: Sequence[SamplerPlan], guidance: GuidanceRange, shape: tuple[int, int, int], conditions: Tensor
) -> list[Tensor]:
    """Random inputs of one step graph that serves several plans, mixed in every batch; step counts are the last."""
    each = [parity_rows(plan, guidance, shape, conditions) for plan in plans]
    chosen = [divmod(i, len(plans)) for i in range(len(conditions))]
    mixed = [torch.stack([of_plans[which][at] for at, which in chosen]) for of_plans in zip(*each, strict=True)]
    return [*mixed, torch.tensor([float(len(plans[which])) for _, which in chosen])]


def step_rows(
    step: StepGraph,
    plans: Sequence[SamplerPlan],
    guidance: GuidanceRange,
    conditions: Tensor,
    shape: Shape,
    scale: int,
) -> list[Tensor]:
    """Random inputs of a step graph that serves these plans, in its order; scale: pixels a position of a latent."""
    latent, timestep, w, told, coefficients, noise, known, mask, grid = shared_parity_rows(
        plans, guidance, shape, conditions
    )
    high, wide = float(shape[1] * scale), float(shape[2] * scale)
    columns = {
        LATENT: latent,
        TIMESTEP: timestep,
        GUIDANCE: w,
        CONDITION: told,
        COEFFICIENTS: coefficients,
        NOISE: noise,
        KNOWN: known,
        MASKED: known,
        MASK: mask,
        TIME_IDS: torch.tensor([[high, wide, 0.0, 0.0, high, wide]]).repeat(len(latent), 1),
        GRID: grid,
    }
    return [columns[name] for name in step.names]


def parity_batches(height: int, width: int) -> tuple[int, ...]:
    """Batch sizes of the comparison, for graphs of latents of this size."""
    return PARITY_BATCHES if height * width < LARGE_LATENT else FEW_BATCHES


def write_checked(
    module: nn.Module,
    rows: list[Tensor],
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    path: Path,
    limit: float,
    batches: tuple[int, ...] = PARITY_BATCHES,
    traced: list[Tensor] | None = None,
    weights: StoredWeights = "float32",
) -> GraphSpec:
    """One graph on disk and its description.

    rows: at least sum(batches); limit: of absolute error; traced: what to trace it with, at least two rows, the
    first of ``rows`` unless given. weights: what the file keeps them in; float16 rounds those of ``module`` first.
    Raises: ExportError when the file disagrees with the module, or rounding changes what it computes.
    """
    rows = [tensor[: sum(batches)] for tensor in rows]
    expected = reference_outputs(module, rows, path.stem)
    rounded = None
    if weights == "float16":
        exact, expected = expected, _rounded(module, rows, path.stem)
        rounded = _moved(exact, expected, path.stem)
    write_graph(module, [tensor[:2] for tensor in traced or rows], inputs, outputs, path, weights)
    parity = check_parity(expected, path, rows, batches, limit)
    lowered = _in_fewer_bits(module, rows, expected)
    return GraphSpec(
        file=path.name, inputs=inputs, outputs=outputs, parity=parity, lowered=lowered, rounded=rounded
    )


def _rounded(module: nn.Module, rows: Sequence[Tensor], name: str) -> list[NDArray[np.float64]]:
    """What the module computes after its weights were rounded to float16."""
    try:
        round_weights(module)
    except OverflowError as error:
        raise ExportError(f"{name}: {error}; {IN_FLOAT32}") from None
    return reference_outputs(module, rows, name)


def _moved(exact: Sequence[NDArray[np.float64]], rounded: Sequence[NDArray[np.float64]], name: str) -> Parity:
    try:
        return rounding(exact, rounded, "the same module, its weights in float32")
    except ArithmeticError as error:
        raise ExportError(f"{name}: {error}; {IN_FLOAT32}") from None


def _in_fewer_bits(
    module: nn.Module, rows: list[Tensor], expected: Sequence[NDArray[np.float64]]
) -> dict[Lowered, Parity | None]:
    few, wanted = [tensor[:LOWERED_ROWS] for tensor in rows], [output[:LOWERED_ROWS] for output in expected]
    return {dtype: lowered_parity(module, few, wanted, dtype) for dtype in LOWERED}


def write_at_sizes(
    module: nn.Module,
    rows_of: Callable[[Shape], list[Tensor]],
    sizes: BundleSizes,
    specs: tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]],
    path: Path,
    limit: float,
    weights: StoredWeights = "float32",
) -> GraphSpec:
    """One graph of all sizes on disk, proved at each.

    rows_of: its rows for latents (C, h, w), as many as ``write_checked`` wants. specs: inputs and outputs; weights:
    as there.
    """
    traced = None if sizes.traced is None else rows_of(sizes.traced)
    first, *others = sizes.sizes
    batches = parity_batches(first.latent_height, first.latent_width)
    spec = write_checked(module, rows_of(sizes.shape(first)), *specs, path, limit, batches, traced, weights)
    if not others:
        return spec
    found, lowered = {str(first): spec.parity}, [spec.lowered]
    for size in others:
        batches = parity_batches(size.latent_height, size.latent_width)
        rows = [tensor[: sum(batches)] for tensor in rows_of(sizes.shape(size))]
        expected = reference_outputs(module, rows, path.stem)
        found[str(size)] = check_parity(expected, path, rows, batches, limit)
        lowered.append(_in_fewer_bits(module, rows, expected))
    return spec.model_copy(
        update={
            "parity": _of_all(list(found.values())),
            "parity_by_size": found,
            "lowered": {dtype: _unless_it_overflows([each[dtype] for each in lowered]) for dtype in LOWERED},
        }
    )


def _unless_it_overflows(each: Sequence[Parity | None]) -> Parity | None:
    """Of all sizes; None where it does at one."""
    finite = [parity for parity in each if parity is not None]
    return _of_all(finite) if len(finite) == len(each) else None


def _of_all(each: Sequence[Parity]) -> Parity:
    rows = sum(parity.rows for parity in each)
    return Parity(
        reference=each[0].reference,
        max_abs_error=max(parity.max_abs_error for parity in each),
        mean_abs_error=sum(parity.rows * parity.mean_abs_error for parity in each) / rows,
        rows=rows,
    )


def parity_latents(rows: int, shape: tuple[int, int, int]) -> Tensor:
    """(rows, C, h, w) latents that reach beyond -1 … 1, for the decode graph: noise and flat patches by turns.

    Of noise the terms of a convolution mostly cancel; of patches, which pictures have, they add up, and overflow a
    narrow type first. Nothing after the graph would see it: its pixels are whole numbers whatever they came of.
    """
    latents = torch.randn((rows, *shape), generator=torch.Generator().manual_seed(1))
    _, height, width = shape
    patches = latents[1::2, :, ::PATCH, ::PATCH].repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    latents[1::2] = patches[:, :, :height, :width]
    return latents


def parity_images(rows: int, shape: tuple[int, ...]) -> Tensor:
    """(rows, H, W, 3) uint8 images, for the encode graph. shape: (H, W, 3)."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (rows, *shape), generator=generator, dtype=torch.uint8)
