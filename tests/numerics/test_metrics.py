"""The measures against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jobs.metrics import class_agreement, coverage, frechet_distance, paired_distance, precision_recall


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


def clusters(centres: list[float], per_cluster: int, seed: int) -> np.ndarray:
    """(n, 4) points in tight clusters far apart along the first axis."""
    rng = np.random.default_rng(seed)
    points = [rng.uniform(-1, 1, (per_cluster, 4)) + centre * np.eye(4)[0] for centre in centres]
    return np.concatenate(points)


def test_a_set_that_equals_the_real_one_is_wholly_precise_and_diverse() -> None:
    points = np.random.default_rng(0).standard_normal((1200, 8)).astype(np.float32)
    assert precision_recall(points, points[::-1]) == (1.0, 1.0)
    assert coverage(points, points[::-1]) == 1.0


def test_a_set_far_from_the_real_one_has_neither() -> None:
    real = clusters([0], 100, 0)
    assert precision_recall(real, real + 1000) == (0.0, 0.0)
    assert coverage(real, real + 1000) == 0.0


def test_dropped_modes_cost_recall_and_coverage_but_no_precision() -> None:
    real = clusters([0, 100, 200, 300], 100, 0)
    generated = real[:100]
    precision, recall = precision_recall(real, generated)
    assert precision == 1.0
    assert recall == 0.25
    assert coverage(real, generated) == 0.25


def test_modes_that_are_not_real_cost_precision_alone() -> None:
    real = clusters([0, 100], 100, 0)
    generated = np.concatenate([real, clusters([500, 600], 100, 1)])
    precision, recall = precision_recall(real, generated)
    assert precision == 0.5
    assert recall == 1.0
    assert coverage(real, generated) == 1.0


def test_one_image_repeated_covers_little() -> None:
    real = clusters([0, 100], 100, 0)
    generated = np.repeat(real[:1], 50, axis=0)
    precision, recall = precision_recall(real, generated)
    assert precision == 1.0
    assert recall == 1 / 200  # the image itself
    assert coverage(real, generated) < 0.2


def test_far_outliers_raise_recall_and_leave_coverage() -> None:
    """The case that coverage was made for: an outlier's ball reaches over all of the data."""
    real = clusters([0], 200, 0)
    outliers = 1000 * np.concatenate([np.eye(4), -np.eye(4)])
    _, recall = precision_recall(real, outliers)
    assert recall == 1.0
    assert coverage(real, outliers) == 0.0


@given(st.integers(0, 1000), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_manifold_measures_follow_their_definitions(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    real, generated = rng.standard_normal((12, 3)), rng.standard_normal((9, 3)) + 0.5

    def radius(points: np.ndarray, i: int) -> float:
        return float(sorted(np.linalg.norm(points[i] - p) for j, p in enumerate(points) if j != i)[k - 1])

    def inside(point: np.ndarray, points: np.ndarray) -> bool:
        return any(np.linalg.norm(point - p) <= radius(points, i) for i, p in enumerate(points))

    covered = [min(np.linalg.norm(r - g) for g in generated) <= radius(real, i) for i, r in enumerate(real)]
    expected = np.mean([inside(g, real) for g in generated]), np.mean([inside(r, generated) for r in real])
    np.testing.assert_allclose(precision_recall(real, generated, k), expected)
    np.testing.assert_allclose(coverage(real, generated, k), np.mean(covered))


def test_too_few_features_for_their_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="n above 3"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
