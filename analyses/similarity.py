"""Similarity of representations: debiased linear CKA, for one pair or for all pairs in one pass.

The biased estimator calls unrelated features similar when there are more channels than samples (0.9 at 32 samples).
The debiased one is 0 on average for unrelated features, and therefore sometimes slightly negative; nothing here clips
it.

Sources: CKA, Kornblith et al. 2019 (arXiv:1905.00414); unbiased HSIC, Song et al. 2012, eq. 5; as "debiased CKA",
Nguyen et al. 2021 (arXiv:2010.15327).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from layerprobe.analyses.arrays import Features, Floats, centred, unusable

TILE_BYTES = 256 * 2**20


@dataclass(frozen=True, eq=False)
class CkaMatrix:
    """Debiased linear CKA of every pair of M representations.

    Attributes:
        values: Shape (M, M), symmetric; nan in the rows and columns of representations that have no similarity.
        reasons: M strings: why a representation has none, or "".
    """

    values: Floats
    reasons: tuple[str, ...]


def linear_cka(x: Features, y: Features) -> float:
    """Debiased linear CKA between two sets of features of the same samples.

    Invariant to rotation, isotropic scale and translation of either input. 1 means equal up to those; slightly
    negative values are possible for unrelated features. nan if either is constant over samples or not finite.

    Args:
        x: Features, shape (n, d1), any float dtype; computed in float64.
        y: Features of the same n samples in the same order, shape (n, d2).

    Raises:
        ValueError: If the inputs disagree on n, or n < 4 (the estimator divides by n - 3).
    """
    return float(cka_matrix([x, y]).values[0, 1])


def cka_matrix(
    representations: Sequence[Features],
    *,
    tile_bytes: int = TILE_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> CkaMatrix:
    """Debiased linear CKA of all pairs, from one pass over tiles of the Gram matrices.

    Peak memory is about `tile_bytes`, one representation in float64 and what `representations` itself holds. A
    representation is taken out of the sequence once per tile, so a sequence that reads from disk bounds the rest.
    Time is n^2 D M + n^2 M^2.

    Args:
        representations: M arrays of shape (n, d_m) of the same n samples in the same order; any float dtype, computed
            in float64.
        tile_bytes: Size of the M x rows x n tile of Gram matrices; tiles have at least one row.
        progress: Called with (tiles done, tiles).

    Raises:
        ValueError: If there is no representation, they disagree on n or n < 4.
    """
    n = _num_samples(representations)
    num = len(representations)
    rows = int(np.clip(tile_bytes // (8 * num * n), 1, n))
    scales, reasons = _scales(representations)
    inner, diagonals = np.zeros((num, num)), np.zeros((num, n))
    starts = range(0, n, rows)
    for done, start in enumerate(starts, 1):
        inner += _tile_products(representations, scales, slice(start, min(start + rows, n)), diagonals)
        if progress:
            progress(done, len(starts))
    return _normalised(_unbiased_hsic(inner, diagonals), inner, reasons)


def _num_samples(representations: Sequence[Features]) -> int:
    if not len(representations):
        raise ValueError("no representation was given; pass at least one array of shape (n, D)")
    n = len(representations[0])
    if n < 4:
        raise ValueError(f"debiased CKA needs 4 samples or more, got {n}; its estimator divides by n - 3")
    return n


def _scales(representations: Sequence[Features]) -> tuple[list[float], list[str]]:
    """One factor per representation that brings its centred features to mean square norm 1, or 0 and a reason."""
    n = len(representations[0])
    scales, reasons = [], []
    for m in range(len(representations)):
        x = representations[m]
        if len(x) != n:
            seen = f"representation {m} has {len(x)} samples, the first has {n}"
            raise ValueError(f"{seen}; pass the same samples in the same order")
        reasons.append(unusable(x))
        scales.append(0.0 if reasons[-1] else float(np.sqrt(n) / np.linalg.norm(centred(x))))
    return scales, reasons


def _tile_products(
    representations: Sequence[Features], scales: Sequence[float], rows: slice, diagonals: Floats
) -> Floats:
    """What these rows of the Gram matrices, from the diagonal on, add to their inner products; fills in `diagonals`."""
    num = len(representations)
    tile = np.zeros((num, rows.stop - rows.start, len(representations[0]) - rows.start))
    for m in np.flatnonzero(scales).tolist():
        x = centred(representations[m]) * scales[m]
        np.matmul(x[rows], x[rows.start :].T, out=tile[m])
        diagonals[m, rows] = np.square(x[rows]).sum(axis=1)
    # Gram matrices are symmetric: what lies right of the diagonal block counts for what lies below it too.
    tile[:, :, rows.stop - rows.start :] *= np.sqrt(2)
    flat = tile.reshape(num, -1)
    products: Floats = flat @ flat.T
    return products


def _unbiased_hsic(inner: Floats, diagonals: Floats) -> Floats:
    """Unbiased HSIC of all pairs up to one common factor, shape (M, M).

    Song et al. 2012, eq. 5, speaks of Gram matrices with their diagonals set to 0. For centred features K 1 = 0, so
    everything it needs follows from the inner products <K_a, K_b> and the diagonals of the matrices as they are.

    Args:
        inner: <K_a, K_b> of centred Gram matrices, shape (M, M).
        diagonals: Their diagonals, shape (M, n).
    """
    n = diagonals.shape[1]
    traces = diagonals.sum(axis=1)
    products = diagonals @ diagonals.T
    hsic: Floats = inner - products - 2 / (n - 2) * products + np.outer(traces, traces) / ((n - 1) * (n - 2))
    return hsic


def _normalised(hsic: Floats, inner: Floats, reasons: Sequence[str]) -> CkaMatrix:
    own = np.diag(hsic)
    # The estimate of a squared norm can come out negative for few samples; below 1e-12 of its terms it is rounding
    # error.
    positive = own > 1e-12 * np.diag(inner)
    root = np.sqrt(np.where(positive, own, np.nan))
    too_few = "the similarity of the features with themselves is estimated as 0 or less; more samples are needed"
    why = [reason or ("" if ok else too_few) for reason, ok in zip(reasons, positive, strict=True)]
    return CkaMatrix(hsic / np.outer(root, root), tuple(why))
