"""Whole trajectories on shared noise: our plan against stock DDIMScheduler, step by step."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from engines.sampler import Prediction, sampler_plan
from engines.schedule import NoiseSchedule, ScheduleSpec

ZERO_SNR = NoiseSchedule(ScheduleSpec())
STABLE = NoiseSchedule(ScheduleSpec(kind="scaled_linear"))


def network(x: torch.Tensor, k: int) -> torch.Tensor:
    """A smooth stand-in: bounded, depends on place and time."""
    return torch.tanh(0.7 * x + 0.3 * x.roll(1, -1) - k / 1000)


def stock(schedule: NoiseSchedule, prediction: Prediction, clip: float | None = None) -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=schedule.timesteps,
        trained_betas=schedule.betas().tolist(),
        timestep_spacing="trailing",
        prediction_type=prediction,
        set_alpha_to_one=True,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )


@pytest.mark.parametrize("n", [1, 2, 4, 5, 8])
@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [
        (ZERO_SNR, "v_prediction"),
        (ZERO_SNR, "sample"),
        (STABLE, "v_prediction"),
        (STABLE, "epsilon"),
        (STABLE, "sample"),
    ],
)
def test_the_deterministic_plan_is_stock_ddim(schedule: NoiseSchedule, prediction: Prediction, n: int) -> None:
    theirs = stock(schedule, prediction)
    theirs.set_timesteps(n)
    ours = other = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    for step, k in zip(sampler_plan(schedule, n, prediction=prediction), theirs.timesteps, strict=True):
        assert step.timestep == int(k)
        ours, clean = step.apply(ours, network(ours, step.timestep))
        result = theirs.step(network(other, int(k)), k, other)
        other = result.prev_sample
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(clean, result.pred_original_sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 4, 5, 8])
def test_the_clipped_plan_is_stock_ddim_with_clipped_model_output(n: int) -> None:
    theirs = stock(ZERO_SNR, "v_prediction", clip=1.0)
    theirs.set_timesteps(n)
    ours = other = 2 * torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    for step, k in zip(sampler_plan(ZERO_SNR, n, clip=1.0), theirs.timesteps, strict=True):
        ours, _ = step.apply(ours, network(ours, step.timestep))
        other = theirs.step(network(other, int(k)), k, other, use_clipped_model_output=True).prev_sample
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [16, 32, 64])
def test_our_grid_reaches_the_clean_end_where_stock_step_lengths_do_not_divide(n: int) -> None:
    """Stock ``step`` goes to t - 1000 // n, which leaves the trailing grid when n does not divide 1000."""
    plan = sampler_plan(ZERO_SNR, n)
    assert [step.target for step in plan][:-1] == list(plan.timesteps[1:])
    assert any(step.timestep - 1000 // n != step.target for step in plan)
