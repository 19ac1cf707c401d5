"""Nearest neighbours against scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from layerprobe.analyses.knn import Metric, knn_accuracy, nearest

Array = NDArray[Any]


def samples(seed: int, n: int = 200, width: int = 8, num_classes: int = 5) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, num_classes, n)
    return rng.normal(size=(n, width)) + np.random.default_rng(99).normal(size=(num_classes, width))[y], y


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 10, 37])
def test_equals_scikit_learn(metric: Metric, k: int) -> None:
    # With k = 10 and 5 classes there are many votes that end in a tie.
    bank_x, bank_y = samples(0)
    query_x, query_y = samples(1)
    mean = bank_x.mean(axis=0)
    reference = KNeighborsClassifier(k, metric=metric, algorithm="brute").fit(bank_x - mean, bank_y)
    result = knn_accuracy(bank_x, bank_y, query_x, query_y, k=k, metric=metric)
    np.testing.assert_array_equal(result.correct, reference.predict(query_x - mean) == query_y)
    assert result.accuracy == result.correct.mean()
    assert (result.k, result.metric) == (k, metric)


def test_equals_scikit_learn_on_real_digits() -> None:
    data = load_digits()
    x, y = data.data, data.target
    reference = KNeighborsClassifier(10).fit(x[:1000], y[:1000])
    result = knn_accuracy(x[:1000], y[:1000], x[1000:], y[1000:], metric="euclidean")
    # Pixel values are integers, so some distances are equal, and only there the two may differ in their tenth
    # neighbour.
    assert np.mean(result.correct != (reference.predict(x[1000:]) == y[1000:])) < 0.01
    assert result.accuracy > 0.9


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_neighbours_equal_scikit_learn(metric: Metric) -> None:
    bank_x, bank_y = samples(2)
    query_x, _ = samples(3)
    mean = bank_x.mean(axis=0)
    reference = KNeighborsClassifier(metric=metric, algorithm="brute").fit(bank_x - mean, bank_y)
    expected = np.sort(reference.kneighbors(query_x - mean, 6, return_distance=False), axis=1)
    np.testing.assert_array_equal(np.concatenate(list(nearest(bank_x, query_x, k=6, metric=metric))), expected)


@pytest.mark.parametrize("rows", [1, 3, 199, 1000])
def test_tiles_change_nothing(rows: int) -> None:
    bank_x, bank_y = samples(4)
    query_x, query_y = samples(5)
    whole = knn_accuracy(bank_x, bank_y, query_x, query_y)
    tiled = knn_accuracy(bank_x, bank_y, query_x, query_y, tile_bytes=rows * 8 * 200)
    np.testing.assert_array_equal(tiled.correct, whole.correct)


def test_tiles_bound_the_memory() -> None:
    bank_x, _ = samples(4)
    sizes = [len(tile) for tile in nearest(bank_x, bank_x, k=3, metric="cosine", tile_bytes=64 * 8 * 200)]
    assert sizes == [64, 64, 64, 8]


def test_of_equally_distant_neighbours_the_first_counts() -> None:
    bank_x = np.array([[0.0], [4.0], [0.0], [4.0], [4.0]])
    neighbours = next(nearest(bank_x, np.array([[3.0]]), k=2, metric="euclidean"))
    assert neighbours.tolist() == [[1, 3]]
    neighbours = next(nearest(bank_x, np.array([[3.0]]), k=4, metric="euclidean"))
    assert neighbours.tolist() == [[0, 1, 3, 4]]


def test_of_equally_common_labels_the_smallest_wins() -> None:
    bank_x, bank_y = np.array([[0.0], [0.1], [0.2], [0.3]]), np.array([8, 8, 5, 5])
    result = knn_accuracy(bank_x, bank_y, np.array([[0.0]]), np.array([5]), k=4, metric="euclidean")
    assert result.correct.all()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_an_offset_in_float32_changes_nothing(metric: Metric) -> None:
    bank_x, bank_y = samples(6)
    query_x, query_y = samples(7)
    # Multiples of 1/64 survive an offset of 1e4 in float32 exactly.
    bank_x, query_x = np.round(bank_x * 64) / 64, np.round(query_x * 64) / 64
    plain = knn_accuracy(bank_x, bank_y, query_x, query_y, metric=metric, k=3)
    bank_x, query_x = (bank_x + 1e4).astype(np.float32), (query_x + 1e4).astype(np.float32)
    offset = knn_accuracy(bank_x, bank_y, query_x, query_y, metric=metric, k=3)
    # Coarse values make some distances equal, and rounding may order those differently.
    assert np.mean(plain.correct != offset.correct) <= 0.01


def test_cosine_ignores_what_all_samples_share() -> None:
    bank_x, bank_y = samples(8)
    query_x, query_y = samples(9)
    plain = knn_accuracy(bank_x, bank_y, query_x, query_y)
    shared = knn_accuracy(bank_x + 1000.0, bank_y, query_x + 1000.0, query_y)
    np.testing.assert_array_equal(shared.correct, plain.correct)
    assert plain.accuracy > 0.6


def test_shuffled_labels_are_not_found() -> None:
    bank_x, bank_y = samples(10, n=500)
    query_x, query_y = samples(11, n=500)
    shuffled = np.random.default_rng(0).permutation(query_y)
    # Five classes, 500 samples: three standard errors about one fifth.
    assert abs(knn_accuracy(bank_x, bank_y, query_x, shuffled).accuracy - 0.2) < 3 * np.sqrt(0.2 * 0.8 / 500)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_constant_features_give_the_vote_of_the_first_samples(metric: Metric) -> None:
    bank_y = np.array([2, 1, 1, 0, 0, 0])
    result = knn_accuracy(np.full((6, 3), 0.1), bank_y, np.full((2, 3), 0.1), np.array([1, 0]), k=3, metric=metric)
    assert result.correct.tolist() == [True, False]


def test_a_sample_at_the_mean_is_equally_far_from_all() -> None:
    bank_x = np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    neighbours = next(nearest(bank_x, np.zeros((1, 2)), k=2, metric="cosine"))
    assert neighbours.tolist() == [[0, 1]]


def test_refuses_bad_input() -> None:
    x, y = samples(12, n=20)
    with pytest.raises(ValueError, match="k is 21, but the bank has 20 samples"):
        knn_accuracy(x, y, x, y, k=21)
    with pytest.raises(ValueError, match=r"20 query samples but labels of shape \(19,\)"):
        knn_accuracy(x, y, x, y[:19])
    with pytest.raises(ValueError, match="8 features in the bank, 7 in the queries"):
        knn_accuracy(x, y, x[:, :7], y)
    with pytest.raises(ValueError, match="query features hold 20 values that are nan or inf"):
        knn_accuracy(x, y, x * np.where(np.arange(8) == 0, np.nan, 1), y)
    metric: Any = "manhattan"
    with pytest.raises(ValueError, match="metric 'manhattan' is not known"):
        knn_accuracy(x, y, x, y, metric=metric)
