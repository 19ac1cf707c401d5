"""Similarity of representations: CKA, linear or RBF, and Procrustes distance, for all pairs at once.

The biased estimator of CKA calls unrelated features similar when there are more channels than samples (0.9 at 32
samples). The debiased one is 0 on average for unrelated features, and therefore sometimes slightly negative; nothing
here clips it.

A set of M representations is compared with itself (layers, noise levels), or with a second set of the same samples in
the same order (another checkpoint, an outside encoder).

Sources: CKA, Kornblith et al. 2019 (arXiv:1905.00414); unbiased HSIC, Song et al. 2012, eq. 5; as "debiased CKA",
Nguyen et al. 2021 (arXiv:2010.15327); Procrustes, Ding et al. 2021 (arXiv:2108.01661).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from layerprobe.analyses.measures.tensors import FeatureMatrix, PairMatrix, as_tensor, centered, centering, num_samples
from layerprobe.progress import StepProgress

Kernel = Literal["linear", "rbf"]
Estimator = Literal["debiased", "biased"]
Precision = Literal["auto", "float32", "float64"]
Take = Callable[[int], Tensor]

TILE_BYTES = 512 * 2**20

# Fewer multiplications than this take less than a second in float64.
_FREE = 2e10
# float32 sums run over this many terms at most, float64 adds up the sums.
_FLOAT32_TERMS = 8192
# The RBF bandwidth is a median over the pairs of this many samples at most.
_MEDIAN_SAMPLES = 2048

_TOO_FEW = "the similarity of the features with themselves is estimated as 0 or less; more samples are needed"


def linear_cka(x: FeatureMatrix, y: FeatureMatrix, *, estimator: Estimator = "debiased") -> float:
    """Linear CKA between two sets of features of the same samples.

    Invariant to rotation, isotropic scale and translation of either input. 1 means equal up to those; debiased,
    slightly negative values are possible for unrelated features. nan if either is constant over samples or not finite.

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
    progress: StepProgress | None = None,
) -> PairMatrix:
    """CKA of all pairs of representations.

    Linear CKA takes whichever of two exact ways has fewer multiplications, with W the sum of all widths: inner
    products of Gram matrices, n^2 (W + M^2), or norms of cross-covariances, n W^2; symmetry halves both.

    Products are in float32 where float64 would take more than about a second. The features are centered first, as
    accurately as in float64, the sums of a product run over 8192 terms at most, and everything after the products is
    in float64; on features of trained networks the result is within 1e-7 of float64. Where debiasing would cancel a
    digit or more (more channels than samples, or a few samples that outweigh all others) products are in float64.

    Memory is at most 1.5 `tile_bytes` and about two representations. Unless all of them fit into half of `tile_bytes`,
    a representation is taken out of its sequence again for every tile, so a sequence may read from disk.

    Args:
        xs: M arrays or tensors of shape (n, D_m) of the same n samples in the same order, any dtype.
        ys: M' more, of the same samples, to compare `xs` with; without them `xs` are compared with one another.
        kernel: "linear", or "rbf": exp(-d^2 / (2 s^2)) of the distance d between two samples, always in float64.
        estimator: "debiased" or "biased".
        bandwidth: s of the RBF kernel over the (lower) median of the distances between two different samples of the
            representation; above 2048 samples the median is over about that many, evenly spaced.
        precision: "auto" as above, "float32" or "float64", of the products of linear CKA.
        tile_bytes: See above. The median of the RBF kernel may take another 150 MB.
        progress: Called with (steps done, steps in all).

    Returns:
        Values symmetric for one set. Debiased ones are at most 1 on average, not each.

    Raises:
        ValueError: If there is no representation, they disagree on n, n is too small (4 for "debiased", else 2), an
            option is not known or the bandwidth is not positive.
    """
    _check_options(kernel, estimator, precision, bandwidth)
    n = num_samples(xs, 4 if estimator == "debiased" else 2, f"{estimator} CKA")
    left = _Side(xs, n)
    right = left if ys is None else _Side(ys, n, "of the second set ")
    by_gram, by_features = _multiplications(left, right)
    dtype = torch.float64
    if kernel == "rbf":
        for side in {left, right}:
            side.set_bandwidths(bandwidth)
    elif precision == "float32" or (precision == "auto" and min(by_gram, by_features) > _FREE):
        cancels = estimator == "debiased" and not (left.keeps_digits() and right.keeps_digits())
        dtype = torch.float64 if cancels and precision == "auto" else torch.float32
    products = _gram_products if kernel == "rbf" or by_gram < by_features else _feature_products
    inner, *squares = products(left, right, dtype, tile_bytes, progress)
    hsic = _hsic(inner, left.grams, right.grams, estimator, _outer)
    rounding = 1e-12 if dtype == torch.float64 else 1e-6
    roots = []
    for side, own in zip((left, right), squares, strict=True):
        own_hsic = _hsic(own, side.grams, side.grams, estimator, _inner)
        roots.append(_roots(own_hsic, own, rounding, side.reasons))
    values = hsic / torch.outer(*roots)
    return _matrix(_symmetric(values) if right is left else values, left, right)


