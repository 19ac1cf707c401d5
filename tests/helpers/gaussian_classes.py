"""Gaussian classes, and their logistic regression by scikit-learn at its optimum."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

Array = NDArray[Any]


def clouds(
    seed: int,
    *,
    n: int = 300,
    width: int = 12,
    num_classes: int = 4,
    distance: float = 1.5,
    centers: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Gaussian classes on ill-conditioned axes: features, labels, class centers."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(num_classes, width)) * distance if centers is None else centers
    y = rng.integers(0, num_classes, n)
    x = (rng.normal(size=(n, width)) + centers[y]) * np.arange(1, width + 1) ** -1.5
    return x, y, centers


def sklearn_fit(x: Array, y: Array, inverse_penalty: float) -> LogisticRegression:
    with warnings.catch_warnings():
        # At this tolerance its line search may end in rounding error, and then warns; the optimum is reached all the
        # same.
        warnings.simplefilter("ignore")
        return LogisticRegression(C=inverse_penalty, solver="newton-cg", tol=1e-11, max_iter=5000).fit(x, y)


def digits() -> tuple[Array, Array]:
    data = load_digits()
    return data.data, data.target
