"""Extraction equals a plain loop, whatever the batches, and goes on where it was killed."""

from __future__ import annotations

import errno
import itertools
import math
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from started import kill_after
from tiny import SHAPE, tiny_samples, tiny_sit, tiny_splits
from torch import Tensor, nn

from layerprobe.backbones.base import Backbone, wrap
from layerprobe.data.samples import Splits, Subset
from layerprobe.extraction import features as features_module
from layerprobe.extraction import forward as extract_module
from layerprobe.extraction.controls import RAW_INPUT_WIDTH, random_weights, raw_input
from layerprobe.extraction.features import FeatureStore
from layerprobe.extraction.forward import extract
from layerprobe.extraction.plan import ExtractionPlan
from layerprobe.extraction.tokens import pool_tokens, token_grid
from layerprobe.files import DiskFull
from layerprobe.noise.schedules import DDPM, EDM, LinearPath, NoiseSchedule

PLAN = ExtractionPlan(("blocks.0", "blocks.1", "blocks.2"), (0.2, 0.7), draws=2, seed=5, shard_size=7)
# One float32 matrix product gives other roundings for another number of rows.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


def own_noise(sample_id: int, draw: int, shape: tuple[int, ...] = SHAPE, seed: int = PLAN.seed) -> Tensor:
    stream = np.random.Philox(key=np.array([seed, sample_id], np.uint64), counter=np.array([0, 0, draw, 0], np.uint64))
    return torch.from_numpy(np.random.Generator(stream).standard_normal(math.prod(shape), np.float32)).view(shape)


def everything(splits: Splits) -> tuple[Tensor, Tensor, list[int]]:
    batches = [samples.batch(range(len(samples))) for _, samples in splits.items()]
    labels = [batch.labels for batch in batches if batch.labels is not None]
    ids = torch.cat([batch.ids for batch in batches]).tolist()
    return torch.cat([batch.x for batch in batches]), torch.cat(labels), ids


def plain_loop(
    backbone: Backbone, splits: Splits, coefficients: Any, *, labels: bool = False
) -> dict[tuple[str, float, int], np.ndarray]:
    """One sample at a time through the bare module, hooks by hand; coefficients(level) is (alpha, sigma, time)."""
    seen: dict[str, Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda _, __, out, name=f"blocks.{i}": seen.update({name: out.mean(1)[0]}))
        for i, block in enumerate(backbone.module.blocks)
    ]
    x, classes, ids = everything(splits)
    found: dict[tuple[str, float, int], list[np.ndarray]] = {}
    for level, draw in itertools.product(PLAN.noise_levels, range(PLAN.draws)):
        alpha, sigma, time = coefficients(level)
        for row, sample_id in enumerate(ids):
            x_t = alpha * x[row] + sigma * own_noise(sample_id, draw)
            label = classes[row] if labels else torch.tensor(3)
            with torch.no_grad():
                backbone.module(x_t[None], torch.tensor([time]), label[None])
            for name, vector in seen.items():
                found.setdefault((name, level, draw), []).append(vector.numpy())
    for hook in hooks:
        hook.remove()
    return {key: np.stack(rows) for key, rows in found.items()}


def assert_equal(store: FeatureStore, expected: dict[tuple[str, float, int], np.ndarray]) -> None:
    assert len(expected) == len(store.layers) * len(store.noise_levels) * store.draws
    for (layer, level, draw), rows in expected.items():
        np.testing.assert_allclose(store.features(layer, level, draw=draw), rows, **ROUNDING)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def ddpm(level: float) -> tuple[float, float, int]:
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    log_snr = 2 * math.log((1 - level) / level)
    norm = math.hypot(1 - level, level)
    return (1 - level) / norm, level / norm, int(np.abs(np.log(abar / (1 - abar)) - log_snr).argmin())


CONVENTIONS: dict[str, tuple[NoiseSchedule, Any]] = {
    "data at time 1": (LinearPath(1, 0), lambda level: (1 - level, level, 1 - level)),
    "data at time 0": (LinearPath(0, 1), lambda level: (1 - level, level, level)),
    "ddpm": (DDPM.from_name("linear"), ddpm),
    "edm": (EDM(), lambda level: (1.0, 0.5 * level / (1 - level), 0.5 * level / (1 - level))),
}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_equals_a_plain_loop(tmp_path: Path, convention: str) -> None:
    schedule, coefficients = CONVENTIONS[convention]
    backbone, splits = tiny_sit(schedule=schedule), tiny_splits(12)
    assert_equal(extract(backbone, splits, PLAN, tmp_path, batch_size=5), plain_loop(backbone, splits, coefficients))


