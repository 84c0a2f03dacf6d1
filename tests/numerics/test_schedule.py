"""Our tables against diffusers' schedulers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import betas_for_alpha_bar, rescale_zero_terminal_snr
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from engines.schedule import CLEAN, NoiseSchedule, ScheduleSpec

COSINE = NoiseSchedule(ScheduleSpec())


def reference_betas(kind: str, timesteps: int) -> torch.Tensor:
    """diffusers' beta formulas in float64."""
    start, end = 0.00085, 0.012
    if kind == "linear":
        return torch.linspace(start, end, timesteps, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64) ** 2
    return betas_for_alpha_bar(timesteps).double()


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("rescale", [False, True])
def test_beta_schedules_are_diffusers_own(kind: str, rescale: bool) -> None:
    schedule = NoiseSchedule(ScheduleSpec(kind=kind, rescale_zero_terminal_snr=rescale))  # type: ignore[arg-type]
    betas = reference_betas(kind, 1000)
    betas = rescale_zero_terminal_snr(betas) if rescale else betas
    expected = torch.cumprod(1 - betas, 0).numpy()
    tolerance = 1e-6 if kind == "squaredcos_cap_v2" else 1e-12  # that function rounds to float32
    np.testing.assert_allclose(schedule.alpha**2, expected, rtol=0, atol=tolerance)
    theirs = DDIMScheduler(
        beta_schedule=kind, beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=rescale
    ).alphas_cumprod.numpy()
    np.testing.assert_allclose(schedule.alpha**2, theirs, rtol=0, atol=6e-6)
    assert schedule.zero_terminal_snr is rescale
    assert (schedule.alpha[-1] == 0) == rescale


@pytest.mark.parametrize(
    "spec",
    [
        ScheduleSpec(),
        ScheduleSpec(timesteps=512),
        ScheduleSpec(log_snr_min=-20, log_snr_max=20),
        ScheduleSpec(kind="scaled_linear"),
        ScheduleSpec(kind="linear", rescale_zero_terminal_snr=True),
    ],
)
def test_stock_diffusers_rebuilds_the_table_from_our_betas(spec: ScheduleSpec) -> None:
    schedule = NoiseSchedule(spec)
    stock = DDIMScheduler(num_train_timesteps=spec.timesteps, trained_betas=schedule.betas().tolist())
    np.testing.assert_allclose(stock.alphas_cumprod.numpy(), schedule.alpha**2, rtol=0, atol=6e-6)
    np.testing.assert_allclose(np.cumprod(1 - schedule.betas()), schedule.alpha**2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", range(1, 65))
def test_grids_are_diffusers_trailing_timesteps(n: int) -> None:
    """Stock accumulates a float step: it rounds the tie of n = 48 the other way and overruns to -1 at n = 61."""
    stock = DDIMScheduler(timestep_spacing="trailing")
    stock.set_timesteps(n)
    grid = COSINE.grid(n)
    theirs = stock.timesteps.tolist()[:n]
    assert grid[0] == CLEAN
    assert len(grid) == n + 1
    if n == 48:
        assert max(abs(ours - other) for ours, other in zip(grid[:0:-1], theirs, strict=True)) == 1
    else:
        assert list(grid[:0:-1]) == theirs


@pytest.mark.parametrize("n", [1, 2, 4, 5, 8, 16, 32])
def test_a_grid_lies_inside_the_grid_of_twice_its_steps(n: int) -> None:
    assert COSINE.grid(2 * n)[::2] == COSINE.grid(n)


@given(st.floats(-30, -1), st.floats(1, 30), st.integers(2, 2000))
def test_bounded_cosine_reaches_both_log_snr_bounds(low: float, high: float, timesteps: int) -> None:
    schedule = NoiseSchedule(ScheduleSpec(log_snr_min=low, log_snr_max=high, timesteps=timesteps))
    angles = schedule.angles
    assert (np.diff(angles) > 0).all()
    np.testing.assert_allclose(-2 * math.log(math.tan(angles[-1])), low, rtol=1e-9)
    first_step = (angles[-1] - math.atan(math.exp(-high / 2))) / timesteps
    np.testing.assert_allclose(np.diff(angles), first_step, rtol=1e-6)


def test_the_table_is_variance_preserving_and_exact_at_both_ends() -> None:
    np.testing.assert_allclose(COSINE.alpha**2 + COSINE.sigma**2, 1, atol=1e-15)
    assert COSINE.at(CLEAN) == (1.0, 0.0)
    assert COSINE.at(999) == (0.0, 1.0)
    for k in (0, 10, 998):
        np.testing.assert_allclose(math.atan2(*COSINE.at(k)[::-1]), COSINE.angle(k), rtol=1e-12)


@pytest.mark.parametrize("k", [-2, 1000])
def test_indices_off_the_table_are_refused(k: int) -> None:
    with pytest.raises(IndexError):
        COSINE.at(k)
    with pytest.raises(IndexError):
        COSINE.angle(k)


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "linear", "log_snr_min": -20},
        {"log_snr_min": 5, "log_snr_max": -5},
        {"timesteps": 1},
        {"kind": "sigmoid"},
        {"beta_end": 0.02},
        {"kind": "cosine", "rescale_zero_terminal_snr": True},
        {"unknown": 1},
    ],
)
def test_impossible_schedules_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ScheduleSpec.model_validate(bad)


@pytest.mark.parametrize("n", [0, 1001])
def test_impossible_grids_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match="a grid has"):
        COSINE.grid(n)
