"""The spectrum of a representation: in how many directions it varies."""

from __future__ import annotations

import numpy as np

from layerprobe.analyses.arrays import Features, Floats, centred, checked, unusable


def effective_rank(x: Features) -> float:
    """Effective rank: the exponential of the entropy of the normalised singular values of the centred features.

    At least 1, at most min(n - 1, D); nan for features that are the same for all samples. Invariant to rotation,
    isotropic scale and translation. It counts directions, whatever they carry: noise that passes through a layer
    raises it too.

    Args:
        x: Features, shape (n, D), any float dtype; computed in float64.

    Raises:
        ValueError: If features are not finite.

    Source: Roy and Vetterli 2007, The effective rank: a measure of effective dimensionality. It is RankMe
        (arXiv:2210.02885) without
    its epsilon and with the mean removed.
    """
    checked(x)
    if unusable(x):
        return float("nan")
    sigma = singular_values(x)
    p = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def singular_values(x: Features) -> Floats:
    """Singular values of the centred features, shape (min(n, D),), in descending order."""
    wide = centred(x)
    wide /= np.abs(wide).max() or 1.0  # squares of very small or large features leave the range of a float
    # Not through the covariance, whose square roots know the small values only to 1e-8 of the largest.
    triangle = np.linalg.qr(wide if len(wide) >= wide.shape[1] else wide.T, mode="r")
    return np.linalg.svd(triangle, compute_uv=False)
