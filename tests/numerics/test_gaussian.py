"""Gaussian data: a guided denoiser that is linear, so ODE endpoints and sampler moments have closed forms.

Class data N(m_c, s_c²), unconditional data N(m_0, s_0²). A Gaussian's exact v-prediction at angle phi is
    v(z) = -sigma·m + alpha·sigma·(1 - s²)/D·(z - alpha·m),   D = alpha²·s² + sigma²,
and guidance combines two of them. dz/dphi = v, so from z at alpha = 0 the endpoint is
    m_w + s·z             when s_c = s_0 = s, with m_w = (1 + w)·m_c - w·m_0;
    m + s_c^(1+w)·s_0^-w·z   when m_c = m_0 = m,
because alpha·sigma·(1 - s²)/D is the derivative of log D / 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest

from engines.guidance import combine
from engines.sampler import SamplerPlan, deterministic_step, sampler_plan
from engines.schedule import NoiseSchedule, ScheduleSpec

SCHEDULE = NoiseSchedule(ScheduleSpec(timesteps=4096))  # power of two: every grid is uniform in angle
WEIGHTS = [0.0, 0.5, 4.0, 14.0]
Model = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class Gaussian:
    mean: float
    spread: float

    def v(self, z: np.ndarray, index: int) -> np.ndarray:
        alpha, sigma = SCHEDULE.at(index)
        slope = alpha * sigma * (1 - self.spread**2) / (alpha**2 * self.spread**2 + sigma**2)
        return np.asarray(-sigma * self.mean + slope * (z - alpha * self.mean))


def guided(of_class: Gaussian, of_all: Gaussian, w: float) -> Model:
    return lambda z, k: combine(of_class.v(z, k), of_all.v(z, k), w)


def sample(model: Model, plan: SamplerPlan, z: np.ndarray) -> np.ndarray:
    for step in plan:
        z, _ = step.apply(z, model(z, step.timestep))
    return z


def errors(model: Model, exact: np.ndarray, z: np.ndarray, grids: list[int]) -> np.ndarray:
    return np.array([np.abs(sample(model, sampler_plan(SCHEDULE, n), z) - exact).max() for n in grids])


@pytest.mark.parametrize("w", WEIGHTS)
def test_ddim_reaches_the_exact_endpoint_at_order_one_for_shared_variance(w: float) -> None:
    z = np.linspace(-2, 2, 9)
    class_, all_ = Gaussian(0.8, 0.5), Gaussian(-0.1, 0.5)
    exact = (1 + w) * 0.8 + w * 0.1 + 0.5 * z
    observed = errors(guided(class_, all_, w), exact, z, [64, 128, 256, 512, 1024])
    np.testing.assert_allclose(observed[:-1] / observed[1:], 2.0, rtol=0.05)
    assert observed[-1] < 2e-3


@pytest.mark.parametrize("w", WEIGHTS)
def test_ddim_reaches_the_exact_endpoint_at_order_one_for_shared_mean(w: float) -> None:
    z = np.linspace(-2, 2, 9)
    class_, all_ = Gaussian(0.3, 0.6), Gaussian(0.3, 0.8)
    exact = 0.3 + 0.6 ** (1 + w) * 0.8**-w * z
    observed = errors(guided(class_, all_, w), exact, z, [64, 128, 256, 512, 1024])
    np.testing.assert_allclose(observed[:-1] / observed[1:], 2.0, rtol=0.1)
    assert observed[-1] < 5e-3


def test_one_step_returns_the_mean_of_the_guided_gaussian() -> None:
    model = guided(Gaussian(0.8, 0.5), Gaussian(-0.1, 0.5), 4.0)
    got = sample(model, sampler_plan(SCHEDULE, 1), np.linspace(-2, 2, 9))
    np.testing.assert_allclose(got, 5 * 0.8 + 4 * 0.1, atol=1e-12)


@pytest.mark.parametrize("n", [16, 256])
def test_the_stochastic_samplers_moments_follow_the_closed_form(n: int) -> None:
    """Linear model, so mean and variance obey mean' = A·mean + B, var' = A²·var + c², and approach the data's."""
    data = Gaussian(0.8, 0.5)
    mean, variance = 0.0, 1.0
    for step in sampler_plan(SCHEDULE, n, "stochastic"):
        zero, one = step.apply(np.array([0.0, 1.0]), data.v(np.array([0.0, 1.0]), step.timestep))[0]
        slope = one - zero
        mean, variance = slope * mean + zero, slope**2 * variance + step.coefficients.c**2
    assert abs(mean - 0.8) < 3 / n
    assert abs(variance - 0.25) < 3 / n


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_the_consistency_sampler_of_the_exact_consistency_function_gives_the_data_exactly(n: int) -> None:
    mean, spread = 0.8, 0.5

    def v(z: np.ndarray, index: int) -> np.ndarray:
        alpha, sigma = SCHEDULE.at(index)
        end = mean + spread * (z - alpha * mean) / np.sqrt(alpha**2 * spread**2 + sigma**2)
        return (alpha * z - end) / sigma

    now, variance = 0.0, 1.0
    for step in sampler_plan(SCHEDULE, n, "consistency"):
        zero, one = step.apply(np.array([0.0, 1.0]), v(np.array([0.0, 1.0]), step.timestep))[0]
        now, variance = (one - zero) * now + zero, (one - zero) ** 2 * variance + step.coefficients.c**2
    np.testing.assert_allclose((now, variance), (mean, spread**2), rtol=0, atol=1e-12)


def test_at_two_steps_the_consistency_sampler_is_the_stochastic_one() -> None:
    assert sampler_plan(SCHEDULE, 2, "consistency").steps == sampler_plan(SCHEDULE, 2, "stochastic").steps
    assert sampler_plan(SCHEDULE, 1, "consistency").steps == sampler_plan(SCHEDULE, 1).steps


def test_empirical_moments_match_the_recursion() -> None:
    data, rng = Gaussian(0.8, 0.5), np.random.default_rng(0)
    z = rng.standard_normal(200_000)
    mean, variance = 0.0, 1.0
    for step in sampler_plan(SCHEDULE, 4, "stochastic"):
        zero, one = step.apply(np.array([0.0, 1.0]), data.v(np.array([0.0, 1.0]), step.timestep))[0]
        mean, variance = (one - zero) * mean + zero, (one - zero) ** 2 * variance + step.coefficients.c**2
        z, _ = step.apply(z, data.v(z, step.timestep), rng.standard_normal(z.shape))
    assert abs(z.mean() - mean) < 5 * np.sqrt(variance / z.size)
    assert abs(z.var() / variance - 1) < 5 * np.sqrt(2 / z.size)


@pytest.mark.parametrize("n", [64, 256])
def test_encoding_then_decoding_returns_at_order_one(n: int) -> None:
    model = guided(Gaussian(0.8, 0.5), Gaussian(-0.1, 0.5), 2.0)
    grid = (0, *SCHEDULE.grid(n)[1:])  # an encoder starts at table index 0
    x = z = np.linspace(-1, 1, 9)
    for here, there in pairwise(grid):
        z, _ = deterministic_step(SCHEDULE, here, there).apply(z, model(z, here))
    for here, there in pairwise(grid[::-1]):
        z, _ = deterministic_step(SCHEDULE, here, there).apply(z, model(z, here))
    assert np.abs(z - x).max() < 12 / n
