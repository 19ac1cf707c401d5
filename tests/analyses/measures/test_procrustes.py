"""Procrustes distance against the best rotation that scipy finds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.linalg import orthogonal_procrustes

from layerprobe.analyses.measures.procrustes import procrustes_matrix

Array = NDArray[Any]


def related(seed: int, n: int = 40) -> list[Array]:
    """Five representations that share some, all or none of their content, of different widths and scales."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(n, 6))
    mixed = base @ rng.normal(size=(6, 9)) + rng.normal(size=(n, 9))
    return [base, mixed * 1e-3, np.tanh(mixed), rng.normal(size=(n, 70)) * 1e5, base[:, :2] + 3.0]


def plain_procrustes(x: Array, y: Array) -> float:
    """Sum of squares that the best orthogonal map leaves."""
    x, y = ((a - a.mean(axis=0)) / np.linalg.norm(a - a.mean(axis=0)) for a in (x, y))
    width = max(x.shape[1], y.shape[1])
    x, y = (np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in (x, y))
    rotation, _ = orthogonal_procrustes(x, y)
    return float(np.square(x @ rotation - y).sum())


def test_procrustes_equals_the_best_rotation_that_scipy_finds() -> None:
    xs = related(16)
    result = procrustes_matrix(xs)
    np.testing.assert_allclose(result.values, [[plain_procrustes(x, y) for y in xs] for x in xs], atol=1e-10)
    np.testing.assert_allclose(
        procrustes_matrix(xs[:2], xs[2:], tile_bytes=1).values, result.values[:2, 2:], atol=1e-12
    )
    assert result.values.min() >= 0


def test_procrustes_ignores_rotation_scale_and_translation_and_gives_reasons() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6)).astype(np.float32)
    moved = x @ np.linalg.qr(rng.normal(size=(6, 6)))[0] * 1e-3 + 5
    result = procrustes_matrix([x, moved, np.ones((50, 3))])
    np.testing.assert_allclose(result.values[:2, :2], 0, atol=1e-6)
    assert np.isnan(result.values[2]).all()
    assert np.isnan(result.values[:, 2]).all()
    assert result.reasons == result.other_reasons == ("", "", "the features are the same for all samples")


def test_refuses_too_few_samples() -> None:
    with pytest.raises(ValueError, match="the Procrustes distance needs 2 samples or more, got 1"):
        procrustes_matrix([np.ones((1, 2))])
