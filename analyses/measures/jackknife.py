"""Numbers with their uncertainty: what each sample adds to an estimate, and the interval that follows from it.

An estimate is a smooth function of the samples' distribution, so to first order it is its value plus the mean of one
number per sample, its influence. Influences of the same samples subtract and average as the estimates do: the interval
of a difference between two layers, or of a mean over noise levels, then takes into account that the same samples stand
in both. A sample brings the noise it was given along, so resampling samples resamples the noise too.

This is the infinitesimal jackknife (for CKA and CKNNA the jackknife that leaves one sample out, in closed form); the
bootstrap would need hundreds of decompositions where one is enough, and it puts samples in twice, which ranks and
nearest neighbors notice. The intervals cover which samples were looked at, not which ones a probe was fitted on.

Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 11 and 21.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerprobe.analyses.measures.arrays import Features, Floats, centered
from layerprobe.analyses.measures.neighbor_graphs import NeighborGraph, SparseGraph, shared_entries
from layerprobe.analyses.measures.spectrum import EPSILON

Z95 = 1.959963985  # of the normal distribution
_NEGLIGIBLE = 1e-12  # of the largest eigenvalue: what is below is rounding error


@dataclass(frozen=True, eq=False)
class Estimate:
    """One number or an array of them, all from the same n samples.

    Attributes:
        value: Shape (...).
        influence: By sample, of mean 0, in units of the value, shape (..., n).
    """

    value: Floats
    influence: Floats

    def __getitem__(self, index: Any) -> Estimate:
        """Some of the numbers; the index is of the leading axes."""
        return Estimate(self.value[index], self.influence[index])

    def __sub__(self, other: Estimate) -> Estimate:
        """Differences, paired by sample."""
        return Estimate(self.value - other.value, self.influence - other.influence)

    def mean(self, axis: int = 0) -> Estimate:
        """Averages over one of the leading axes, whose entries are of the same samples."""
        return Estimate(self.value.mean(axis), self.influence.mean(axis))

    def log(self) -> Estimate:
        """Of positive numbers."""
        return Estimate(np.log(self.value), self.influence / self.value[..., None])

    @property
    def half_width(self) -> Floats:
        """Of the 95 % interval, shape (...)."""
        n = self.influence.shape[-1]
        width: Floats = Z95 * np.sqrt(np.square(self.influence).sum(-1) / (n * (n - 1)))
        return width


def stacked(parts: Sequence[Estimate]) -> Estimate:
    """Estimates of equal shape side by side, along a new first axis."""
    return Estimate(np.stack([part.value for part in parts]), np.stack([part.influence for part in parts]))


def mean_estimate(scores: Floats) -> Estimate:
    """The mean over samples of scores (..., n)."""
    value = scores.mean(-1)
    return Estimate(value, scores - value[..., None])


def ratio_estimate(numerator: Floats, denominator: Floats) -> Estimate:
    """The ratio of two sums over samples, both of terms (..., n)."""
    total = denominator.sum(-1)
    value = numerator.sum(-1) / total
    n = numerator.shape[-1]
    return Estimate(value, n * (numerator - value[..., None] * denominator) / total[..., None])


def effective_rank_estimate(x: Features) -> Estimate:
    """The effective rank of features (n, D), as `spectrum.effective_rank` has it.

    An eigenvalue of the covariance moves by `(u x_i)^2 - eigenvalue` with the weight of sample i.
    """
    wide = centered(x / np.float64(np.abs(x).max()))
    variances, axes = np.linalg.eigh(wide.T @ wide / len(wide))
    kept = variances > _NEGLIGIBLE * variances[-1]
    roots = np.sqrt(variances[kept])
    rank, slopes = _exponential_entropy(roots)
    moved = np.square(wide @ axes[:, kept]) - variances[kept]
    return Estimate(np.array(rank), moved @ (slopes / (2 * roots)))


def lidar_estimate(x: Features, *, ridge: float = 1e-4) -> Estimate:
    """Noise-LiDAR less what noise alone gives, of features (n, draws, D), as `spectrum.Lidar.debiased_rank` has it.

    1 where nothing is left: there is no direction in which samples differ more than noise moves them.
    """
    n, draws, width = x.shape
    wide = centered(x.reshape(-1, width) / np.float64(np.abs(x).max())).reshape(x.shape)
    means = wide.mean(axis=1)
    inner = wide - means[:, None]
    flat = inner.reshape(-1, width)
    within, axes = np.linalg.eigh(flat.T @ flat / (n * (draws - 1)))
    within = np.maximum(within, 0)
    floor = ridge * np.median(within[within > _NEGLIGIBLE * within[-1]])
    whitening = axes / np.sqrt(within + floor)
    whitened = means @ whitening
    between, directions = np.linalg.eigh(whitened.T @ whitened / (n - 1))
    left = np.maximum(between - 1 / draws, 0)
    if not left.any():
        return Estimate(np.array(1.0), np.zeros(n))
    rank, slopes = _exponential_entropy(left, epsilon=EPSILON)
    moved = np.square(whitened @ directions)
    noise = np.square(inner @ (whitening @ directions)).sum(1) / (draws - 1)
    return Estimate(np.array(rank), (moved - moved.mean(0) - between * (noise - noise.mean(0))) @ slopes)


def cka_estimates(xs: Sequence[Features]) -> Estimate:
    """Debiased linear CKA of all pairs of M representations of n samples, shape (M, M), as `cka_matrix` has it.

    HSIC (Song et al. 2012, eq. 5) without sample i follows from the Gram matrices' row sums. Memory is M n^2 numbers.
    """
    grams = np.stack([_gram(x) for x in xs])
    n, rows, totals = grams.shape[1], grams.sum(2), grams.sum((1, 2))
    by_sample = grams.transpose(1, 0, 2)
    products = np.matmul(by_sample, by_sample.transpose(0, 2, 1)).transpose(1, 2, 0)  # (M, M, n)
    crossed = np.matmul(grams, rows.T).transpose(0, 2, 1)  # [a, b, i]: row i of K_a with the row sums of K_b
    inner, linked = products.sum(2), rows @ rows.T
    hsic = _unbiased(inner, totals[:, None] * totals, linked, n)
    short = totals[:, None] - 2 * rows
    without = _unbiased(
        inner[:, :, None] - 2 * products,
        short[:, None] * short,
        linked[:, :, None] - rows[:, None] * rows - crossed - crossed.transpose(1, 0, 2) + products,
        n - 1,
    )
    return _jackknifed(_correlation(hsic[:, :, None])[:, :, 0], _correlation(without))


def cknna_estimates(graphs: Sequence[NeighborGraph]) -> Estimate:
    """CKNNA of all pairs of M neighbor graphs of the same n samples, shape (M, M), as `neighbors.cknna` has it.

    Where two samples are neighbors of each other, both of them count it. So a sample is left out of the rows alone
    (who still has it as a neighbor finds another one instead), and the influences are those times the root of 2: each
    of the pairs that they sum over stands in two of them.
    """
    sides = [SparseGraph(graph) for graph in graphs]
    num, n = len(sides), sides[0].n
    hsic, without = np.empty((num, num)), np.empty((num, num, n))
    for a, left in enumerate(sides):
        for b, right in enumerate(sides[a:], a):
            inner, columns, rows = _common_neighbors(left, right)
            totals, linked = columns.sum() * rows, columns * rows
            hsic[a, b] = hsic[b, a] = _unbiased(inner.sum(), totals.sum(), linked.sum(), n)
            share = _unbiased(inner, totals + columns * rows.sum(), linked, n)
            without[a, b] = without[b, a] = hsic[a, b] - share
    found = _jackknifed(_correlation(hsic[:, :, None])[:, :, 0], _correlation(without))
    return Estimate(found.value, np.sqrt(2) * found.influence)


def _common_neighbors(left: SparseGraph, right: SparseGraph) -> tuple[Floats, Floats, Floats]:
    """By sample: products of the similarities to common neighbors, column sums of one and row sums of the other."""
    n, in_left, in_right = left.n, shared_entries(left, right), shared_entries(right, left)
    inner = _summed(in_left // left.k, left.returned[in_left] * right.returned[in_right], n)
    columns = _summed(left.columns[in_left], left.similarities[in_left], n)
    return inner, columns, _summed(in_right // right.k, right.similarities[in_right], n)


def _summed(places: Any, values: Floats, n: int) -> Floats:
    """Sums of the values that belong to each of n places."""
    return np.bincount(places, values, minlength=n).astype(np.float64)


def _gram(x: Features) -> Floats:
    """Of centered features of mean square norm 1, its diagonal set to 0."""
    wide = centered(x / np.float64(np.abs(x).max() or 1))
    gram = wide @ wide.T
    scale = np.trace(gram) / len(gram)
    np.fill_diagonal(gram, 0)
    scaled: Floats = gram / (scale or np.nan)
    return scaled


def _unbiased(inner: Any, totals: Any, linked: Any, n: int) -> Any:
    """HSIC but for a factor of n, from <K, L>, the product of their sums and that of their row sums."""
    return inner + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * linked


def _correlation(hsic: Floats) -> Floats:
    """HSICs (M, M, k) divided by the roots of those of the representations with themselves."""
    own = hsic[np.arange(len(hsic)), np.arange(len(hsic))]
    roots = np.sqrt(np.where(own > 0, own, np.nan))
    values: Floats = hsic / (roots[:, None] * roots)
    return values


def _jackknifed(value: Floats, without: Floats) -> Estimate:
    """From the value and the values without each sample."""
    return Estimate(value, (without.shape[-1] - 1) * (without.mean(-1, keepdims=True) - without))


def _exponential_entropy(values: Floats, epsilon: float = 0.0) -> tuple[float, Floats]:
    """Exponential of the entropy of the normalized values, and its derivative by each value that is not 0."""
    p = values / values.sum()
    some = p[p + epsilon > 0] + epsilon
    rank = float(np.exp(-(some * np.log(some)).sum()))
    logarithms = np.log(np.where(p > 0, p, 1))
    slopes = rank / values.sum() * (-logarithms + (p * logarithms).sum())
    return rank, np.where(p > 0, slopes, 0)
