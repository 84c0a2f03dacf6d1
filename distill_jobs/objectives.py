"""The training objectives, each returning one loss a row.

Everything is in v: v = alpha·eps - sigma·x; schedule coefficients are float64 tables, targets float32.
Sources: Ho & Salimans 2022 (condition dropout); Meng et al. 2023, eq. 4 (stage one) and Alg. 2 (stage two);
Salimans & Ho 2022 (truncated SNR: max(SNR, 1)·|x - x̂|² = max(alpha², sigma²)·|v - v̂|²).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from distill_jobs.data.source import Condition
from distill_jobs.student import predict
from engines.guidance import combine
from engines.sampler import compose, deterministic_step
from engines.schedule import NoiseSchedule


@dataclass(frozen=True)
class Noisy:
    """What an objective sees.

    x, noise: (B, C, h, w); t: (B,) table indices; extra: (B, K, h, w) further input channels, or None.
    """

    x: Tensor
    condition: Condition
    null: Condition
    noise: Tensor
    t: Tensor
    extra: Tensor | None = None

    def to(self, device: torch.device) -> Noisy:
        return Noisy(
            self.x.to(device),
            self.condition.to(device),
            self.null.to(device),
            self.noise.to(device),
            self.t.to(device),
            None if self.extra is None else self.extra.to(device),
        )


@dataclass(frozen=True)
class Tables:
    """A schedule's tables on the training device: alpha, sigma (T,) float32, computed in float64."""

    alpha: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, schedule: NoiseSchedule, device: torch.device | None = None) -> Tables:
        return cls(_float32(schedule.alpha).to(device), _float32(schedule.sigma).to(device))

    def noisy(self, rows: Noisy) -> tuple[Tensor, Tensor]:
        """(z_t, v) of a batch, both shaped as x."""
        alpha, sigma = _wide(self.alpha[rows.t], rows.x), _wide(self.sigma[rows.t], rows.x)
        return alpha * rows.x + sigma * rows.noise, alpha * rows.noise - sigma * rows.x

    def truncated_snr(self, t: Tensor) -> Tensor:
        """(B,) max(alpha², sigma²): the v-space weight of the truncated-SNR loss."""
        return torch.maximum(self.alpha[t] ** 2, self.sigma[t] ** 2)


def teacher_loss(teacher: nn.Module, tables: Tables, rows: Noisy, dropped: Tensor) -> Tensor:
    """(B,) v-MSE with the condition dropped on the rows marked in ``dropped``: (B,) bool."""
    z_t, v = tables.noisy(rows)
    condition = rows.null.where(dropped, rows.condition)
    return _row_mse(predict(teacher, z_t, rows.t, condition, extra=rows.extra), v)


def guided_v(teacher: nn.Module, z_t: Tensor, rows: Noisy, w: Tensor) -> Tensor:
    """True guidance: the teacher's v at weights w: (B,), from one doubled batch."""
    both = predict(
        teacher,
        torch.cat([z_t, z_t]),
        torch.cat([rows.t, rows.t]),
        Condition.cat([rows.condition, rows.null]),
        extra=None if rows.extra is None else torch.cat([rows.extra, rows.extra]),
    )
    conditional, unconditional = both.chunk(2)
    return torch.as_tensor(combine(conditional, unconditional, _wide(w, z_t)))


def stage_one_loss(student: nn.Module, teacher: nn.Module, tables: Tables, rows: Noisy, w: Tensor) -> Tensor:
    """(B,) truncated-SNR loss of the w-conditioned student against true guidance."""
    z_t, _ = tables.noisy(rows)
    with torch.no_grad():
        target = guided_v(teacher, z_t, rows, w)
    prediction = predict(student, z_t, rows.t, rows.condition, w, rows.extra)
    return tables.truncated_snr(rows.t) * _row_mse(prediction, target)


@dataclass(frozen=True)
class HalvingTables:
    """Coefficients of one halving, indexed by grid point i - 1: two teacher steps and the target they compose to.

    t, middle: (N,) table indices of point i and of the half-way point; a, d: the first teacher step;
    target_x, target_first, target_second: weights of z, v1, v2 in the target v.
    """

    t: Tensor
    middle: Tensor
    a: Tensor
    d: Tensor
    target_x: Tensor
    target_first: Tensor
    target_second: Tensor

    @classmethod
    def of(cls, schedule: NoiseSchedule, n: int, device: torch.device | None = None) -> HalvingTables:
        """Tables for halving 2n teacher steps to n student steps."""
        grid = schedule.grid(2 * n)
        points = [(grid[2 * i], grid[2 * i - 1], grid[2 * i - 2]) for i in range(1, n + 1)]
        firsts = [deterministic_step(schedule, t, middle) for t, middle, _ in points]
        composed = [
            compose(first, deterministic_step(schedule, middle, s), deterministic_step(schedule, t, s))
            for first, (t, middle, s) in zip(firsts, points, strict=True)
        ]
        return cls(
            t=torch.tensor([t for t, _, _ in points], device=device),
            middle=torch.tensor([middle for _, middle, _ in points], device=device),
            a=_float32([f.coefficients.a for f in firsts]).to(device),
            d=_float32([f.coefficients.d for f in firsts]).to(device),
            target_x=_float32([c.x for c in composed]).to(device),
            target_first=_float32([c.first for c in composed]).to(device),
            target_second=_float32([c.second for c in composed]).to(device),
        )


def halving_loss(
    student: nn.Module,
    teacher: nn.Module,
    tables: Tables,
    halving: HalvingTables,
    rows: Noisy,
    point: Tensor,
    w: Tensor,
) -> Tensor:
    """(B,) truncated-SNR loss against two teacher steps, at the same w. point: (B,) grid points i - 1.

    rows.t must be ``halving.t[point]``.
    """
    z_t, _ = tables.noisy(rows)
    with torch.no_grad():
        target = two_step_target(teacher, halving, z_t, rows, point, w)
    prediction = predict(student, z_t, rows.t, rows.condition, w, rows.extra)
    return tables.truncated_snr(rows.t) * _row_mse(prediction, target)


def two_step_target(
    teacher: nn.Module, halving: HalvingTables, z_t: Tensor, rows: Noisy, point: Tensor, w: Tensor
) -> Tensor:
    """The v with which one step lands where the teacher's two steps do, shaped as z_t; from unclipped outputs."""
    first = predict(teacher, z_t, rows.t, rows.condition, w, rows.extra)
    z_middle = _wide(halving.a[point], z_t) * z_t + _wide(halving.d[point], z_t) * first
    second = predict(teacher, z_middle, halving.middle[point], rows.condition, w, rows.extra)
    return (
        _wide(halving.target_x[point], z_t) * z_t
        + _wide(halving.target_first[point], z_t) * first
        + _wide(halving.target_second[point], z_t) * second
    )


def _row_mse(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().flatten(1).mean(1)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """(B,) float → (B, 1, 1, 1), broadcastable to ``like``."""
    return values.to(like.dtype).reshape(-1, *([1] * (like.dim() - 1)))


def _float32(values: np.ndarray | list[float]) -> Tensor:
    return torch.tensor(np.asarray(values, np.float64)).to(torch.float32)
