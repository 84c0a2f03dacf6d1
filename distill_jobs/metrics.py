"""Measures of generated images: distance of distributions, obedience to the prompt, distance to a reference."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FRECHET_NAME = "Fréchet distance in digit-classifier features"
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