def test_the_label_is_read_only_when_asked_for(tmp_path: Path) -> None:
    backbone, splits = tiny_sit(), tiny_splits(12)
    coefficients = CONVENTIONS["data at time 1"][1]
    with_labels = plain_loop(backbone, splits, coefficients, labels=True)
    assert_equal(extract(backbone, splits, replace(PLAN, condition="label"), tmp_path / "label"), with_labels)
    null = extract(backbone, splits, PLAN, tmp_path / "null")
    gap = np.abs(null["blocks.0", 0.2] - with_labels["blocks.0", 0.2, 0])
    assert gap.max() > 100 * ROUNDING["atol"]  # so the comparison above tells the two apart
    unlabeled = extract(backbone, tiny_splits(12, labeled=False), PLAN, tmp_path / "unlabeled")
    np.testing.assert_array_equal(unlabeled["blocks.2", 0.7], null["blocks.2", 0.7])
    assert unlabeled.labels is None


def test_the_store_says_which_row_is_which(tmp_path: Path) -> None:
    splits = tiny_splits(20, first_id=40)
    store = extract(tiny_sit(), splits, PLAN, tmp_path)
    _, labels, ids = everything(splits)
    assert store.labels is not None
    assert (store.ids.tolist(), store.labels.tolist()) == (ids, labels.tolist())
    assert store.splits.tolist() == ["train"] * 10 + ["validation"] * 5 + ["test"] * 5


def test_any_batch_size_gives_the_same_features(tmp_path: Path) -> None:
    backbone, splits = tiny_sit(), tiny_splits()
    one, many = (extract(backbone, splits, PLAN, tmp_path / str(size), batch_size=size) for size in (1, 64))
    for layer, level, draw in itertools.product(PLAN.layers, PLAN.noise_levels, range(PLAN.draws)):
        expected = one.features(layer, level, draw=draw)
        np.testing.assert_allclose(many.features(layer, level, draw=draw), expected, **ROUNDING)


def test_noise_depends_on_seed_id_and_draw_only_bit_for_bit(tmp_path: Path) -> None:
    """At noise level 1 the raw input is the noise itself."""
    backbone, samples = raw_input(tiny_sit()), tiny_samples(20, first_id=7)
    order = [13, 2, 19, 0, 5, 6, 11, 3]
    splits = Splits(*(Subset(samples, rows, name="x") for rows in (order[:5], order[5:6], order[6:])))
    plan = ExtractionPlan(("input",), (0.5, 1.0), draws=2, seed=5, shard_size=3)
    expected = [torch.stack([own_noise(7 + i, draw).flatten() for i in order]).numpy() for draw in range(2)]
    for size in (1, 64):
        store = extract(backbone, splits, plan, tmp_path / str(size), batch_size=size)
        for draw in range(2):
            np.testing.assert_array_equal(store.features("input", 1.0, draw=draw), expected[draw])
    assert len(np.unique(np.concatenate(expected))) == 2 * 8 * 16
    other = extract(backbone, splits, replace(plan, seed=6), tmp_path / "other")
    assert not np.isin(other["input", 1.0], expected[0]).any()


def test_the_raw_input_is_x_t(tmp_path: Path) -> None:
    splits = tiny_splits()
    store = extract(raw_input(tiny_sit()), splits, ExtractionPlan(("input",), (0.0, 0.25), seed=5), tmp_path)
    x, _, ids = everything(splits)
    noise = torch.stack([own_noise(i, 0) for i in ids])
    np.testing.assert_array_equal(store["input", 0.0], x.flatten(1).numpy())
    np.testing.assert_array_equal(store["input", 0.25], (0.75 * x + 0.25 * noise).flatten(1).numpy())


def test_a_wide_raw_input_is_averaged_over_neighbors(tmp_path: Path) -> None:
    shape = (3, 64, 32)
    splits = tiny_splits(4, shape=shape)
    backbone = wrap(nn.Sequential(nn.Identity()), layers="0", schedule="sit", prediction="velocity", shape=shape)
    store = extract(raw_input(backbone), splits, ExtractionPlan(("input",), (0.0,)), tmp_path)
    x = everything(splits)[0]
    # 6144 values, then 1536, then 384: the first width that is at most RAW_INPUT_WIDTH.
    expected = x.view(4, 3, 16, 4, 8, 4).mean((3, 5)).flatten(1)
    assert expected.shape[1] == 384 < RAW_INPUT_WIDTH < 1536
    np.testing.assert_allclose(store["input", 0.0], expected.numpy(), atol=1e-6)


