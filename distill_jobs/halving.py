"""Stage two: the target of one student step, from the steps its teacher takes over the same stretch.

Sources: Meng et al. 2023, Alg. 2 (deterministic) and Alg. 3 (stochastic); Salimans & Ho 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distill_jobs.objectives import Noisy, Tables, VectorField, float32, network_v, row_mse, wide
from engines.sampler import Sampler, compose, deterministic_step, encoder_plan
from engines.schedule import CLEAN, NoiseSchedule

_Row = tuple[int, int, int, float, float, float, float, float]


@dataclass(frozen=True)
class HalvingTables:
    """Coefficients of a student's targets, indexed by grid point i - 1: two teacher steps and what they compose to.

    An encoder's are indexed by the step, 0 at the clean end. t, middle, end: (N,) table indices of where a step
    begins, of where the first teacher step ends, and of where the second does, -1 at the clean end; a, d: the
    first step; target_x, target_first, target_second: weights of z, v1, v2 in the target v.
    """

    t: Tensor
    middle: Tensor
    end: Tensor
    a: Tensor
    d: Tensor
    target_x: Tensor
    target_first: Tensor
    target_second: Tensor

    @classmethod
    def of(
        cls,
        schedule: NoiseSchedule,
        n: int,
        device: torch.device | None = None,
        sampler: Sampler = "deterministic",
    ) -> HalvingTables:
        """Tables for the n-step student of a teacher of 2n steps.

        Deterministic: a student step spans two teacher steps of 1/2n. Stochastic: from points i ≥ 2 it spans two
        steps of 1/n, the double length its sampler walks before the noisy step back; from point 1 the teacher
        itself reaches the end in one step.
        """
        if sampler == "stochastic":
            grid = schedule.grid(n)
            rows = [(grid[1], grid[1], CLEAN, 1.0, 0.0, 0.0, 1.0, 0.0)]
            rows += [_two_steps(schedule, grid[i], grid[i - 1], grid[i - 2]) for i in range(2, n + 1)]
        else:
            grid = schedule.grid(2 * n)
            rows = [_two_steps(schedule, grid[2 * i], grid[2 * i - 1], grid[2 * i - 2]) for i in range(1, n + 1)]
        return cls._of_rows(rows, device)

    @classmethod
    def encoding(cls, schedule: NoiseSchedule, n: int, device: torch.device | None = None) -> HalvingTables:
        """Tables for the n-step encoder of an encoder of 2n steps: time increases, and point 0 is table index 0."""
        steps = encoder_plan(schedule, 2 * n).steps
        rows = [
            _two_steps(schedule, a.timestep, a.target, b.target)
            for a, b in zip(steps[::2], steps[1::2], strict=True)
        ]
        return cls._of_rows(rows, device)

    @classmethod
    def _of_rows(cls, rows: Sequence[_Row], device: torch.device | None) -> HalvingTables:
        t, middle, end, *coefficients = zip(*rows, strict=True)
        at = (torch.tensor(indices, device=device) for indices in (t, middle, end))
        return cls(*at, *(float32(list(column)).to(device) for column in coefficients))

    @classmethod
    def cat(cls, tables: Sequence[HalvingTables]) -> HalvingTables:
        """The points of several grids, one grid after the other."""
        return cls(**{name: torch.cat([getattr(each, name) for each in tables]) for name in cls.__annotations__})

    def guided(self, off: Tensor, first: HalvingTables) -> Tensor:
        """(N,) bool: whose stretch has guidance in it, counted where the chain's first teacher is evaluated.

        off: (T,) bool, where there is none; first: the tables of the chain's first halving.
        """
        seen = torch.cat([first.t, first.middle])
        on = seen[~off[seen]]
        low, high = torch.minimum(self.t, self.end)[:, None], torch.maximum(self.t, self.end)[:, None]
        return ((low <= on) & (on <= high) & (on != self.end[:, None])).any(1)


def drawn_points(u: Tensor, guided: Tensor, share: float | None = None) -> Tensor:
    """(B,) points of a grid, by u: (B,) uniform in [0, 1). guided: (N,) bool; share: of the rows at those points.

    Without a share, or where all points are alike, each is as likely.
    """
    points = len(guided)
    if share is None or (on := int(guided.sum())) in (0, points):
        return (u * points).long()
    likely = torch.where(guided.cpu(), share / on, (1 - share) / (points - on)).to(torch.float64)
    return torch.bucketize(u, likely.cumsum(0)[:-1], right=True)


def target_loss(
    student: nn.Module,
    tables: Tables,
    z_t: Tensor,
    rows: Noisy,
    w: Tensor | None,
    target: Tensor,
    grid: Tensor | None = None,
) -> Tensor:
    """(B,) truncated-SNR loss against a target v. grid: (B,) step counts, for shared weights."""
    prediction = network_v(student, z_t, rows, w, grid)
    return tables.truncated_snr(rows.t) * row_mse(prediction, target)


@torch.no_grad()
def two_step_target(field: VectorField, halving: HalvingTables, z_t: Tensor, rows: Noisy, point: Tensor) -> Tensor:
    """The v with which one step lands where two along ``field`` do, shaped as z_t; from unclipped outputs."""
    first = field(z_t, rows)
    z_middle = wide(halving.a[point], z_t) * z_t + wide(halving.d[point], z_t) * first
    second = field(z_middle, replace(rows, t=halving.middle[point]))
    return (
        wide(halving.target_x[point], z_t) * z_t
        + wide(halving.target_first[point], z_t) * first
        + wide(halving.target_second[point], z_t) * second
    )


def _two_steps(schedule: NoiseSchedule, t: int, middle: int, s: int) -> _Row:
    first, second = deterministic_step(schedule, t, middle), deterministic_step(schedule, middle, s)
    composed = compose(first, second, deterministic_step(schedule, t, s))
    k = first.coefficients
    return t, middle, s, k.a, k.d, composed.x, composed.first, composed.second
