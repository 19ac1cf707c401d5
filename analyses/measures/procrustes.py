"""Procrustes distance of representations for all pairs at once.

`scipy.linalg.orthogonal_procrustes` would compute the rotation of one pair of equal width; the distance only needs
the nuclear norm of the cross-covariance, for which all pairs share their features.

Source: Ding et al. 2021 (arXiv:2108.01661).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from layerprobe.analyses.measures.gram_products import TILE_BYTES, FeatureSet, Progress, Work, cross_products, symmetric
from layerprobe.analyses.measures.tensors import FeatureMatrix, PairMatrix, num_samples


def procrustes_matrix(
    xs: Sequence[FeatureMatrix],
    ys: Sequence[FeatureMatrix] | None = None,
    *,
    tile_bytes: int = TILE_BYTES,
    progress: Progress | None = None,
) -> PairMatrix:
    """Computes the Procrustes distance of all pairs of representations: what the best rotation leaves, in [0, 2].

    For centered features of unit Frobenius norm it is ||X||^2 + ||Y||^2 - 2 ||X^T Y||_*. 0 means equal up to rotation,
    isotropic scale and translation; 2 means that no direction of one is correlated with any of the other. Like biased
    CKA it calls unrelated features similar unless samples far outnumber channels. Computed in float64, in about
    10 D^3 steps per pair.

    Args:
        xs: M arrays or tensors of shape (n, D_m) of the same n samples in the same order, any dtype.
        ys: M' representations of the same samples to compare `xs` with; without them `xs` are compared with one
            another.
        tile_bytes: Memory in bytes, in addition to about two representations.
        progress: Called with (steps done, steps in all).

    Raises:
        ValueError: If there is no representation, representations disagree on n, or n < 2.
    """
    n = num_samples(xs, 2, "the Procrustes distance")
    left = FeatureSet(xs, n)
    right = left if ys is None else FeatureSet(ys, n, "of the second set ")
    overlap = cross_products(left, right, _nuclear_norm, Work(torch.float64, tile_bytes, progress)).cpu() / n
    if right is left:
        overlap = symmetric(overlap)
    for side, values in ((left, overlap), (right, overlap.T)):
        for m in np.flatnonzero(side.reasons):
            values[m] = torch.nan
    return PairMatrix((2 - 2 * overlap).clamp_(min=0).numpy(), tuple(left.reasons), tuple(right.reasons))


def _nuclear_norm(product: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.svdvals(product).sum()
    return norm
