"""Centered kernel alignment (CKA) of representations, linear or RBF, for all pairs at once or from batches.

The biased estimator of CKA calls unrelated features similar if there are more channels than samples (0.9 at 32
samples). The debiased one is 0 on average for unrelated features, and therefore sometimes slightly negative; it is
not clipped.

A set of M representations is compared with itself (layers, noise levels), or with a second set of the same samples in
the same order (another checkpoint, an external encoder).

Sources: CKA, Kornblith et al. 2019 (arXiv:1905.00414); unbiased HSIC, Song et al. 2012, eq. 5; as "debiased CKA",
Nguyen et al. 2021 (arXiv:2010.15327).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from layerprobe.analyses.measures.arrays import NOT_FINITE
from layerprobe.analyses.measures.gram_products import (
    TILE_BYTES,
    FeatureSet,
    GramSums,
    Progress,
    Share,
    Work,
    feature_products,
    gram_products,
    num_multiplications,
    symmetric,
)
from layerprobe.analyses.measures.tensors import FeatureMatrix, PairMatrix, as_tensor, centered_with_mean, num_samples

Kernel = Literal["linear", "rbf"]
Estimator = Literal["debiased", "biased"]
Precision = Literal["auto", "float32", "float64"]

# With fewer multiplications than this, float64 takes less than a second.
_CHEAP_MULTIPLICATIONS = 2e10

_TOO_FEW = "the similarity of the features with themselves is estimated as 0 or less; more samples are needed"


def linear_cka(x: FeatureMatrix, y: FeatureMatrix, *, estimator: Estimator = "debiased") -> float:
    """Computes linear CKA between two sets of features of the same samples.

    Invariant to rotation, isotropic scale and translation of either input. 1 means equal up to those; with the
    debiased estimator, slightly negative values are possible for unrelated features. nan if either input is constant
    over samples or not finite.

    Args:
        x: Features, shape (n, d1), any dtype.
        y: Features of the same n samples in the same order, shape (n, d2).
        estimator: "debiased" or "biased".

    Raises:
        ValueError: If the inputs disagree on n, or n < 4 (the debiased estimator divides by n - 3; biased, n < 2).
    """
    return float(cka_matrix([x], [y], estimator=estimator).values[0, 0])


def cka_matrix(
    xs: Sequence[FeatureMatrix],
    ys: Sequence[FeatureMatrix] | None = None,
    *,
    kernel: Kernel = "linear",
    estimator: Estimator = "debiased",
    bandwidth: float = 1.0,
    precision: Precision = "auto",
    tile_bytes: int = TILE_BYTES,
    progress: Progress | None = None,
    share: Share = map,
) -> PairMatrix:
    """Computes CKA of all pairs of representations.

    Linear CKA uses whichever of two exact ways has fewer multiplications, with W the sum of all widths: inner
    products of Gram matrices, n^2 (W + M^2), or norms of cross-covariances, n W^2; symmetry halves both.

    Products are in float32 where float64 would take more than about a second. The features are centered first, as
    accurately as in float64, the sums of a product run over at most 8192 terms, and everything after the products is
    in float64; on features of trained networks the result is within 1e-7 of float64. Products are in float64 where
    debiasing would lose a digit or more (more channels than samples, or a few samples that outweigh all others).

    Memory is at most 1.5 `tile_bytes` plus about two representations. Unless all representations fit into half of
    `tile_bytes`, each is read from its sequence again for every tile, so a sequence may read from disk.

    Args:
        xs: M arrays or tensors of shape (n, D_m) of the same n samples in the same order, any dtype.
        ys: M' representations of the same samples to compare `xs` with; without them `xs` are compared with one
            another.
        kernel: "linear", or "rbf": exp(-d^2 / (2 s^2)) of the distance d between two samples, always in float64.
        estimator: "debiased" or "biased".
        bandwidth: Bandwidth s of the RBF kernel, in units of the (lower) median of the distances between two different
            samples of the representation; above 2048 samples the median is over about that many, evenly spaced.
        precision: Precision of the products of linear CKA: "float32", "float64", or "auto" as above.
        tile_bytes: Memory in bytes, as above. The median of the RBF kernel may take another 150 MB.
        progress: Called with (steps done, steps in all).
        share: Computes the statistics of the representations, and the tiles. Processes that share them all get the
            result, the same bits as of one.

    Returns:
        CKA by pair, symmetric for one set. Debiased values are at most 1 on average, but single ones may exceed 1.

    Raises:
        ValueError: If there is no representation, representations disagree on n, n is too small (4 for "debiased",
            else 2), an option is unknown or the bandwidth is not positive.
    """
    _check_options(kernel, estimator, precision, bandwidth)
    n = num_samples(xs, 4 if estimator == "debiased" else 2, f"{estimator} CKA")
    left = FeatureSet(xs, n, share=share)
    right = left if ys is None else FeatureSet(ys, n, "of the second set ", share)
    by_gram, by_features = num_multiplications(left, right)
    dtype = torch.float64
    if kernel == "rbf":
        for side in {left, right}:
            side.set_bandwidths(bandwidth)
    elif precision == "float32" or (precision == "auto" and min(by_gram, by_features) > _CHEAP_MULTIPLICATIONS):
        loses_digits = estimator == "debiased" and not all(side.debiasing_keeps_digits() for side in (left, right))
        dtype = torch.float64 if loses_digits and precision == "auto" else torch.float32
    products = gram_products if kernel == "rbf" or by_gram < by_features else feature_products
    inner, *squares = products(left, right, Work(dtype, tile_bytes, progress, share))
    hsic = _hsic(inner, left.gram_sums, right.gram_sums, estimator, _outer)
    rounding = 1e-12 if dtype == torch.float64 else 1e-6
    roots = []
    for side, square in zip((left, right), squares, strict=True):
        self_hsic = _hsic(square, side.gram_sums, side.gram_sums, estimator, _inner)
        roots.append(_roots(self_hsic, square, rounding, side.reasons))
    values = hsic / torch.outer(*roots)
    if right is left:
        values = symmetric(values)
    return PairMatrix(values.cpu().numpy(), tuple(left.reasons), tuple(right.reasons))


class CkaSums:
    """Debiased linear CKA of representations that arrive in batches and are never in memory together.

    Unbiased HSICs of batches of b samples are added with weights b (b - 3), and their ratio is computed at the end.
    (The mean of the biased CKAs of batches is far too high: 0.92 at batch 32 where the true value is 0.28.) The
    estimate is noisier than that of `cka_matrix`, which compares every sample with every other.

    A batch of fewer than 4 samples has no unbiased HSIC: its samples join the next batch, or the last one at the end.
    Computed in float64; memory is M b^2 numbers.
    """

    def __init__(self) -> None:
        self._widths: tuple[list[int], list[int]] | None = None
        self._pending: list[Tensor] = []
        self._small: list[Tensor] = []
        self._sums: _Sums | None = None

    def update(self, xs: Sequence[FeatureMatrix], ys: Sequence[FeatureMatrix] = ()) -> None:
        """Adds the next batch.

        Args:
            xs: M arrays or tensors of shape (b, D_m) of the same b >= 1 samples, none of which was in another batch.
            ys: M' representations of the same samples, in every batch or in none.

        Raises:
            ValueError: If sizes disagree within the batch or with earlier batches.
        """
        batch = [as_tensor(x) for x in (*xs, *ys)]
        widths = [x.shape[1] for x in batch]
        if len({len(x) for x in batch}) != 1:
            raise ValueError(f"a batch has representations of {[len(x) for x in batch]} samples; pass the same samples")
        if self._widths is None:
            self._widths = widths[: len(xs)], widths[len(xs) :]
        if self._widths != (widths[: len(xs)], widths[len(xs) :]):
            raise ValueError(f"earlier batches had widths {self._widths}, this one has {widths}; pass the same layers")
        # Copied, because a caller may fill the same memory with the next batch.
        batch = _concatenated(self._small, batch) if self._small else [x.clone() for x in batch]
        if len(batch[0]) < 4:
            self._small = batch
            return
        if self._pending:
            self._sums = _add_batch(self._sums, self._pending)
        self._pending, self._small = batch, []

    def result(self) -> PairMatrix:
        """Computes CKA of all batches so far; more batches may follow.

        Without a second set, the first set is compared with itself.

        Raises:
            ValueError: If there were fewer than 4 samples in all.
        """
        if self._widths is None or not self._pending:
            raise ValueError("debiased CKA needs 4 samples or more; pass more batches")
        # A batch is pending until the next one with 4 samples or more, since smaller ones at the end join it.
        last = _concatenated(self._pending, self._small) if self._small else self._pending
        hsic, squares = _add_batch(self._sums, last)
        num_first, num_second = len(self._widths[0]), len(self._widths[1])
        first, second = slice(0, num_first), slice(num_first, None) if num_second else slice(0, num_first)
        reasons = ["" if finite else NOT_FINITE for finite in torch.isfinite(squares).tolist()]
        roots = _roots(hsic.diag(), squares, 1e-12, reasons)
        values = symmetric(hsic / torch.outer(roots, roots))[first, second]
        return PairMatrix(values.cpu().numpy(), tuple(reasons[first]), tuple(reasons[second]))


_Sums = tuple[Tensor, Tensor]  # unbiased HSICs times their weights, shape (M, M), and ||K||^2, shape (M,)


def _add_batch(sums: _Sums | None, batch: Sequence[Tensor]) -> _Sums:
    grams = torch.stack([_centered_gram(x) for x in batch])
    gram_sums = grams.diagonal(dim1=1, dim2=2), grams.new_zeros(grams.shape[:2])
    flat = grams.flatten(1)
    inner = flat @ flat.T
    hsic, squares = _hsic(inner, gram_sums, gram_sums, "debiased", _outer), inner.diag()
    return (hsic, squares) if sums is None else (sums[0] + hsic, sums[1] + squares)


def _concatenated(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(first, second, strict=True)]


def _centered_gram(x: Tensor) -> Tensor:
    wide, _ = centered_with_mean(x)
    return wide @ wide.T


def _check_options(kernel: str, estimator: str, precision: str, bandwidth: float) -> None:
    options = (
        ("kernel", kernel, ("linear", "rbf")),
        ("estimator", estimator, ("debiased", "biased")),
        ("precision", precision, ("auto", "float32", "float64")),
    )
    for name, value, choices in options:
        if value not in choices:
            raise ValueError(f"{name} {value!r} is not known; use one of {', '.join(choices)}")
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"the bandwidth is {bandwidth}; pass a positive multiple of the median distance, such as 1.0")


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.T


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def _hsic(
    inner: Tensor, left: GramSums, right: GramSums, estimator: Estimator, dot: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """HSIC up to a factor that depends on n alone, from <K_a, K_b>, diagonals and row sums.

    Song et al. 2012, eq. 5, is for Gram matrices with their diagonals set to 0.

    Args:
        inner: Inner products <K_a, K_b>, shape (M, M'), or (M,) for each with itself.
        left: Diagonals and row sums of K_a.
        right: Diagonals and row sums of K_b.
        estimator: "debiased" or "biased".
        dot: `_outer` for all pairs, `_inner` for each with itself.
    """
    n = left[0].shape[1]
    if estimator == "biased":
        sums = [row_sums for _, row_sums in (left, right)]
        totals = [rows.sum(1, keepdim=True) for rows in sums]
        return inner - 2 / n * dot(*sums) + dot(*totals) / n**2
    sums = [row_sums - diagonals for diagonals, row_sums in (left, right)]
    totals = [rows.sum(1, keepdim=True) for rows in sums]
    return inner - dot(left[0], right[0]) - 2 / (n - 2) * dot(*sums) + dot(*totals) / ((n - 1) * (n - 2))


def _roots(self_hsic: Tensor, squares: Tensor, rounding: float, reasons: list[str]) -> Tensor:
    """Roots of HSICs of representations with themselves; nan, and a reason is set, where there is none.

    With few samples the estimate of a squared norm can be negative; below `rounding` times `squares` it is rounding
    error.
    """
    has_no_reason = torch.tensor([not reason for reason in reasons], device=self_hsic.device)
    is_positive = (self_hsic > rounding * squares) & has_no_reason
    for m in torch.nonzero(~is_positive).flatten().tolist():
        reasons[m] = reasons[m] or _TOO_FEW
    return torch.where(is_positive, self_hsic, torch.nan).sqrt()
