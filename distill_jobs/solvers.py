"""Diffusers' own samplers on a teacher: what a user gets without distilling, for the same table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from torch import Tensor

from distill_jobs.data.source import Condition
from distill_jobs.sampling import Network, request_noise
from distill_jobs.sections import Solver

TITLES: dict[Solver, str] = {"ddim": "DDIM of diffusers", "dpm-solver++": "DPM-Solver++"}


def stock_scheduler(folder: Path, solver: Solver) -> SchedulerMixin:
    """The solver as diffusers makes it from a stock folder's scheduler; DPM-Solver++ is the second-order multistep.

    A table that ends at zero SNR needs diffusers' own guard against dividing by it, ``rescale_betas_zero_snr``,
    which leaves the other entries as they are.
    """
    ddim = DDIMScheduler.from_pretrained(folder / "scheduler")
    if solver == "ddim":
        return ddim
    ends_at_zero = bool(ddim.alphas_cumprod[-1] == 0)
    return DPMSolverMultistepScheduler.from_config(
        ddim.config, algorithm_type="dpmsolver++", solver_order=2, rescale_betas_zero_snr=ends_at_zero
    )


def solver_timesteps(folder: Path, solver: Solver, steps: int) -> list[int]:
    """The timesteps that ``steps`` of it evaluate a network at."""
    scheduler = stock_scheduler(folder, solver)
    scheduler.set_timesteps(steps)
    return [int(timestep) for timestep in scheduler.timesteps]


def solve(
    network: Network,
    scheduler: SchedulerMixin,
    steps: int,
    condition: Condition,
    seeds: Sequence[int],
    shape: tuple[int, int, int],
) -> Tensor:
    """(B, *shape) float32 results of ``steps`` evaluations of ``network`` from the noise of ``seeds``."""
    scheduler.set_timesteps(steps)
    x_t: Tensor = request_noise(seeds, shape) * scheduler.init_noise_sigma
    with torch.inference_mode():
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x_t, timestep)
            x_t = scheduler.step(network(scaled, int(timestep), condition), timestep, x_t).prev_sample
    return x_t
