"""Rows of coefficients against the formulas they came from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.sampler import (
    NO_CLIP,
    Prediction,
    Sampler,
    ancestral_step,
    deterministic_step,
    entry_point,
    plan_through,
    sampler_plan,
    stochastic_step,
)
from engines.schedule import CLEAN, NoiseSchedule, ScheduleSpec

COSINE = NoiseSchedule(ScheduleSpec())
STABLE = NoiseSchedule(ScheduleSpec(kind="scaled_linear"))

index = st.integers(0, 999)
two_falling = st.tuples(index, index).filter(lambda p: p[0] != p[1]).map(lambda p: (max(p), min(p)))
three_falling = st.lists(st.integers(-1, 999), min_size=3, max_size=3, unique=True).map(
    lambda p: tuple(sorted(p, reverse=True))
)


def output(schedule: NoiseSchedule, k: int, x: np.ndarray, eps: np.ndarray, prediction: Prediction) -> np.ndarray:
    """What a perfect network says at index k about clean x and noise eps."""
    alpha, sigma = schedule.at(k)
    return {"v_prediction": alpha * eps - sigma * x, "epsilon": eps, "sample": x}[prediction]


@given(
    st.tuples(index, index).filter(lambda p: p[0] != p[1]), st.sampled_from(["v_prediction", "epsilon", "sample"])
)
def test_a_perfect_network_moves_along_its_own_line_either_way(
    pair: tuple[int, int], prediction: Prediction
) -> None:
    t, s = pair
    x, eps = np.random.default_rng(0).standard_normal((2, 16))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = STABLE.at(t), STABLE.at(s)
    x_t = alpha_t * x + sigma_t * eps
    x_s, clean = deterministic_step(STABLE, t, s, prediction).apply(x_t, output(STABLE, t, x, eps, prediction))
    np.testing.assert_allclose(x_s, alpha_s * x + sigma_s * eps, atol=1e-10)
    np.testing.assert_allclose(clean, x, atol=1e-10)


@given(two_falling, st.sampled_from(["v_prediction", "epsilon", "sample"]))
def test_an_ancestral_step_draws_from_the_forward_process_posterior(
    pair: tuple[int, int], prediction: Prediction
) -> None:
    """Ho et al. 2020, eq. 7, for a perfect network."""
    t, s = pair
    x, eps, fresh = np.random.default_rng(0).standard_normal((3, 16))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = STABLE.at(t), STABLE.at(s)
    x_t = alpha_t * x + sigma_t * eps
    step = ancestral_step(STABLE, t, s, prediction)
    x_s, _ = step.apply(x_t, output(STABLE, t, x, eps, prediction), fresh)
    kept = alpha_t / alpha_s
    beta = 1 - kept**2
    mean = (alpha_s * beta * x + kept * sigma_s**2 * x_t) / sigma_t**2
    np.testing.assert_allclose(x_s, mean + np.sqrt(beta) * sigma_s / sigma_t * fresh, atol=1e-9)


def test_at_zero_snr_an_ancestral_step_is_the_consistency_samplers() -> None:
    t, s = COSINE.grid(4)[4], COSINE.grid(4)[3]
    mine, theirs = ancestral_step(COSINE, t, s).row, stochastic_step(COSINE, t, CLEAN, s).row
    np.testing.assert_allclose(mine, theirs, atol=1e-7)


@given(st.tuples(index, index).filter(lambda p: p[0] != p[1]))
def test_encoding_and_decoding_with_a_perfect_network_is_the_identity(pair: tuple[int, int]) -> None:
    s, t = pair
    x, eps = np.random.default_rng(0).standard_normal((2, 16))
    alpha, sigma = COSINE.at(s)
    x_s = alpha * x + sigma * eps
    x_t, _ = deterministic_step(COSINE, s, t).apply(x_s, output(COSINE, s, x, eps, "v_prediction"))
    back, _ = deterministic_step(COSINE, t, s).apply(x_t, output(COSINE, t, x, eps, "v_prediction"))
    np.testing.assert_allclose(back, x_s, atol=1e-12)


def test_the_first_encoding_step_keeps_its_digits_in_float32() -> None:
    steep = NoiseSchedule(ScheduleSpec(log_snr_min=-20, log_snr_max=20))
    x, eps = np.random.default_rng(0).standard_normal((2, 64))
    alpha, sigma = steep.at(0)
    x_0, v = alpha * x + sigma * eps, alpha * eps - sigma * x
    step = deterministic_step(steep, 0, 124)
    exact, _ = step.apply(x_0, v)
    single, _ = step.apply(x_0.astype(np.float32), v.astype(np.float32))
    np.testing.assert_allclose(single, exact, rtol=0, atol=1e-6)


@given(three_falling)
def test_stochastic_noise_is_exactly_the_missing_variance(triple: tuple[int, int, int]) -> None:
    """With clean x and noise eps known exactly, a stochastic step ends at alpha_s·x plus variance sigma_s²."""
    t, s, k = triple
    c = stochastic_step(COSINE, t, k, s).coefficients
    alpha_t, sigma_t = COSINE.at(t)
    (alpha_k, sigma_k), (alpha_s, sigma_s) = COSINE.at(k), COSINE.at(s)
    of_x, of_eps = c.a * alpha_t - c.d * sigma_t, c.a * sigma_t + c.d * alpha_t
    np.testing.assert_allclose(of_x, alpha_s, atol=1e-12)
    np.testing.assert_allclose(of_eps**2 + c.c**2, sigma_s**2, atol=1e-12)
    forward = 1 - (alpha_s * sigma_k / (alpha_k * sigma_s)) ** 2  # 1 - exp(lambda_s - lambda_k)
    np.testing.assert_allclose(c.c, sigma_s * np.sqrt(forward), atol=1e-7)
    assert (c.e, c.f) == (alpha_s, sigma_s)


def test_two_stochastic_steps_are_consistency_multistep_sampling() -> None:
    z, noise = np.random.default_rng(0).standard_normal((2, 64))

    def network(x: np.ndarray, k: int) -> np.ndarray:
        return np.tanh(x + k / 1000)

    plan = sampler_plan(COSINE, 2, "stochastic")
    x, _ = plan.steps[0].apply(z, network(z, 999), noise)
    x, _ = plan.steps[1].apply(x, network(x, 499))
    alpha, sigma = COSINE.at(499)
    clean = -network(z, 999)  # x̂ = alpha·z - sigma·v at alpha = 0
    middle = alpha * clean + sigma * noise
    np.testing.assert_allclose(x, alpha * middle - sigma * network(middle, 499), atol=1e-12)


@pytest.mark.parametrize("sampler", ["deterministic", "stochastic"])
@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "sample"])
def test_clipped_rows_equal_unclipped_rows_where_nothing_clips(sampler: Sampler, prediction: Prediction) -> None:
    z, out, noise = np.random.default_rng(0).standard_normal((3, 64))
    free = sampler_plan(STABLE, 8, sampler, prediction)
    clipped = sampler_plan(STABLE, 8, sampler, prediction, clip=1e6)
    for one, other in zip(free, clipped, strict=True):
        assert one.coefficients.r == NO_CLIP
        assert other.coefficients.d == 0
        for a, b in zip(one.apply(z, out, noise), other.apply(z, out, noise), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10)


def test_a_clipped_row_bounds_its_clean_estimate_and_uses_it() -> None:
    z, out = 3 * np.random.default_rng(0).standard_normal((2, 64))
    step = deterministic_step(COSINE, 749, 499, clip=1.0)
    x_s, clean = step.apply(z, out)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = COSINE.at(749), COSINE.at(499)
    expected = np.clip(alpha_t * z - sigma_t * out, -1, 1)
    np.testing.assert_allclose(clean, expected, atol=1e-12)
    np.testing.assert_allclose(x_s, alpha_s * expected + sigma_s * (z - alpha_t * expected) / sigma_t, atol=1e-12)


@given(two_falling)
def test_a_clipped_row_never_encodes(pair: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must not clip"):
        deterministic_step(COSINE, pair[1], pair[0], clip=1.0)


@given(st.integers(1, 64), st.sampled_from(["deterministic", "stochastic"]))
def test_a_plan_walks_its_grid_and_ends_clean(n: int, sampler: Sampler) -> None:
    plan = sampler_plan(COSINE, n, sampler)
    grid = COSINE.grid(n)
    assert plan.timesteps == grid[:0:-1]
    assert [step.target for step in plan] == list(grid[-2::-1])
    last = plan.steps[-1]
    assert last.target == CLEAN
    assert not last.stochastic
    assert (last.coefficients.e, last.coefficients.f) == (1, 0)
    x, v = np.random.default_rng(0).standard_normal((2, 4))
    x_s, clean = last.apply(x, v)
    np.testing.assert_allclose(x_s, clean, atol=1e-15)


@given(st.integers(1, 64), st.data())
def test_a_plan_entered_midway_is_the_tail_of_the_whole(n: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(1, n))
    assert sampler_plan(COSINE, n, start=start).steps == sampler_plan(COSINE, n).steps[n - start :]


@pytest.mark.parametrize("sampler", ["deterministic", "stochastic", "consistency", "ancestral"])
def test_a_plan_goes_through_points_of_its_own(sampler: Sampler) -> None:
    """Those of LCM's four steps, which are no grid of the schedule."""
    plan = plan_through(COSINE, (999, 759, 499, 259), sampler)
    assert plan.timesteps == (999, 759, 499, 259)
    assert [step.target for step in plan] == [759, 499, 259, CLEAN]
    levels = [(step.coefficients.e, step.coefficients.f) for step in plan]
    assert levels == [COSINE.at(759), COSINE.at(499), COSINE.at(259), (1, 0)]
    assert plan_through(COSINE, plan.timesteps, sampler, start=3).steps == plan.steps[1:]


@pytest.mark.parametrize("timesteps", [(499, 749), (499, 499), (1000, 499), (499, -1)])
def test_points_that_do_not_fall_within_the_table_are_refused(timesteps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="from at most 999 to at least 0"):
        plan_through(COSINE, timesteps)


@given(st.integers(1, 64), st.floats(1e-6, 1.0))
def test_strength_enters_at_a_trained_point_no_noisier_than_asked(n: int, strength: float) -> None:
    point = entry_point(n, strength)
    assert 1 <= point <= n
    assert point <= max(1.0, strength * n)


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="zero SNR"):
        sampler_plan(COSINE, 4, prediction="epsilon")
    with pytest.raises(ValueError, match="start"):
        sampler_plan(COSINE, 4, start=5)
    with pytest.raises(ValueError, match="strength"):
        entry_point(4, 0.0)
