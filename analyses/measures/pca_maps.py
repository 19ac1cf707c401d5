"""PCA-to-RGB maps: a layer's tokens as a picture, as in the figures of LayerSync, REPA and DINOv2.

Colors are relative: within one map equal colors mean similar tokens; between layers or noise levels only the shapes
compare.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerprobe.analyses.measures.arrays import Features, Floats, centered, checked, unusable

PERCENTILES = (1.0, 99.0)


@dataclass(frozen=True, eq=False)
class RgbMap:
    """The first three principal components of one layer's tokens as colors.

    Attributes:
        rgb: Shape (n, T, 3), float32 in [0, 1]; nan without an answer.
        explained: Share of the variance that each component holds, shape (3,), descending, in [0, 1].
        reason: Why there are no colors, or "".
    """

    rgb: NDArray[np.float32] = field(repr=False)
    explained: Floats
    reason: str


def pca_rgb(tokens: Features) -> RgbMap:
    """Colors for tokens: red, green and blue are the first three principal components over all tokens of all samples.

    Each component runs from its 1st to its 99th percentile and is clipped beyond, so that a few outliers do not turn
    the rest gray. Its sign is such that the rarer side is bright (positive third moment), which keeps small objects
    bright in every layer. Components that hold nothing are a flat 0.5.

    Args:
        tokens: Of one layer at one noise level, shape (n, T, D), any float dtype; computed in float64.

    Raises:
        ValueError: If tokens are not finite or of another shape.
    """
    if tokens.ndim != 3:
        raise ValueError(f"tokens of shape {tokens.shape} are no maps; pass (n, T, D)")
    flat = tokens.reshape(-1, tokens.shape[2])
    checked(flat, "tokens")
    if unusable(flat):
        blank = np.full((*tokens.shape[:2], 3), np.nan, np.float32)
        return RgbMap(blank, np.full(3, np.nan), "all tokens are the same")
    scores, explained = _principal_components(flat)
    low, high = np.percentile(scores, PERCENTILES, axis=0)
    # Fewer than one token in a hundred differs: the percentiles coincide and the ends take over.
    low, high = np.where(high > low, low, scores.min(axis=0)), np.where(high > low, high, scores.max(axis=0))
    span = high - low
    empty = explained <= 1e-12
    rgb = np.clip((scores - low) / np.where(empty, 1.0, span), 0, 1)
    rgb[:, empty] = 0.5
    return RgbMap(rgb.reshape(*tokens.shape[:2], 3).astype(np.float32), explained, "")


def _principal_components(x: Features) -> tuple[Floats, Floats]:
    """Scores on three principal axes, shape (N, 3), and the shares of variance (3,); missing axes are zero."""
    wide: NDArray[Any] = centered(x / np.float64(np.abs(x).max()))
    variances, axes = np.linalg.eigh(wide.T @ wide)
    variances = np.maximum(variances[::-1], 0)
    found = min(3, len(variances))
    scores, explained = np.zeros((len(wide), 3)), np.zeros(3)
    scores[:, :found] = wide @ axes[:, ::-1][:, :found]
    explained[:found] = variances[:found] / variances.sum()
    scores *= np.where((scores**3).sum(axis=0) < 0, -1.0, 1.0)
    return scores, explained
