"""Checks of features, and centering without losing digits."""

from __future__ import annotations

import numpy as np
import pytest

from layerprobe.analyses.measures.arrays import centered, checked, unusable


def test_centering_loses_nothing_to_a_large_offset() -> None:
    x = np.random.default_rng(0).integers(-5, 6, size=(1001, 3)).astype(np.float64)
    # Integers survive the offset exactly. One subtraction of the mean would leave 1e-6 of it in every column.
    moved = centered(x + 1e10)
    np.testing.assert_allclose(moved.mean(axis=0), 0, atol=1e-14)
    np.testing.assert_allclose(moved, x - x.mean(axis=0), atol=1e-12)


def test_centering_leaves_its_argument_alone() -> None:
    x = np.arange(6.0).reshape(3, 2)
    centered(x)
    np.testing.assert_array_equal(x, np.arange(6.0).reshape(3, 2))


def test_says_why_features_are_unusable() -> None:
    assert unusable(np.eye(3)) == ""
    assert unusable(np.full((4, 2), 0.1)) == "the features are the same for all samples"
    assert unusable(np.array([[1.0, np.nan]])) == "the features hold nan or inf"


def test_refuses_what_cannot_be_analyzed() -> None:
    with pytest.raises(ValueError, match=r"weights of shape \(0, 3\) cannot be analyzed"):
        checked(np.zeros((0, 3)), "weights")
    with pytest.raises(ValueError, match="features hold 2 values that are nan or inf"):
        checked(np.array([[1.0, np.nan, -np.inf]]))
