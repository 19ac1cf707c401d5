"""Estimates equal the measures, and their intervals those of resampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerprobe.analyses.measures.cka import cka_matrix
from layerprobe.analyses.measures.jackknife import (
    Z95,
    Estimate,
    cka_estimates,
    cknna_estimates,
    effective_rank_estimate,
    lidar_estimate,
    mean_estimate,
    ratio_estimate,
    stacked,
)
from layerprobe.analyses.measures.neighbor_graphs import cknna, neighbor_graph
from layerprobe.analyses.measures.spectra import effective_rank, lidar


def layers(n: int, seed: int, *, offset: float = 0.0) -> list[Any]:
    """Three layers of five classes under two noise draws, arrays (n, 2, 8); the map from one to the next is fixed."""
    fixed, generator = np.random.default_rng(0), np.random.default_rng([1, seed])
    means, first, second = 2 * fixed.standard_normal((5, 8)), *fixed.standard_normal((2, 8, 8)) / 3
    content = means[generator.integers(0, 5, n)] + generator.standard_normal((n, 8)) * np.linspace(2, 0.2, 8)
    x = content[:, None] + 0.3 * generator.standard_normal((n, 2, 8))
    y = np.tanh(x @ first)
    return [x + offset, y + offset, np.tanh(y @ second) + 0.5 * y + offset]


def bootstrap_sd(statistic: Callable[[Any], Any], arrays: Any, *, resamples: int = 300) -> Any:
    """Standard deviation of a statistic over resamples of the first axis."""
    generator = np.random.default_rng(0)
    n = len(arrays[0])
    draws = [generator.integers(0, n, n) for _ in range(resamples)]
    return np.std([statistic([x[rows] for x in arrays]) for rows in draws], axis=0)


def spread(statistic: Callable[[Any], Any], n: int, *, repeats: int) -> Any:
    """Standard deviation of a statistic over new samples from the same source: which an interval estimates."""
    return np.std([statistic(layers(n, seed)) for seed in range(repeats)], axis=0)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_estimates_equal_the_measures(offset: float) -> None:
    x, y, z = layers(60, 0, offset=offset)
    exact = 1e-9 if offset == 0 else 1e-6  # digits that an offset of a thousand leaves
    result = cka_estimates([x[:, 0], y[:, 0], z[:, 0]]).value
    np.testing.assert_allclose(result, cka_matrix([x[:, 0], y[:, 0], z[:, 0]]).values, atol=exact)
    graphs = [neighbor_graph(a[:, 0], k=7) for a in (x, y, z)]
    np.testing.assert_allclose(np.triu(cknna_estimates(graphs).value), np.triu(cknna(graphs).values), atol=1e-12)
    for a in (x, y, z):
        assert effective_rank_estimate(a[:, 0]).value == pytest.approx(effective_rank(a[:, 0]), abs=exact)
        assert lidar_estimate(a).value == pytest.approx(lidar(a).debiased_rank, abs=exact)


def test_wide_features_have_the_rank_and_the_influences_of_their_span() -> None:
    x = layers(40, 4)[0][:, 0]
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((300, 8)))[0]
    wide, narrow = effective_rank_estimate(x @ basis.T), effective_rank_estimate(x)
    assert wide.value == pytest.approx(narrow.value, rel=1e-6)
    np.testing.assert_allclose(wide.influence, narrow.influence, atol=1e-6)


def test_the_jackknife_of_cka_is_cka_without_each_sample() -> None:
    arrays = [a[:, 0] for a in layers(12, 3)]
    without = np.stack([cka_matrix([np.delete(a, i, axis=0) for a in arrays]).values for i in range(12)], axis=-1)
    expected = 11 * (without.mean(-1, keepdims=True) - without)
    np.testing.assert_allclose(cka_estimates(arrays).influence, expected, atol=1e-10)


@pytest.mark.parametrize("which", ["effective rank", "noise-LiDAR"])
def test_the_influence_on_a_rank_is_its_derivative_by_the_weight_of_the_sample(which: str) -> None:
    """The derivative by differences: many copies of all samples, and one more copy of a single sample."""
    x = layers(40, 1)[1]
    chosen, copies = (3, 17), 400
    of = (lambda a: effective_rank(a[:, 0])) if which == "effective rank" else (lambda a: lidar(a).debiased_rank)
    estimate = effective_rank_estimate(x[:, 0]) if which == "effective rank" else lidar_estimate(x)
    many = np.tile(x, (copies, 1, 1))
    # Tiling changes the n - 1 of the variance between samples, so compare with the tiled value.
    base, size = of(many), len(many)
    for i in chosen:
        moved = (of(np.concatenate([many, x[i : i + 1]])) - base) * (size + 1)
        assert moved == pytest.approx(float(estimate.influence[i]), rel=0.03, abs=0.02)


def test_the_interval_of_a_mean_and_of_a_paired_difference_is_the_bootstraps() -> None:
    generator = np.random.default_rng(0)
    hard = generator.random(400) < 0.5
    student, teacher = ((generator.random(400) < np.where(hard, a, b)).astype(float) for a, b in ((0.1, 0.9), (0.2, 1)))
    estimate = mean_estimate(np.stack([student, teacher]))
    gap = estimate[1] - estimate[0]
    by_force = bootstrap_sd(lambda rows: rows[1].mean() - rows[0].mean(), [student, teacher], resamples=1000)
    assert gap.value == pytest.approx(teacher.mean() - student.mean())
    assert gap.half_width == pytest.approx(Z95 * by_force, rel=0.1)  # the spread of 1000 resamples is accurate to 2 %
    # Paired: the same samples are hard for both, so the interval of the difference is smaller.
    assert gap.half_width < 0.75 * np.hypot(*estimate.half_width)


def test_the_interval_of_a_ratio_is_the_bootstraps() -> None:
    generator = np.random.default_rng(1)
    size = generator.gamma(2.0, size=300)
    missed = size * generator.beta(2, 5, size=300)
    estimate = ratio_estimate(missed, size)
    by_force = bootstrap_sd(lambda rows: rows[0].sum() / rows[1].sum(), [missed, size], resamples=1000)
    assert estimate.value == pytest.approx(missed.sum() / size.sum())
    assert estimate.half_width == pytest.approx(Z95 * by_force, rel=0.1)


def test_the_interval_of_ranks_is_the_bootstraps() -> None:
    x, _, z = layers(400, 2)
    ranks = [effective_rank_estimate(a[:, 0]) for a in (x, z)]
    lidars = [lidar_estimate(a) for a in (x, z)]
    result = [ranks[0], ranks[1] - ranks[0], lidars[0], lidars[1].log() - lidars[0].log()]

    def by_force(rows: Any) -> list[float]:
        rank, directions = ([of(a) for a in rows] for of in (lambda a: effective_rank(a[:, 0]), _directions))
        return [rank[0], rank[1] - rank[0], directions[0], np.log(directions[1]) - np.log(directions[0])]

    expected = bootstrap_sd(by_force, [x, z])
    # 300 resamples give a spread to 4 %; resamples hold samples twice, which moves ranks a little.
    np.testing.assert_allclose([e.half_width for e in result], Z95 * expected, rtol=0.2)


def _directions(x: Any) -> float:
    return lidar(x).debiased_rank


def test_the_interval_of_similarities_is_the_spread_over_new_samples() -> None:
    """Not the bootstrap's: a sample that is drawn twice is its own nearest neighbor."""

    def of(arrays: Any) -> list[float]:
        graphs = [neighbor_graph(a[:, 0], k=10) for a in arrays]
        return [cka_matrix([a[:, 0] for a in arrays]).values[0, 2], cknna(graphs).values[0, 2]]

    arrays = layers(150, 1000)
    graphs = [neighbor_graph(a[:, 0], k=10) for a in arrays]
    result = [cka_estimates([a[:, 0] for a in arrays])[0, 2], cknna_estimates(graphs)[0, 2]]
    # 80 repeats give a spread to 8 %, the intervals vary from sample to sample too.
    np.testing.assert_allclose([e.half_width for e in result], Z95 * spread(of, 150, repeats=80), rtol=0.3)


