"""PCA-to-RGB maps: a layer's tokens as a picture, as in the figures of LayerSync, REPA and DINOv2.

Colors are relative: within one map equal colors mean similar tokens; between layers or noise levels only the shapes
can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from layerprobe.analyses.measures.arrays import NEGLIGIBLE, Features, Floats, centered, checked, unusable

PERCENTILES = (1.0, 99.0)


@dataclass(frozen=True, eq=False)
class RgbMap:
    """The first three principal components of one layer's tokens as colors.

    Attributes:
        rgb: Colors, shape (n, T, 3), float32 in [0, 1]; nan if there are no colors.
        explained: Share of the variance of each component, shape (3,), descending, in [0, 1].
        reason: Why there are no colors, or "".
    """

    rgb: NDArray[np.float32] = field(repr=False)
    explained: Floats
    reason: str


def pca_rgb(tokens: Features) -> RgbMap:
    """Computes colors of tokens: the first three principal components over all tokens as red, green and blue.

    Each component is scaled from its 1st to its 99th percentile and clipped, so that a few outliers do not turn the
    rest gray. Its sign makes the rarer side bright (positive third moment), so small objects are bright in every
    layer. Components without variance are a flat 0.5.

    Args:
        tokens: Tokens of one layer at one noise level, shape (n, T, D), any float dtype; computed in float64.

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
    # If fewer than one token in a hundred differs, the percentiles coincide and the extremes replace them.
    low, high = np.where(high > low, low, scores.min(axis=0)), np.where(high > low, high, scores.max(axis=0))
    is_flat = explained <= NEGLIGIBLE
    rgb = np.clip((scores - low) / np.where(is_flat, 1.0, high - low), 0, 1)
    rgb[:, is_flat] = 0.5
    return RgbMap(rgb.reshape(*tokens.shape[:2], 3).astype(np.float32), explained, "")


def _principal_components(x: Features) -> tuple[Floats, Floats]:
    """Scores on three principal axes, shape (N, 3), and their shares of the variance (3,); missing axes are zero."""
    # Centered here: the solver subtracts a large mean from the products, which loses digits.
    wide = centered(x / np.float64(np.abs(x).max()))
    num_components = min(3, *wide.shape)
    pca = PCA(num_components, svd_solver="covariance_eigh")
    scores, explained = np.zeros((len(wide), 3)), np.zeros(3)
    scores[:, :num_components] = pca.fit_transform(wide)
    explained[:num_components] = pca.explained_variance_ratio_
    scores *= np.where((scores**3).sum(axis=0) < 0, -1.0, 1.0)
    return scores, explained