def cells_of(edge: int, cells: int) -> list[slice]:
    return [slice(i * edge // cells, -(-(i + 1) * edge // cells)) for i in range(cells)]


@pytest.mark.parametrize(
    ("grid", "patch", "cells"), [((12,), 2, 3), ((8, 8), 2, 2), ((8, 12), 2, 2), ((4, 8, 8), 2, 2), ((10, 10), 2, 2)]
)
def test_pooling_over_cells_equals_slicing(grid: tuple[int, ...], patch: int, cells: int) -> None:
    token_grid = [edge // patch for edge in grid]
    tokens = torch.randn(2, *token_grid, 3)
    places = itertools.product(*(cells_of(edge, cells) for edge in token_grid))
    dims = tuple(range(1, 1 + len(grid)))
    parts = [tokens[:, *place].mean(dims) for place in places]
    expected = torch.stack(parts, dim=2).flatten(1)  # (B, D, cells**d)
    pooled = pool_tokens(tokens.view(2, -1, 3), cells, grid)
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(pool_tokens(tokens.view(2, -1, 3), 1, grid), tokens.flatten(1, len(grid)).mean(1))


def test_pooling_has_no_more_cells_than_tokens_and_keeps_single_tokens() -> None:
    tokens = torch.randn(2, 4, 3)
    torch.testing.assert_close(pool_tokens(tokens, 5, (4, 4)), tokens.transpose(1, 2).flatten(1))
    torch.testing.assert_close(pool_tokens(tokens[:, :1], 5, (4, 4)), tokens[:, 0])


def test_pooling_is_done_in_float32() -> None:
    tokens = torch.tensor([1.0, 1 + 2**-7]).bfloat16().view(1, 2, 1)  # neighbors: bfloat16 has nothing between them
    assert pool_tokens(tokens, 1, (2,)).item() == 1 + 2**-8


def test_tokens_on_no_grid_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"5 tokens form no grid with the proportions of the input \(4, 4\); pass pool_cells 1"
    ):
        pool_tokens(torch.zeros(1, 5, 2), 2, (4, 4))


class Convolutions(nn.Module):
    """Maps that shrink, a vector, and a dropout: not a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.vector = nn.Linear(5, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        second = self.second(self.drop(self.first(x)))
        return x + self.vector(second.mean((2, 3))).mean() * t.view(-1, 1, 1, 1)


@pytest.fixture
def convolutions() -> Backbone:
    torch.manual_seed(0)
    return wrap(
        Convolutions(), layers=["first", "second", "vector"], schedule="flow", prediction="velocity", shape=(1, 8, 8)
    )


def test_maps_are_pooled_like_tokens(tmp_path: Path, convolutions: Backbone) -> None:
    splits = tiny_splits(8, shape=(1, 8, 8))
    plan = ExtractionPlan(convolutions.layers, (0.0,), pool_cells=2)
    store = extract(convolutions, splits, plan, tmp_path)
    module: Any = convolutions.module
    with torch.no_grad():
        first = module.first(everything(splits)[0])
        second = module.second(first)
        vector = module.vector(second.mean((2, 3)))
    np.testing.assert_allclose(store["first", 0.0], first.view(8, 3, 2, 4, 2, 4).mean((3, 5)).flatten(1), **ROUNDING)
    np.testing.assert_allclose(store["second", 0.0], second.view(8, 5, 2, 2, 2, 2).mean((3, 5)).flatten(1), **ROUNDING)
    np.testing.assert_allclose(store["vector", 0.0], vector, **ROUNDING)


def test_a_network_left_in_training_mode_is_read_in_evaluation_mode(tmp_path: Path, convolutions: Backbone) -> None:
    splits, plan = tiny_splits(8, shape=(1, 8, 8)), ExtractionPlan(("second",), (0.3,))
    expected = extract(convolutions, splits, plan, tmp_path / "eval")["second", 0.3]
    convolutions.module.train()
    convolutions.module.first.eval()  # type: ignore[union-attr]
    np.testing.assert_array_equal(extract(convolutions, splits, plan, tmp_path / "train")["second", 0.3], expected)
    modes = {name: part.training for name, part in convolutions.module.named_modules()}
    assert modes == {"": True, "first": False, "drop": True, "second": True, "vector": True}


def test_layers_come_in_the_order_in_which_they_run(tmp_path: Path) -> None:
    plan = replace(PLAN, layers=("blocks.2", "blocks.0"))
    assert extract(tiny_sit(), tiny_splits(), plan, tmp_path).layers == ("blocks.0", "blocks.2")


def test_the_forward_pass_ends_at_the_deepest_layer_wanted(tmp_path: Path) -> None:
    backbone, ran = tiny_sit(), []
    for name, part in backbone.module.named_modules():
        if name in ("blocks.0", "blocks.1", "blocks.2", "final_layer"):
            part.register_forward_pre_hook(lambda _, inputs, name=name: ran.append((name, len(inputs[0]))))
    extract(backbone, tiny_splits(), replace(PLAN, layers=("blocks.1",), shard_size=50), tmp_path, batch_size=1000)
    # Before, two samples go through the whole network, to see that every layer runs once.
    assert [name for name, size in ran if size > 2] == ["blocks.0", "blocks.1"]


def test_half_precision_is_read_and_stored_as_float32(tmp_path: Path) -> None:
    backbone, splits = tiny_sit(), tiny_splits()
    exact = extract(backbone, splits, PLAN, tmp_path / "float32")["blocks.2", 0.2]
    half = extract(backbone, splits, replace(PLAN, precision="bfloat16"), tmp_path / "bfloat16")["blocks.2", 0.2]
    assert half.dtype == np.float32
    error = np.abs(half - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.05  # bfloat16 has 8 bits: it was used, and it is near


def test_progress_counts_samples(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    extract(tiny_sit(), tiny_splits(), PLAN, tmp_path, progress=lambda *state: told.append(state))
    assert told == [(7, 20), (14, 20), (20, 20)]


# --------------------------------------------------------------------------------------------------------------- tokens

KEEPING = replace(PLAN, token_samples=4)  # of 20 samples in shards of 7: rows 0-3, 10-13 and 15-18


def bare_tokens(backbone: Backbone, splits: Splits, level: float, draw: int) -> dict[str, np.ndarray]:
    """The tokens of every sample and block, shape (n, T, D), by hooks by hand, one sample at a time; linear path."""
    rows: dict[str, list[np.ndarray]] = {}
    hooks = [
        block.register_forward_hook(lambda _, __, out, i=i: rows.setdefault(f"blocks.{i}", []).append(out[0].numpy()))
        for i, block in enumerate(backbone.module.blocks)
    ]
    x, _, ids = everything(splits)
    with torch.no_grad():
        for row, sample_id in enumerate(ids):
            x_t = (1 - level) * x[row] + level * own_noise(sample_id, draw)
            backbone.module(x_t[None], torch.tensor([1 - level]), torch.tensor([3]))
    for hook in hooks:
        hook.remove()
    return {name: np.stack(tokens) for name, tokens in rows.items()}


@pytest.mark.parametrize("batch_size", [1, 6, 64])
def test_whole_grids_of_the_first_samples_are_kept(tmp_path: Path, batch_size: int) -> None:
    backbone, splits = tiny_sit(), tiny_splits(20, first_id=40)
    store = extract(backbone, splits, KEEPING, tmp_path, batch_size=batch_size)
    rows = [0, 1, 2, 3, 10, 11, 12, 13, 15, 16, 17, 18]
    assert store.token_rows.tolist() == rows
    for level, draw in itertools.product(PLAN.noise_levels, range(PLAN.draws)):
        expected = bare_tokens(backbone, splits, level, draw)
        for layer in PLAN.layers:
            tokens = store.tokens(layer, level, draw=draw)
            np.testing.assert_allclose(tokens, expected[layer][rows], **ROUNDING)
            # The same forward pass gave both.
            np.testing.assert_allclose(store.features(layer, level, draw=draw)[rows], tokens.mean(1), atol=1e-6)
    assert [store.grid(layer) for layer in PLAN.layers] == [(2, 2)] * 3


def test_tokens_leave_the_pooled_features_as_they_are_bit_for_bit(tmp_path: Path) -> None:
    backbone, splits = tiny_sit(), tiny_splits()
    extract(backbone, splits, PLAN, tmp_path / "without")
    extract(backbone, splits, KEEPING, tmp_path / "with")
    without, kept = shards(tmp_path / "without"), shards(tmp_path / "with")
    assert set(kept) - set(without) == {f"tokens-0000{i}.safetensors" for i in range(3)}
    for name in set(without) - {"manifest.json", "checksums.json"}:
        assert kept[name] == without[name]


def test_few_tokens_of_a_sample_are_those_of_the_whole_grid_at_the_same_places(tmp_path: Path) -> None:
    backbone, splits = tiny_sit(shape=(1, 8, 8)), tiny_splits(shape=(1, 8, 8))
    whole = extract(backbone, splits, KEEPING, tmp_path / "whole")
    few = extract(backbone, splits, replace(KEEPING, tokens_per_sample=5), tmp_path / "few")
    other = extract(backbone, splits, replace(KEEPING, tokens_per_sample=5, seed=6), tmp_path / "other")
    grid, part = whole.tokens("blocks.1", 0.2), few.tokens("blocks.1", 0.2)
    assert (grid.shape, part.shape) == ((12, 16, 16), (12, 5, 16))
    places = [np.flatnonzero((grid[0] == token).all(1))[0] for token in part[0]]
    assert places == sorted(set(places))
    for layer, level, draw in itertools.product(PLAN.layers, PLAN.noise_levels, range(PLAN.draws)):
        expected = whole.tokens(layer, level, draw=draw)[:, places]
        np.testing.assert_array_equal(few.tokens(layer, level, draw=draw), expected)
    assert few.grid("blocks.1") is None
    assert whole.grid("blocks.1") == (4, 4)
    assert not np.isin(other.tokens("blocks.1", 0.2), grid).any()  # another seed is other noise


def test_more_tokens_than_there_are_is_the_whole_grid(tmp_path: Path) -> None:
    store = extract(tiny_sit(), tiny_splits(), replace(KEEPING, tokens_per_sample=100), tmp_path)
    assert store.tokens("blocks.0", 0.2).shape == (12, 4, 16)
    assert store.grid("blocks.0") == (2, 2)


def test_tokens_are_on_disk_before_the_next_layer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of all layers of a large model do not fit into memory."""
    backbone, seen, filled = tiny_sit(), [], extract_module.filled_tensors

    @contextmanager
    def noted(*arguments: Any) -> Iterator[Any]:
        with filled(*arguments) as put:
            yield lambda layer, *rest: (seen.append(f"{layer} kept"), put(layer, *rest))

    monkeypatch.setattr(extract_module, "filled_tensors", noted)
    for name in PLAN.layers:
        backbone.module.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: seen.append(f"{name} runs"))
    plan = replace(KEEPING, token_samples=1, noise_levels=(0.5,), draws=1)
    extract(backbone, tiny_splits(), plan, tmp_path)
    assert seen[3:9] == [f"{name} {what}" for name in PLAN.layers for what in ("runs", "kept")]


def test_what_goes_into_a_layer_is_read_too(tmp_path: Path) -> None:
    backbone, splits = tiny_sit(), tiny_splits()
    layers = ("blocks.1.attn:input", "blocks.0", "blocks.1")
    store = extract(backbone, splits, replace(KEEPING, layers=layers, draws=1), tmp_path)
    assert store.layers == ("blocks.0", "blocks.1.attn:input", "blocks.1")
    block: Any = backbone.module.blocks[1]  # type: ignore[index]
    with torch.no_grad():
        c = backbone.module.t_embedder(torch.tensor([1 - 0.2])) + backbone.module.y_embedder(torch.tensor([3]))  # type: ignore[operator]
        shift, scale = block.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)[:2]
        expected = block.norm1(torch.from_numpy(store.tokens("blocks.0", 0.2))) * (1 + scale) + shift
    np.testing.assert_allclose(store.tokens("blocks.1.attn:input", 0.2), expected, **ROUNDING)
    rows = store.features("blocks.1.attn:input", 0.2)[store.token_rows]
    np.testing.assert_allclose(rows, expected.mean(1), **ROUNDING)


