"""Estimates with their uncertainty: the influence of each sample on an estimate, and the interval it implies.

An estimate is a smooth function of the samples' distribution, so to first order it is its value plus the mean of one
number per sample, its influence. Influences of the same samples can be subtracted and averaged like the estimates. So
the interval of a difference between two layers, or of a mean over noise levels, takes into account that both use the
same samples. The influence of a sample includes the noise that was drawn for it.

This is the infinitesimal jackknife (for CKA and CKNNA the leave-one-out jackknife, in closed form). A bootstrap
(`scipy.stats.bootstrap`) would need hundreds of decompositions instead of one, and it repeats samples, which biases
ranks and nearest neighbors. The intervals cover the choice of the evaluated samples, not of those that a probe was
fitted on.

Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 11 and 21.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerprobe.analyses.measures.arrays import NEGLIGIBLE, Features, Floats, centered
from layerprobe.analyses.measures.neighbor_graphs import NeighborGraph, SparseGraph, shared_entries
from layerprobe.analyses.measures.spectra import EPSILON, exponential_entropy, whiten_draws

Z95 = 1.959963985  # 97.5 % quantile of the standard normal distribution


@dataclass(frozen=True, eq=False)
class Estimate:
    """One number or an array of numbers, all estimated from the same n samples.

    Attributes:
        value: Estimated values, shape (...).
        influence: Influence of each sample, of mean 0, in units of the value, shape (..., n).
    """

    value: Floats
    influence: Floats

    def __getitem__(self, index: Any) -> Estimate:
        """Selects some of the numbers by an index of the leading axes."""
        return Estimate(self.value[index], self.influence[index])

    def __sub__(self, other: Estimate) -> Estimate:
        """Computes differences, paired by sample."""
        return Estimate(self.value - other.value, self.influence - other.influence)

    def mean(self, axis: int = 0) -> Estimate:
        """Averages over one of the leading axes, whose entries are from the same samples."""
        return Estimate(self.value.mean(axis), self.influence.mean(axis))

    def log(self) -> Estimate:
        """Computes logarithms of positive numbers."""
        return Estimate(np.log(self.value), self.influence / self.value[..., None])

    @property
    def half_width(self) -> Floats:
        """Half width of the 95 % interval, shape (...)."""
        n = self.influence.shape[-1]
        width: Floats = Z95 * np.sqrt(np.square(self.influence).sum(-1) / (n * (n - 1)))
        return width


def stacked(parts: Sequence[Estimate]) -> Estimate:
    """Stacks estimates of equal shape along a new first axis."""
    return Estimate(np.stack([part.value for part in parts]), np.stack([part.influence for part in parts]))


def mean_estimate(scores: Floats) -> Estimate:
    """Estimates the mean over samples of scores (..., n)."""
    value = scores.mean(-1)
    return Estimate(value, scores - value[..., None])


def ratio_estimate(numerator: Floats, denominator: Floats) -> Estimate:
    """Estimates the ratio of two sums over samples, both of terms (..., n)."""
    total = denominator.sum(-1)
    value = numerator.sum(-1) / total
    n = numerator.shape[-1]
    return Estimate(value, n * (numerator - value[..., None] * denominator) / total[..., None])


def effective_rank_estimate(x: Features) -> Estimate:
    """Estimates the effective rank of features (n, D), with the value of `effective_rank`.

    The influence of sample i on an eigenvalue of the covariance with eigenvector u is `(u x_i)^2 - eigenvalue`.
    """
    wide = centered(x / np.float64(np.abs(x).max()))
    if len(wide) < wide.shape[1]:  # in coordinates of the directions that the samples span
        triangle: Any = np.linalg.qr(wide.T, mode="r")
        wide = triangle.T
    variances, axes = np.linalg.eigh(wide.T @ wide / len(wide))
    is_positive = variances > NEGLIGIBLE * variances[-1]
    variances, axes = variances[is_positive], axes[:, is_positive]
    roots = np.sqrt(variances)
    rank = exponential_entropy(roots)
    variance_changes = np.square(wide @ axes) - variances
    return Estimate(np.array(rank), variance_changes @ (_entropy_slopes(roots, rank) / (2 * roots)))


def lidar_estimate(x: Features, *, ridge: float = 1e-4) -> Estimate:
    """Estimates the debiased LiDAR rank of features (n, draws, D), with the value of `Lidar.debiased_rank`.

    The value is 1 if there is no direction in which samples differ more than their noise draws.

    Args:
        x: Features, shape (n, draws, D).
        ridge: Ridge added to the variances between draws, as in `lidar`.
    """
    n, num_draws, _ = x.shape
    deviations, means, whitening = whiten_draws(x, ridge)
    whitened = means @ whitening
    eigenvalues, directions = np.linalg.eigh(whitened.T @ whitened / (n - 1))
    excess = np.maximum(eigenvalues - 1 / num_draws, 0)
    if not excess.any():
        return Estimate(np.array(1.0), np.zeros(n))
    rank = exponential_entropy(excess, epsilon=EPSILON)
    between = np.square(whitened @ directions)
    within = np.square(deviations @ (whitening @ directions)).sum(1) / (num_draws - 1)
    changes = between - between.mean(0) - eigenvalues * (within - within.mean(0))
    return Estimate(np.array(rank), changes @ _entropy_slopes(excess, rank))


def cka_estimates(xs: Sequence[Features]) -> Estimate:
    """Estimates debiased linear CKA of all pairs of M representations, shape (M, M), with the values of `cka_matrix`.

    HSIC (Song et al. 2012, eq. 5) without sample i follows from the Gram matrices' row sums. Memory is M n^2 numbers.

    Args:
        xs: M representations of the same n samples, shape (n, D_m).
    """
    grams = np.stack([_gram(x) for x in xs])
    n, rows, totals = grams.shape[1], grams.sum(2), grams.sum((1, 2))
    by_sample = grams.transpose(1, 0, 2)
    products = np.matmul(by_sample, by_sample.transpose(0, 2, 1)).transpose(1, 2, 0)  # (M, M, n)
    crossed = np.matmul(grams, rows.T).transpose(0, 2, 1)  # [a, b, i]: row i of K_a times the row sums of K_b
    inner, row_products = products.sum(2), rows @ rows.T
    hsic = _unbiased_hsic(inner, totals[:, None] * totals, row_products, n)
    totals_without = totals[:, None] - 2 * rows
    hsic_without = _unbiased_hsic(
        inner[:, :, None] - 2 * products,
        totals_without[:, None] * totals_without,
        row_products[:, :, None] - rows[:, None] * rows - crossed - crossed.transpose(1, 0, 2) + products,
        n - 1,
    )
    return _jackknifed(_normalized(hsic[:, :, None])[:, :, 0], _normalized(hsic_without))


def cknna_estimates(graphs: Sequence[NeighborGraph]) -> Estimate:
    """Estimates CKNNA of all pairs of M neighbor graphs of the same samples, shape (M, M), with the values of `cknna`.

    A sample is left out of the rows only, since those that have it as a neighbor would find another one instead. Each
    of the pairs that an influence sums over belongs to two samples, so influences are multiplied by the root of 2.
    """
    sides = [SparseGraph(graph) for graph in graphs]
    num, n = len(sides), sides[0].n
    hsic, hsic_without = np.empty((num, num)), np.empty((num, num, n))
    for a, left in enumerate(sides):
        for b, right in enumerate(sides[a:], a):
            inner, columns, rows = _common_neighbors(left, right)
            totals, row_products = columns.sum() * rows, columns * rows
            hsic[a, b] = hsic[b, a] = _unbiased_hsic(inner.sum(), totals.sum(), row_products.sum(), n)
            share = _unbiased_hsic(inner, totals + columns * rows.sum(), row_products, n)
            hsic_without[a, b] = hsic_without[b, a] = hsic[a, b] - share
    estimate = _jackknifed(_normalized(hsic[:, :, None])[:, :, 0], _normalized(hsic_without))
    return Estimate(estimate.value, np.sqrt(2) * estimate.influence)


def _common_neighbors(left: SparseGraph, right: SparseGraph) -> tuple[Floats, Floats, Floats]:
    """By sample: products of the similarities to common neighbors, column sums of one and row sums of the other."""
    n, in_left, in_right = left.n, shared_entries(left, right), shared_entries(right, left)
    products = left.mutual_similarities[in_left] * right.mutual_similarities[in_right]
    inner = _sums_by_sample(in_left // left.k, products, n)
    columns = _sums_by_sample(left.columns[in_left], left.similarities[in_left], n)
    return inner, columns, _sums_by_sample(in_right // right.k, right.similarities[in_right], n)


def _sums_by_sample(samples: Any, values: Floats, n: int) -> Floats:
    return np.bincount(samples, values, minlength=n).astype(np.float64)


def _gram(x: Features) -> Floats:
    """Gram matrix of centered features of mean square norm 1, with its diagonal set to 0."""
    wide = centered(x / np.float64(np.abs(x).max() or 1))
    gram = wide @ wide.T
    scale = np.trace(gram) / len(gram)
    np.fill_diagonal(gram, 0)
    scaled: Floats = gram / (scale or np.nan)
    return scaled


def _unbiased_hsic(inner: Any, totals: Any, row_products: Any, n: int) -> Any:
    """HSIC up to a factor that depends on n, from <K, L>, the product of their sums and that of their row sums."""
    return inner + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * row_products


def _normalized(hsic: Floats) -> Floats:
    """HSICs (M, M, k) divided by the roots of those of the representations with themselves."""
    self_hsic = hsic[np.arange(len(hsic)), np.arange(len(hsic))]
    roots = np.sqrt(np.where(self_hsic > 0, self_hsic, np.nan))
    values: Floats = hsic / (roots[:, None] * roots)
    return values


def _jackknifed(value: Floats, values_without: Floats) -> Estimate:
    """Estimate from the value and the values without each sample."""
    num_others = values_without.shape[-1] - 1
    return Estimate(value, num_others * (values_without.mean(-1, keepdims=True) - values_without))


def _entropy_slopes(values: Floats, rank: float) -> Floats:
    """Derivative of the exponential entropy with respect to each value; 0 for values that are 0."""
    p = values / values.sum()
    logarithms = np.log(np.where(p > 0, p, 1))
    slopes = rank / values.sum() * (-logarithms + (p * logarithms).sum())
    return np.where(p > 0, slopes, 0)
