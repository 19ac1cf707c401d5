"""What every analysis does to its features first: check them, then center them in float64.

Features are arrays of shape (n, D): one row per sample, one column per channel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Features = NDArray[Any]
Floats = NDArray[np.float64]


def checked(x: Features, name: str = "features") -> Features:
    """`x` as given, once it is known to be usable.

    Raises:
        ValueError: If `x` is not of shape (n, D) with n, D >= 1, or holds nan or inf.
    """
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name} of shape {x.shape} cannot be analyzed; pass samples by channels, (n, D)")
    if not np.isfinite(x).all():
        broken = np.count_nonzero(~np.isfinite(x))
        raise ValueError(f"{name} hold {broken} values that are nan or inf; extract them again in float32")
    return x


def centered(x: Features) -> Floats:
    """`x` minus its mean over samples, shape (n, D), in float64.

    Residual streams drift to a large mean, and float32 loses everything but that mean in a product.
    """
    wide = x.astype(np.float64)
    wide -= wide.mean(axis=0)
    # The first mean is rounded at the size of the offset, the second at the size of the spread.
    wide -= wide.mean(axis=0)
    return wide


def unusable(x: Features) -> str:
    """Why no analysis of the differences between samples is possible, or ""."""
    if not np.isfinite(x).all():
        return "the features hold nan or inf"
    return "the features are the same for all samples" if (x == x[:1]).all() else ""