def test_the_backbone_says_what_a_layers_tokens_are(tmp_path: Path) -> None:
    """Here the first token is a condition's, and belongs neither to the means nor to the kept tokens."""
    backbone, splits = tiny_sit(), tiny_splits()
    whole = extract(backbone, splits, KEEPING, tmp_path / "whole")
    own = replace(backbone, tokens=lambda output, _: output[:, 1:])
    store = extract(own, splits, KEEPING, tmp_path / "own")
    np.testing.assert_array_equal(store.tokens("blocks.1", 0.2), whole.tokens("blocks.1", 0.2)[:, 1:])
    np.testing.assert_allclose(
        store["blocks.1", 0.2][store.token_rows], store.tokens("blocks.1", 0.2).mean(1), **ROUNDING
    )
    assert store.grid("blocks.1") is None  # three tokens


def test_widths_and_grids_may_differ_between_layers(tmp_path: Path, convolutions: Backbone) -> None:
    splits = tiny_splits(8, shape=(1, 8, 8))
    store = extract(convolutions, splits, ExtractionPlan(convolutions.layers, (0.0,), token_samples=9), tmp_path)
    module: Any = convolutions.module
    with torch.no_grad():
        first = module.first(everything(splits)[0])
        second = module.second(first)
    np.testing.assert_allclose(store.tokens("first", 0.0), first.flatten(2).transpose(1, 2), **ROUNDING)
    np.testing.assert_allclose(store.tokens("second", 0.0), second.flatten(2).transpose(1, 2), **ROUNDING)
    assert store.tokens("vector", 0.0).shape == (8, 1, 4)
    assert (store.grid("first"), store.grid("second")) == ((8, 8), (4, 4))


