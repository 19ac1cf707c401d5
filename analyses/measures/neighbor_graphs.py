"""Whether two representations agree on the neighbors of each sample: mutual-kNN, cycle-kNN and CKNNA for all pairs.

Neighbors are searched once per representation, never per pair. The comparisons then only read the n k neighbors, so
all pairs take M^2 n k steps instead of M^2 n^2.

Source: Huh et al. 2024, "The Platonic Representation Hypothesis" (arXiv:2405.07987), which defines the measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

from layerprobe.analyses.measures.arrays import Floats
from layerprobe.analyses.measures.knn import TILE_BYTES, nearest, unit_rows
from layerprobe.analyses.measures.tensors import (
    FeatureMatrix,
    PairMatrix,
    as_tensor,
    feature_statistics,
    subtract_mean,
)

Kernel = Literal["cosine", "linear"]


@dataclass(frozen=True, eq=False)
class NeighborGraph:
    """The nearest neighbors of every sample among the other samples.

    Attributes:
        positions: Positions of the neighbors, nearest first, shape (n, k).
        similarities: Similarities of sample and neighbor, shape (n, k).
        reason: Why there are no meaningful neighbors, or "".
    """

    positions: NDArray[np.intp]
    similarities: Floats
    reason: str


def neighbor_graph(
    x: FeatureMatrix, *, k: int = 10, kernel: Kernel = "cosine", center: bool = True, tile_bytes: int = TILE_BYTES
) -> NeighborGraph:
    """Finds the k other samples with the largest inner product with each sample, exact to float64.

    Of equally similar samples the first counts as nearer, so the order of duplicates depends on the order of the data.

    Args:
        x: Features, array or tensor of shape (n, D), any dtype.
        k: Number of neighbors, in [1, n - 1].
        kernel: "cosine" divides every sample by its norm, "linear" uses it as it is, up to a common factor.
        center: Whether to subtract the mean over samples first. The paper does so in its definition but not in its
            code; choose False to follow the code.
        tile_bytes: Memory in bytes in addition to three copies of the features in float64.

    Raises:
        ValueError: If `x` is not (n, D), k is not in [1, n - 1] or the kernel is unknown.
    """
    features = as_tensor(x)
    n = len(features)
    if not 1 <= k < n:
        raise ValueError(f"k is {k} for {n} samples; pass k between 1 and {n - 1}")
    if kernel not in ("cosine", "linear"):
        raise ValueError(f"kernel {kernel!r} is not known; use 'cosine' or 'linear'")
    statistics = feature_statistics(features)
    if statistics.reason:
        return NeighborGraph(np.zeros((n, k), np.intp), np.full((n, k), np.nan), statistics.reason)
    z = subtract_mean(features, statistics.mean if center else torch.zeros_like(statistics.mean), torch.float64)
    z = unit_rows(z) if kernel == "cosine" else z / z.square().sum(1).mean().sqrt()
    return NeighborGraph(*nearest(z, None, k=k, score="inner product", tile_bytes=tile_bytes), "")


def mutual_knn(xs: Sequence[NeighborGraph], ys: Sequence[NeighborGraph] | None = None) -> PairMatrix:
    """Computes the share of neighbors that two representations have in common, averaged over samples; in [0, 1].

    Unrelated representations share k / (n - 1) on average.

    Args:
        xs: M graphs of the same samples in the same order with the same k.
        ys: M' graphs to compare them with; without them `xs` are compared with one another.

    Raises:
        ValueError: If there is no graph, or graphs disagree on n or k.
    """
    left, right = _sparse_graphs(xs, ys)
    return _matrix(_compare_all(left, right, _common_share), left, right)


def cycle_knn(xs: Sequence[NeighborGraph], ys: Sequence[NeighborGraph] | None = None) -> PairMatrix:
    """Computes the share of samples that, in representation a, are a neighbor of one of their neighbors in b.

    Values are in [0, 1]; a is the row and b the column, and the matrix is not symmetric.

    Args:
        xs: M graphs of the same samples in the same order with the same k.
        ys: M' graphs to compare them with; without them `xs` are compared with one another.

    Raises:
        ValueError: If there is no graph, or graphs disagree on n or k.
    """
    left, right = _sparse_graphs(xs, ys)
    return _matrix(_compare_all(left, right, _returning_share), left, right)


def cknna(xs: Sequence[NeighborGraph], ys: Sequence[NeighborGraph] | None = None) -> PairMatrix:
    """Computes the centered kernel nearest-neighbor alignment: debiased CKA of kernels with common neighbors only.

    With k = n - 1 and the linear kernel it equals debiased linear CKA. As in the authors' code the masked kernels are
    not made symmetric, so the values are not quite symmetric either. Values are nan where the alignment of a
    representation with itself is estimated as 0 or less.

    Args:
        xs: M graphs of the same n >= 4 samples in the same order with the same k >= 2.
        ys: M' graphs to compare them with; without them `xs` are compared with one another.

    Raises:
        ValueError: If there is no graph, graphs disagree on n or k, or k or n is too small.
    """
    left, right = _sparse_graphs(xs, ys)
    n, k = left[0].n, left[0].k
    if k < 2 or n < 4:
        raise ValueError(f"CKNNA needs k >= 2 and 4 samples or more, got k = {k} and {n} samples")
    values = _compare_all(left, right, _alignment)
    self_values = [np.array([np.nan if a.reason else _alignment(a, a) for a in side]) for side in (left, right)]
    roots = [np.sqrt(np.where(values > 1e-12, values, np.nan)) for values in self_values]
    return _matrix(values / np.outer(*roots), left, right, roots)


class SparseGraph:
    """A neighbor graph as sparse matrices of shape (n, n) with entries at (sample, neighbor)."""

    def __init__(self, graph: NeighborGraph) -> None:
        self.reason = graph.reason
        order = np.argsort(graph.positions, axis=1)
        self.n, self.k = graph.positions.shape
        self.columns = np.take_along_axis(graph.positions, order, axis=1).ravel()
        self.similarities = np.take_along_axis(graph.similarities, order, axis=1).ravel()
        self.mask = self._matrix(np.ones(self.n * self.k))

    def _matrix(self, entries: NDArray[Any]) -> Any:
        row_starts = np.arange(0, self.n * self.k + 1, self.k)
        return csr_array((entries, self.columns, row_starts), shape=(self.n, self.n))

    @cached_property
    def transposed_mask(self) -> Any:
        """Sparse matrix with 1 at (neighbor, sample)."""
        return self.mask.T.tocsr()

    @cached_property
    def numbers(self) -> Any:
        """Sparse matrix with 1, 2, ... at the entries in order; its product with a mask shows the remaining entries."""
        return self._matrix(np.arange(1.0, self.n * self.k + 1))

    @cached_property
    def mutual_similarities(self) -> Floats:
        """The similarities where the sample is a neighbor of its neighbor too, else 0; shape (n k,)."""
        similarities = np.zeros(self.n * self.k)
        entries = self.numbers.multiply(self.transposed_mask).data.astype(np.intp) - 1
        similarities[entries] = self.similarities[entries]
        return similarities


def shared_entries(a: SparseGraph, b: SparseGraph) -> NDArray[np.intp]:
    """Returns which of a's n k entries, counted sample by sample, are neighbors in b too."""
    entries: NDArray[np.intp] = a.numbers.multiply(b.mask).data.astype(np.intp) - 1
    return entries


