"""Nearest neighbours: how well the labels of a sample's neighbours in feature space predict its own.

It needs no optimisation, so it is the check that a probe's ranking of layers is not the solver's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from layerprobe.analyses.arrays import Features, Floats, checked

Metric = Literal["cosine", "euclidean"]
TILE_BYTES = 16 * 2**20


@dataclass(frozen=True, eq=False)
class KnnResult:
    """What the nearest neighbours predict.

    Attributes:
        accuracy: Fraction correct.
        correct: Per sample, shape (n_query,), bool.
        k: Number of neighbours.
        metric: "cosine" or "euclidean".
    """

    accuracy: float
    correct: NDArray[np.bool_]
    k: int
    metric: Metric


def knn_accuracy(
    bank_x: Features,
    bank_y: NDArray[Any],
    query_x: Features,
    query_y: NDArray[Any],
    *,
    k: int = 10,
    metric: Metric = "cosine",
    tile_bytes: int = TILE_BYTES,
) -> KnnResult:
    """Accuracy of the majority vote of the k nearest neighbours.

    Every neighbour has one vote; of equally common labels the smallest wins, as in
    `sklearn.neighbors.KNeighborsClassifier`. Of neighbours at exactly the same distance the one that stands first in
    the bank is nearer.

    Features are centred on the mean of the bank before cosines are taken: all samples share most of a residual
    stream, and cosines of the raw features are all close to 1. Euclidean distances do not change by it, but keep
    their digits.

    Args:
        bank_x: Features whose labels vote, shape (n_bank, D), any float dtype; computed in float64.
        bank_y: Their labels, shape (n_bank,).
        query_x: Features to classify, shape (n_query, D).
        query_y: Their labels, shape (n_query,).
        k: Number of neighbours.
        metric: "cosine" or "euclidean".
        tile_bytes: Size of the tile of distances in memory; a tile has at least one query.

    Raises:
        ValueError: If features and labels disagree, bank and queries differ in D, features are not finite, k is not
            in [1, n_bank], or the metric is not known.
    """
    _check(bank_x, bank_y, query_x, query_y, k)
    classes, targets = np.unique(bank_y, return_inverse=True)
    tiles = nearest(bank_x, query_x, k=k, metric=metric, tile_bytes=tile_bytes)
    predicted = np.concatenate([classes[_majority(targets[neighbours], len(classes))] for neighbours in tiles])
    correct = predicted == query_y
    return KnnResult(float(correct.mean()), correct, k, metric)


def nearest(
    bank_x: Features, query_x: Features, *, k: int, metric: Metric, tile_bytes: int = TILE_BYTES
) -> Iterator[NDArray[np.intp]]:
    """Positions in the bank of the k nearest neighbours in ascending order, as tiles of shape (queries, k)."""
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric {metric!r} is not known; use 'cosine' or 'euclidean'")
    mean = bank_x.mean(axis=0, dtype=np.float64)
    bank = _prepared(bank_x - mean, metric)
    half_squares = np.square(bank).sum(axis=1) / 2
    rows = max(1, tile_bytes // (8 * len(bank)))
    for start in range(0, len(query_x), rows):
        queries = _prepared(query_x[start : start + rows] - mean, metric)
        # Half the squared distance, without the query's own part, which its neighbours have in common.
        distances = queries @ bank.T
        np.subtract(half_squares, distances, out=distances)
        yield _smallest(distances, k)


def _check(bank_x: Features, bank_y: NDArray[Any], query_x: Features, query_y: NDArray[Any], k: int) -> None:
    for name, x, y in (("bank", bank_x, bank_y), ("query", query_x, query_y)):
        checked(x, f"{name} features")
        if y.shape != x.shape[:1]:
            raise ValueError(f"{len(x)} {name} samples but labels of shape {y.shape}; pass one label per sample")
    if bank_x.shape[1] != query_x.shape[1]:
        widths = f"{bank_x.shape[1]} features in the bank, {query_x.shape[1]} in the queries"
        raise ValueError(f"{widths}; pass the same layer")
    if not 1 <= k <= len(bank_x):
        raise ValueError(f"k is {k}, but the bank has {len(bank_x)} samples; pass k between 1 and that")


def _prepared(x: Floats, metric: Metric) -> Floats:
    if metric == "euclidean":
        return x
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    # A sample at the mean has no direction; at the origin it is equally far from all.
    return x / np.where(norms == 0, 1, norms)


def _smallest(distances: Floats, k: int) -> NDArray[np.intp]:
    """Columns of the k smallest entries of each row; of equal entries the first columns. Shape (rows, k)."""
    limit = np.partition(distances, k - 1, axis=1)[:, k - 1 : k]
    taken = distances <= limit
    for row in np.flatnonzero(np.count_nonzero(taken, axis=1) > k):
        tied = np.flatnonzero(distances[row] == limit[row])
        surplus = np.count_nonzero(taken[row]) - k
        taken[row, tied[len(tied) - surplus :]] = False
    columns: NDArray[np.intp] = np.flatnonzero(taken) % distances.shape[1]
    return columns.reshape(len(distances), k)


def _majority(labels: NDArray[np.intp], num_classes: int) -> NDArray[np.intp]:
    rows = np.arange(len(labels))[:, None] * num_classes
    votes = np.bincount((rows + labels).ravel(), minlength=len(labels) * num_classes)
    winners: NDArray[np.intp] = votes.reshape(-1, num_classes).argmax(axis=1)
    return winners
