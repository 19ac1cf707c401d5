"""Gaps against scikit-learn's ridge pair by pair, and against teachers whose increment is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import Ridge

from layerprobe.analyses.measures.recoverability import (
    PENALTIES,
    SPLITS,
    Recoverability,
    TokenMoments,
    recoverability,
    shared_basis,
)

Array = NDArray[Any]
Layers = dict[str, list[Array]]  # per split, one array (n, D) per layer
SIZES = {"train": 400, "validation": 150, "test": 200}


def network(
    num: int = 4, *, width: int = 6, sizes: dict[str, int] = SIZES, seed: int = 0, offset: float = 0.0
) -> Layers:
    """Tokens of residual layers, each adding a linear part and a part of its own."""
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
    found = measured(layers, whiten=False)
    for s in range(4):
        for t in range(s + 1, 4):
            gap, validation_gap, penalty = explicit(layers, s, t, PENALTIES)
            # The explicit products of an offset of 1e4 are good to 1e-8.
            assert found.gap[s, t] == pytest.approx(gap, rel=1e-8)
            assert found.validation_gap[s, t] == pytest.approx(validation_gap, rel=1e-8)
            assert found.penalty[s, t] == pytest.approx(penalty)
    assert found.num_tokens == SIZES


def test_whitened_gaps_equal_an_explicit_ridge_on_whitened_tokens() -> None:
    layers = network()
    covariances = [np.cov(x.T, bias=True) for x in layers["train"]]
    pooled = np.mean([c / np.trace(c) for c in covariances], axis=0)
    whitening = np.linalg.cholesky(np.linalg.inv(pooled))  # any root: gaps do not depend on rotation
    whitened = {split: [x @ whitening for x in arrays] for split, arrays in layers.items()}
    found = measured(layers)
    assert found.gap[0, 3] == pytest.approx(explicit(whitened, 0, 3, PENALTIES)[0], rel=1e-8)
    assert found.gap[1, 2] == pytest.approx(explicit(whitened, 1, 2, PENALTIES)[0], rel=1e-8)


def test_few_tokens_choose_a_strong_penalty_and_still_equal_the_explicit_ridge() -> None:
    layers = network(width=30, sizes={"train": 20, "validation": 15, "test": 15})
    found = measured(layers, whiten=False)
    gap, _, penalty = explicit(layers, 0, 2, PENALTIES)
    assert found.gap[0, 2] == pytest.approx(gap, rel=1e-6)
    assert found.penalty[0, 2] == pytest.approx(penalty)
    assert penalty > 1e-3


@given(batch=st.integers(1, 500), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_streaming_equals_batch(batch: int, seed: int) -> None:
    layers = network(3, sizes={"train": 90, "validation": 40, "test": 50}, seed=seed)
    whole, streamed = measured(layers), measured(layers, batch=batch)
    np.testing.assert_allclose(streamed.gap, whole.gap, rtol=1e-9)
    np.testing.assert_array_equal(streamed.penalty, whole.penalty)
    assert streamed.reasons == whole.reasons


def test_batches_larger_than_the_working_set_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = network(3)
    whole = measured(layers).gap
    monkeypatch.setattr("layerprobe.analyses.measures.recoverability._MAX_ROWS", 7)
    np.testing.assert_allclose(measured(layers).gap, whole, rtol=1e-9)


def test_samples_of_tokens_are_read_as_rows() -> None:
    layers = network(2)
    stacked = {split: [x.reshape(-1, 5, 6) for x in arrays] for split, arrays in layers.items()}
    np.testing.assert_array_equal(measured(stacked).gap, measured(layers).gap)


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
    found = measured(layers, whiten=whiten)
    assert found.gap[0, 1] == pytest.approx(0.0, abs=1e-9)
    assert found.gap[0, 2] == pytest.approx(1.0, abs=0.02)


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
    found = measured(layers)
    assert np.isnan(found.gap[0, 1])
    assert found.reasons[0][1].startswith("teacher and student differ by a constant")
    assert found.gap[0, 2] == pytest.approx(found.gap[1, 2], rel=1e-9)


@pytest.mark.parametrize("splits", [SPLITS, ("train",)])
def test_a_constant_layer_spoils_its_own_pairs_only(splits: Sequence[str]) -> None:
    layers = network(4)
    whole = {split: [arrays[0], arrays[2], arrays[3]] for split, arrays in layers.items()}
    for split in splits:
        layers[split][1] = np.full_like(layers[split][1], 0.1)
    found, expected = measured(layers), measured(whole)
    assert found.reasons[0][1] == "the tokens of the teacher are all the same on the training split"
    assert found.reasons[1][2] == "the tokens of the student are all the same on the training split"
    assert np.isnan(found.gap[0, 1])
    assert np.isnan(found.gap[1, 2])
    np.testing.assert_allclose(found.gap[[0, 0, 2], [2, 3, 3]], expected.gap[[0, 0, 1], [1, 2, 2]], rtol=1e-9)


def test_no_teacher_before_its_student() -> None:
    found = measured(network(3))
    assert np.isnan(found.gap[np.tril_indices(3)]).all()
    assert np.isfinite(found.gap[np.triu_indices(3, 1)]).all()
    assert found.reasons[2][0] == found.reasons[1][1] == "a teacher lies after its student"
    assert found.reasons[0][1] == ""


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
        student, own = rng.normal(size=(n, 6)), rng.normal(size=(n, 6))
        step = np.where(np.arange(6) < 2, student[:, ::-1], own)
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
        found = recoverability(moments(layers, basis=basis), whiten=whiten).gap
        np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_a_basis_keeps_the_directions_that_vary_most() -> None:
    layers = network(width=8)  # channel i has a standard deviation of about i + 1
    basis = shared_basis(layers["train"], rank=3)
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-12)
    kept = np.square(basis).sum(axis=1)
    assert kept[5:].min() > 0.85
    found = recoverability(moments(layers, basis=basis))
    assert np.isfinite(found.gap[0, 3])


# ----------------------------------------------------------------------------------------------- errors


def test_what_does_not_fit_is_refused() -> None:
    x = np.ones((4, 3))
    with pytest.raises(ValueError, match="the layers are a; pass two or more different ones"):
        TokenMoments(["a"])
    with pytest.raises(ValueError, match="the layers are a, a"):
        TokenMoments(["a", "a"])
    collected = TokenMoments(["a", "b"])
    with pytest.raises(ValueError, match="unknown split 'holdout'; use one of train, validation, test"):
        collected.update("test", [x, x])
    with pytest.raises(ValueError, match="1 arrays for 2 layers"):
        collected.update("train", [x])
    with pytest.raises(ValueError, match=r"tokens of b have shape \(4, 2\), those before \(4, 3\); an increment needs"):
        collected.update("train", [x, x[:, :2]])
    with pytest.raises(ValueError, match="tokens of b hold 12 values that are nan or inf"):
        collected.update("train", [x, x * np.nan])
    collected.update("train", [x, x])
    with pytest.raises(ValueError, match="no tokens of the split 'validation' were added; add train, validation, test"):
        recoverability(collected)
    with pytest.raises(ValueError, match="the basis is for width 5, the tokens have 3"):
        TokenMoments(["a", "b"], basis=np.eye(5)).update("train", [x, x])
    for penalties in ([], [0.0], [np.nan]):
        with pytest.raises(ValueError, match="pass finite numbers above 0"):
            recoverability(collected, penalties=penalties)


def test_moments_that_would_fill_the_memory_are_refused() -> None:
    collected = TokenMoments([f"blocks.{i}" for i in range(28)])
    message = r"28 layers of width 1152 need 25 GB of moments; pass basis=shared_basis\(tokens, rank=128\)"
    with pytest.raises(ValueError, match=message):
        collected.update("train", [np.ones((2, 1152), np.float32)] * 28)
    with pytest.raises(ValueError, match="layers have widths 3 and 2; pass the layers of one stage"):
        shared_basis([np.ones((4, 3)), np.ones((4, 2))])


def test_a_refused_batch_leaves_the_moments_as_they_were() -> None:
    layers = network(2)
    collected = moments(layers)
    before = recoverability(collected).gap
    with pytest.raises(ValueError, match="nan or inf"):
        collected.update("test", [np.full((3, 6), np.inf)] * 2)
    np.testing.assert_array_equal(recoverability(collected).gap, before)
    assert collected.counts == {split: SIZES[split] for split in SPLITS}
