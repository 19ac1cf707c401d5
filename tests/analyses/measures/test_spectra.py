"""Numbers of the spectrum against planted spectra and the formulas of the papers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import linalg

from layerprobe.analyses.measures.spectra import effective_rank, exponential_entropy, lidar, spectrum

Array = NDArray[Any]
NUMBERS = ("effective_rank", "rank_me", "participation_ratio", "anisotropy")


def with_spectrum(values: Array, *, n: int, width: int, seed: int = 0) -> Array:
    """Centered features (n, width) with these singular values."""
    rng = np.random.default_rng(seed)
    num = len(values)
    # Orthonormal columns that are orthogonal to the ones vector, so that centering leaves them as they are.
    left = np.linalg.qr(np.concatenate([np.ones((n, 1)), rng.normal(size=(n, num))], axis=1))[0][:, 1:]
    right = np.linalg.qr(rng.normal(size=(width, num)))[0]
    return (left * values) @ right.T


def on_a_lattice(*shape: int) -> Array:
    """Multiples of 1/64 survive an offset of 1e4 in float32 exactly."""
    return np.round(np.random.default_rng(0).normal(size=shape) * 64) / 64


# ----------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize(("n", "width"), [(50, 12), (12, 50), (13, 13), (13, 12)])
def test_equal_singular_values_give_their_number(n: int, width: int) -> None:
    result = spectrum(with_spectrum(np.full(7, 3.0), n=n, width=width))
    assert result.effective_rank == pytest.approx(7.0, rel=1e-9)
    assert result.participation_ratio == pytest.approx(7.0, rel=1e-9)
    # Its epsilon lets the missing directions count a little.
    assert result.rank_me == pytest.approx(7.0, rel=1e-4)


def test_equals_the_formulas_for_a_known_spectrum() -> None:
    values = np.array([4.0, 2.0, 1.0, 1.0])
    p = values / 8
    result = spectrum(with_spectrum(values, n=30, width=6))
    assert result.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)
    assert result.participation_ratio == pytest.approx((16 + 4 + 1 + 1) ** 2 / (256 + 16 + 1 + 1), rel=1e-9)
    np.testing.assert_allclose(result.singular_values[:4], values, rtol=1e-9)
    assert result.singular_values.shape == result.uncentered.shape == (6,)


@pytest.mark.parametrize(("n", "width"), [(40, 9), (9, 40), (10, 10), (9, 10), (2, 5)])
def test_both_decompositions_are_those_of_numpy(n: int, width: int) -> None:
    x = np.random.default_rng(1).normal(size=(n, width)) + 3.0
    result = spectrum(x)
    np.testing.assert_allclose(result.uncentered, np.linalg.svd(x, compute_uv=False), rtol=1e-10)
    expected = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)
    np.testing.assert_allclose(result.singular_values, expected, atol=1e-12 * expected[0])


@pytest.mark.parametrize(("n", "width"), [(60, 8), (8, 60)])
def test_rank_me_is_the_published_formula(n: int, width: int) -> None:
    """Garrido et al. 2023, eq. 1: of the features as they are."""
    x = np.random.default_rng(2).normal(size=(n, width)) * np.arange(1, width + 1) + 0.5
    sigma = np.linalg.svd(x, compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    assert spectrum(x).rank_me == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-10)


def test_a_large_mean_hides_the_rank_from_rank_me_only() -> None:
    x = np.random.default_rng(3).normal(size=(200, 16))
    moved = spectrum(x + 1e4)
    assert moved.rank_me == pytest.approx(1.0, abs=0.01)
    assert moved.effective_rank == pytest.approx(spectrum(x).effective_rank, rel=1e-9)


def test_one_direction_has_rank_one() -> None:
    result = spectrum(np.outer(np.arange(10.0) - 4.5, np.ones(4)))
    for name in ("effective_rank", "participation_ratio"):
        assert getattr(result, name) == pytest.approx(1.0, abs=1e-9)


def test_small_singular_values_are_exact() -> None:
    measured = spectrum(with_spectrum(np.array([1.0, 1e-10]), n=30, width=6)).singular_values
    assert measured[1] / measured[0] == pytest.approx(1e-10, rel=1e-4)


@given(seed=st.integers(0, 10**6), exponent=st.integers(-150, 150), offset=st.floats(-1e3, 1e3))
@settings(max_examples=30, deadline=None)
def test_invariant_to_rotation_scale_and_translation(seed: int, exponent: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, 25)) * np.arange(1, 26)
    rotation = np.linalg.qr(rng.normal(size=(25, 25)))[0]
    moved, still = spectrum((x @ rotation + offset) * 10.0**exponent), spectrum(x)
    assert moved.effective_rank == pytest.approx(still.effective_rank, rel=1e-10)
    assert moved.participation_ratio == pytest.approx(still.participation_ratio, rel=1e-10)
    assert moved.power_law.exponent == pytest.approx(still.power_law.exponent, rel=1e-8)
    rotated = spectrum(x @ rotation * 10.0**exponent)
    assert rotated.rank_me == pytest.approx(still.rank_me, rel=1e-10)
    assert rotated.anisotropy == pytest.approx(still.anisotropy, abs=1e-12)


def test_an_offset_of_1e4_in_float32_changes_nothing() -> None:
    x = on_a_lattice(100, 8)
    moved = spectrum((x + 1e4).astype(np.float32))
    assert moved.effective_rank == pytest.approx(spectrum(x).effective_rank, rel=1e-10)
    assert moved.participation_ratio == pytest.approx(spectrum(x).participation_ratio, rel=1e-10)


def test_two_huge_channels_leave_two_directions() -> None:
    x = np.random.default_rng(4).normal(size=(300, 20))
    x[:, :2] *= 1000
    assert spectrum(x).participation_ratio == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("value", [0.0, 0.1, 12345.678])
@pytest.mark.parametrize("n", [9, 1])
def test_constant_features_have_no_spectrum(value: float, n: int) -> None:
    result = spectrum(np.full((n, 3), value, np.float32))
    assert result.reason == "the features are the same for all samples"
    assert all(np.isnan(getattr(result, name)) for name in NUMBERS)
    assert np.isnan(result.power_law.exponent)


def test_refuses_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="1 values that are nan or inf"):
        spectrum(np.array([[1.0, np.inf], [0.0, 1.0]]))


def test_the_shortcut_is_the_property() -> None:
    x = np.random.default_rng(5).normal(size=(20, 5))
    assert effective_rank(x) == spectrum(x).effective_rank


@pytest.mark.parametrize("epsilon", [0.0, 1e-7])
def test_the_exponential_entropy_counts_equal_values(epsilon: float) -> None:
    assert exponential_entropy(np.array([2.0, 2.0, 2.0, 0.0]), epsilon=epsilon) == pytest.approx(3, rel=1e-5)


# ------------------------------------------------------------------------------------------- power law


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
def test_a_planted_power_law_is_found(alpha: float) -> None:
    law = spectrum(with_spectrum(np.arange(1.0, 151) ** (-alpha / 2), n=400, width=160)).power_law
    assert (law.first_rank, law.last_rank) == (11, 100)
    assert law.exponent == pytest.approx(alpha, rel=1e-9)
    assert law.r_squared == pytest.approx(1.0, abs=1e-9)


def test_the_first_ten_ranks_do_not_count() -> None:
    values = np.arange(1.0, 151) ** -0.5
    values[:10] *= 100
    assert spectrum(with_spectrum(values, n=400, width=160)).power_law.exponent == pytest.approx(1.0, rel=1e-9)


def test_the_fit_is_the_weighted_least_squares_of_the_reference() -> None:
    """Written as the normal equations of Stringer et al. 2019: weights 1 / rank."""
    x = np.random.default_rng(6).normal(size=(300, 120)) * np.arange(1, 121)
    rank = np.arange(11, 101)
    y = 2 * np.log(np.linalg.svd(x - x.mean(axis=0), compute_uv=False)[rank - 1])
    design = np.stack([-np.log(rank), np.ones(len(rank))], axis=1)
    expected = np.linalg.solve(design.T @ (design / rank[:, None]), design.T @ (y / rank))[0]
    law = spectrum(x).power_law
    assert law.exponent == pytest.approx(expected, rel=1e-9)
    assert 0 < law.r_squared < 0.99


@pytest.mark.parametrize(("num", "last"), [(40, 40), (20, 20), (19, 19)])
def test_a_small_spectrum_is_fitted_as_far_as_it_goes(num: int, last: int) -> None:
    law = spectrum(with_spectrum(np.arange(1.0, num + 1) ** -0.5, n=90, width=60)).power_law
    assert law.last_rank == last
    assert np.isnan(law.exponent) == (num < 20)


# ------------------------------------------------------------------------------------------ anisotropy


@pytest.mark.parametrize("offset", [0.0, 3.0, 1e4])
def test_anisotropy_is_the_mean_over_all_pairs(offset: float) -> None:
    x = (np.random.default_rng(7).normal(size=(50, 6)) + offset).astype(np.float32)
    units = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    cosines = (units @ units.T)[~np.eye(50, dtype=bool)]
    # 1 - cosine is 1e-9 at the largest offset, and rounding 1e-16.
    assert spectrum(x).anisotropy == pytest.approx(cosines.mean(), abs=1e-13)


def test_opposite_vectors_have_the_smallest_anisotropy() -> None:
    assert spectrum(np.array([[1.0, 2.0], [-2.0, -4.0]])).anisotropy == pytest.approx(-1.0)


def test_a_zero_vector_points_nowhere() -> None:
    result = spectrum(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    assert np.isnan(result.anisotropy)
    assert result.effective_rank > 1


# ------------------------------------------------------------------------------------------------ LiDAR


def draws(signal: Array, *, num: int, noise: float = 1.0, seed: int = 0) -> Array:
    n, width = signal.shape
    return signal[:, None] + noise * np.random.default_rng(seed).normal(size=(n, num, width))


@pytest.mark.parametrize("shape", [(40, 3, 8), (12, 6, 30)])
def test_lidar_is_the_published_formula(shape: tuple[int, int, int]) -> None:
    """The generalized eigenvalues of the two covariances, with scipy, and a ridge in the same units."""
    n, num, width = shape
    x = draws(np.random.default_rng(11).normal(size=(n, width)) * np.arange(1, width + 1), num=num)
    means = x.mean(axis=1)
    inner = (x - means[:, None]).reshape(-1, width)
    within = inner.T @ inner / (n * (num - 1))
    between = np.cov(means.T)
    ridge = 1e-4 * np.median(np.linalg.eigvalsh(within))
    expected = linalg.eigh(between, within + ridge * np.eye(width), eigvals_only=True)[::-1][: min(n - 1, width)]
    result = lidar(x)
    np.testing.assert_allclose(result.eigenvalues, expected, rtol=1e-8)
    p = expected / expected.sum() + 1e-7
    assert result.rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-8)


def test_lidar_counts_the_directions_that_tell_samples_apart() -> None:
    signal = np.zeros((400, 32))
    signal[:, :5] = 20 * np.random.default_rng(12).normal(size=(400, 5))
    result = lidar(draws(signal, num=8))
    assert result.rank == pytest.approx(5.0, rel=0.05)
    # The ordinary rank counts the noise too.
    assert effective_rank(draws(signal, num=8)[:, 0]) > 10


def test_few_draws_of_noise_look_like_rank_until_debiased() -> None:
    signal = np.zeros((2000, 32))
    signal[:, :3] = 3 * np.random.default_rng(13).normal(size=(2000, 3))
    result = lidar(draws(signal, num=2))
    assert result.rank > 8
    assert 3 <= result.debiased_rank < 4.5  # random excess above 1 / num_draws remains


@given(seed=st.integers(0, 10**6), exponent=st.integers(-100, 100))
@settings(max_examples=15, deadline=None)
def test_lidar_is_invariant_to_invertible_maps_and_offsets(seed: int, exponent: int) -> None:
    rng = np.random.default_rng(seed)
    x = draws(rng.normal(size=(60, 6)) * np.arange(1, 7), num=4, seed=seed)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    moved = (x @ rotation + 100) * 10.0**exponent
    assert lidar(moved).rank == pytest.approx(lidar(x).rank, rel=1e-8)
    # Stretching changes the ridge's part, which is 1e-4 of the variance.
    assert lidar(x * np.array([1000.0, 1000, 1, 1, 1, 1])).rank == pytest.approx(lidar(x).rank, rel=0.02)


def test_lidar_survives_an_offset_of_1e4_in_float32() -> None:
    x = on_a_lattice(50, 3, 6)
    assert lidar((x + 1e4).astype(np.float32)).rank == pytest.approx(lidar(x).rank, rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_lidar_needs_draws_that_differ(value: float) -> None:
    for x in (np.full((5, 3, 2), value), np.repeat(np.arange(10.0).reshape(5, 1, 2), 3, axis=1)):
        result = lidar(x)
        assert result.reason == "the features are the same for all draws of a sample"
        assert np.isnan(result.rank)
        assert np.isnan(result.debiased_rank)


@pytest.mark.parametrize("shape", [(5, 1, 3), (1, 5, 3), (5, 3)])
def test_lidar_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pass \(n, draws, D\) with 2 samples and draws or more"):
        lidar(np.ones(shape))


def test_lidar_refuses_bad_values() -> None:
    with pytest.raises(ValueError, match="ridge is 0"):
        lidar(np.ones((3, 3, 3)), ridge=0)
    with pytest.raises(ValueError, match="1 values that are nan or inf"):
        lidar(np.where(np.arange(8).reshape(2, 2, 2) == 3, np.nan, 1.0))
