"""The stage-two target: three algebraically equal forms, and the one that keeps its digits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.sampler import Composition, Prediction, compose, deterministic_step
from engines.schedule import CLEAN, NoiseSchedule, ScheduleSpec

COSINE = NoiseSchedule(ScheduleSpec(timesteps=1024))
BOUNDED = NoiseSchedule(ScheduleSpec(timesteps=1024, log_snr_min=-20, log_snr_max=20))
STABLE = NoiseSchedule(ScheduleSpec(kind="scaled_linear"))

triples = st.integers(0, 1021).flatmap(
    lambda s: st.integers(s + 1, 1022).flatmap(
        lambda m: st.integers(m + 1, 1023).map(lambda t: (t, m, s)),
    )
)


def composition(schedule: NoiseSchedule, t: int, m: int, s: int, prediction: Prediction) -> Composition:
    return compose(
        deterministic_step(schedule, t, m, prediction),
        deterministic_step(schedule, m, s, prediction),
        deterministic_step(schedule, t, s, prediction),
    )


def target(weights: Composition, z: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return weights.x * z + weights.first * first + weights.second * second


def two_teacher_steps(schedule: NoiseSchedule, t: int, m: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random teacher outputs along t → m, in all three predictions: z and x1, e1, v1, x2, e2, v2."""
    z, v1, v2 = np.random.default_rng(seed).standard_normal((3, 16))
    z2, _ = deterministic_step(schedule, t, m).apply(z, v1)
    (a1, s1), (a2, s2) = schedule.at(t), schedule.at(m)
    return {
        "z": z, "v1": v1, "x1": a1 * z - s1 * v1, "e1": s1 * z + a1 * v1,
        "v2": v2, "x2": a2 * z2 - s2 * v2, "e2": s2 * z2 + a2 * v2,
    }  # fmt: skip


