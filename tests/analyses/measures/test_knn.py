"""Nearest neighbors against scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from layerprobe.analyses.measures.knn import Metric, NeighborScore, knn_accuracy, nearest

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
    # neighbor.
    assert np.mean(result.correct != (reference.predict(x[1000:]) == y[1000:])) < 0.01
    assert result.accuracy > 0.9


def plain_nearest(bank: Array, queries: Array, k: int, score: NeighborScore, *, excludes_self: bool = False) -> Array:
    """Every score by itself in float64, and a stable sort."""
    scores = (queries[:, None] * bank).sum(-1)
    if score == "distance":
        scores -= np.square(bank).sum(1) / 2
    if excludes_self:
        np.fill_diagonal(scores, -np.inf)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def positions_of(bank: Array, queries: Array | None, k: int, score: NeighborScore, **options: int) -> Array:
    wide = None if queries is None else torch.from_numpy(queries)
    return nearest(torch.from_numpy(bank), wide, k=k, score=score, **options)[0]


@pytest.mark.parametrize("score", ["inner product", "distance"])
@pytest.mark.parametrize("k", [1, 7, 199])
def test_neighbors_equal_a_plain_search(score: NeighborScore, k: int) -> None:
    bank, queries = samples(2)[0], samples(3)[0]
    np.testing.assert_array_equal(positions_of(bank, queries, k, score), plain_nearest(bank, queries, k, score))
    np.testing.assert_array_equal(
        positions_of(bank, None, k, score), plain_nearest(bank, bank, k, score, excludes_self=True)
    )


def test_neighbors_that_float32_cannot_tell_apart_are_told_apart() -> None:
    # 100 neighbors around one query whose distances differ in the tenth digit, in random order: float32 sees one.
    rng = np.random.default_rng(0)
    bank = np.concatenate([np.ones((100, 4)) * (1 + 1e-10 * rng.permutation(100))[:, None], rng.normal(size=(50, 4))])
    queries = np.full((3, 4), 2.0)
    expected = plain_nearest(bank, queries, 5, "distance")
    assert not np.array_equal(np.argsort(-(bank.astype(np.float32) @ queries[0].astype(np.float32)))[:5], expected[0])
    np.testing.assert_array_equal(positions_of(bank, queries, 5, "distance"), expected)


def test_one_sample_far_from_all_others_costs_no_digits() -> None:
    bank, queries = samples(4)[0], samples(5)[0]
    bank[3] *= 1e6
    np.testing.assert_array_equal(
        positions_of(bank, queries, 5, "distance"), plain_nearest(bank, queries, 5, "distance")
    )


@given(seed=st.integers(0, 10**6), copies=st.integers(2, 40), k=st.integers(1, 30))
def test_of_duplicates_the_first_is_nearer(seed: int, copies: int, k: int) -> None:
    distinct = np.random.default_rng(seed).normal(size=(7, 5))
    bank = np.tile(distinct, (copies, 1))
    k = min(k, len(bank) - 1)
    for score in ("inner product", "distance"):
        positions = positions_of(bank, distinct, k, score)
        np.testing.assert_array_equal(positions, plain_nearest(bank, distinct, k, score))
        positions = positions_of(bank, None, k, score)
        assert not (positions == np.arange(len(bank))[:, None]).any()


@pytest.mark.parametrize("rows", [1, 3, 199, 1000])
def test_tiles_change_nothing(rows: int) -> None:
    bank_x, bank_y = samples(4)
    query_x, query_y = samples(5)
    whole = knn_accuracy(bank_x, bank_y, query_x, query_y)
    tiled = knn_accuracy(bank_x, bank_y, query_x, query_y, tile_bytes=rows * 16 * 26 * 8)
    np.testing.assert_array_equal(tiled.correct, whole.correct)


def test_of_equally_distant_neighbors_the_first_counts() -> None:
    bank, query = np.array([[0.0], [4.0], [0.0], [4.0], [4.0]]), np.array([[3.0]])
    assert positions_of(bank, query, 2, "distance").tolist() == [[1, 3]]
    assert positions_of(bank, query, 4, "distance").tolist() == [[1, 3, 4, 0]]


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


def test_a_sample_at_the_mean_has_cosine_0_with_all() -> None:
    bank_x, bank_y = np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]), np.array([1, 1, 0, 0])
    # Equally far from all, so the first two vote.
    assert knn_accuracy(bank_x, bank_y, np.zeros((1, 2)), np.array([1]), k=2).accuracy == 1


def plain_weighted(bank_x: Array, bank_y: Array, query_x: Array, k: int, temperature: float) -> Array:
    """The k-NN classifier of DINO, in the words of its paper."""
    mean = bank_x.mean(axis=0)
    bank, queries = ((x - mean) / np.linalg.norm(x - mean, axis=1, keepdims=True) for x in (bank_x, query_x))
    predicted = []
    for similarities in queries @ bank.T:
        votes = np.zeros(bank_y.max() + 1)
        for i in np.argsort(-similarities)[:k]:
            votes[bank_y[i]] += np.exp(similarities[i] / temperature)
        predicted.append(votes.argmax())
    return np.array(predicted)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_weighted_votes_are_dinos(temperature: float) -> None:
    bank_x, bank_y = samples(13)
    query_x, query_y = samples(14)
    expected = plain_weighted(bank_x, bank_y, query_x, 20, temperature) == query_y
    result = knn_accuracy(bank_x, bank_y, query_x, query_y, k=20, temperature=temperature)
    np.testing.assert_array_equal(result.correct, expected)
    if temperature < 1:
        assert (knn_accuracy(bank_x, bank_y, query_x, query_y, k=20).correct != expected).any()


def test_weighted_euclidean_votes_do_not_depend_on_the_scale_and_are_cosines_on_the_sphere() -> None:
    rng = np.random.default_rng(0)
    # Pairs of opposite points: their mean is the center of the sphere.
    half, y = rng.normal(size=(100, 4)), rng.integers(0, 3, 200)
    bank = np.concatenate([half, -half]) / np.tile(np.linalg.norm(half, axis=1, keepdims=True), (2, 1))
    queries, targets = bank[:50] + 1e-3, rng.integers(0, 3, 50)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    cosine = knn_accuracy(bank, y, queries, targets, k=30, temperature=0.1)
    for scale in (1e-4, 1.0, 1e4):
        euclidean = knn_accuracy(bank * scale, y, queries * scale, targets, k=30, temperature=0.1, metric="euclidean")
        np.testing.assert_array_equal(euclidean.correct, cosine.correct)


def test_takes_tensors_and_half_precision() -> None:
    bank_x, bank_y = samples(15)
    query_x, query_y = samples(16)
    bank_x, query_x = bank_x.astype(np.float16), query_x.astype(np.float16)
    expected = knn_accuracy(bank_x.astype(np.float64), bank_y, query_x.astype(np.float64), query_y)
    for convert in (lambda x: x, torch.from_numpy, lambda x: torch.from_numpy(x.astype(np.float32))):
        result = knn_accuracy(convert(bank_x), bank_y, convert(query_x), query_y)
        np.testing.assert_array_equal(result.correct, expected.correct)


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
    with pytest.raises(ValueError, match="the temperature is 0"):
        knn_accuracy(x, y, x, y, temperature=0)
    with pytest.raises(ValueError, match=r"features of shape \(20,\) cannot be compared"):
        knn_accuracy(x[:, 0], y, x, y)
