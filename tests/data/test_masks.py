"""Samples of unequal length: padding never counts, from the network to the pooled features."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_sit
from torch import Tensor

from layerprobe.backbones.base import Backbone, wrap
from layerprobe.capture import capture, real_tokens
from layerprobe.checkpoints.convention import check_convention
from layerprobe.data.samples import Batch, Splits, Subset, TensorSamples, joined
from layerprobe.extraction.ablation import ablate_layers
from layerprobe.extraction.controls import raw_input
from layerprobe.extraction.features import SPLITS
from layerprobe.extraction.forward import extract
from layerprobe.extraction.plan import ExtractionPlan
from layerprobe.extraction.tokens import pool_tokens
from layerprobe.noise.random_stream import RandomStream
from layerprobe.sampling.solvers import guided

LENGTHS = torch.tensor([6, 8, 3, 5])


def padded(n: int = 4, *, shape: tuple[int, ...] = (2, 8), fill: float = 0.0) -> tuple[Tensor, Tensor]:
    """Noise of shape (n, *shape), `fill` beyond each length, and the mask (n, *grid) along the first grid axis."""
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))
    lengths = LENGTHS.repeat(n // len(LENGTHS) + 1)[:n]
    places = torch.arange(shape[1]).view(-1, *[1] * (len(shape) - 2)).expand(shape[1:])
    mask = places < lengths.view(-1, *[1] * (len(shape) - 1))
    return x.masked_fill(~mask.unsqueeze(1), fill), mask


def velocity(backbone: Backbone, x_t: Tensor, mask: Tensor | None) -> Tensor:
    with torch.inference_mode():
        return backbone.masked(mask)(x_t, torch.full((len(x_t),), 0.4), torch.arange(len(x_t)) % 3)


@pytest.mark.parametrize("shape", [(2, 8), (1, 8, 4), (1, 8, 4, 2)])
@pytest.mark.parametrize("fill", [3.0, 1e4, float("nan")])
def test_what_lies_in_the_padding_changes_nothing(shape: tuple[int, ...], fill: float) -> None:
    backbone = tiny_sit(shape=shape)
    clean, mask = padded(shape=shape)
    dirty, _ = padded(shape=shape, fill=fill)
    assert torch.equal(velocity(backbone, clean, mask), velocity(backbone, dirty, mask))


def test_a_padded_sequence_is_seen_like_the_short_one_by_itself() -> None:
    long, short = tiny_sit(shape=(2, 8)), tiny_sit(shape=(2, 6))
    weights = {name: w for name, w in long.module.state_dict().items() if name != "pos_embed"}
    short.module.load_state_dict(weights | {"pos_embed": long.module.state_dict()["pos_embed"][:, :3]})
    x, mask = padded(1)
    # Attention sums over fewer keys in another order: float32 rounding.
    torch.testing.assert_close(
        velocity(long, x, mask)[..., :6], velocity(short, x[..., :6], None), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("prediction", ["velocity", "eps", "x0", "v"])
def test_the_velocity_of_padding_is_zero(prediction: str) -> None:
    x, mask = padded()
    moved = velocity(replace(tiny_sit(shape=(2, 8)), prediction=prediction), x + 1, mask)
    assert torch.equal(moved.masked_select(~mask.unsqueeze(1)), torch.zeros(int((~mask).sum()) * 2))
    assert bool((moved.masked_select(mask.unsqueeze(1)) != 0).all())


def test_a_mask_without_padding_is_as_no_mask() -> None:
    backbone = tiny_sit(shape=(2, 8))
    x, mask = padded()
    torch.testing.assert_close(velocity(backbone, x, torch.ones_like(mask)), velocity(backbone, x, None))


def test_guidance_calls_the_masked_batch_twice_over() -> None:
    backbone = tiny_sit(shape=(2, 8))
    x, mask = padded()
    level, labels = torch.full((4,), 0.4), torch.arange(4) % 3
    with torch.inference_mode():
        found = guided(backbone.masked(mask), 2.0)(x, level, labels)
        with_label, without = (backbone.masked(mask)(x, level, y) for y in (labels, None))
    torch.testing.assert_close(found, without + 2 * (with_label - without))


def test_a_network_that_knows_no_mask_refuses_padded_samples() -> None:
    network = torch.nn.Sequential(torch.nn.Conv1d(2, 2, 1))
    own = wrap(network, layers="0", schedule="sit", prediction="velocity", shape=(2, 8))
    with pytest.raises(ValueError, match=r"Sequential does not take padded samples; cut all to one length"):
        own.masked(padded()[1])
    assert own.masked(None) is own


def test_a_token_is_real_where_any_place_of_its_patch_is() -> None:
    assert real_tokens(padded()[1], (4,)).tolist() == [
        [True, True, True, False],
        [True] * 4,
        [True, True, False, False],
        [True, True, True, False],
    ]


@pytest.mark.parametrize("cells", [1, 2])
def test_pooling_is_the_mean_of_the_real_tokens_of_each_cell(cells: int) -> None:
    _, mask = padded()
    tokens = 1e4 + torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(1))
    real = real_tokens(mask, (4,))
    found = pool_tokens(tokens.masked_fill(~real.unsqueeze(2), float("inf")), cells, (8,), mask).view(4, 5, cells)
    for sample in range(4):
        for cell in range(cells):
            rows = slice(cell * 4 // cells, (cell + 1) * 4 // cells)
            inside = tokens[sample, rows][real[sample, rows]]
            wanted = inside.double().mean(0).float() if len(inside) else torch.zeros(5)
            torch.testing.assert_close(found[sample, :, cell], wanted)


def test_tokens_without_a_grid_are_not_pooled_under_a_mask() -> None:
    with pytest.raises(ValueError, match="5 tokens form no grid with the proportions of the input"):
        pool_tokens(torch.zeros(4, 5, 3), 1, (4, 4), torch.ones(4, 4, 4, dtype=torch.bool))


def splits_of(fill: float, n: int = 24) -> Splits:
    x, mask = padded(n)
    samples = TensorSamples(x.masked_fill(~mask.unsqueeze(1), fill), torch.arange(n) % 3, mask=mask)
    return Splits(*(Subset(samples, range(i, n, 3), name=str(i)) for i in range(3)))


def test_extracted_features_know_nothing_of_the_padding(tmp_path: Path) -> None:
    backbone, plan = tiny_sit(shape=(2, 8)), ExtractionPlan(layers=("blocks.*",), noise_levels=(0.3, 0.7))
    plan = replace(plan, layers=backbone.layers)
    stores = [extract(backbone, splits_of(fill), plan, tmp_path / str(fill), batch_size=7) for fill in (0.0, 9.0)]
    assert stores[0].features("blocks.1", 0.7).tolist() == stores[1].features("blocks.1", 0.7).tolist()
    # Each row is what the sample gives by itself.
    sample = splits_of(0.0).train.batch([3])
    alone = Splits(*(TensorSamples(sample.x, sample.labels, ids=sample.ids + i, mask=sample.mask) for i in range(3)))
    single = extract(backbone, alone, plan, tmp_path / "alone")
    torch.testing.assert_close(
        torch.from_numpy(stores[0].features("blocks.1", 0.3)[3]),
        torch.from_numpy(single.features("blocks.1", 0.3)[0]),
        rtol=1e-5,
        atol=1e-6,
    )


def test_the_raw_input_control_sees_no_noise_in_the_padding(tmp_path: Path) -> None:
    reader = raw_input(tiny_sit(shape=(2, 8)))
    store = extract(reader, splits_of(5.0), ExtractionPlan(layers=("input",), noise_levels=(0.5,)), tmp_path)
    features = torch.from_numpy(store.features("input", 0.5, split="train")).view(8, 2, 8)
    mask = splits_of(0.0).train.batch(range(8)).real
    assert torch.equal(features != 0, mask.unsqueeze(1).expand(8, 2, 8))


def test_whole_grids_of_padded_samples_are_not_kept(tmp_path: Path) -> None:
    backbone = tiny_sit(shape=(2, 8))
    plan = ExtractionPlan(layers=backbone.layers, noise_levels=(0.5,), token_samples=2)
    with pytest.raises(ValueError, match="whole token grids can be kept only for samples of equal length"):
        extract(backbone, splits_of(0.0), plan, tmp_path)


@pytest.mark.parametrize("few", [1, 3, 4, 9])
def test_few_tokens_of_padded_samples_are_real_ones_over_again(few: int, tmp_path: Path) -> None:
    backbone, splits = tiny_sit(shape=(2, 8)), splits_of(0.0)
    plan = ExtractionPlan(backbone.layers, (0.5,), token_samples=8, tokens_per_sample=few)
    store = extract(backbone, splits, plan, tmp_path / "few", batch_size=5)
    other = extract(backbone, splits_of(9.0), plan, tmp_path / "filled", batch_size=7)
    assert not store.tokens_padded
    assert store.grid("blocks.1") is None
    for layer, name in itertools.product(backbone.layers, SPLITS):
        kept = store.tokens(layer, 0.5, split=name)
        np.testing.assert_allclose(kept, other.tokens(layer, 0.5, split=name), rtol=1e-5, atol=1e-6)
        samples = dict(splits.items())[name]
        batch = samples.batch(range(len(samples)))
        assert batch.mask is not None
        x_t = backbone.schedule.corrupt(batch.x, RandomStream(0).normal(batch.ids, (2, 8), draw=0), torch.tensor(0.5))
        with torch.inference_mode(), capture(backbone.module, [layer]) as outputs:
            backbone.masked(batch.mask).predict(x_t, torch.full((len(x_t),), 0.5), None)
        for tokens, every, real in zip(kept, outputs[layer].numpy(), real_tokens(batch.mask, (4,)), strict=True):
            same = np.isclose(tokens[:, None], every[None], rtol=1e-5, atol=1e-6).all(2).sum(0)
            assert same.sum() == len(tokens) == min(few, 4)
            assert not same[~real.numpy()].any()
            assert same[real.numpy()].max() - same[real.numpy()].min() <= 1  # all of them before any comes again


def test_ablation_and_convention_do_not_see_the_padding() -> None:
    backbone = tiny_sit(shape=(2, 8))
    changes = [
        ablate_layers(backbone, splits_of(fill).test, (0.3, 0.8), split="test").velocity_change for fill in (0.0, 7.0)
    ]
    assert changes[0].tolist() == changes[1].tolist()
    scores = [check_convention(backbone, splits_of(fill).train).declared.score for fill in (0.0, 7.0)]
    assert scores[0] == scores[1]


def test_batches_with_and_without_padding_join() -> None:
    x, mask = padded()
    plain = Batch(x, None, torch.arange(4))
    both = joined([plain, Batch(x, None, torch.arange(4, 8), mask)])
    assert both.mask is not None
    assert bool(both.mask[:4].all())
    assert torch.equal(both.mask[4:], mask)
    assert joined([plain, plain]).mask is None


def test_the_mask_is_part_of_what_the_data_is() -> None:
    x, mask = padded()
    longer = mask.clone()
    longer[2, 3] = True
    kept = x.masked_fill(~mask.unsqueeze(1), 0.0)
    prints = {TensorSamples(kept, mask=m).fingerprint for m in (mask, longer, None)}
    assert len(prints) == 3


def test_bad_masks_are_refused() -> None:
    x, mask = padded()
    with pytest.raises(ValueError, match=r"torch.bool and shape \(4, 7\); pass bool of shape \(4, 8\)"):
        TensorSamples(x, mask=mask[:, :7])
    with pytest.raises(ValueError, match=r"has type torch\.float32"):
        TensorSamples(x, mask=mask.float())
    with pytest.raises(ValueError, match="uint8 has no value for padding"):
        TensorSamples(x.to(torch.uint8), mask=mask)
    mask[2] = False
    with pytest.raises(ValueError, match=r"1 of 4 samples consist of padding only \(first: 2\)"):
        TensorSamples(x, mask=mask)
