"""Spatial structure of tokens: how the similarity of two tokens depends on their positions.

Tokens are arrays (n, T, D) on a grid of any number of axes: (frames,), (height, width), (frames, height, width); T
runs over the grid in C order. Distances between tokens are Manhattan distances in cells. Similarity is the cosine.

Source: iREPA (arXiv:2512.10794), where such scores of the teacher followed the quality of generation closely and its
ImageNet accuracy did not. Where its text and its code differ (the definition of near and far in LDS and SRSS) this
module follows the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from layerprobe.analyses.measures.arrays import Features, Floats, checked

FAR_DISTANCE = 6  # cells, of LDS and SRSS
DECAY_DISTANCE = 8  # cells, of CDS


@dataclass(frozen=True, eq=False)
class SpatialStructure:
    """Similarity of tokens of the same sample by distance; nan for samples without a result.

    Attributes:
        correlogram: Mean cosine of the pairs of tokens at distance 0, 1, 2, ... cells, shape (n, distances); nan at
            distances that no two tokens have.
        pair_counts: Number of pairs at each distance, shape (distances,).
        rmsc: RMS spatial contrast: root mean square distance of a sample's unit tokens from their mean, shape (n,), in
            [0, 1].
        far_distance: Smallest distance in cells of a distant pair in `lds`.
        reason: Why some or all samples have no result, or "".
    """

    correlogram: Floats = field(repr=False)
    pair_counts: NDArray[np.int64]
    rmsc: Floats = field(repr=False)
    far_distance: int
    reason: str

    @property
    def lds(self) -> Floats:
        """Local minus distant similarity (LDS), shape (n,): mean cosine of neighbors minus that of distant pairs.

        Neighbors share an edge (4 in two dimensions); distant pairs are `far_distance` or more cells apart.
        """
        far_counts = self.pair_counts[self.far_distance :]
        if not (len(far_counts) and far_counts.any() and self.pair_counts[1]):
            return np.full(len(self.rmsc), np.nan)
        occurs = far_counts > 0
        weights = far_counts[occurs] / far_counts.sum()
        distant = self.correlogram[:, self.far_distance :][:, occurs] @ weights
        contrast: Floats = self.correlogram[:, 1] - distant
        return contrast

    @property
    def cds(self) -> Floats:
        """Correlation decay slope (CDS), shape (n,): decrease of the mean cosine per cell over distances 1 to 8.

        Minus the slope of a least-squares line through the correlogram; smaller grids have fewer distances.
        """
        distances = 1 + np.flatnonzero(self.pair_counts[1 : DECAY_DISTANCE + 1])
        if len(distances) < 2:
            return np.full(len(self.rmsc), np.nan)
        deviations = distances - distances.mean()
        slope: Floats = self.correlogram[:, distances] @ deviations / (deviations @ deviations)
        return -slope


def spatial_structure(
    tokens: Features, grid: Sequence[int], *, positions: Sequence[int] | None = None, center: bool = False
) -> SpatialStructure:
    """Computes correlogram, LDS, CDS and RMSC of every sample.

    Distant pairs of LDS are the published 6 cells apart if the grid is 12 or more cells long from corner to corner
    (Manhattan). On smaller grids they are half of that length apart, rounded up and at least 2. Numbers from grids of
    different sizes cannot be compared.

    Args:
        tokens: Tokens, shape (n, T, D), any float dtype; computed in float64, in T^2 D steps per sample.
        grid: Number of cells along each axis, of product T.
        positions: Cells of the tokens, if only some cells were kept: T indices into the flattened grid.
        center: Whether to subtract the mean over all samples and tokens first. A large common part makes all cosines
            nearly 1, and layers then differ by that part only; without centering the scores are as published.

    Raises:
        ValueError: If tokens are not finite, or tokens, grid and positions do not fit together.
    """
    distances = _distances(tokens, grid, positions)
    counts = np.bincount(distances.ravel())
    reason = "all tokens are the same" if (tokens == tokens[:1, :1]).all() else ""
    far = far_distance(grid)
    correlogram = np.full((len(tokens), len(counts)), np.nan)
    rmsc = np.full(len(tokens), np.nan)
    if reason:
        return SpatialStructure(correlogram, _pairs(counts), rmsc, far, reason)
    mean = _mean(tokens) if center else np.zeros(tokens.shape[2])
    num_broken = 0
    for i, sample in enumerate(tokens):
        units = _units(sample, mean)
        if units is None:
            num_broken += 1
            continue
        cosines = np.bincount(distances.ravel(), weights=(units @ units.T).ravel())
        np.divide(cosines, counts, out=correlogram[i], where=counts > 0)
        rmsc[i] = np.sqrt(np.square(units - units.mean(axis=0)).sum(axis=1).mean())
    if num_broken:
        reason = f"{num_broken} of {len(tokens)} samples have tokens that are zero vectors"
    return SpatialStructure(correlogram, _pairs(counts), rmsc, far, reason)


def spatial_contrast(tokens: Features) -> Floats:
    """Computes the centered RMSC of every sample, shape (n,): `spatial_structure(tokens, grid, center=True).rmsc`.

    It needs no grid, so a part of each sample's tokens is enough. nan for samples with a token that is the zero vector.

    Args:
        tokens: Tokens, shape (n, T, D), any float dtype; computed in float64.
    """
    wide = tokens.astype(np.float64) - _mean(tokens)
    lengths = np.linalg.norm(wide, axis=2, keepdims=True)
    units = np.divide(wide, lengths, out=np.full_like(wide, np.nan), where=lengths > 0)
    spread: Floats = np.square(units - units.mean(axis=1, keepdims=True)).sum(axis=2).mean(axis=1)
    return np.sqrt(spread)


def semantic_similarity(
    tokens: Features, grid: Sequence[int], masks: NDArray[np.bool_], *, positions: Sequence[int] | None = None
) -> Floats:
    """Computes the semantic-region self-similarity (SRSS) of an object's tokens with each other and the background.

    For every token inside the mask it is the mean cosine with neighbors inside minus that with tokens outside at
    `far_distance(grid)` or more cells, averaged over the tokens that have both.

    Args:
        tokens: Tokens, shape (n, T, D), any float dtype; computed in float64.
        grid: Number of cells along each axis, of product T.
        masks: Whether each token belongs to the sample's object, shape (n, T), bool.
        positions: Cells of the tokens, as in `spatial_structure`.

    Returns:
        SRSS of every sample, shape (n,); nan for samples where no token has both, or some token is the zero vector.

    Raises:
        ValueError: If tokens are not finite, or tokens, grid, masks and positions do not fit together.
    """
    distances = _distances(tokens, grid, positions)
    if masks.shape != tokens.shape[:2] or masks.dtype != np.bool_:
        types = f"masks of shape {masks.shape} and dtype {masks.dtype} do not fit tokens of shape {tokens.shape}"
        raise ValueError(f"{types}; pass one bool per token, (n, T)")
    near, far = distances == 1, distances >= far_distance(grid)
    scores = np.full(len(tokens), np.nan)
    for i, (sample, inside) in enumerate(zip(tokens, masks, strict=True)):
        units = _units(sample, np.zeros(tokens.shape[2]))
        if units is None:
            continue
        cosines = (units @ units.T)[inside]
        positive, negative = near[inside] & inside, far[inside] & ~inside
        usable = positive.any(axis=1) & negative.any(axis=1)
        if usable.any():
            cosines, positive, negative = cosines[usable], positive[usable], negative[usable]
            gain = _row_means(cosines, positive) - _row_means(cosines, negative)
            scores[i] = gain.mean()
    return scores


def far_distance(grid: Sequence[int]) -> int:
    """Returns the smallest distance in cells of distant tokens of a grid: 6, or less on grids shorter than 12."""
    return min(FAR_DISTANCE, max(2, (sum(grid) - len(grid) + 1) // 2))


def _distances(tokens: Features, grid: Sequence[int], positions: Sequence[int] | None) -> NDArray[np.int64]:
    """Manhattan distance in cells between any two tokens, shape (T, T), after checking the arguments."""
    if tokens.ndim != 3 or 0 in tokens.shape:
        raise ValueError(f"tokens of shape {tokens.shape} have no place on a grid; pass (n, T, D)")
    checked(tokens.reshape(-1, tokens.shape[2]), "tokens")
    size = int(np.prod(grid))
    indices = np.arange(size) if positions is None else np.asarray(positions)
    if indices.shape != tokens.shape[1:2]:
        count = f"grid {tuple(grid)} has {size} cells" if positions is None else f"{len(indices)} positions are given"
        raise ValueError(f"{tokens.shape[1]} tokens but {count}; pass the grid, and positions if only some were kept")
    if indices.min() < 0 or indices.max() >= size or len(np.unique(indices)) < len(indices):
        problem = f"positions are not different cells of the grid {tuple(grid)}"
        raise ValueError(f"{problem}; pass indices from 0 to {size - 1}")
    cells = np.stack(np.unravel_index(indices, tuple(grid)))
    distances: NDArray[np.int64] = np.abs(cells[:, :, None] - cells[:, None, :]).sum(axis=0)
    return distances


def _units(sample: Features, mean: Floats) -> Floats | None:
    """Tokens (T, D) minus the mean, at length 1, or None if one of them is the zero vector."""
    wide = sample.astype(np.float64) - mean
    wide /= np.abs(wide).max() or 1.0
    lengths = np.linalg.norm(wide, axis=1)
    return wide / lengths[:, None] if lengths.all() else None


def _mean(tokens: Features) -> Floats:
    mean: Floats = tokens.mean(axis=(0, 1), dtype=np.float64)
    return mean


def _pairs(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of unordered pairs by distance; the number of tokens comes first, so that indices are distances."""
    pairs = counts // 2
    pairs[0] = counts[0]
    return pairs


def _row_means(values: Floats, mask: NDArray[np.bool_]) -> Floats:
    means: Floats = (values * mask).sum(axis=1) / mask.sum(axis=1)
    return means
