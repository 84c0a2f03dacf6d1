"""Consistency: one network that maps every point of a teacher's path to where it ends, guidance kept an input.

x̂ = alpha·z - sigma·v is z itself at the clean end, so a v-network is a consistency model with no further scaling.
Each point's target is the network's own weight average at the next point of the grid, where the teacher's step
leads; the last point's is what that step gives.
Sources: Song et al. 2023 (consistency distillation); Song & Dhariwal 2023 (pseudo-Huber); Luo et al. 2023 (guided,
skipping points: LCM); Lu & Song 2024 (the parametrisation).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill_jobs.objectives import Noisy, Tables, float32, wide
from distill_jobs.student import predict
from engines.sampler import deterministic_step
from engines.schedule import NoiseSchedule


@dataclass(frozen=True)
class ConsistencyTables:
    """Coefficients by grid point i - 1, each (N,).

    t: table index of point i; alpha, sigma: there; a, d: the teacher's step to point i - 1; next_t, next_alpha,
    next_sigma: there, where the last is 1, 0 at any index: at the clean end nothing is left to predict.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    a: Tensor
    d: Tensor
    next_t: Tensor
    next_alpha: Tensor
    next_sigma: Tensor

    @classmethod
    def of(cls, schedule: NoiseSchedule, points: int, device: torch.device | None = None) -> ConsistencyTables:
        grid = schedule.grid(points)
        steps = [deterministic_step(schedule, grid[i], grid[i - 1]).coefficients for i in range(1, points + 1)]
        noise = [schedule.at(index) for index in grid]
        alpha, sigma = (float32([level[k] for level in noise]).to(device) for k in range(2))
        index = torch.tensor([max(k, 0) for k in grid], device=device)
        return cls(
            t=index[1:],
            alpha=alpha[1:],
            sigma=sigma[1:],
            a=float32([k.a for k in steps]).to(device),
            d=float32([k.d for k in steps]).to(device),
            next_t=index[:-1],
            next_alpha=alpha[:-1],
            next_sigma=sigma[:-1],
        )


def consistency_loss(
    student: nn.Module,
    average: nn.Module,
    teacher: nn.Module,
    tables: Tables,
    consistency: ConsistencyTables,
    rows: Noisy,
    point: Tensor,
    w: Tensor,
    huber: float,
) -> Tensor:
    """(B,) pseudo-Huber distance of the student's clean estimate from the target's.

    average: the student's weight average; teacher: takes the steps, at the same w; point: (B,) rows of
    ``consistency``; rows.t must be ``consistency.t[point]``.
    """
    z_t, _ = tables.noisy(rows)
    with torch.no_grad():
        target = consistency_target(average, teacher, consistency, z_t, rows, point, w)
    v = predict(student, z_t, rows.t, rows.condition, w, rows.extra)
    clean = wide(consistency.alpha[point], z_t) * z_t - wide(consistency.sigma[point], z_t) * v
    return pseudo_huber(clean, target, huber)


def consistency_target(
    average: nn.Module,
    teacher: nn.Module,
    consistency: ConsistencyTables,
    z_t: Tensor,
    rows: Noisy,
    point: Tensor,
    w: Tensor,
) -> Tensor:
    """The clean estimate of ``average`` one teacher step on, shaped as z_t."""
    step = predict(teacher, z_t, rows.t, rows.condition, w, rows.extra)
    z_next = wide(consistency.a[point], z_t) * z_t + wide(consistency.d[point], z_t) * step
    v = predict(average, z_next, consistency.next_t[point], rows.condition, w, rows.extra)
    return wide(consistency.next_alpha[point], z_t) * z_next - wide(consistency.next_sigma[point], z_t) * v


def pseudo_huber(prediction: Tensor, target: Tensor, width: float) -> Tensor:
    """(B,) √(mean square + width²) - width: quadratic below ``width``, linear in the RMS difference above."""
    return (prediction - target).square().flatten(1).mean(1).add(width**2).sqrt() - width