def procrustes_matrix(
    xs: Sequence[FeatureMatrix],
    ys: Sequence[FeatureMatrix] | None = None,
    *,
    tile_bytes: int = TILE_BYTES,
    progress: StepProgress | None = None,
) -> PairMatrix:
    """Procrustes distance of all pairs of representations: what the best rotation leaves, in [0, 2].

    Of centered features of unit Frobenius norm, ||X||^2 + ||Y||^2 - 2 ||X^T Y||_*. 0 means equal up to rotation,
    isotropic scale and translation, 2 that no direction of one goes with any of the other. Like biased CKA it calls
    unrelated features similar unless samples outnumber channels by far. In float64, about 10 D^3 for every pair.

    Args:
        xs: As in `cka_matrix`, like the other arguments.
        ys: The second set, if any.
        tile_bytes: Memory is about this and two representations.
        progress: Called with (steps done, steps in all).

    Raises:
        ValueError: If there is no representation, they disagree on n, or n < 2.
    """
    n = num_samples(xs, 2, "the Procrustes distance")
    left = _Side(xs, n)
    right = left if ys is None else _Side(ys, n, "of the second set ")
    overlap = torch.zeros(len(left.widths), len(right.widths), dtype=torch.float64)
    for a, b, product in _cross_products(left, right, torch.float64, tile_bytes, progress):
        overlap[a, b] = torch.linalg.svdvals(product).sum() / n
    if right is left:
        overlap = _symmetric(overlap)
    for side, values in ((left, overlap), (right, overlap.T)):
        for m in np.flatnonzero(side.reasons):
            values[m] = torch.nan
    return _matrix((2 - 2 * overlap).clamp_(min=0), left, right)


