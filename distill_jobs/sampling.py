"""Images from a network and a plan in torch: the loop that evaluation shares with the engines' rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from distill_jobs.data.source import Condition
from distill_jobs.student import predict
from engines.guidance import combine
from engines.noise import Purpose, row_noise
from engines.sampler import SamplerPlan

SEED_STRIDE = 1_000_000
"""Sample i of an evaluation's seed s is what a request with seed s·SEED_STRIDE + i draws."""

Network = Callable[[Tensor, int, Condition], Tensor]
"""(x_t (B, C, h, w), timestep, condition) to the v-prediction, shaped as x_t."""


def request_noise(
    seeds: Sequence[int], shape: tuple[int, ...], purpose: Purpose = Purpose.INITIAL, step: int = 0
) -> Tensor:
    """(B, *shape) noise, row i being what a request with seeds[i] draws."""
    return torch.from_numpy(np.stack([row_noise(seed, shape, purpose, step) for seed in seeds]))


def sample(
    network: Network, plan: SamplerPlan, condition: Condition, seeds: Sequence[int], shape: tuple[int, ...]
) -> Tensor:
    """(B, *shape) float32 results of a plan from the noise of ``seeds``; a pipeline gives the same.

    shape: (C, h, w) of one row.
    """
    x_t = request_noise(seeds, shape)
    with torch.inference_mode():
        for position, step in enumerate(plan):
            noise = request_noise(seeds, shape, Purpose.STEP, position) if step.stochastic else 0.0
            x_t, _ = step.apply(x_t, network(x_t, step.timestep, condition), noise)
    return x_t


def student_network(student: UNet2DConditionModel, w: float, seen: Tensor | None = None) -> Network:
    """A student at guidance weight w: one evaluation a step. seen: (B or 1, K, h, w) its further input channels."""

    def network(x_t: Tensor, timestep: int, condition: Condition) -> Tensor:
        weights = torch.full((len(x_t),), w, device=x_t.device)
        return predict(student, x_t, _timesteps(x_t, timestep), condition, weights, _rows(seen, x_t))

    return network


def guided_networks(
    conditional: UNet2DConditionModel,
    unconditional: UNet2DConditionModel,
    null: Condition,
    w: float,
    seen: Tensor | None = None,
    off: Collection[int] = (),
) -> Network:
    """Classifier-free guidance at sampling: two evaluations a step, the second spared where it counts nothing.

    A teacher is both networks. null: the empty condition, one row, framed as each row's own condition is; seen:
    (B or 1, K, h, w) further input channels, which are never dropped. off: timesteps without guidance.
    """

    def network(x_t: Tensor, timestep: int, condition: Condition) -> Tensor:
        at, extra = _timesteps(x_t, timestep), _rows(seen, x_t)
        guided = predict(conditional, x_t, at, condition, extra=extra)
        if w == 0 or timestep in off:
            return guided
        empty = null.expand(len(condition)).framed_as(condition)
        return torch.as_tensor(combine(guided, predict(unconditional, x_t, at, empty, extra=extra), w))

    return network


def _rows(seen: Tensor | None, x_t: Tensor) -> Tensor | None:
    """One row of channels for each of x_t."""
    return None if seen is None else seen.expand(len(x_t), *seen.shape[1:])


def _timesteps(x_t: Tensor, timestep: int) -> Tensor:
    return torch.full((len(x_t),), float(timestep), device=x_t.device)
