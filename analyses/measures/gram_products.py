"""Inner products of the Gram matrices of many representations, in tiles and in two precisions.

They are what CKA and the Procrustes distance are made of: either all Gram matrices tile by tile, or the
cross-covariance of every pair. Pieces of the work do not depend on who computes them, and are added in their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from layerprobe.analyses.measures.tensors import FeatureMatrix, as_tensor, feature_statistics, subtract_mean

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]
GramSums = tuple[Tensor, Tensor]  # diagonals and row sums of Gram matrices, both of shape (M, n)
InnerProducts = tuple[Tensor, Tensor, Tensor]  # <K_a, K_b> of all pairs, ||K||^2 of the first set and of the second

TILE_BYTES = 512 * 2**20

# Sums in float32 run over this many terms at most; their results are added in float64.
_FLOAT32_TERMS = 8192
# The RBF bandwidth is a median over the pairs of this many samples at most.
_MEDIAN_SAMPLES = 2048


class Share(Protocol):
    """Applies a function to items and returns the results in their order, as `map` does; processes may share the items.

    The function returns tensors on the CPU.
    """

    def __call__(self, function: Callable[[Item], Result], items: Sequence[Item], /) -> Iterable[Result]: ...


class FeatureSet:
    """One set of representations of n samples: the statistics of each, and access to its centered features.

    Args:
        representations: M arrays or tensors of shape (n, D_m).
        n: Number of samples.
        description: Description of the set in error messages, with a space at its end, or "".
        share: Computes the statistics of the representations.

    Attributes:
        widths: Widths D_m.
        reasons: Why each representation has no similarity, or "".
        diagonals: Square norms of the samples that `reader` returns, shape (M, n), float64.
        row_sums: Row sums of the Gram matrices, shape (M, n), float64; 0 for the linear kernel of centered features.
        exponents: -1 / (2 s^2) of the RBF kernel, shape (M, 1, 1), or None for the linear kernel.

    Raises:
        ValueError: If a representation does not have n samples.
    """

    def __init__(
        self, representations: Sequence[FeatureMatrix], n: int, description: str = "", share: Share = map
    ) -> None:
        self.representations = representations
        self.exponents: Tensor | None = None
        measured = share(partial(_statistics, representations, n, description), range(len(representations)))
        means, scales, diagonals, reasons = zip(*measured, strict=True)
        device = as_tensor(representations[0]).device
        self._means, self._scales = [mean.to(device) for mean in means], scales
        self.widths, self.reasons = [len(mean) for mean in means], [*reasons]
        self.diagonals = torch.stack(diagonals).to(device)
        self.row_sums = torch.zeros_like(self.diagonals)

    def __len__(self) -> int:
        return len(self.widths)

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.diagonals.shape[1]

    @property
    def gram_sums(self) -> GramSums:
        """Diagonals and row sums of the Gram matrices."""
        diagonals = self.diagonals if self.exponents is None else torch.ones_like(self.diagonals)
        return diagonals, self.row_sums

    def debiasing_keeps_digits(self) -> bool:
        """Returns whether debiasing leaves a tenth or more of every ||K||^2, by the least that ||K||^2 can be."""
        d, n = self.diagonals, self.n
        rank = torch.tensor(self.widths, device=d.device).clamp(max=n - 1)
        correction = n / (n - 2) * d.square().sum(1) - d.sum(1).square() / ((n - 1) * (n - 2))
        return bool((correction <= 0.9 * d.sum(1).square() / rank).all())

    def set_bandwidths(self, bandwidth: float) -> None:
        """Makes the kernel an RBF kernel.

        Args:
            bandwidth: Bandwidth in units of the median distance between two samples of the representation.
        """
        subset = slice(None, None, math.ceil(self.n / _MEDIAN_SAMPLES))
        self.exponents = torch.zeros(len(self), 1, 1, dtype=torch.float64, device=self.diagonals.device)
        for m in np.flatnonzero([not reason for reason in self.reasons]).tolist():
            x, d = self._read(m, torch.float64)[subset], self.diagonals[m, subset]
            squares = d[:, None] + d - 2 * x @ x.T
            median = squares[torch.ones_like(squares, dtype=torch.bool).triu_(1)].median()
            if median <= 1e-12:
                self.reasons[m] = "half of the distances between samples are 0, so the RBF kernel has no bandwidth"
            else:
                self.exponents[m] = -1 / (2 * bandwidth**2 * median)

    def reader(self, dtype: torch.dtype, cache_bytes: float) -> Callable[[int], Tensor]:
        """Returns a function from positions to centered features of mean square norm 1.

        Args:
            dtype: Type of the features, float32 or float64.
            cache_bytes: Memory in bytes; if all features fit into it they are read once, else at every call.
        """
        read = partial(self._read, dtype=dtype)
        if self.n * sum(self.widths) * dtype.itemsize > cache_bytes:
            return read
        return [read(m) for m in range(len(self))].__getitem__

    def _read(self, m: int, dtype: torch.dtype) -> Tensor:
        x = as_tensor(self.representations[m])
        if self.reasons[m]:
            return torch.zeros_like(x, dtype=dtype)
        return subtract_mean(x, self._means[m], dtype).mul_(self._scales[m])


def num_multiplications(left: FeatureSet, right: FeatureSet) -> tuple[int, int]:
    """Counts the multiplications of `gram_products` and of `feature_products`."""
    width = sum(left.widths) + (sum(right.widths) if right is not left else 0)
    by_gram = left.n**2 * (width + len(left) * len(right))
    return by_gram, left.n * sum(left.widths) * sum(right.widths)


class _TileSums(NamedTuple):
    """What one tile adds to the sums over all, on the CPU in float64.

    Attributes:
        inner: Inner products by stretch of columns, each of shape (M, M').
        squares: Square norms for each set, shape (M,); none if both sets are the same.
        row_sums: Additions to the row sums of each set from the tile's first sample on, shape (M, n - start); none if
            the kernel is linear.
    """

    inner: list[Tensor]
    squares: list[Tensor]
    row_sums: list[Tensor]


class Work(NamedTuple):
    """How inner products are computed.

    Attributes:
        dtype: Type of the products, float32 or float64.
        tile_bytes: Memory in bytes.
        progress: Called with (pieces done, pieces in all): rows of Gram matrices, or products with panels.
        share: Computes the pieces.
    """

    dtype: torch.dtype
    tile_bytes: int
    progress: Progress | None = None
    share: Share = map


def gram_products(left: FeatureSet, right: FeatureSet, work: Work) -> InnerProducts:
    """Computes inner products from tiles of all Gram matrices at once; sets the row sums of RBF kernels.

    Args:
        left: First set.
        right: Second set, or `left` itself.
        work: How they are computed.
    """
    dtype, tile_bytes, progress, share = work
    n, sides = left.n, [left] if right is left else [left, right]
    readers = [side.reader(dtype, tile_bytes / 2 / len(sides)) for side in sides]
    num_representations, device = sum(len(side) for side in sides), left.diagonals.device
    rows = int(np.clip(tile_bytes // 2 // (dtype.itemsize * num_representations * n), 1, n))
    # One buffer for all tiles: new memory pages for each would cost a fifth of the time.
    buffers = [torch.empty(len(side) * rows * n, dtype=dtype, device=device) for side in sides]

    inner = torch.zeros(len(left), len(right), dtype=torch.float64)
    squares = [torch.zeros(len(side), dtype=torch.float64) for side in sides]
    starts = range(0, n, rows)
    tile_sums = share(partial(_tile_sums, sides, readers, buffers, rows), starts)
    for start, tile in zip(starts, tile_sums, strict=True):
        for part in tile.inner:
            inner += part
        for total, square in zip(squares, tile.squares, strict=False):
            total += square
        for side, row_sums in zip(sides, tile.row_sums, strict=False):
            side.row_sums[:, start:] += row_sums.to(device)
        if progress:
            progress(min(start + rows, n), n)
    inner = inner.to(device)
    if right is not left:
        return inner, squares[0].to(device), squares[1].to(device)
    return symmetric(inner), inner.diag(), inner.diag()


def feature_products(left: FeatureSet, right: FeatureSet, work: Work) -> InnerProducts:
    """Computes inner products of linear Gram matrices as ||X_a^T X_b||^2; arguments as in `gram_products`."""
    inner = cross_products(left, right, _square_norm, work)
    if right is left:
        return symmetric(inner), inner.diag(), inner.diag()
    return inner, _self_products(left, work), _self_products(right, work)


def cross_products(left: FeatureSet, right: FeatureSet, measure: Callable[[Tensor], Tensor], work: Work) -> Tensor:
    """Computes a number of X_a^T Y_b for all pairs, only for b >= a if both sets are the same.

    Panels of several Y side by side make the products large.

    Args:
        left: First set.
        right: Second set, or `left` itself.
        measure: Function of X_a^T Y_b, shape (D_a, D_b), that returns a number.
        work: How they are computed; a piece is the products of an X with a panel.

    Returns:
        The numbers, shape (M, M'), float64; 0 for the pairs that are left out.
    """
    dtype, tile_bytes, progress, share = work
    ends = np.cumsum(right.widths).tolist()
    read_left, read_right = left.reader(dtype, 0), right.reader(dtype, 0)
    panels = _panels(right.widths, tile_bytes // (dtype.itemsize * (left.n + max(left.widths))))
    is_same, values = right is left, left.diagonals.new_zeros(len(left), len(right))
    num_done, num_steps = 0, sum(stop if is_same else len(left) for _, stop in panels)
    for start, stop in panels:
        offset = ends[start] - right.widths[start]
        columns = [slice(ends[b] - right.widths[b] - offset, ends[b] - offset) for b in range(start, stop)]
        panel = torch.empty(left.n, columns[-1].stop, dtype=dtype, device=left.diagonals.device)
        for b in range(start, stop):
            panel[:, columns[b - start]] = read_right(b)
        row = partial(_panel_row, read_left, panel, columns, measure, start if is_same else len(left))
        rows = range(stop if is_same else len(left))
        for a, of_row in zip(rows, share(row, rows), strict=True):
            values[a, stop - len(of_row) : stop] = of_row
            num_done += 1
            if progress:
                progress(num_done, num_steps)
    return values


def symmetric(upper: Tensor) -> Tensor:
    """Returns the symmetric matrix with this upper triangle."""
    return upper.triu() + upper.triu(1).T


def _statistics(
    representations: Sequence[FeatureMatrix], n: int, description: str, m: int
) -> tuple[Tensor, float, Tensor, str]:
    """Mean of a representation, factor to a mean square norm of 1, square norms after it, and why it is unusable."""
    x = as_tensor(representations[m])
    if len(x) != n:
        counts = f"representation {m} {description}has {len(x)} samples, the first has {n}"
        raise ValueError(f"{counts}; pass the same samples in the same order")
    statistics = feature_statistics(x)
    square_norms, reason = statistics.square_norms, statistics.reason
    mean_square = float(square_norms.mean())
    if not reason and not 0 < mean_square < math.inf:
        reason = "the squares of the features leave the range of float64"
    diagonal = torch.zeros_like(square_norms) if reason else square_norms / mean_square
    return statistics.mean.cpu(), 0.0 if reason else mean_square**-0.5, diagonal.cpu(), reason


def _tile_sums(
    sides: Sequence[FeatureSet],
    readers: Sequence[Callable[[int], Tensor]],
    buffers: Sequence[Tensor],
    rows: int,
    start: int,
) -> _TileSums:
    block = slice(start, min(start + rows, sides[0].n))
    tiles = [_gram_tile(*parts, block) for parts in zip(sides, readers, buffers, strict=True)]
    row_sums = [] if sides[0].exponents is None else [_row_sums(tile) for tile in tiles]
    for tile in tiles:  # Entries right of the diagonal block also stand for those below it.
        tile[:, :, tile.shape[1] :] *= math.sqrt(2)
    inner = []
    for column in range(0, tiles[0].shape[2], _FLOAT32_TERMS):
        parts = [tile[:, :, column : column + _FLOAT32_TERMS] for tile in tiles]
        # One product for every row of the tile, so that float32 sums stay short.
        by_row = torch.bmm(parts[0].transpose(0, 1), parts[-1].permute(1, 2, 0))
        inner.append(by_row.sum(0, dtype=torch.float64).cpu())
    squares = []
    if len(tiles) > 1:
        norms = (torch.linalg.vector_norm(tile, dim=(1, 2), dtype=torch.float64) for tile in tiles)
        squares = [norm.square().cpu() for norm in norms]
    return _TileSums(inner, squares, row_sums)


def _gram_tile(side: FeatureSet, read: Callable[[int], Tensor], buffer: Tensor, block: slice) -> Tensor:
    """Rows of all Gram matrices from the diagonal on, shape (M, rows, n - start)."""
    num, rows, columns = len(side), block.stop - block.start, side.n - block.start
    tile = buffer[: num * rows * columns].view(num, rows, columns)
    for m, gram in enumerate(tile):
        x = read(m)
        torch.mm(x[block], x[block.start :].T, out=gram)
    if side.exponents is not None:
        d = side.diagonals
        tile.mul_(-2).add_(d[:, block, None]).add_(d[:, None, block.start :]).mul_(side.exponents).exp_()
    return tile


def _row_sums(tile: Tensor) -> Tensor:
    """What a tile adds to the row sums from its first sample on, shape (M, n - start), on the CPU."""
    return torch.cat([tile.sum(2), tile[:, :, tile.shape[1] :].sum(1)], 1).cpu()


def _panel_row(
    read: Callable[[int], Tensor],
    panel: Tensor,
    columns: Sequence[slice],
    measure: Callable[[Tensor], Tensor],
    start: int,
    a: int,
) -> Tensor:
    """The measure of X_a with every Y of a panel; from X_a on if it is in the panel, whose first is number `start`."""
    needed = columns[max(a - start, 0) :]
    offset = needed[0].start
    x = panel[:, needed[0]] if a >= start else read(a)
    product = _transposed_product(x, panel[:, offset:])
    return torch.stack([measure(product[:, column.start - offset : column.stop - offset]) for column in needed]).cpu()


def _self_products(side: FeatureSet, work: Work) -> Tensor:
    read = side.reader(work.dtype, 0)

    def square(m: int) -> Tensor:
        x = read(m)
        return _square_norm(x.T @ x if x.shape[1] < x.shape[0] else x @ x.T).cpu()

    return torch.stack([*work.share(square, range(len(side)))]).to(side.diagonals.device)


def _square_norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm.square()


def _panels(widths: Sequence[int], max_width: int) -> list[tuple[int, int]]:
    """Ranges (start, stop) of representations that together are at most `max_width` wide, or of a single one."""
    panels, start = [], 0
    for stop in range(1, len(widths) + 1):
        if stop == len(widths) or sum(widths[start : stop + 1]) > max_width:
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
