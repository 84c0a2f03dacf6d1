"""The training objectives, each returning one loss a row.

Everything is in v: v = alpha·eps - sigma·x; schedule coefficients are float64 tables, targets float32.
Sources: Ho & Salimans 2022 (condition dropout); Meng et al. 2023, eq. 4 (stage one); Salimans & Ho 2022
(truncated SNR: max(SNR, 1)·|x - x̂|² = max(alpha², sigma²)·|v - v̂|²). Stage two: ``distill_jobs.halving``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from distill_jobs.data.source import Condition
from distill_jobs.student import predict
from engines.guidance import combine
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

    def __getitem__(self, rows: Tensor) -> Noisy:
        """The rows marked in ``rows``: (B,) bool."""
        extra = None if self.extra is None else self.extra[rows]
        return Noisy(self.x[rows], self.condition[rows], self.null[rows], self.noise[rows], self.t[rows], extra)

    def to(self, device: torch.device) -> Noisy:
        return Noisy(
            self.x.to(device),
            self.condition.to(device),
            self.null.to(device),
            self.noise.to(device),
            self.t.to(device),
            None if self.extra is None else self.extra.to(device),
        )


VectorField = Callable[[Tensor, Noisy], Tensor]
"""What steps are taken along: z_t: (B, C, h, w) and its rows to the v there, shaped as z_t."""


@dataclass(frozen=True)
class Tables:
    """A schedule's tables on the training device: alpha, sigma (T,) float32, computed in float64.

    off: (T,) bool, where the teacher is not guided.
    """

    alpha: Tensor
    sigma: Tensor
    off: Tensor

    @classmethod
    def of(cls, schedule: NoiseSchedule, device: torch.device | None = None, off: Collection[int] = ()) -> Tables:
        """off: the table indices at which the teacher is not guided."""
        marked = torch.zeros(schedule.timesteps, dtype=torch.bool)
        marked[sorted(off)] = True
        return cls(float32(schedule.alpha).to(device), float32(schedule.sigma).to(device), marked.to(device))

    def applied(self, w: Tensor, t: Tensor) -> Tensor:
        """(B,) the guidance weights that count at table indices t: w, or 0 where there is no guidance."""
        return w.masked_fill(self.off[t], 0.0)

    def ahead(self, w: Tensor, t: Tensor) -> Tensor:
        """(B,) the guidance weights that count anywhere from table indices t to the clean end: w, or 0."""
        return w.masked_fill(self.off.logical_not().cumsum(0)[t] == 0, 0.0)

    def noisy(self, rows: Noisy) -> tuple[Tensor, Tensor]:
        """(z_t, v) of a batch, both shaped as x."""
        alpha, sigma = wide(self.alpha[rows.t], rows.x), wide(self.sigma[rows.t], rows.x)
        return alpha * rows.x + sigma * rows.noise, alpha * rows.noise - sigma * rows.x

    def truncated_snr(self, t: Tensor) -> Tensor:
        """(B,) max(alpha², sigma²): the v-space weight of the truncated-SNR loss."""
        return torch.maximum(self.alpha[t] ** 2, self.sigma[t] ** 2)


def teacher_loss(teacher: nn.Module, tables: Tables, rows: Noisy, dropped: Tensor) -> Tensor:
    """(B,) v-MSE with the condition dropped on the rows marked in ``dropped``: (B,) bool."""
    z_t, v = tables.noisy(rows)
    condition = rows.null.where(dropped, rows.condition)
    return row_mse(network_v(teacher, z_t, replace(rows, condition=condition)), v)


def network_v(
    network: nn.Module, z_t: Tensor, rows: Noisy, w: Tensor | None = None, grid: Tensor | None = None
) -> Tensor:
    """What a network says of the rows at z_t, shaped as z_t. w, grid: as ``predict`` has them."""
    return predict(network, z_t, rows.t, rows.condition, w, rows.extra, grid)


def guided_v(teacher: nn.Module, tables: Tables, z_t: Tensor, rows: Noisy, w: Tensor) -> Tensor:
    """True guidance: the teacher with and without the condition, combined at w: (B,). Shaped as z_t.

    Rows at weight 0, or where ``tables`` have no guidance, are evaluated with it alone. One call: processes sharing
    a network must call it alike.
    """
    w = tables.applied(w, rows.t)
    on = w != 0
    v, unconditional = both_ways(teacher, z_t, rows, on)
    v[on] = guided((v[on], unconditional), w[on])
    return v


def both_ways(teacher: nn.Module, z_t: Tensor, rows: Noisy, without: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The teacher's v with the condition and without it, in one call, each shaped as z_t.

    without: (B,) bool, the only rows that are evaluated without it.
    """
    again = torch.ones_like(rows.t, dtype=torch.bool) if without is None else without
    both = predict(
        teacher,
        torch.cat([z_t, z_t[again]]),
        torch.cat([rows.t, rows.t[again]]),
        Condition.cat([rows.condition, rows.null[again]]),
        extra=None if rows.extra is None else torch.cat([rows.extra, rows.extra[again]]),
    )
    return both[: len(z_t)], both[len(z_t) :]


def guided(both: tuple[Tensor, Tensor], w: Tensor) -> Tensor:
    """``both_ways``, combined at w: (B,)."""
    return torch.as_tensor(combine(*both, wide(w, both[0])))


def stage_one_loss(student: nn.Module, teacher: nn.Module, tables: Tables, rows: Noisy, w: Tensor) -> Tensor:
    """(B,) truncated-SNR loss of the w-conditioned student against true guidance."""
    z_t, _ = tables.noisy(rows)
    with torch.no_grad():
        target = guided_v(teacher, tables, z_t, rows, w)
    return tables.truncated_snr(rows.t) * row_mse(network_v(student, z_t, rows, w), target)


def balanced(losses: Tensor, w: Tensor, power: float) -> Tensor:
    """(B,) losses divided by (1 + w)^power, since a target's scale grows with the guidance that counts in it."""
    return losses / (1 + w) ** power


def row_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """(B,) mean square of the difference in each row."""
    return (prediction - target).square().flatten(1).mean(1)


def wide(values: Tensor, like: Tensor) -> Tensor:
    """(B,) float → (B, 1, 1, 1), broadcastable to ``like``."""
    return values.to(like.dtype).reshape(-1, *([1] * (like.dim() - 1)))


def float32(values: np.ndarray | list[float]) -> Tensor:
    """Coefficients computed in float64, as float32."""
    return torch.tensor(np.asarray(values, np.float64)).to(torch.float32)