def _sparse_graphs(
    xs: Sequence[NeighborGraph], ys: Sequence[NeighborGraph] | None
) -> tuple[list[SparseGraph], list[SparseGraph]]:
    if not xs:
        raise ValueError("no graph was given; pass at least one")
    shapes = {graph.positions.shape for graph in (*xs, *(ys or ()))}
    if len(shapes) != 1:
        raise ValueError(f"graphs of (n, k) = {sorted(shapes)} cannot be compared; pass graphs of one n and one k")
    left = [SparseGraph(graph) for graph in xs]
    return left, left if ys is None else [SparseGraph(graph) for graph in ys]


def _compare_all(
    left: Sequence[SparseGraph], right: Sequence[SparseGraph], compare: Callable[[SparseGraph, SparseGraph], float]
) -> Floats:
    values = [[np.nan if a.reason or b.reason else compare(a, b) for b in right] for a in left]
    return np.array(values)


def _matrix(
    values: Floats, left: Sequence[SparseGraph], right: Sequence[SparseGraph], roots: Sequence[Floats] | None = None
) -> PairMatrix:
    reasons = [[a.reason for a in side] for side in (left, right)]
    for side, root in zip(reasons, roots or (), strict=False):
        for m in np.flatnonzero(np.isnan(root)).tolist():
            side[m] = side[m] or "its alignment with itself is estimated as 0 or less; use more samples or a larger k"
    return PairMatrix(values, tuple(reasons[0]), tuple(reasons[1]))


def _common_share(a: SparseGraph, b: SparseGraph) -> float:
    return float(a.mask.multiply(b.mask).nnz / a.mask.nnz)


def _returning_share(a: SparseGraph, b: SparseGraph) -> float:
    return float(np.mean(np.diff(b.mask.multiply(a.transposed_mask).indptr) > 0))


def _alignment(a: SparseGraph, b: SparseGraph) -> float:
    """Unbiased HSIC of the two kernels on common neighbors, up to a factor that depends on n.

    Song et al. 2012, eq. 5, for K and L with entries at common neighbors only: <K, L^T>, the sums of both, and the
    columns of K times the rows of L.
    """
    n = a.n
    in_a, in_b = shared_entries(a, b), shared_entries(b, a)
    columns = np.bincount(a.columns[in_a], a.similarities[in_a], minlength=n)
    rows = np.bincount(in_b // b.k, b.similarities[in_b], minlength=n)
    inner = a.mutual_similarities[in_a] @ b.mutual_similarities[in_b]
    return float(inner + columns.sum() * rows.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (columns @ rows))