@pytest.mark.parametrize(
    ("count", "input_grid", "grid"),
    [
        (64, (16, 16), (8, 8)),
        (24, (8, 12), (4, 6)),
        (16, (28, 28), (4, 4)),  # 28, 14, 7, 4: strides that round up
        (5, (4, 4), None),
        (65, (16, 16), None),  # a class token makes it no grid
        (30, (60,), (30,)),
        (64, (8, 8, 8), (4, 4, 4)),
        (4096, (16, 32, 32), (16, 16, 16)),  # patches of 1 x 2 x 2
        (105, (7, 10, 6), (7, 5, 3)),
        (7, (8, 8, 8), None),
        (1, (16, 16), (1, 1)),
    ],
)
def test_tokens_lie_on_a_grid_like_the_inputs(count: int, input_grid: tuple[int, ...], grid: Any) -> None:
    assert token_grid(count, input_grid) == grid


def test_tokens_of_half_precision_are_stored_as_float32(tmp_path: Path) -> None:
    backbone = tiny_sit()
    backbone.module.blocks[1].mlp.fc2.bias.data += 1e6  # type: ignore[index, union-attr]  # beyond float16
    plan = replace(KEEPING, precision="bfloat16")
    tokens = extract(backbone, tiny_splits(), plan, tmp_path).tokens("blocks.2", 0.7)
    assert tokens.dtype == np.float32
    assert np.isfinite(tokens).all()
    assert np.abs(tokens).max() > 65504