class CkaSums:
    """Debiased linear CKA of representations that come in batches and are never held together.

    Unbiased HSICs of batches of b samples are added up with weights b (b - 3), and their ratio is taken at the end.
    (The mean of the biased CKAs of batches is far too high: 0.92 at batch 32 where the truth is 0.28.) The estimate is
    noisier than that of `cka_matrix`, which compares every sample with every other.

    A batch of fewer than 4 samples has no unbiased HSIC: its samples join the next batch, or at the end the last one.
    Computed in float64; memory is M b^2 numbers.
    """

    def __init__(self) -> None:
        self._widths: tuple[list[int], list[int]] | None = None
        self._waiting: list[Tensor] = []
        self._small: list[Tensor] = []
        self._sums: _Sums | None = None

    def update(self, xs: Sequence[FeatureMatrix], ys: Sequence[FeatureMatrix] = ()) -> None:
        """Adds the next batch.

        Args:
            xs: M arrays or tensors of shape (b, D_m) of the same b >= 1 samples, none of which was in another batch.
            ys: M' more of the same samples, in every batch or in none.

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
        batch = _joined(self._small, batch) if self._small else [x.clone() for x in batch]
        if len(batch[0]) < 4:
            self._small = batch
            return
        if self._waiting:
            self._sums = _add(self._sums, self._waiting)
        self._waiting, self._small = batch, []

    def result(self) -> PairMatrix:
        """CKA of all batches so far, without a second set of the first with itself; more batches may follow.

        Raises:
            ValueError: If there were fewer than 4 samples in all.
        """
        if self._widths is None or not self._waiting:
            raise ValueError("debiased CKA needs 4 samples or more; pass more batches")
        # A batch waits until the next of 4 or more, in case the last one is too small for an estimate of its own.
        last = _joined(self._waiting, self._small) if self._small else self._waiting
        hsic, squares = _add(self._sums, last)
        num, others = len(self._widths[0]), len(self._widths[1])
        first, second = slice(0, num), slice(num, None) if others else slice(0, num)
        reasons = ["" if finite else "the features hold nan or inf" for finite in torch.isfinite(squares).tolist()]
        roots = _roots(hsic.diag(), squares, 1e-12, reasons)
        values = _symmetric(hsic / torch.outer(roots, roots))[first, second]
        return PairMatrix(values.cpu().numpy(), tuple(reasons[first]), tuple(reasons[second]))


_Sums = tuple[Tensor, Tensor]  # unbiased HSICs times their weights, shape (M, M), and ||K||^2, shape (M,)


def _add(sums: _Sums | None, batch: Sequence[Tensor]) -> _Sums:
    """These sums and those of one more batch."""
    grams = torch.stack([_centered_gram(x) for x in batch])
    known = grams.diagonal(dim1=1, dim2=2), grams.new_zeros(grams.shape[:2])
    flat = grams.flatten(1)
    inner = flat @ flat.T
    hsic, squares = _hsic(inner, known, known, "debiased", _outer), inner.diag()
    return (hsic, squares) if sums is None else (sums[0] + hsic, sums[1] + squares)


def _joined(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(first, second, strict=True)]


def _centered_gram(x: Tensor) -> Tensor:
    x = centered(x, centering(x).mean, torch.float64)
    return x @ x.T


def _check_options(kernel: str, estimator: str, precision: str, bandwidth: float) -> None:
    options = (
        ("kernel", kernel, ("linear", "rbf")),
        ("estimator", estimator, ("debiased", "biased")),
        ("precision", precision, ("auto", "float32", "float64")),
    )
    for name, value, known in options:
        if value not in known:
            raise ValueError(f"{name} {value!r} is not known; use one of {', '.join(known)}")
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"the bandwidth is {bandwidth}; pass a positive multiple of the median distance, such as 1.0")


class _Side:
    """One set of representations of n samples: what is known about each, and the features as they are wanted.

    Attributes:
        widths: D_m.
        reasons: Why a representation has no similarity, or "".
        diagonals: Square norms of the samples as `taker` gives them, shape (M, n), float64.
        row_sums: Of the Gram matrices, shape (M, n), float64; 0 for the linear kernel of centered features.
        exponents: -1 / (2 s^2) of the RBF kernel, shape (M, 1, 1), or None for the linear one.
    """

    def __init__(self, representations: Sequence[FeatureMatrix], n: int, which: str = "") -> None:
        self.representations = representations
        self.widths: list[int] = []
        self.reasons: list[str] = []
        self.exponents: Tensor | None = None
        self._means: list[Tensor] = []
        self._scales: list[float] = []
        diagonals = []
        for m in range(len(representations)):
            x = as_tensor(representations[m])
            if len(x) != n:
                seen = f"representation {m} {which}has {len(x)} samples, the first has {n}"
                raise ValueError(f"{seen}; pass the same samples in the same order")
            known = centering(x)
            mean_square = float(known.square_norms.mean())
            reason = known.reason
            if not reason and not 0 < mean_square < math.inf:
                reason = "the squares of the features leave the range of float64"
            self.widths.append(x.shape[1])
            self.reasons.append(reason)
            self._means.append(known.mean)
            self._scales.append(0.0 if reason else mean_square**-0.5)
            diagonals.append(torch.zeros_like(known.square_norms) if reason else known.square_norms / mean_square)
        self.diagonals = torch.stack(diagonals)
        self.row_sums = torch.zeros_like(self.diagonals)

    @property
    def n(self) -> int:
        return self.diagonals.shape[1]

    @property
    def grams(self) -> _Grams:
        diagonals = self.diagonals if self.exponents is None else torch.ones_like(self.diagonals)
        return diagonals, self.row_sums

    def keeps_digits(self) -> bool:
        """Whether debiasing leaves a tenth or more of every ||K||^2, judged by the least that ||K||^2 can be."""
        d, n = self.diagonals, self.n
        rank = torch.tensor(self.widths, device=d.device).clamp(max=n - 1)
        taken = n / (n - 2) * d.square().sum(1) - d.sum(1).square() / ((n - 1) * (n - 2))
        return bool((taken <= 0.9 * d.sum(1).square() / rank).all())

    def set_bandwidths(self, bandwidth: float) -> None:
        """Makes the kernel an RBF kernel."""
        some = slice(None, None, math.ceil(self.n / _MEDIAN_SAMPLES))
        self.exponents = torch.zeros(len(self.widths), 1, 1, dtype=torch.float64, device=self.diagonals.device)
        for m in np.flatnonzero([not reason for reason in self.reasons]).tolist():
            x, d = self._take(m, torch.float64)[some], self.diagonals[m, some]
            squares = d[:, None] + d - 2 * x @ x.T
            median = squares[torch.ones_like(squares, dtype=torch.bool).triu_(1)].median()
            if median <= 1e-12:
                self.reasons[m] = "half of the distances between samples are 0, so the RBF kernel has no bandwidth"
            else:
                self.exponents[m] = -1 / (2 * bandwidth**2 * median)

    def taker(self, dtype: torch.dtype, room: float) -> Take:
        """A function from positions to centered features of mean square norm 1; kept if all fit into `room` bytes."""
        take = partial(self._take, dtype=dtype)
        if self.n * sum(self.widths) * dtype.itemsize > room:
            return take
        return [take(m) for m in range(len(self.widths))].__getitem__

    def _take(self, m: int, dtype: torch.dtype) -> Tensor:
        x = as_tensor(self.representations[m])
        if self.reasons[m]:
            return torch.zeros_like(x, dtype=dtype)
        return centered(x, self._means[m], dtype).mul_(self._scales[m])


_Grams = tuple[Tensor, Tensor]  # what debiasing must know of Gram matrices: diagonals and row sums, shape (M, n)
_Products = tuple[Tensor, Tensor, Tensor]  # <K_a, K_b> of all pairs, ||K||^2 of the first set, of the second


def _multiplications(left: _Side, right: _Side) -> tuple[int, int]:
    """Of the two ways to the inner products of linear Gram matrices: by Gram matrices, by cross-covariances."""
    width = sum(left.widths) + (sum(right.widths) if right is not left else 0)
    gram = left.n**2 * (width + len(left.widths) * len(right.widths))
    return gram, left.n * sum(left.widths) * sum(right.widths)


def _gram_products(
    left: _Side, right: _Side, dtype: torch.dtype, tile_bytes: int, progress: StepProgress | None
) -> _Products:
    """Inner products from tiles of all Gram matrices at once; fills in the row sums of RBF kernels."""
    n, sides = left.n, [left] if right is left else [left, right]
    takers = [side.taker(dtype, tile_bytes / 2 / len(sides)) for side in sides]
    count = sum(len(side.widths) for side in sides)
    rows = int(np.clip(tile_bytes // 2 // (dtype.itemsize * count * n), 1, n))
    inner = left.diagonals.new_zeros(len(left.widths), len(right.widths))
    squares = [left.diagonals.new_zeros(len(side.widths)) for side in sides]
    # One piece of memory for all tiles: fresh pages for each would cost a fifth of the time.
    rooms = [torch.empty(len(side.widths) * rows * n, dtype=dtype, device=inner.device) for side in sides]
    for start in range(0, n, rows):
        block = slice(start, min(start + rows, n))
        tiles = [_gram_tile(*parts, block) for parts in zip(sides, takers, rooms, strict=True)]
        for column in range(0, n - start, _FLOAT32_TERMS):
            part = [tile[:, :, column : column + _FLOAT32_TERMS] for tile in tiles]
            # One product for every row of the tile, so that float32 sums stay short.
            by_row = torch.bmm(part[0].transpose(0, 1), part[-1].permute(1, 2, 0))
            inner += by_row.sum(0, dtype=torch.float64)
        if right is not left:
            for total, tile in zip(squares, tiles, strict=True):
                total += torch.linalg.vector_norm(tile, dim=(1, 2), dtype=torch.float64).square()
        if progress:
            progress(block.stop, n)
    if right is not left:
        return inner, squares[0], squares[1]
    return _symmetric(inner), inner.diag(), inner.diag()


def _gram_tile(side: _Side, take: Take, room: Tensor, block: slice) -> Tensor:
    """These rows of all Gram matrices from the diagonal on, shape (M, rows, n - start).

    What lies right of the diagonal block counts for what lies below it too, hence its factor sqrt(2).
    """
    shape = num, rows, columns = len(side.widths), block.stop - block.start, side.n - block.start
    tile = room[: num * rows * columns].view(shape)
    for m, gram in enumerate(tile):
        x = take(m)
        torch.mm(x[block], x[block.start :].T, out=gram)
    if side.exponents is not None:
        d = side.diagonals
        tile.mul_(-2).add_(d[:, block, None]).add_(d[:, None, block.start :]).mul_(side.exponents).exp_()
        side.row_sums[:, block] += tile.sum(2)
        side.row_sums[:, block.stop :] += tile[:, :, rows:].sum(1)
    tile[:, :, rows:] *= math.sqrt(2)
    return tile


def _feature_products(
    left: _Side, right: _Side, dtype: torch.dtype, tile_bytes: int, progress: StepProgress | None
) -> _Products:
    """Inner products of linear Gram matrices as ||X_a^T X_b||^2."""
    inner = left.diagonals.new_zeros(len(left.widths), len(right.widths))
    for a, b, product in _cross_products(left, right, dtype, tile_bytes, progress):
        inner[a, b] = _square_norm(product)
    if right is left:
        return _symmetric(inner), inner.diag(), inner.diag()
    return inner, _own_squares(left, dtype), _own_squares(right, dtype)


def _own_squares(side: _Side, dtype: torch.dtype) -> Tensor:
    take = side.taker(dtype, 0)
    grams = (x.T @ x if x.shape[1] < x.shape[0] else x @ x.T for x in map(take, range(len(side.widths))))
    return torch.stack([_square_norm(gram) for gram in grams])


def _square_norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm.square()


def _cross_products(
    left: _Side, right: _Side, dtype: torch.dtype, tile_bytes: int, progress: StepProgress | None
) -> Iterator[tuple[int, int, Tensor]]:
    """(a, b, X_a^T Y_b) for all pairs, for b >= a alone if both sides are the same.

    Panels of several Y side by side make the products large.
    """
    ends = np.cumsum(right.widths).tolist()
    take, take_right = left.taker(dtype, 0), right.taker(dtype, 0)
    panels = _panels(right.widths, tile_bytes // (dtype.itemsize * (left.n + max(left.widths))))
    same = right is left
    done, steps = 0, sum(stop if same else len(left.widths) for _, stop in panels)
    for start, stop in panels:
        before = ends[start] - right.widths[start]
        columns = [slice(ends[b] - right.widths[b] - before, ends[b] - before) for b in range(start, stop)]
        panel = torch.empty(left.n, columns[-1].stop, dtype=dtype, device=left.diagonals.device)
        for b in range(start, stop):
            panel[:, columns[b - start]] = take_right(b)
        for a in range(stop if same else len(left.widths)):
            own = same and a >= start
            part = columns[a - start :] if own else columns
            x = panel[:, part[0]] if own else take(a)
            product = _transposed_product(x, panel[:, part[0].start :])
            for b, column in enumerate(part, stop - len(part)):
                yield a, b, product[:, column.start - part[0].start : column.stop - part[0].start]
            done += 1
            if progress:
                progress(done, steps)


def _panels(widths: Sequence[int], width: int) -> list[tuple[int, int]]:
    """Runs (start, stop) of representations that are no wider than `width` together, or one alone."""
    panels, start = [], 0
    for stop in range(1, len(widths) + 1):
        if stop == len(widths) or sum(widths[start : stop + 1]) > width:
            panels.append((start, stop))
            start = stop
    return panels


def _transposed_product(x: Tensor, y: Tensor) -> Tensor:
    """x^T y in float64 or, if the sums are short, in float32."""
    if x.dtype == torch.float64 or len(x) <= _FLOAT32_TERMS:
        return x.T @ y
    total = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    for start in range(0, len(x), _FLOAT32_TERMS):
        rows = slice(start, start + _FLOAT32_TERMS)
        total += x[rows].T @ y[rows]
    return total


def _symmetric(upper: Tensor) -> Tensor:
    return upper.triu() + upper.triu(1).T


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.T


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def _hsic(
    inner: Tensor, left: _Grams, right: _Grams, estimator: Estimator, dot: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """HSIC up to a factor that depends on n alone, from <K_a, K_b>, diagonals and row sums.

    Song et al. 2012, eq. 5, speaks of Gram matrices with their diagonals set to 0.

    Args:
        inner: <K_a, K_b>, shape (M, M'), or (M,) for each with itself.
        left: Diagonals and row sums of K_a.
        right: The same of K_b.
        estimator: "debiased" or "biased".
        dot: `_outer` for all pairs, `_inner` for each with itself.
    """
    n = left[0].shape[1]
    if estimator == "biased":
        sums = [grams[1] for grams in (left, right)]
        totals = [rows.sum(1, keepdim=True) for rows in sums]
        return inner - 2 / n * dot(*sums) + dot(*totals) / n**2
    sums = [row_sums - diagonals for diagonals, row_sums in (left, right)]
    totals = [rows.sum(1, keepdim=True) for rows in sums]
    return inner - dot(left[0], right[0]) - 2 / (n - 2) * dot(*sums) + dot(*totals) / ((n - 1) * (n - 2))


def _roots(own: Tensor, squares: Tensor, rounding: float, reasons: list[str]) -> Tensor:
    """Roots of HSICs of representations with themselves; nan and a reason where there is none.

    The estimate of a squared norm can come out negative for few samples; this far below its terms it is rounding.
    """
    positive = (own > rounding * squares) & torch.tensor([not reason for reason in reasons], device=own.device)
    for m in torch.nonzero(~positive).flatten().tolist():
        reasons[m] = reasons[m] or _TOO_FEW
    return torch.where(positive, own, torch.nan).sqrt()


def _matrix(values: Tensor, left: _Side, right: _Side) -> PairMatrix:
    return PairMatrix(values.cpu().numpy(), tuple(left.reasons), tuple(right.reasons))
