"""Diffusers' solvers, as the tables run them, on data whose probability flow is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill_jobs.data.digits import class_condition
from distill_jobs.sampling import request_noise
from distill_jobs.sections import Solver
from distill_jobs.solvers import solve, stock_scheduler
from distill_jobs.student import new_teacher, save_stock
from engines.schedule import NoiseSchedule, ScheduleSpec
from tests.support.tiny_run import UNET

SPREAD = 0.3
SCHEDULES = [ScheduleSpec(), ScheduleSpec(kind="scaled_linear"), ScheduleSpec(kind="linear")]


def distance_from_exact(folder: Path, schedule: NoiseSchedule, solver: Solver, steps: int) -> float:
    """RMS error for data N(0, SPREAD²): the flow takes noise x at the last time to SPREAD·x / std of that time."""
    alphas, sigmas = torch.from_numpy(schedule.alpha), torch.from_numpy(schedule.sigma)

    def network(x_t: Tensor, k: int, _: object) -> Tensor:
        a, s = alphas[k], sigmas[k]
        return (a * s * (1 - SPREAD**2) / (a**2 * SPREAD**2 + s**2) * x_t).float()

    seeds, shape = range(8), (1, 8, 8)
    images = solve(
        network, stock_scheduler(folder, solver), steps, class_condition(torch.zeros(8, dtype=int)), seeds, shape
    )
    start = (alphas[-1] ** 2 * SPREAD**2 + sigmas[-1] ** 2).sqrt()
    return float((images - request_noise(seeds, shape) * SPREAD / start).pow(2).mean().sqrt())


@pytest.mark.parametrize("spec", SCHEDULES, ids=lambda spec: spec.kind)
def test_solvers_converge_and_the_second_order_one_is_ahead(spec: ScheduleSpec, tmp_path: Path) -> None:
    schedule = NoiseSchedule(spec)
    save_stock(tmp_path, new_teacher(UNET, 0), schedule, None)
    errors = {
        solver: [distance_from_exact(tmp_path, schedule, solver, n) for n in (5, 10, 20)]
        for solver in ("ddim", "dpm-solver++")
    }
    for coarse, middle, fine in errors.values():
        assert coarse > middle > fine
    assert errors["dpm-solver++"][2] < errors["ddim"][2]