@given(triples)
def test_compose_equals_the_closed_weights_of_every_form(triple: tuple[int, int, int]) -> None:
    t, m, s = triple
    t, m, s = min(t, 1000), min(m, 999), min(s, 998)  # away from alpha = 0
    kappa = np.tan(COSINE.angles)
    rho = 1 / kappa
    one, two = COSINE.angle(t) - COSINE.angle(m), COSINE.angle(m) - COSINE.angle(s)
    expected = {
        "sample": (0, (rho[m] - rho[t]) / (rho[s] - rho[t]), (rho[s] - rho[m]) / (rho[s] - rho[t])),
        "epsilon": (
            0,
            (kappa[t] - kappa[m]) / (kappa[t] - kappa[s]),
            (kappa[m] - kappa[s]) / (kappa[t] - kappa[s]),
        ),
        "v_prediction": (
            -np.sin(one) * np.sin(two) / np.sin(one + two),
            np.sin(one) * np.cos(two) / np.sin(one + two),
            np.sin(two) / np.sin(one + two),
        ),
    }
    for prediction, weights in expected.items():
        got = composition(COSINE, t, m, s, prediction)  # type: ignore[arg-type]
        np.testing.assert_allclose((got.x, got.first, got.second), weights, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", [COSINE, BOUNDED, STABLE])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 16, 32, 64])
def test_the_three_forms_agree_away_from_the_endpoints(schedule: NoiseSchedule, steps: int) -> None:
    fine = schedule.grid(2 * steps)
    for i in range(2, steps):
        t, m, s = fine[2 * i], fine[2 * i - 1], fine[2 * i - 2]
        o = two_teacher_steps(schedule, t, m, seed=i)
        alpha, sigma = schedule.at(t)
        v = target(composition(schedule, t, m, s, "v_prediction"), o["z"], o["v1"], o["v2"])
        x = target(composition(schedule, t, m, s, "sample"), o["z"], o["x1"], o["x2"])
        e = target(composition(schedule, t, m, s, "epsilon"), o["z"], o["e1"], o["e2"])
        np.testing.assert_allclose((alpha * o["z"] - x) / sigma, v, rtol=0, atol=1e-12)
        np.testing.assert_allclose((e - sigma * o["z"]) / alpha, v, rtol=0, atol=1e-12 / alpha**2)


@pytest.mark.parametrize("steps", [1, 2, 8, 64, 512])
def test_v_form_keeps_six_digits_in_float32_up_to_both_endpoints(steps: int) -> None:
    fine = COSINE.grid(2 * steps)
    for i in {1, steps // 2 + 1, steps}:
        t, m, s = fine[2 * i], fine[2 * i - 1], fine[2 * i - 2]
        weights = composition(COSINE, t, m, s, "v_prediction")
        o = two_teacher_steps(COSINE, t, m)
        exact = target(weights, o["z"], o["v1"], o["v2"])
        single = target(weights, *(o[k].astype(np.float32) for k in ("z", "v1", "v2")))
        assert single.dtype == np.float32
        np.testing.assert_allclose(single, exact, rtol=0, atol=1e-6)


@given(triples)
def test_one_composed_step_lands_where_two_steps_do(triple: tuple[int, int, int]) -> None:
    t, m, s = triple
    o = two_teacher_steps(COSINE, t, m)
    z2, _ = deterministic_step(COSINE, t, m).apply(o["z"], o["v1"])
    z3, _ = deterministic_step(COSINE, m, s).apply(z2, o["v2"])
    student = target(composition(COSINE, t, m, s, "v_prediction"), o["z"], o["v1"], o["v2"])
    landed, _ = deterministic_step(COSINE, t, s).apply(o["z"], student)
    np.testing.assert_allclose(landed, z3, rtol=0, atol=1e-11)


@given(triples, st.sampled_from(["x", "e"]))
def test_a_teacher_constant_in_x_or_epsilon_is_its_own_target(triple: tuple[int, int, int], kind: str) -> None:
    t, m, s = triple
    z, constant = np.random.default_rng(1).standard_normal((2, 16))
    (a1, s1), (a2, s2) = COSINE.at(t), COSINE.at(m)
    if kind == "e" and a1 == 0:
        return  # epsilon says nothing about x at alpha = 0

    def v(z_t: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
        return (alpha * z_t - constant) / sigma if kind == "x" else (constant - sigma * z_t) / alpha

    first = v(z, a1, s1)
    z2, _ = deterministic_step(COSINE, t, m).apply(z, first)
    got = target(composition(COSINE, t, m, s, "v_prediction"), z, first, v(z2, a2, s2))
    np.testing.assert_allclose(got, first, rtol=1e-9, atol=1e-9)


def test_a_teacher_constant_in_v_is_not_its_own_target() -> None:
    t, m, s = COSINE.grid(2)[::-1]
    z, v = np.random.default_rng(1).standard_normal((2, 16))
    got = target(composition(COSINE, t, m, s, "v_prediction"), z, v, v)
    assert np.abs(got - v).max() > 0.1


def test_the_target_of_the_last_step_is_the_second_teachers_clean_estimate() -> None:
    t, m, s = COSINE.grid(64)[2], COSINE.grid(64)[1], CLEAN
    o = two_teacher_steps(COSINE, t, m)
    weights = composition(COSINE, t, m, s, "sample")
    np.testing.assert_allclose(target(weights, o["z"], o["x1"], o["x2"]), o["x2"], atol=1e-12)
    v = target(composition(COSINE, t, m, s, "v_prediction"), o["z"], o["v1"], o["v2"])
    _, clean = deterministic_step(COSINE, t, s).apply(o["z"], v)
    np.testing.assert_allclose(clean, o["x2"], atol=1e-12)


def test_compose_refuses_steps_that_do_not_meet_or_clip() -> None:
    good = deterministic_step(COSINE, 900, 500)
    whole = deterministic_step(COSINE, 900, 100)
    with pytest.raises(ValueError, match="meet"):
        compose(good, deterministic_step(COSINE, 499, 100), whole)
    with pytest.raises(ValueError, match="unclipped"):
        compose(good, deterministic_step(COSINE, 500, 100, clip=1.0), whole)
