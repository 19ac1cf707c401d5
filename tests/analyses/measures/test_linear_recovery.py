"""Gaps against scikit-learn's ridge pair by pair, and for teachers with planted increments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import Ridge

from layerprobe.analyses.measures.arrays import SPLITS
from layerprobe.analyses.measures.linear_recovery import (
    PENALTIES,
    Recoverability,
    missed_by_sample,
    recoverability,
)
from layerprobe.analyses.measures.token_moments import TokenMoments, shared_basis

Array = NDArray[Any]
Layers = dict[str, list[Array]]  # per split, one array (n, D) per layer
SIZES = {"train": 400, "validation": 150, "test": 200}


def network(
    num: int = 4, *, width: int = 6, sizes: dict[str, int] = SIZES, seed: int = 0, offset: float = 0.0
) -> Layers:
    """Tokens of residual layers; each adds a linear part and noise."""
    rng = np.random.default_rng(seed)
    maps = [rng.normal(size=(width, width)) / width for _ in range(num)]
    layers: Layers = {}
    for split, n in sizes.items():
        x = rng.normal(size=(n, width)) * np.arange(1, width + 1) + offset
        layers[split] = [x]
        for step in maps[1:]:
            x = x + np.tanh(x - offset) @ step + 0.3 * rng.normal(size=x.shape)
            layers[split].append(x)
    return layers


def measured(layers: Layers, *, batch: int | None = None, **options: Any) -> Recoverability:
    return recoverability(moments(layers, batch=batch), **options)


def moments(layers: Layers, *, batch: int | None = None, basis: Array | None = None) -> TokenMoments:
    collected = TokenMoments([f"blocks.{i}" for i in range(len(layers["train"]))], basis=basis)
    for split, arrays in layers.items():
        for start in range(0, len(arrays[0]), batch or len(arrays[0])):
            collected.update(split, [x[start : start + (batch or len(x))] for x in arrays])
    return collected


def explicit(layers: Layers, s: int, t: int, penalties: Sequence[float]) -> tuple[float, float, float]:
    """Gap, gap on the validation split and penalty of one pair, by scikit-learn."""
    increments = {split: arrays[t] - arrays[s] for split, arrays in layers.items()}
    x = layers["train"][s]
    unit = len(x) * np.cov(x.T, bias=True).trace() / x.shape[1]

    def gap(model: Ridge, split: str) -> float:
        missed = increments[split] - model.predict(layers[split][s])
        return float(np.square(missed).sum() / np.square(increments[split] - increments["train"].mean(axis=0)).sum())

    models = {p: Ridge(alpha=p * unit, solver="svd").fit(x, increments["train"]) for p in penalties}
    best = min(penalties, key=lambda p: gap(models[p], "validation"))
    return gap(models[best], "test"), gap(models[best], "validation"), best


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_every_pair_equals_an_explicit_ridge(offset: float) -> None:
    layers = network(offset=offset)
    result = measured(layers, whiten=False)
    for s in range(4):
        for t in range(s + 1, 4):
            gap, validation_gap, penalty = explicit(layers, s, t, PENALTIES)
            # The explicit products of an offset of 1e4 are good to 1e-8.
            assert result.gap[s, t] == pytest.approx(gap, rel=1e-8)
            assert result.validation_gap[s, t] == pytest.approx(validation_gap, rel=1e-8)
            assert result.penalty[s, t] == pytest.approx(penalty)
    assert result.num_tokens == SIZES


def test_whitened_gaps_equal_an_explicit_ridge_on_whitened_tokens() -> None:
    layers = network()
    covariances = [np.cov(x.T, bias=True) for x in layers["train"]]
    pooled = np.mean([c / np.trace(c) for c in covariances], axis=0)
    whitening = np.linalg.cholesky(np.linalg.inv(pooled))  # any root: gaps do not depend on rotation
    whitened = {split: [x @ whitening for x in arrays] for split, arrays in layers.items()}
    result = measured(layers)
    assert result.gap[0, 3] == pytest.approx(explicit(whitened, 0, 3, PENALTIES)[0], rel=1e-8)
    assert result.gap[1, 2] == pytest.approx(explicit(whitened, 1, 2, PENALTIES)[0], rel=1e-8)


def test_few_tokens_choose_a_strong_penalty_and_still_equal_the_explicit_ridge() -> None:
    layers = network(width=30, sizes={"train": 20, "validation": 15, "test": 15})
    result = measured(layers, whiten=False)
    gap, _, penalty = explicit(layers, 0, 2, PENALTIES)
    assert result.gap[0, 2] == pytest.approx(gap, rel=1e-6)
    assert result.penalty[0, 2] == pytest.approx(penalty)
    assert penalty > 1e-3


@given(batch=st.integers(1, 500), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_streaming_equals_batch(batch: int, seed: int) -> None:
    layers = network(3, sizes={"train": 90, "validation": 40, "test": 50}, seed=seed)
    whole, streamed = measured(layers), measured(layers, batch=batch)
    np.testing.assert_allclose(streamed.gap, whole.gap, rtol=1e-9)
    np.testing.assert_array_equal(streamed.penalty, whole.penalty)
    assert streamed.reasons == whole.reasons


# --------------------------------------------------------------------------------------- planted cases


@pytest.mark.parametrize("whiten", [True, False])
def test_a_linear_teacher_is_recovered_and_an_independent_increment_is_not(whiten: bool) -> None:
    rng = np.random.default_rng(1)
    layers: Layers = {}
    step = rng.normal(size=(5, 5))
    for split, n in {"train": 4000, "validation": 1000, "test": 1000}.items():
        student = rng.normal(size=(n, 5)) + 3
        linear = student @ step + 7
        layers[split] = [student, linear, student + rng.normal(size=(n, 5))]
    result = measured(layers, whiten=whiten)
    assert result.gap[0, 1] == pytest.approx(0.0, abs=1e-9)
    assert result.gap[0, 2] == pytest.approx(1.0, abs=0.02)


def test_the_gap_is_the_share_that_was_planted() -> None:
    rng = np.random.default_rng(2)
    layers: Layers = {}
    for split, n in {"train": 8000, "validation": 2000, "test": 4000}.items():
        student = rng.normal(size=(n, 4))
        layers[split] = [student, student + 3 * student[:, ::-1] + np.sqrt(3) * rng.normal(size=(n, 4))]
    # The increment's variance is 9 recoverable parts and 3 others.
    assert measured(layers, whiten=False).gap[0, 1] == pytest.approx(0.25, abs=0.01)
    assert measured(layers, whiten=False).increment[0, 1] == pytest.approx(12 / 13, abs=0.03)


def test_overfitting_shows() -> None:
    """With as many channels as tokens a ridge fits everything; on new samples it predicts nothing."""
    rng = np.random.default_rng(3)
    sizes = {"train": 60, "validation": 60, "test": 2000}
    layers = {split: [rng.normal(size=(n, 50)) for _ in range(2)] for split, n in sizes.items()}
    layers = {split: [a, a + b] for split, (a, b) in layers.items()}
    assert measured(layers).gap[0, 1] > 0.95
    assert measured(layers, penalties=[1e-8]).gap[0, 1] > 1.5


def test_a_duplicated_layer_has_no_increment() -> None:
    layers = network(3)
    for arrays in layers.values():
        arrays[1] = arrays[0] + 5.0
    result = measured(layers)
    assert np.isnan(result.gap[0, 1])
    assert result.reasons[0][1].startswith("teacher and student differ by a constant")
    assert result.gap[0, 2] == pytest.approx(result.gap[1, 2], rel=1e-9)


@pytest.mark.parametrize("splits", [SPLITS, ("train",)])
def test_a_constant_layer_spoils_its_own_pairs_only(splits: Sequence[str]) -> None:
    layers = network(4)
    whole = {split: [arrays[0], arrays[2], arrays[3]] for split, arrays in layers.items()}
    for split in splits:
        layers[split][1] = np.full_like(layers[split][1], 0.1)
    result, expected = measured(layers), measured(whole)
    assert result.reasons[0][1] == "the tokens of the teacher are all the same on the training split"
    assert result.reasons[1][2] == "the tokens of the student are all the same on the training split"
    assert np.isnan(result.gap[0, 1])
    assert np.isnan(result.gap[1, 2])
    np.testing.assert_allclose(result.gap[[0, 0, 2], [2, 3, 3]], expected.gap[[0, 0, 1], [1, 2, 2]], rtol=1e-9)


def test_no_teacher_before_its_student() -> None:
    result = measured(network(3))
    assert np.isnan(result.gap[np.tril_indices(3)]).all()
    assert np.isfinite(result.gap[np.triu_indices(3, 1)]).all()
    assert result.reasons[2][0] == result.reasons[1][1] == "a teacher lies after its student"
    assert result.reasons[0][1] == ""


# ------------------------------------------------------------------------------------ adversarial input


def test_an_offset_of_1e4_in_float32_changes_nothing() -> None:
    # Multiples of 1/64 survive an offset of 1e4 in float32 exactly.
    layers = {split: [np.round(x * 64) / 64 for x in arrays] for split, arrays in network().items()}
    moved = {split: [(x + 1e4).astype(np.float32) for x in arrays] for split, arrays in layers.items()}
    np.testing.assert_allclose(measured(moved).gap, measured(layers).gap, rtol=1e-8)


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_scale_does_not_matter(factor: float) -> None:
    layers = network()
    scaled = {split: [x * factor for x in arrays] for split, arrays in layers.items()}
    for whiten in (True, False):
        np.testing.assert_allclose(measured(scaled, whiten=whiten).gap, measured(layers, whiten=whiten).gap, rtol=1e-7)


def test_two_huge_channels_do_not_decide_when_whitened() -> None:
    """Two of six channels add what is recoverable, the others what is not; the two are a thousand times larger."""
    rng = np.random.default_rng(4)
    layers: Layers = {}
    for split, n in {"train": 4000, "validation": 1000, "test": 1000}.items():
        student, noise = rng.normal(size=(n, 6)), rng.normal(size=(n, 6))
        step = np.where(np.arange(6) < 2, student[:, ::-1], noise)
        layers[split] = [x * np.array([1000, 1000, 1, 1, 1, 1]) for x in (student, student + step)]
    assert measured(layers).gap[0, 1] == pytest.approx(4 / 6, abs=0.02)
    assert measured(layers, whiten=False).gap[0, 1] < 1e-3


def test_directions_without_variance_are_left_out() -> None:
    layers = {split: [np.pad(x, ((0, 0), (0, 3))) for x in arrays] for split, arrays in network().items()}
    np.testing.assert_allclose(measured(layers).gap, measured(network()).gap, rtol=1e-9)


# ------------------------------------------------------------------------------------------ wide layers


def test_a_basis_of_full_rank_changes_nothing() -> None:
    layers = network(width=8)
    basis = shared_basis(layers["train"], rank=128)
    assert basis.shape == (8, 8)
    for whiten in (True, False):
        expected = measured(layers, whiten=whiten).gap
        result = recoverability(moments(layers, basis=basis), whiten=whiten).gap
        np.testing.assert_allclose(result, expected, rtol=1e-8)


def test_a_basis_keeps_the_directions_that_vary_most() -> None:
    layers = network(width=8)  # channel i has a standard deviation of about i + 1
    basis = shared_basis(layers["train"], rank=3)
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-12)
    shares = np.square(basis).sum(axis=1)
    assert shares[5:].min() > 0.85
    result = recoverability(moments(layers, basis=basis))
    assert np.isfinite(result.gap[0, 3])


# ------------------------------------------------------------------------------------- terms by sample


def test_the_terms_of_the_samples_add_up_to_the_gap() -> None:
    layers = network(3)
    samples = {split: [x.reshape(-1, 5, 6) for x in arrays] for split, arrays in layers.items()}
    missed, increments = missed_by_sample(["a", "b", "c"], samples)
    assert missed.shape == increments.shape == (3, 3, SIZES["test"] // 5)
    expected = measured(layers)
    # The increment is not centered by sample, but has nearly the mean of the training split.
    gaps = missed.sum(2) / increments.sum(2)
    upper = np.triu_indices(3, 1)
    np.testing.assert_allclose(gaps[upper], expected.gap[upper], rtol=0.05)
    assert np.isnan(gaps[np.tril_indices(3)]).all()


# ----------------------------------------------------------------------------------------------- errors


def test_refuses_missing_splits_and_bad_penalties() -> None:
    layers = network(2)
    with pytest.raises(ValueError, match="no tokens of the split 'validation' were added"):
        recoverability(moments({"train": layers["train"]}))
    for penalties in ([], [0.0], [np.nan]):
        with pytest.raises(ValueError, match="pass finite numbers above 0"):
            recoverability(moments(layers), penalties=penalties)
