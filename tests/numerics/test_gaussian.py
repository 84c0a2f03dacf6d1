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

import numpy as np
import pytest

from engines.guidance import combine
from engines.sampler import SamplerPlan, encoder_plan, sampler_plan
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


# ---- marginals along the way


GRIDS = [128, 256, 512, 1024]
SHARED_VARIANCE = (Gaussian(0.8, 0.5), Gaussian(-0.1, 0.5))
SHARED_MEAN = (Gaussian(0.3, 0.6), Gaussian(0.3, 0.8))
Pair = tuple[Gaussian, Gaussian]


def exact_moments(pair: Pair, w: float, index: int) -> tuple[float, float]:
    """Mean and standard deviation that noise has when the exact guided flow has taken it to a table index.

    alpha·m_w and D_c^((1+w)/2)·D_0^(-w/2), for pairs of one mean or one variance. With one variance this is
    N(m_w, s²) noised, whose score the guided model then has, so that the stochastic sampler keeps it too.
    """
    (of_class, of_all), (alpha, sigma) = pair, SCHEDULE.at(index)
    d_c, d_0 = ((alpha * each.spread) ** 2 + sigma**2 for each in pair)
    return alpha * ((1 + w) * of_class.mean - w * of_all.mean), d_c ** ((1 + w) / 2) * d_0 ** (-w / 2)


def worst_moments(plan: SamplerPlan, pair: Pair, w: float, start: tuple[float, float]) -> tuple[float, float]:
    """Largest errors of mean and standard deviation over all points of a plan. start: moments at its beginning.

    The model is linear, so a step takes mean to A·mean + B and variance to A²·variance + c².
    """
    model, (mean, spread), found = guided(*pair, w), start, []
    for step in plan:
        zero, one = step.apply(np.array([0.0, 1.0]), model(np.array([0.0, 1.0]), step.timestep))[0]
        mean, spread = (one - zero) * mean + zero, np.hypot((one - zero) * spread, step.coefficients.c)
        found.append(np.abs(np.subtract((mean, spread), exact_moments(pair, w, step.target))))
    worst_mean, worst_spread = np.max(found, axis=0)
    return worst_mean, worst_spread


def assert_order_one(plans: list[SamplerPlan], pair: Pair, w: float, start: tuple[float, float]) -> None:
    """The mean exact at every point, since v is then -sigma·m; the deviation's error halved by every grid."""
    means, spreads = zip(*(worst_moments(plan, pair, w, start) for plan in plans), strict=True)
    assert max(means) < 1e-12
    np.testing.assert_allclose(np.divide(spreads[:-1], spreads[1:]), 2.0, rtol=0.1)
    assert spreads[-1] < 0.02


@pytest.mark.parametrize("w", WEIGHTS)
@pytest.mark.parametrize("pair", [SHARED_VARIANCE, SHARED_MEAN], ids=["variance", "mean"])
def test_the_marginals_of_the_deterministic_sampler_are_exact_at_order_one(pair: Pair, w: float) -> None:
    assert_order_one([sampler_plan(SCHEDULE, n) for n in GRIDS], pair, w, (0.0, 1.0))


@pytest.mark.parametrize("w", WEIGHTS)
def test_the_marginals_of_the_stochastic_sampler_are_exact_at_order_one(w: float) -> None:
    plans = [sampler_plan(SCHEDULE, n, "stochastic") for n in GRIDS]
    assert_order_one(plans, SHARED_VARIANCE, w, (0.0, 1.0))


@pytest.mark.parametrize("w", WEIGHTS)
@pytest.mark.parametrize("pair", [SHARED_VARIANCE, SHARED_MEAN], ids=["variance", "mean"])
def test_the_marginals_of_the_encoder_are_exact_at_order_one(pair: Pair, w: float) -> None:
    assert_order_one([encoder_plan(SCHEDULE, n) for n in GRIDS], pair, w, exact_moments(pair, w, 0))


@pytest.mark.parametrize("w", WEIGHTS)
@pytest.mark.parametrize("pair", [SHARED_VARIANCE, SHARED_MEAN], ids=["variance", "mean"])
def test_the_encoder_finds_the_noise_that_an_image_comes_from(pair: Pair, w: float) -> None:
    noise, (mean, spread) = np.linspace(-2, 2, 9), exact_moments(pair, w, 0)
    model, image = guided(*pair, w), mean + spread * noise
    found = [np.abs(sample(model, encoder_plan(SCHEDULE, n), image) - noise).max() for n in GRIDS]
    np.testing.assert_allclose(np.divide(found[:-1], found[1:]), 2.0, rtol=0.1)


@pytest.mark.parametrize("w", WEIGHTS)
@pytest.mark.parametrize("pair", [SHARED_VARIANCE, SHARED_MEAN], ids=["variance", "mean"])
def test_inversion_then_decoding_is_the_identity_at_order_one(pair: Pair, w: float) -> None:
    model, image = guided(*pair, w), np.linspace(-1, 1, 9)
    found = []
    for n in GRIDS:
        noise = sample(model, encoder_plan(SCHEDULE, n), image)
        found.append(np.abs(sample(model, sampler_plan(SCHEDULE, n), noise) - image).max())
    np.testing.assert_allclose(np.divide(found[:-1], found[1:]), 2.0, rtol=0.1)
