"""Checks and centering that the measures of NumPy arrays share.

Features are arrays of shape (n, D): one row per sample, one column per channel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Features = NDArray[Any]
Floats = NDArray[np.float64]

SPLITS = ("train", "validation", "test")
NEGLIGIBLE = 1e-12  # smaller than this, relative to the largest variance, is rounding error
NOT_FINITE = "the features hold nan or inf"
CONSTANT = "the features are the same for all samples"


def checked(x: Features, name: str = "features") -> Features:
    """Returns `x` unchanged after checking that it can be analyzed.

    Args:
        x: Features, shape (n, D).
        name: Name of the features in the error message.

    Raises:
        ValueError: If `x` is not of shape (n, D) with n, D >= 1, or holds nan or inf.
    """
    check_shape(x.shape, name)
    check_finite(int(np.count_nonzero(~np.isfinite(x))), name)
    return x


def check_shape(shape: tuple[int, ...], name: str) -> None:
    """Raises a ValueError unless `shape` is (n, D) with n, D >= 1."""
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{name} of shape {tuple(shape)} cannot be analyzed; pass samples by channels, (n, D)")


def check_finite(num_broken: int, name: str) -> None:
    """Raises a ValueError if any value is nan or inf."""
    if num_broken:
        raise ValueError(f"{name} hold {num_broken} values that are nan or inf; extract them again in float32")


def centered(x: Features) -> Floats:
    """Returns `x` minus its mean over samples, shape (n, D), in float64.

    Residual streams drift to a large mean, and products in float32 lose everything but that mean.
    """
    wide = x.astype(np.float64)
    wide -= wide.mean(axis=0)
    # The first mean has rounding errors of the size of the offset, the second of the size of the spread.
    wide -= wide.mean(axis=0)
    return wide


def unusable(x: Features) -> str:
    """Returns why samples cannot be compared by these features, or "" if they can."""
    if not np.isfinite(x).all():
        return NOT_FINITE
    return CONSTANT if (x == x[:1]).all() else ""