def test_lost_tokens_are_made_again(tmp_path: Path) -> None:
    backbone, splits = tiny_sit(), tiny_splits()
    extract(backbone, splits, KEEPING, tmp_path)
    before = shards(tmp_path)
    (tmp_path / "tokens-00001.safetensors").unlink()
    extract(backbone, splits, KEEPING, tmp_path)
    assert shards(tmp_path) == before


def test_a_store_without_tokens_is_not_taken_for_one_with(tmp_path: Path) -> None:
    backbone, splits = tiny_sit(), tiny_splits()
    extract(backbone, splits, PLAN, tmp_path)
    with pytest.raises(
        ValueError, match=r"another run \(different: plan.token_samples, plan.tokens_per_sample, plan_hash"
    ):
        extract(backbone, splits, KEEPING, tmp_path)


# ------------------------------------------------------------------------------------------------------- interruptions


class Interruption(Exception):
    pass


@pytest.mark.parametrize("plan", [PLAN, KEEPING], ids=["pooled", "tokens"])
@pytest.mark.parametrize("calls", [1, 3, 5])
def test_interrupted_by_an_exception_it_goes_on_to_the_same_bytes(
    tmp_path: Path, calls: int, plan: ExtractionPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, splits = tiny_sit(), tiny_splits()
    extract(backbone, splits, plan, tmp_path / "whole", batch_size=16)
    read, left = extract_module._read, iter(range(calls))

    def failing(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise Interruption
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(extract_module, "_read", failing)
        with pytest.raises(Interruption):
            extract(backbone, splits, plan, tmp_path / "again", batch_size=16)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").glob("shard-*")}
    assert len(done) == calls // 2  # 7 samples, 2 levels, 2 draws: two batches of 16 a shard
    extract(backbone, splits, plan, tmp_path / "again", batch_size=16)
    assert shards(tmp_path / "again") == shards(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert not any(part._forward_hooks for part in backbone.module.modules())


def test_a_plan_without_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the plan has no layers; pass at least one"):
        extract(tiny_sit(), tiny_splits(8), replace(PLAN, layers=()), tmp_path / "store")
    assert not (tmp_path / "store").exists()


SMALL_SHARDS = replace(PLAN, shard_size=2)


def extracted(tell: Any, folder: Path) -> None:
    extract(tiny_sit(), tiny_splits(400), SMALL_SHARDS, folder, batch_size=16, progress=tell)


def test_killed_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    kill_after(random.randint(1, 60), extracted, tmp_path / "again")
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").glob("shard-*.safetensors")}
    assert 1 <= len(done) < 200
    for name in ("whole", "again"):
        extracted(None, tmp_path / name)
    whole, again = shards(tmp_path / "whole"), shards(tmp_path / "again")
    # A write that the signal cut short may leave its temporary file; it is not read.
    assert {name: content for name, content in again.items() if not name.endswith(".partial")} == whole
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_what_the_disk_refuses_ends_the_extraction_and_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are written by a thread, whose errors reach the caller."""
    backbone, splits, write, told = tiny_sit(), tiny_splits(), features_module.save_file, []

    def full(tensors: Any, path: Path) -> None:
        write(tensors, path)
        if path.name.startswith("shard-00001"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(features_module, "save_file", full)
    with pytest.raises(DiskFull, match=r"shard-00001.safetensors could not be written: the disk is full"):
        extract(backbone, splits, PLAN, tmp_path / "again", progress=lambda *state: told.append(state))
    assert told == [(7, 20)]  # what is told of is on disk
    assert sorted(path.name for path in (tmp_path / "again").glob("shard*")) == ["shard-00000.safetensors"]
    monkeypatch.undo()
    for name in ("whole", "again"):
        extract(backbone, splits, PLAN, tmp_path / name)
    assert shards(tmp_path / "again") == shards(tmp_path / "whole")


def test_the_next_shard_is_read_and_the_last_one_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[str, set[str]] = {"written": set(), "read": set()}
    write, batch = features_module.save_file, Subset.batch
    monkeypatch.setattr(
        features_module,
        "save_file",
        lambda tensors, path: (used["written"].add(threading.current_thread().name), write(tensors, path)),
    )
    monkeypatch.setattr(
        Subset, "batch", lambda self, rows: (used["read"].add(threading.current_thread().name), batch(self, rows))[1]
    )
    extract(tiny_sit(), tiny_splits(), PLAN, tmp_path)
    assert {name.rsplit("_", 1)[0] for name in used["read"]} == {"batches"}
    assert {name.rsplit("_", 1)[0] for name in used["written"]} == {
        "MainThread",
        "behind",
    }  # the samples and the shards
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("batches", "behind"))]


def test_a_finished_extraction_reads_neither_model_nor_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, splits = tiny_sit(), tiny_splits()
    before = extract(backbone, splits, PLAN, tmp_path)["blocks.1", 0.2]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    def refuse(*_: object) -> None:
        raise AssertionError("work is done again")

    monkeypatch.setattr(Subset, "batch", refuse)
    monkeypatch.setattr(extract_module, "_read", refuse)
    np.testing.assert_array_equal(extract(backbone, splits, PLAN, tmp_path)["blocks.1", 0.2], before)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps


# ------------------------------------------------------------------------------------------------------------- refusals


def test_another_run_is_refused(tmp_path: Path) -> None:
    backbone, splits = tiny_sit(), tiny_splits()
    extract(backbone, splits, PLAN, tmp_path)
    before = shards(tmp_path)
    others: dict[str, tuple[Backbone, Splits, ExtractionPlan]] = {
        "model_hash": (tiny_sit(seed=1), splits, PLAN),
        # Time 1 is noise here: the same weights and the name "linear", but another model.
        "schedule_hash": (tiny_sit(schedule=LinearPath(0, 1)), splits, PLAN),
        "prediction": (tiny_sit(prediction="eps"), splits, PLAN),
        "data.test, data.train, data.validation": (backbone, tiny_splits(seed=1), PLAN),
        "plan.seed, plan_hash": (backbone, splits, replace(PLAN, seed=6)),
    }
    for different, (model, data, plan) in others.items():
        with pytest.raises(ValueError, match=rf"holds features of another run \(different: {different}\)"):
            extract(model, data, plan, tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"is not empty and contains other files \(thesis.tex\)"):
        extract(backbone, splits, PLAN, tmp_path / "mine")
    (tmp_path / "mine" / "thesis.tex").unlink()
    (tmp_path / "mine").rmdir()
    assert shards(tmp_path) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    splits = tiny_splits(20, first_id=100)
    splits.validation.samples.x[12, 0, 1, 1] = value  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="sample 112 has values that are not finite; remove it from the data") as error:
        extract(tiny_sit(), splits, PLAN, tmp_path)
    assert "\n" not in str(error.value)
    assert [path.name for path in sorted(tmp_path.glob("shard*"))] == ["shard-00000.safetensors"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    backbone = tiny_sit()
    backbone.module.blocks[1].attn.qkv.weight.data[0, 0] = value  # type: ignore[index, union-attr]
    message = r"has values that are not finite in blocks.1.attn.qkv.weight; use an earlier checkpoint$"
    with pytest.raises(ValueError, match=message):
        extract(backbone, tiny_splits(), PLAN, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_features_that_overflow_are_refused(tmp_path: Path) -> None:
    backbone = tiny_sit()
    for linear in (backbone.module.blocks[1].mlp.fc1, backbone.module.blocks[1].mlp.fc2):  # type: ignore[index, union-attr]
        linear.weight.data *= 1e30
    message = "blocks.1 outputs values that are not finite at noise level 0.2; check the checkpoint, or use float32"
    with pytest.raises(ValueError, match=message) as error:
        extract(backbone, tiny_splits(), PLAN, tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("shard*"))


def test_a_level_without_an_end_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    plan = replace(PLAN, noise_levels=(0.5, 1.0))
    with pytest.raises(
        ValueError, match=r"level 1 is infinitely noisy under the schedule edm; pass levels up to 0.9938"
    ):
        extract(tiny_sit(schedule=EDM()), tiny_splits(), plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train": tiny_samples(4, shape=(1, 6, 6), first_id=50)},
            r"the train samples have shape \(1, 6, 6\) but .* expects \(1, 4, 4\)",
        ),
        ({"test": tiny_samples(4, first_id=2)}, "two samples have the same id, so they would see the same noise"),
        (
            {"validation": tiny_samples(4, first_id=50, labeled=False)},
            "only one of the train and the validation splits has labels",
        ),
    ],
)
def test_data_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        extract(tiny_sit(), replace(tiny_splits(), **change), PLAN, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("num_classes", "labeled"), [(2, True), (0, True), (3, False)])
def test_labels_that_the_model_or_the_data_lacks_are_refused(tmp_path: Path, num_classes: int, labeled: bool) -> None:
    backbone, splits = tiny_sit(num_classes=num_classes), tiny_splits(labeled=labeled)
    message = rf"the data has {3 * labeled} classes but .* has {num_classes}; use the null condition"
    with pytest.raises(ValueError, match=message):
        extract(backbone, splits, replace(PLAN, condition="label"), tmp_path)
    extract(backbone, splits, PLAN, tmp_path)


def test_a_layer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"blocks.7 is not in SiT, which has .* blocks.0 to blocks.2"):
        extract(tiny_sit(), tiny_splits(), replace(PLAN, layers=("blocks.0", "blocks.7")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------- controls


def tensors_of(backbone: Backbone) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in backbone.module.state_dict().items()}


def test_random_weights_keep_each_tensors_values_and_give_the_model_back() -> None:
    """In place, since the device may not hold two of it; after an error too."""
    backbone = tiny_sit()
    before, places = tensors_of(backbone), [p.data_ptr() for p in backbone.module.parameters()]
    with suppress(KeyboardInterrupt), random_weights(backbone, seed=3) as control:
        assert [p.data_ptr() for p in control.module.parameters()] == places
        shuffled = tensors_of(control)
        raise KeyboardInterrupt
    moved = []
    for name, tensor in shuffled.items():
        torch.testing.assert_close(backbone.module.state_dict()[name], before[name], rtol=0, atol=0)
        torch.testing.assert_close(tensor.flatten().sort()[0], before[name].flatten().sort()[0], rtol=0, atol=0)
        moved.append(not torch.equal(tensor, before[name]))
    assert sum(moved) == len(before) - 1  # all but the fixed position embedding
    assert torch.equal(shuffled["pos_embed"], before["pos_embed"])
    assert control.name == f"{backbone.name}, random weights"


def test_random_weights_depend_on_the_seed_only() -> None:
    weights = []
    for seed in (0, 0, 1):
        with random_weights(tiny_sit(), seed=seed) as control:
            weights.append(tensors_of(control)["x_embedder.proj.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_random_weights_of_a_network_that_was_frozen_to_be_read() -> None:
    backbone = tiny_sit()
    backbone.module.requires_grad_(False)
    weight = "blocks.0.attn.qkv.weight"
    before = tensors_of(backbone)[weight]
    with random_weights(backbone) as control:
        assert not torch.equal(control.module.get_parameter(weight), before)


def test_the_controls_are_other_models_on_disk(tmp_path: Path) -> None:
    backbone, splits = tiny_sit(), tiny_splits()
    extract(backbone, splits, PLAN, tmp_path)
    with random_weights(backbone) as control, pytest.raises(ValueError, match="different: model, model_hash"):
        extract(control, splits, PLAN, tmp_path)
