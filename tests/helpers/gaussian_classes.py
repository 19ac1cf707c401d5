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


def sklearn_fit(x: Array, y: Array, inverse_penalty: float, solver: str = "newton-cg") -> LogisticRegression:
    with warnings.catch_warnings():
        # At this tolerance its line search may end in rounding error, and then warns; the optimum is reached all the
        # same.
        warnings.simplefilter("ignore")
        return LogisticRegression(C=inverse_penalty, solver=solver, tol=1e-11, max_iter=5000).fit(x, y)


def searched(x: Array, y: Array, held_x: Array, held_y: Array) -> tuple[LogisticRegression, float]:
    """scikit-learn's model of the best C, and its accuracy on held-out samples, over the search of probes.

    C from 1e-3 to 1; the smallest of the best ones. Then by decades until two on either side are no better.
    """
    solver = "newton-cholesky"  # a hundred times as fast as newton-cg under a weak penalty
    decades = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6]
    models: dict[int, LogisticRegression] = {}
    scores: dict[int, float] = {}

    def score(i: int) -> float:
        models[i] = sklearn_fit(x, y, decades[i], solver)
        scores[i] = float(models[i].score(held_x, held_y))
        return scores[i]

    best = max(range(3, 7), key=score)  # the first of equal ones
    for step, limit in ((1, len(decades)), (-1, -1)):
        edge = max(scores) if step == 1 else min(scores)
        while scores[best] < 1 and abs(edge - best) < 2 and edge + step != limit:
            edge += step
            best = edge if score(edge) > scores[best] else best
    return models[best], scores[best]


def digits() -> tuple[Array, Array]:
    data = load_digits()
    return data.data, data.target
