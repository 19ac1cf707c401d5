"""Agreement of neighborhoods against plain loops and full matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from layerprobe.analyses.measures.cka import cka_matrix
from layerprobe.analyses.measures.neighbor_graphs import NeighborGraph, cknna, cycle_knn, mutual_knn, neighbor_graph
from layerprobe.analyses.measures.tensors import PairMatrix

Array = NDArray[Any]
Measure = Callable[..., PairMatrix]
MEASURES: list[Measure] = [mutual_knn, cycle_knn, cknna]


def related(seed: int, n: int = 60) -> list[Array]:
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(n, 4))
    mixed = base @ rng.normal(size=(4, 9)) + 0.5 * rng.normal(size=(n, 9))
    return [base + 2, mixed * 1e-3, np.tanh(mixed), rng.normal(size=(n, 30)) * 1e5]


def graphs(xs: list[Array], **options: Any) -> list[NeighborGraph]:
    return [neighbor_graph(x, **options) for x in xs]


def plain_kernel(x: Array, kernel: str = "cosine", *, center: bool = True) -> Array:
    z = x - x.mean(axis=0) if center else x
    if kernel == "cosine":
        z = z / np.linalg.norm(z, axis=1, keepdims=True)
    return z @ z.T


def plain_mask(gram: Array, k: int) -> Array:
    ranked = gram.copy()
    np.fill_diagonal(ranked, -np.inf)
    mask = np.zeros_like(gram, dtype=bool)
    np.put_along_axis(mask, np.argsort(-ranked, axis=1)[:, :k], True, axis=1)
    return mask


def plain_hsic(a: Array, b: Array) -> float:
    """Song et al. 2012, eq. 5, for matrices whose diagonals are 0."""
    n = len(a)
    total = np.trace(a @ b) + a.sum() * b.sum() / ((n - 1) * (n - 2))
    return float(total - 2 / (n - 2) * (a @ b).sum()) / (n * (n - 3))


def plain(measure: Measure, x: Array, y: Array, k: int, kernel: str = "cosine", *, center: bool = True) -> float:
    """Huh et al. 2024, their definitions with full matrices."""
    gram_x, gram_y = plain_kernel(x, kernel, center=center), plain_kernel(y, kernel, center=center)
    in_x, in_y = plain_mask(gram_x, k), plain_mask(gram_y, k)
    if measure is mutual_knn:
        return float((in_x & in_y).sum() / (k * len(x)))
    if measure is cycle_knn:
        return float(np.mean([any(in_x[j, i] for j in np.flatnonzero(in_y[i])) for i in range(len(x))]))
    both = in_x & in_y
    self_alignments = plain_hsic(in_x * gram_x, in_x * gram_x) * plain_hsic(in_y * gram_y, in_y * gram_y)
    return plain_hsic(both * gram_x, both * gram_y) / float(np.sqrt(self_alignments))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(("kernel", "center"), [("cosine", True), ("cosine", False), ("linear", True)])
@pytest.mark.parametrize("k", [3, 10])
def test_equals_the_plain_definition_for_every_pair(measure: Measure, kernel: Any, center: bool, k: int) -> None:
    xs = related(0)
    result = measure(graphs(xs, k=k, kernel=kernel, center=center))
    expected = [[plain(measure, x, y, k, kernel, center=center) for y in xs] for x in xs]
    np.testing.assert_allclose(result.values, expected, atol=1e-10)
    assert result.reasons == result.other_reasons == ("",) * 4
    np.testing.assert_allclose(np.diag(mutual_knn(graphs(xs, k=k)).values), 1.0)


@pytest.mark.parametrize("n", [4, 7, 40])
def test_cknna_of_all_neighbors_is_debiased_cka(n: int) -> None:
    xs = [x[:n] for x in related(1)]
    result = cknna(graphs(xs, k=n - 1, kernel="linear"))
    np.testing.assert_allclose(result.values, cka_matrix(xs).values, atol=1e-9)


@pytest.mark.parametrize("measure", MEASURES)
def test_two_sets_are_a_part_of_the_whole(measure: Measure) -> None:
    xs = graphs(related(2))
    whole = measure(xs).values
    np.testing.assert_array_equal(measure(xs[:1], xs[1:]).values, whole[:1, 1:])
    np.testing.assert_array_equal(measure(xs[2:], xs).values, whole[2:])


@given(seed=st.integers(0, 10**6), exponent=st.integers(-4, 4))
def test_offset_scale_rotation_and_order_change_nothing(seed: int, exponent: int) -> None:
    rng = np.random.default_rng(seed)
    # Multiples of 1/64 survive an offset of 1e4 in float32 exactly, so any difference is ours.
    x, y = (np.round(rng.normal(size=(40, 5)) * 64) / 64 for _ in range(2))
    y[:, :3] = x[:, :3]
    order = rng.permutation(40)
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    moved = [(x + 1e4).astype(np.float32), x @ rotation * 10.0**exponent, x]
    for measure in MEASURES:
        values = measure(graphs(moved, k=5), graphs([y], k=5)).values[:, 0]
        np.testing.assert_allclose(values, values[-1], atol=1e-9)
        shuffled = measure(graphs([x[order]], k=5), graphs([y[order]], k=5)).values[0, 0]
        assert shuffled == pytest.approx(values[-1], abs=1e-12)


def test_two_channels_times_1000_leave_what_these_two_know() -> None:
    xs = related(3)
    massive = xs[2].copy()
    massive[:, :2] *= 1000
    share = mutual_knn(graphs([massive], k=5), graphs([massive[:, :2]], k=5)).values[0, 0]
    assert share > 0.95
    expected = plain(cknna, massive, xs[0], 5)
    assert cknna(graphs([massive], k=5), graphs([xs[0]], k=5)).values[0, 0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_constant_or_broken_representation_is_nan_with_a_reason_and_leaves_the_others_alone(measure: Measure) -> None:
    xs = related(4)
    broken = xs[0].copy()
    broken[3, 1] = np.inf
    result = measure(graphs([xs[0], np.full((60, 3), 0.1, np.float32), xs[1], broken]))
    np.testing.assert_array_equal(result.values[np.ix_([0, 2], [0, 2])], measure(graphs(xs[:2])).values)
    for m, reason in ((1, "the same for all samples"), (3, "nan or inf")):
        assert np.isnan(result.values[m]).all()
        assert np.isnan(result.values[:, m]).all()
        assert reason in result.reasons[m]
    assert result.reasons[0] == result.reasons[2] == ""


def test_duplicated_samples_are_each_others_neighbors() -> None:
    x = related(5)[0]
    graph = neighbor_graph(np.repeat(x, 3, axis=0), k=2)
    # The two copies of each sample, in order, never the sample itself.
    expected = [[j for j in range(i - i % 3, i - i % 3 + 3) if j != i] for i in range(180)]
    np.testing.assert_array_equal(graph.positions, expected)
    np.testing.assert_allclose(graph.similarities, 1.0)


def test_shuffled_samples_share_neighbors_by_chance_only() -> None:
    x = np.random.default_rng(0).normal(size=(500, 5))
    pair = graphs([x, x[np.random.default_rng(1).permutation(500)]], k=10)
    # Chance is 10 / 499; 5000 neighbors make its standard error about 0.002.
    assert mutual_knn(pair).values[0, 1] == pytest.approx(10 / 499, abs=0.008)
    assert abs(cknna(pair).values[0, 1]) < 0.05


def test_tiles_and_tensors_change_nothing() -> None:
    x = related(6)[1]
    whole, tiled, tensor = neighbor_graph(x), neighbor_graph(x, tile_bytes=1), neighbor_graph(torch.from_numpy(x))
    for other in (tiled, tensor):
        np.testing.assert_array_equal(other.positions, whole.positions)
        np.testing.assert_allclose(other.similarities, whole.similarities, atol=1e-15)


def test_an_alignment_of_0_with_itself_is_nan_with_a_reason() -> None:
    # The corners of a regular simplex: all similarities are the same, which says nothing.
    result = cknna(graphs([np.eye(6), related(7)[0][:6]], k=5))
    assert np.isnan(result.values[0]).all()
    assert "estimated as 0 or less" in result.reasons[0]
    assert result.reasons[1] == ""


def test_refuses_bad_input() -> None:
    xs = related(8)
    with pytest.raises(ValueError, match="k is 60 for 60 samples; pass k between 1 and 59"):
        neighbor_graph(xs[0], k=60)
    kernel: Any = "rbf"
    with pytest.raises(ValueError, match="kernel 'rbf' is not known"):
        neighbor_graph(xs[0], kernel=kernel)
    with pytest.raises(ValueError, match="no graph was given"):
        mutual_knn([])
    with pytest.raises(ValueError, match=r"graphs of \(n, k\) = \[\(60, 4\), \(60, 5\)\] cannot be compared"):
        cycle_knn(graphs(xs, k=4), graphs(xs, k=5))
    with pytest.raises(ValueError, match="CKNNA needs k >= 2 and 4 samples or more, got k = 1 and 60 samples"):
        cknna(graphs(xs, k=1))
