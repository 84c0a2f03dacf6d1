"""The measures against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jobs.metrics import class_agreement, frechet_distance, paired_distance


def exact_set(mean: np.ndarray, covariance: np.ndarray, n: int = 400, seed: int = 0) -> np.ndarray:
    """(n, D) points whose sample mean and covariance are exactly these."""
    points = np.random.default_rng(seed).standard_normal((n, len(mean)))
    points -= points.mean(axis=0)
    whitened = points @ np.linalg.inv(np.linalg.cholesky(np.cov(points, rowvar=False))).T
    return whitened @ np.linalg.cholesky(covariance).T + mean


def test_commuting_gaussians_have_the_closed_form() -> None:
    one, other = np.array([4.0, 1.0, 0.25]), np.array([1.0, 9.0, 0.25])
    mean = np.array([1.0, -2.0, 0.5])
    got = frechet_distance(exact_set(np.zeros(3), np.diag(one)), exact_set(mean, np.diag(other), seed=1))
    expected = (mean**2).sum() + ((np.sqrt(one) - np.sqrt(other)) ** 2).sum()
    np.testing.assert_allclose(got, expected, rtol=1e-9)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_two_dimensional_gaussians_have_the_closed_form(seed: int) -> None:
    """tr (S1·S2)^½ = sqrt(tr S1·S2 + 2·sqrt(det S1·S2)) in two dimensions."""
    rng = np.random.default_rng(seed)
    one, other = (a @ a.T + 0.1 * np.eye(2) for a in rng.standard_normal((2, 2, 2)))
    product = one @ other
    cross = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    got = frechet_distance(exact_set(np.zeros(2), one, seed=seed), exact_set(np.ones(2), other, seed=seed + 1))
    np.testing.assert_allclose(got, 2 + np.trace(one) + np.trace(other) - 2 * cross, rtol=1e-7, atol=1e-9)


def test_a_set_is_at_no_distance_from_itself_in_any_order() -> None:
    points = np.random.default_rng(0).standard_normal((200, 16)).astype(np.float32)
    assert frechet_distance(points, points[::-1]) < 1e-9


def test_features_that_never_vary_do_no_harm() -> None:
    points = np.random.default_rng(0).standard_normal((200, 6))
    points[:, 3:] = 0
    assert frechet_distance(points, points) < 1e-9
    assert np.isfinite(frechet_distance(points, np.zeros_like(points)))


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_distance_is_symmetric_and_unmoved_by_rotation_and_shift(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = rng.standard_normal((50, 5)), 2 * rng.standard_normal((60, 5)) + 1
    rotation, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    plain = frechet_distance(one, other)
    np.testing.assert_allclose(frechet_distance(other, one), plain, rtol=1e-9)
    np.testing.assert_allclose(frechet_distance(one @ rotation + 3, other @ rotation + 3), plain, rtol=1e-8)


@pytest.mark.parametrize("shape", [(1, 4), (4,)])
def test_too_few_features_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="features must be"):
        frechet_distance(np.zeros(shape), np.zeros((5, 4)))


def test_agreement_and_paired_distance() -> None:
    assert class_agreement(np.array([1, 2, 3, 3]), np.array([1, 2, 3, 4])) == 0.75
    images = np.zeros((3, 1, 8, 8), np.float32)
    assert paired_distance(images, images) == 0
    np.testing.assert_allclose(paired_distance(images, images + 0.25), 0.25)
