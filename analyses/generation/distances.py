"""Distances between two sets of features: Fréchet distance and kernel distance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Gaussian:
    """Gaussian fitted to features.

    Attributes:
        mean: Mean, shape (D,), float64.
        covariance: Covariance, shape (D, D), float64.
        n: Number of samples.
    """

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    n: int


def gaussian(features: NDArray[np.floating]) -> Gaussian:
    """Fits a Gaussian to features.

    Args:
        features: Features, shape (n, D).

    Raises:
        ValueError: If n < 2 or a feature is not finite.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"need features of shape (n, D) with n of at least 2, got shape {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features are not finite; the samples or the extractor have diverged")
    return Gaussian(features.mean(0), np.cov(features, rowvar=False).reshape(features.shape[1], -1), len(features))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Computes the Fréchet distance |mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

    The trace of the root is computed as the sum of the singular values of S_a^(1/2) S_b^(1/2), which stays real and
    accurate when the covariances are singular.

    Args:
        a: Gaussian of one set of features.
        b: Gaussian of the other set.

    Raises:
        ValueError: If the Gaussians differ in width.

    Source: Dowson & Landau 1982; Heusel et al. 2017 (arXiv:1706.08500).
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features of width {len(a.mean)} and {len(b.mean)} cannot be compared; use one extractor for both"
        )
    mixed = np.linalg.svd(_root(a.covariance) @ _root(b.covariance), compute_uv=False)
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * mixed.sum()
    # Rounding must not make the distance negative.
    return float(max(((a.mean - b.mean) ** 2).sum() + trace, 0.0))


def leave_out_gaussians(features: NDArray[np.floating], groups: NDArray[np.integer]) -> list[Gaussian]:
    """Fits a Gaussian to the samples outside each group 0, 1, ..., in one pass over the features.

    Args:
        features: Features, shape (n, D).
        groups: Group of each sample, shape (n,); no group is empty.
    """
    # Centered first, because differences of raw second moments are inaccurate where the mean is large.
    center = features.mean(0, dtype=np.float64)
    parts = (features[groups == group] - center for group in range(int(groups.max()) + 1))
    counts, sums, moments = (np.stack(z) for z in zip(*((len(p), p.sum(0), p.T @ p) for p in parts), strict=True))
    ns, means = counts.sum() - counts, (sums.sum(0) - sums) / (counts.sum() - counts)[:, None]
    squares = moments.sum(0)
    return [
        Gaussian(center + mean, (squares - moment - n * np.outer(mean, mean)) / (n - 1), int(n))
        for n, mean, moment in zip(ns, means, moments, strict=True)
    ]


def kernel_distance(x: NDArray[np.floating], y: NDArray[np.floating], *, rows: int = 1024) -> float:
    """Computes the unbiased squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, known as KID.

    Its expectation is 0 for two sets from one distribution at any size, so single values below 0 are possible.

    Args:
        x: Features, shape (n, D), n at least 2.
        y: Features, shape (m, D), m at least 2.
        rows: Number of samples processed at a time; memory grows with rows * max(n, m).

    Raises:
        ValueError: If the shapes do not match, or a feature is not finite.

    Source: Bińkowski et al. 2018 (arXiv:1801.01401); estimator of Gretton et al. 2012.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"need features (n, D) and (m, D) of at least 2 samples, got shapes {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("features are not finite; the samples or the extractor have diverged")
    a, b = x.astype(np.float64), y.astype(np.float64)
    within = sum(
        (_kernel_sum(z, z, rows) - _kernel((z**2).sum(1), z.shape[1]).sum()) / (len(z) * (len(z) - 1)) for z in (a, b)
    )
    return float(within - 2 * _kernel_sum(a, b, rows) / (len(a) * len(b)))


def _kernel(products: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    return (products / width + 1) ** 3


def _kernel_sum(x: NDArray[np.float64], y: NDArray[np.float64], rows: int) -> float:
    """The sum of the kernel over all pairs of samples."""
    return float(sum(_kernel(x[part.start : part.stop] @ y.T, x.shape[1]).sum() for part in row_blocks(len(x), rows)))


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(covariance)
    root: NDArray[np.float64] = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root


def row_blocks(n: int, size: int) -> Iterator[range]:
    """Yields consecutive ranges of at most `size` rows that cover n rows."""
    for start in range(0, n, size):
        yield range(start, min(start + size, n))
