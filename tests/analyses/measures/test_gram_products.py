"""Inner products of Gram matrices against full matrices, in both ways, from tiles of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerprobe.analyses.measures.gram_products import (
    FeatureSet,
    Work,
    cross_products,
    feature_products,
    gram_products,
    num_multiplications,
)


def example(seed: int = 0, n: int = 30) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, width)) + 5 for width in (2, 7, 40)]


def scaled(x: np.ndarray) -> np.ndarray:
    """Centered, with a mean square norm of 1."""
    x = x - x.mean(axis=0)
    return x / np.sqrt(np.square(x).sum(axis=1).mean())


@pytest.mark.parametrize("products", [gram_products, feature_products])
@pytest.mark.parametrize("tile_bytes", [1, 5000, 2**24])
@pytest.mark.parametrize("same", [True, False])
def test_both_ways_equal_the_full_matrices(products, tile_bytes: int, same: bool) -> None:
    xs = example()
    ys = xs if same else example(1)
    left = FeatureSet(xs, 30)
    right = left if same else FeatureSet(ys, 30)
    inner, left_squares, right_squares = products(left, right, Work(torch.float64, tile_bytes))
    grams = [[scaled(x) @ scaled(x).T for x in side] for side in (xs, ys)]
    np.testing.assert_allclose(inner, [[(k * m).sum() for m in grams[1]] for k in grams[0]], rtol=1e-10)
    np.testing.assert_allclose(left_squares, [(k * k).sum() for k in grams[0]], rtol=1e-10)
    np.testing.assert_allclose(right_squares, [(k * k).sum() for k in grams[1]], rtol=1e-10)


def test_cross_products_of_one_set_come_once_per_pair() -> None:
    features, shapes = FeatureSet(example(), 30), []

    def area(product: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(product.shape))
        return torch.tensor(float(product.numel()))

    areas = cross_products(features, features, area, Work(torch.float64, 1))
    assert areas.tolist() == [[4, 14, 80], [0, 49, 280], [0, 0, 1600]]
    assert sorted(shapes) == [(2, 2), (2, 7), (2, 40), (7, 7), (7, 40), (40, 40)]


def test_the_cheaper_way_depends_on_the_widths() -> None:
    narrow, wide = FeatureSet([np.eye(30)[:, :3]] * 2, 30), FeatureSet([np.random.default_rng(0).random((30, 500))], 30)
    by_gram, by_features = num_multiplications(narrow, narrow)
    assert by_features < by_gram
    by_gram, by_features = num_multiplications(wide, wide)
    assert by_gram < by_features


def test_unusable_features_are_zeros_with_a_reason() -> None:
    features = FeatureSet([np.ones((4, 2)), np.full((4, 2), np.nan), np.eye(4) * 1e200], 4)
    assert features.reasons == [
        "the features are the same for all samples",
        "the features hold nan or inf",
        "the squares of the features leave the range of float64",
    ]
    assert not features.diagonals.any()
    assert not features.reader(torch.float64, 0)(1).any()


def test_refuses_other_numbers_of_samples() -> None:
    with pytest.raises(ValueError, match="representation 1 of the second set has 3 samples, the first has 4"):
        FeatureSet([np.eye(4), np.eye(3)], 4, "of the second set ")
