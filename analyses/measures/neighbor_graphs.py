"""Whether two representations agree on who is whose neighbor: mutual-kNN, cycle-kNN and CKNNA for all pairs.

Neighbors are searched for once per representation, never per pair; the comparisons then only look at the n k
neighbors, so all pairs take M^2 n k steps and not M^2 n^2.

Source: Huh et al. 2024, "The Platonic Representation Hypothesis" (arXiv:2405.07987), whose definitions these are.
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
from layerprobe.analyses.measures.tensors import FeatureMatrix, PairMatrix, as_tensor, centered, centering

Kernel = Literal["cosine", "linear"]


@dataclass(frozen=True, eq=False)
class NeighborGraph:
    """The nearest neighbors of every sample among the others.

    Attributes:
        positions: Nearest first, shape (n, k).
        similarities: Of sample and neighbor, shape (n, k).
        reason: Why there are no meaningful neighbors, or "".
    """

    positions: NDArray[np.intp]
    similarities: Floats
    reason: str


def neighbor_graph(
    x: FeatureMatrix, *, k: int = 10, kernel: Kernel = "cosine", center: bool = True, tile_bytes: int = TILE_BYTES
) -> NeighborGraph:
    """The k samples with the largest inner product with each sample, itself excepted, exact to float64.

    Of equally similar samples the first is nearer, so duplicates have an order of their own in shuffled data.

    Args:
        x: Features, array or tensor of shape (n, D), any dtype.
        k: Number of neighbors, in [1, n - 1].
        kernel: "cosine" divides every sample by its norm, "linear" takes it as it is, up to a common factor.
        center: Subtract the mean over samples first. The paper does in its definition, its code does not; for that
            choose False.
        tile_bytes: Memory beside three copies of the features in float64.

    Raises:
        ValueError: If `x` is not (n, D), k is not in [1, n - 1] or the kernel is not known.
    """
    features = as_tensor(x)
    n = len(features)
    if not 1 <= k < n:
        raise ValueError(f"k is {k} for {n} samples; pass k between 1 and {n - 1}")
    if kernel not in ("cosine", "linear"):
        raise ValueError(f"kernel {kernel!r} is not known; use 'cosine' or 'linear'")
    known = centering(features)
    if known.reason:
        return NeighborGraph(np.zeros((n, k), np.intp), np.full((n, k), np.nan), known.reason)
    z = centered(features, known.mean if center else torch.zeros_like(known.mean), torch.float64)
    z = unit_rows(z) if kernel == "cosine" else z / z.square().sum(1).mean().sqrt()
    return NeighborGraph(*nearest(z, None, k=k, score="inner product", tile_bytes=tile_bytes), "")


def mutual_knn(xs: Sequence[NeighborGraph], ys: Sequence[NeighborGraph] | None = None) -> PairMatrix:
    """The share of neighbors that two representations have in common, averaged over samples; in [0, 1].

    Unrelated representations share k / (n - 1) on average.

    Args:
        xs: M graphs of the same samples in the same order with the same k.
        ys: M' more to compare them with; without them `xs` are compared with one another.

    Raises:
        ValueError: If there is no graph, or they disagree on n or k.
    """
    left, right = _sides(xs, ys)
    return _matrix(_compared(left, right, _common_share), left, right)


def cycle_knn(xs: Sequence[NeighborGraph], ys: Sequence[NeighborGraph] | None = None) -> PairMatrix:
    """The share of samples that, in representation a, are a neighbor of one of their neighbors in b; in [0, 1].

    Row a, column b; not symmetric. Arguments and errors as for `mutual_knn`.
    """
    left, right = _sides(xs, ys)
    return _matrix(_compared(left, right, _returning_share), left, right)


def cknna(xs: Sequence[NeighborGraph], ys: Sequence[NeighborGraph] | None = None) -> PairMatrix:
    """Centered kernel nearest-neighbor alignment: debiased CKA of kernels that keep common neighbors only.

    With k = n - 1 and the linear kernel it is debiased linear CKA. As in the authors' code the masked kernels are not
    made symmetric, so the values are not quite symmetric either. nan where the alignment of a representation with
    itself is estimated as 0 or less.

    Args:
        xs: As in `mutual_knn`, like `ys`; k >= 2 and n >= 4.
        ys: The second set, if any.

    Raises:
        ValueError: As `mutual_knn`, or if k or n is too small.
    """
    left, right = _sides(xs, ys)
    n, k = left[0].n, left[0].k
    if k < 2 or n < 4:
        raise ValueError(f"CKNNA needs k >= 2 and 4 samples or more, got k = {k} and {n} samples")
    values = _compared(left, right, _alignment)
    own = [np.array([np.nan if a.reason else _alignment(a, a) for a in side]) for side in (left, right)]
    roots = [np.sqrt(np.where(values > 1e-12, values, np.nan)) for values in own]
    return _matrix(values / np.outer(*roots), left, right, roots)


class SparseGraph:
    """A graph as matrices of shape (n, n) that hold something at (sample, neighbor) and nothing elsewhere."""

    def __init__(self, graph: NeighborGraph) -> None:
        self.reason = graph.reason
        order = np.argsort(graph.positions, axis=1)
        self.n, self.k = graph.positions.shape
        self.columns = np.take_along_axis(graph.positions, order, axis=1).ravel()
        self.similarities = np.take_along_axis(graph.similarities, order, axis=1).ravel()
        self.marks = self._matrix(np.ones(self.n * self.k))

    def _matrix(self, entries: NDArray[Any]) -> Any:
        starts = np.arange(0, self.n * self.k + 1, self.k)
        return csr_array((entries, self.columns, starts), shape=(self.n, self.n))

    @cached_property
    def back(self) -> Any:
        """1 at (neighbor, sample)."""
        return self.marks.T.tocsr()

    @cached_property
    def numbers(self) -> Any:
        """1, 2, ... at the entries in their order: products with 0 and 1 then say which entries are left."""
        return self._matrix(np.arange(1.0, self.n * self.k + 1))

    @cached_property
    def returned(self) -> Floats:
        """The similarities, where the sample is a neighbor of its neighbor too, else 0; shape (n k,)."""
        kept = np.zeros(self.n * self.k)
        where = self.numbers.multiply(self.back).data.astype(np.intp) - 1
        kept[where] = self.similarities[where]
        return kept


def _sides(
    xs: Sequence[NeighborGraph], ys: Sequence[NeighborGraph] | None
) -> tuple[list[SparseGraph], list[SparseGraph]]:
    if not xs:
        raise ValueError("no graph was given; pass at least one")
    shapes = {graph.positions.shape for graph in (*xs, *(ys or ()))}
    if len(shapes) != 1:
        raise ValueError(f"graphs of (n, k) = {sorted(shapes)} cannot be compared; pass graphs of one n and one k")
    left = [SparseGraph(graph) for graph in xs]
    return left, left if ys is None else [SparseGraph(graph) for graph in ys]


def _compared(
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
    return float(a.marks.multiply(b.marks).nnz / a.marks.nnz)


def _returning_share(a: SparseGraph, b: SparseGraph) -> float:
    return float(np.mean(np.diff(b.marks.multiply(a.back).indptr) > 0))


def _alignment(a: SparseGraph, b: SparseGraph) -> float:
    """Unbiased HSIC of the two kernels on common neighbors, but for a factor of n.

    Song et al. 2012, eq. 5, for K and L with entries at common neighbors only: <K, L^T>, the sums of both, and the
    columns of K against the rows of L.
    """
    n = a.n
    in_a, in_b = shared_entries(a, b), shared_entries(b, a)
    columns = np.bincount(a.columns[in_a], a.similarities[in_a], minlength=n)
    rows = np.bincount(in_b // b.k, b.similarities[in_b], minlength=n)
    inner = a.returned[in_a] @ b.returned[in_b]
    return float(inner + columns.sum() * rows.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (columns @ rows))


def shared_entries(a: SparseGraph, b: SparseGraph) -> NDArray[np.intp]:
    """Which of a's neighbors, counted sample by sample, are b's too."""
    entries: NDArray[np.intp] = a.numbers.multiply(b.marks).data.astype(np.intp) - 1
    return entries
