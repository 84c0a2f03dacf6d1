"""What a folder's network predicts, asked of the network: a config may be wrong, and nothing else says so."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from distill_jobs.objectives import Noisy, Tables
from distill_jobs.student import predict
from engines.sampler import Prediction
from engines.schedule import NoiseSchedule

PROBED_ROWS = 8
SURE, PLAINLY = 0.15, 2.0
"""Another quantity is predicted if its error is at most the first, and so many times smaller than the own."""


def middle(schedule: NoiseSchedule) -> int:
    """The table index where signal and noise are equally strong, and the three predictions differ most."""
    return int(np.abs(schedule.angles - math.pi / 4).argmin())


@torch.no_grad()
def prediction_errors(
    network: nn.Module, own: Tables, rows: Noisy, *, prompted: bool = True
) -> dict[Prediction, float]:
    """|output - quantity|² / |quantity|² for each that a network may predict, with the rows' prompts or without.

    own: of its own schedule.
    """
    z_t, v = own.noisy(rows)
    out = predict(network, z_t, rows.t, rows.condition if prompted else rows.null, extra=rows.extra)
    quantities: dict[Prediction, Tensor] = {"epsilon": rows.noise, "v_prediction": v, "sample": rows.x}
    return {name: float((out - true).square().sum() / true.square().sum()) for name, true in quantities.items()}


def contradiction(says: Prediction, errors: Mapping[Prediction, float]) -> Prediction | None:
    """What a network plainly predicts instead of what its config says, if so."""
    nearest = min(errors, key=lambda name: errors[name])
    return nearest if errors[nearest] <= SURE and errors[says] > PLAINLY * errors[nearest] else None


def unfit(with_prompts: float, without: float, limit: float) -> str | None:
    """What is wrong with a network of such errors, if anything."""
    what = "its unet's relative error on the data, at equal signal and noise, is"
    if not with_prompts <= limit:
        return (
            f"{what} {with_prompts:.2f}, and {limit:g} is allowed (teacher.max_relative_error): data, "
            "scaling_factor or weights do not belong together"
        )
    if without > max(limit, PLAINLY * with_prompts):
        return (
            f"{what} {without:.2f} without prompts, and {with_prompts:.2f} with them: it was not trained with "
            "prompts left out, so it cannot be guided"
        )
    return None
