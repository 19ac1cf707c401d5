"""Moments against those of all tokens at once, whatever the batches, offsets and bases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from layerprobe.analyses.measures.arrays import SPLITS
from layerprobe.analyses.measures.token_moments import TokenMoments, shared_basis

Array = NDArray[Any]
SIZES = {"train": 90, "validation": 40, "test": 50}


def example(width: int = 4, offset: float = 0.0) -> dict[str, list[Array]]:
    rng = np.random.default_rng(0)
    return {split: [rng.normal(size=(n, width)) + offset for _ in range(3)] for split, n in SIZES.items()}


def collected(tokens: dict[str, list[Array]], batch: int = 1000, basis: Array | None = None) -> TokenMoments:
    moments = TokenMoments(["a", "b", "c"], basis=basis)
    for split, layers in tokens.items():
        for start in range(0, len(layers[0]), batch):
            moments.update(split, [x[start : start + batch] for x in layers])
    return moments


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_moments_are_those_of_all_tokens_at_once(batch: int, offset: float) -> None:
    tokens = example(offset=offset)
    moments = collected(tokens, batch)
    for split in SPLITS:
        rows = np.concatenate(tokens[split], axis=1)
        centered = rows - np.concatenate(tokens["train"], axis=1).mean(axis=0)
        mean, second = moments.moments(split)
        shift = np.stack([x[0] for x in tokens["train"]])  # means are of tokens minus the first one
        np.testing.assert_allclose(mean + shift, rows.mean(axis=0).reshape(3, 4), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(second.reshape(12, 12), centered.T @ centered / len(rows), atol=1e-8)
    assert moments.counts == SIZES


def test_large_batches_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = collected(example()).moments("test")[1]
    monkeypatch.setattr("layerprobe.analyses.measures.token_moments._MAX_ROWS", 7)
    np.testing.assert_allclose(collected(example()).moments("test")[1], expected, atol=1e-12)


def test_samples_of_tokens_are_read_as_rows() -> None:
    tokens = example()
    samples = {split: [x.reshape(-1, 5, 4) for x in layers] for split, layers in tokens.items()}
    np.testing.assert_array_equal(collected(samples).moments("test")[1], collected(tokens).moments("test")[1])


def test_constant_layers_are_reported() -> None:
    tokens = example()
    tokens["train"][1] = np.full_like(tokens["train"][1], 0.1)
    assert collected(tokens, 7).constant == (False, True, False)


def test_a_basis_keeps_the_directions_that_vary_most() -> None:
    rng = np.random.default_rng(1)
    tokens = [rng.normal(size=(500, 8)) * np.arange(1, 9) for _ in range(2)]
    basis = shared_basis(tokens, rank=3)
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-12)
    assert np.square(basis).sum(axis=1)[5:].min() > 0.85
    assert shared_basis(tokens, rank=128).shape == (8, 8)


def test_moments_in_a_basis_are_projected() -> None:
    tokens = example()
    basis = shared_basis(tokens["train"], rank=2)
    moments = collected(tokens, basis=basis)
    assert moments.width == 2
    expected = np.einsum("arbs,rk,sl->akbl", collected(tokens).moments("test")[1], basis, basis)
    np.testing.assert_allclose(moments.moments("test")[1], expected, atol=1e-12)


def test_refuses_bad_input() -> None:
    x = np.ones((4, 3))
    with pytest.raises(ValueError, match="the layers are a; pass two or more different ones"):
        TokenMoments(["a"])
    with pytest.raises(ValueError, match="the layers are a, a"):
        TokenMoments(["a", "a"])
    moments = TokenMoments(["a", "b"])
    with pytest.raises(ValueError, match="unknown split 'holdout'; use one of train, validation, test"):
        moments.update("holdout", [x, x])
    with pytest.raises(ValueError, match="1 arrays for 2 layers"):
        moments.update("train", [x])
    with pytest.raises(ValueError, match=r"tokens of b have shape \(4, 2\), those before \(4, 3\); an increment needs"):
        moments.update("train", [x, x[:, :2]])
    with pytest.raises(ValueError, match="tokens of b hold 12 values that are nan or inf"):
        moments.update("train", [x, x * np.nan])
    moments.update("train", [x, x])
    with pytest.raises(ValueError, match="no tokens of the split 'validation' were added; add train, validation, test"):
        moments.moments("validation")
    with pytest.raises(ValueError, match="the basis is for width 5, the tokens have 3"):
        TokenMoments(["a", "b"], basis=np.eye(5)).update("train", [x, x])


def test_moments_that_would_fill_the_memory_are_refused() -> None:
    moments = TokenMoments([f"blocks.{i}" for i in range(28)])
    message = r"28 layers of width 1152 need 25 GB of moments; pass basis=shared_basis\(tokens, rank=128\)"
    with pytest.raises(ValueError, match=message):
        moments.update("train", [np.ones((2, 1152), np.float32)] * 28)
    with pytest.raises(ValueError, match="layers have widths 3 and 2; pass the layers of one stage"):
        shared_basis([np.ones((4, 3)), np.ones((4, 2))])


def test_a_refused_batch_leaves_the_moments_as_they_were() -> None:
    moments = collected(example())
    before = moments.moments("test")[1]
    with pytest.raises(ValueError, match="nan or inf"):
        moments.update("test", [np.full((3, 4), np.inf)] * 3)
    np.testing.assert_array_equal(moments.moments("test")[1], before)
    assert moments.counts == SIZES
