"""Measures of generated images: distance of distributions, diversity, obedience, distance to a reference."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PRECISION_RECALL_K = 3
COVERAGE_K = 5
ROWS_AT_ONCE = 1000
Floats = NDArray[np.floating]


def frechet_distance(one: Floats, other: Floats) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the Gaussians fitted to two feature sets, in float64.

    one, other: (n, D) features, n at least 2. The trace of (S1·S2)^½ is taken from the eigenvalues of the
    symmetric S1^½·S2·S1^½, which stay real and non-negative where S1·S2's do not.
    Biased upwards by 1/n: compare only equal counts. Source: Heusel et al. 2017; Dowson & Landau 1982.
    """
    mean_1, cov_1 = _moments(one)
    mean_2, cov_2 = _moments(other)
    values, vectors = np.linalg.eigh(cov_1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = root @ cov_2 @ root
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0)).sum()
    distance = ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * cross
    return max(float(distance), 0.0)


def precision_recall(real: Floats, generated: Floats, k: int = PRECISION_RECALL_K) -> tuple[float, float]:
    """(precision, recall) of generated features against real ones, both (n, D), n above k.

    A set's manifold is the union of balls around its points, each reaching its k-th nearest neighbour in the
    set. Precision: share of generated points on the real manifold. Recall: share of real points on the
    generated one, so what is never drawn lowers it. Depends on both counts. Source: Kynkäänniemi et al. 2019.
    """
    precision = _nearest_excess(generated, real, _squared_radii(real, k)) <= 0
    recall = _nearest_excess(real, generated, _squared_radii(generated, k)) <= 0
    return float(precision.mean()), float(recall.mean())


def coverage(real: Floats, generated: Floats, k: int = COVERAGE_K) -> float:
    """Share of real points whose k-nearest-neighbour ball holds a generated one; both (n, D), real n above k.

    Its balls are those of the real set alone, so outliers among the generated do not raise it as they raise
    recall. Source: Naeem et al. 2020.
    """
    nearest = _nearest_excess(real, generated, np.zeros(len(generated)))
    return float((nearest <= _squared_radii(real, k)).mean())


def class_agreement(predicted: NDArray[np.int64], prompted: NDArray[np.int64]) -> float:
    """Fraction of images that the classifier takes for the class they were asked to be."""
    return float((predicted == prompted).mean())


def paired_distance(images: Floats, reference: Floats) -> float:
    """Root mean square pixel difference of images from the same noise, in units of the -1 … 1 range."""
    return float(np.sqrt(((images.astype(np.float64) - reference.astype(np.float64)) ** 2).mean()))


def _moments(features: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(D,) mean and (D, D) covariance."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be (n, D) with n at least 2, not {features.shape}")
    wide = features.astype(np.float64)
    return wide.mean(axis=0), np.atleast_2d(np.cov(wide, rowvar=False))


def _squared_radii(points: Floats, k: int) -> NDArray[np.float64]:
    """(n,) squared distance of each point to its k-th nearest other point."""
    if points.ndim != 2 or len(points) <= k:
        raise ValueError(f"features must be (n, D) with n above {k}, not {points.shape}")
    radii = np.empty(len(points))
    for first in range(0, len(points), ROWS_AT_ONCE):
        block = _squared_distances(points[first : first + ROWS_AT_ONCE], points)
        rows = np.arange(len(block))
        block[rows, first + rows] = np.inf
        radii[first : first + len(block)] = np.partition(block, k - 1, axis=1)[:, k - 1]
    return radii


def _nearest_excess(points: Floats, centres: Floats, squared_radii: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) smallest squared distance to a centre minus that centre's squared radius; at most 0 inside a ball."""
    blocks = (points[first : first + ROWS_AT_ONCE] for first in range(0, len(points), ROWS_AT_ONCE))
    return np.concatenate([(_squared_distances(b, centres) - squared_radii).min(axis=1) for b in blocks])


def _squared_distances(one: Floats, other: Floats) -> NDArray[np.float64]:
    """(n, m) squared distances in float64, about a common centre so that little is lost to cancellation."""
    centre = other.mean(axis=0, dtype=np.float64)
    a, b = one - centre, other - centre
    squared = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.asarray(np.maximum(squared, 0))