def test_a_mean_over_levels_takes_account_of_the_same_samples_in_all() -> None:
    generator = np.random.default_rng(0)
    once = generator.standard_normal((1, 200))
    same, other = np.repeat(once, 4, axis=0), generator.standard_normal((4, 200))
    assert mean_estimate(same).mean(0).half_width == pytest.approx(mean_estimate(once)[0].half_width)
    assert mean_estimate(other).mean(0).half_width == pytest.approx(mean_estimate(once)[0].half_width / 2, rel=0.1)


@given(st.integers(0, 10_000), st.integers(5, 30))
def test_influences_cancel_and_intervals_do_not_depend_on_units(seed: int, n: int) -> None:
    x = np.random.default_rng(seed).standard_normal((n, 2, 4))
    for make in (lambda a: effective_rank_estimate(a[:, 0]), lidar_estimate):
        result, scaled = make(x), make(1000 * x + 5)
        assert abs(result.influence.mean()) < 1e-6 * max(1.0, float(np.abs(result.influence).max()))
        assert scaled.half_width == pytest.approx(float(result.half_width), rel=1e-4, abs=1e-9)


def test_pure_noise_has_no_direction_and_an_interval_of_0() -> None:
    generator = np.random.default_rng(0)
    draw = generator.standard_normal((50, 1, 6))
    mirrored = np.concatenate([draw, -draw], axis=1)  # all means are 0
    result = lidar_estimate(mirrored)
    assert (result.value, result.half_width) == (1.0, 0.0)


def test_a_layer_without_an_estimate_does_not_affect_the_others() -> None:
    x, y, _ = (a[:, 0] for a in layers(40, 0))
    result = cka_estimates([x, np.ones_like(x), y])
    assert np.isnan(result.value[1]).all()
    assert result.value[0, 2] == pytest.approx(cka_matrix([x, y]).values[0, 1])
    assert np.isfinite(result[0, 2].half_width)


def test_estimates_stack_and_index() -> None:
    parts = [mean_estimate(np.random.default_rng(i).random((3, 10))) for i in range(2)]
    both = stacked(parts)
    assert both.value.shape == (2, 3)
    assert isinstance(both[1, 2], Estimate)
    assert both[1, 2].value == parts[1].value[2]
