"""What a teacher of any prediction type says of v, on its own noise schedule or on one that was rescaled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from distill_jobs.data.source import Condition
from distill_jobs.objectives import Noisy, Tables, float32, row_mse, wide
from distill_jobs.student import predict
from engines.sampler import Prediction
from engines.schedule import NoiseSchedule


def as_v(out: Tensor, z_t: Tensor, alpha: Tensor, sigma: Tensor, prediction: Prediction) -> Tensor:
    """The v that an output means, shaped as z_t: (B, C, h, w). alpha, sigma: (B,), neither zero where it divides.

    From v = alpha·eps - sigma·x and z = alpha·x + sigma·eps.
    """
    alpha, sigma = wide(alpha, z_t), wide(sigma, z_t)
    if prediction == "epsilon":
        return (out - sigma * z_t) / alpha
    if prediction == "sample":
        return (alpha * z_t - out) / sigma
    return out


@dataclass(frozen=True)
class NativeTeacher:
    """A pipeline's own network, asked for v at the points of ``tables``.

    timestep: (T,) where on its own schedule each point's signal-to-noise ratio lies; known: (T,) whether it does:
    not that of points noisier than the schedule ever is.
    """

    network: nn.Module
    prediction: Prediction
    tables: Tables
    timestep: Tensor
    known: Tensor

    @classmethod
    def of(
        cls,
        network: nn.Module,
        prediction: Prediction,
        own: NoiseSchedule,
        points: NoiseSchedule,
        device: torch.device | None = None,
    ) -> NativeTeacher:
        """own: the schedule it was trained on; points: the one it is asked on, as clean at its clean end."""
        at = np.interp(points.angles, own.angles, np.arange(own.timesteps))
        known = torch.tensor(points.angles <= own.angles[-1], device=device)
        return cls(network, prediction, Tables.of(points, device), float32(at).to(device), known)

    @torch.no_grad()
    def v(self, z_t: Tensor, rows: Noisy, condition: Condition) -> Tensor:
        """Shaped as z_t; of no meaning in rows whose point is not ``known``."""
        out = predict(self.network, z_t, self.timestep[rows.t], condition, extra=rows.extra)
        return as_v(out, z_t, self.tables.alpha[rows.t], self.tables.sigma[rows.t], self.prediction)


def imitation_loss(network: nn.Module, teacher: NativeTeacher, rows: Noisy, dropped: Tensor) -> Tensor:
    """(B,) v-MSE against the teacher; against the data at points that its schedule does not reach.

    dropped: (B,) bool, rows with the empty condition, for both networks.
    """
    z_t, v = teacher.tables.noisy(rows)
    condition = rows.null.where(dropped, rows.condition)
    known = teacher.known[rows.t].reshape(-1, 1, 1, 1)
    target = torch.where(known, teacher.v(z_t, rows, condition), v)
    return row_mse(predict(network, z_t, rows.t, condition, extra=rows.extra), target)
