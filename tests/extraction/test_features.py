"""A plan says what was read; a store gives back what was written, and says so when something is missing."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from layerprobe.extraction.features import (
    SPLITS,
    FeatureStore,
    begin_store,
    filled_tensors,
    shard_path,
    token_path,
    token_rows,
    write_tensors,
)
from layerprobe.extraction.plan import ExtractionPlan

LAYERS, LEVELS, DRAWS = ("late", "early"), (0.1, 0.5, 1.0), 2
SIZES, WIDTHS = (5, 3), {"late": 4, "early": 2}
NUM = sum(SIZES)
PLAN = ExtractionPlan(("blocks.0",), (0.1, 0.5))


def written(folder: Path, *, labeled: bool = True) -> dict[str, NDArray[np.float32]]:
    """Writes a store of two shards; gives the features as one array (levels, draws, n, D) per layer."""
    rng = np.random.default_rng(0)
    whole = {
        name: rng.normal(size=(len(LEVELS), DRAWS, NUM, width)).astype(np.float32) for name, width in WIDTHS.items()
    }
    plan = {"layers": LAYERS, "noise_levels": LEVELS, "draws": DRAWS}
    samples = {"ids": np.arange(NUM) + 100, "splits": np.repeat([0, 1, 2], [4, 1, 3])}
    if labeled:
        samples["labels"] = np.arange(NUM) % 2
    begin_store(folder, {"plan": plan, "num_shards": len(SIZES)}, samples)
    start = 0
    for index, size in enumerate(SIZES):
        write_tensors(shard_path(folder, index), {k: v[:, :, start : start + size] for k, v in whole.items()})
        start += size
    return whole


def test_a_store_gives_back_what_was_written(tmp_path: Path) -> None:
    whole = written(tmp_path)
    store = FeatureStore.open(tmp_path)
    assert (store.layers, store.noise_levels, store.draws) == (LAYERS, LEVELS, DRAWS)
    for layer, features in whole.items():
        for i, level in enumerate(LEVELS):
            np.testing.assert_array_equal(store[layer, level], features[i, 0])
            for draw in range(DRAWS):
                np.testing.assert_array_equal(store.features(layer, level, draw=draw), features[i, draw])
    assert store["late", 0.1].dtype == np.float32


def test_splits_labels_and_ids_belong_to_the_rows(tmp_path: Path) -> None:
    whole = written(tmp_path)
    store = FeatureStore.open(str(tmp_path))
    assert store.splits.tolist() == ["train"] * 4 + ["validation"] + ["test"] * 3
    assert store.ids.tolist() == list(range(100, 108))
    assert store.labels is not None
    assert store.labels.tolist() == [0, 1] * 4
    for split, rows in zip(SPLITS, (slice(0, 4), slice(4, 5), slice(5, 8)), strict=True):
        np.testing.assert_array_equal(store.features("early", 0.5, draw=1, split=split), whole["early"][1, 1, rows])


def test_unlabeled_samples_have_no_labels(tmp_path: Path) -> None:
    written(tmp_path, labeled=False)
    assert FeatureStore.open(tmp_path).labels is None


@pytest.mark.parametrize(
    ("layer", "level", "options"),
    [("blocks.9", 0.1, {}), ("early", 0.3, {}), ("early", 0.1, {"draw": 2}), ("early", 0.1, {"draw": -1})],
)
def test_what_was_not_extracted_is_refused(tmp_path: Path, layer: str, level: float, options: dict[str, Any]) -> None:
    written(tmp_path)
    with pytest.raises(
        KeyError, match=r"the store has layers \('late', 'early'\), noise levels \(0.1, 0.5, 1.0\) and 2 draws"
    ):
        FeatureStore.open(tmp_path).features(layer, level, **options)


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(KeyError, match="unknown split 'holdout'; use one of train, validation, test"):
        FeatureStore.open(tmp_path).features("early", 0.1, split="holdout")


def test_unfinished_and_absent_stores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="contains no features; run `layerprobe probe`"):
        FeatureStore.open(tmp_path)
    written(tmp_path)
    shard_path(tmp_path, 1).unlink()
    with pytest.raises(ValueError, match=r"unfinished \(1 of 3 files missing\); repeat the command"):
        FeatureStore.open(tmp_path)


@pytest.mark.parametrize("name", ["samples.safetensors", "shard-00001.safetensors"])
@pytest.mark.parametrize("keep", [0, 40, -1])
def test_damaged_files_are_named(tmp_path: Path, name: str, keep: int) -> None:
    written(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{name} is damaged .*; repeat the `layerprobe probe`") as refused:
        FeatureStore.open(tmp_path)["late", 0.1]
    assert "\n" not in str(refused.value)


# --------------------------------------------------------------------------------------------------------------- tokens

GRIDS = {"late": (2, 3), "early": None}
TOKEN_SHAPES = {"late": (6, 4), "early": (5, 2)}


def written_with_tokens(folder: Path) -> dict[str, NDArray[np.float32]]:
    """Gives the tokens as one array (levels, draws, 5, T, D) per layer."""
    rng = np.random.default_rng(1)
    plan = {"layers": LAYERS, "noise_levels": LEVELS, "draws": DRAWS, "token_samples": 2}
    samples = {"ids": np.arange(NUM) + 100, "splits": np.repeat([0, 1, 2], [4, 1, 3]), "labels": np.arange(NUM) % 2}
    tokens = {"shards": [0, 1], "grids": GRIDS}
    begin_store(folder, {"plan": plan, "num_shards": 2, "tokens": tokens}, samples)
    whole = {k: rng.normal(size=(len(LEVELS), DRAWS, 5, *s)).astype(np.float32) for k, s in TOKEN_SHAPES.items()}
    for index, rows in enumerate((slice(0, 3), slice(3, 5))):
        write_tensors(token_path(folder, index), {name: values[:, :, rows] for name, values in whole.items()})
        write_tensors(shard_path(folder, index), {"late": np.zeros((3, 2, SIZES[index], 4), np.float32)})
    return whole


def test_tokens_come_back_with_the_samples_they_belong_to(tmp_path: Path) -> None:
    whole = written_with_tokens(tmp_path)
    store = FeatureStore.open(tmp_path)
    assert store.token_rows.tolist() == [0, 1, 4, 5, 6]
    assert store.token_ids.tolist() == [100, 101, 104, 105, 106]
    assert store.token_labels is not None
    assert store.token_labels.tolist() == [0, 1, 0, 1, 0]
    assert store.token_splits.tolist() == ["train", "train", "validation", "test", "test"]
    for layer, tokens in whole.items():
        np.testing.assert_array_equal(store.tokens(layer, 0.1), tokens[0, 0])
        np.testing.assert_array_equal(store.tokens(layer, 1.0, draw=1), tokens[2, 1])
        np.testing.assert_array_equal(store.tokens(layer, 0.5, draw=1, split="test"), tokens[1, 1, 3:])
    assert store.tokens("late", 0.1).dtype == np.float32
    assert (store.grid("late"), store.grid("early")) == ((2, 3), None)


def test_tokens_that_were_not_kept_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "none")
    store = FeatureStore.open(tmp_path / "none")
    assert len(store.token_rows) == len(store.token_ids) == 0
    for ask in (lambda: store.tokens("late", 0.1), lambda: store.grid("late")):
        with pytest.raises(KeyError, match="contains no tokens; extract with token_samples into another folder"):
            ask()
    written_with_tokens(tmp_path / "some")
    store = FeatureStore.open(tmp_path / "some")
    with pytest.raises(KeyError, match="was not extracted"):
        store.tokens("late", 0.3)
    with pytest.raises(KeyError, match="was not extracted"):
        store.grid("blocks.9")
    with pytest.raises(KeyError, match="unknown split 'holdout'"):
        store.tokens("late", 0.1, split="holdout")


def test_lost_and_damaged_tokens_are_named(tmp_path: Path) -> None:
    written_with_tokens(tmp_path)
    token_path(tmp_path, 1).write_bytes(token_path(tmp_path, 1).read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"tokens-00001.safetensors is damaged .*; repeat the `layerprobe probe`"):
        FeatureStore.open(tmp_path).tokens("early", 0.1)
    token_path(tmp_path, 1).unlink()
    with pytest.raises(ValueError, match=r"unfinished \(1 of 5 files missing\); repeat the command"):
        FeatureStore.open(tmp_path)


def test_the_first_samples_of_each_split_are_kept() -> None:
    splits = np.array([0, 0, 0, 1, 2, 2])
    assert token_rows(splits, 0).tolist() == []
    assert token_rows(splits, 1).tolist() == [0, 3, 4]
    assert token_rows(splits, 2).tolist() == [0, 1, 3, 4, 5]
    assert token_rows(splits, 99).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_file_filled_in_any_order_is_the_file_written_at_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = {name: rng.normal(size=(2, 3, 4, 5)).astype(np.float32) for name in ("blocks.3.attn:input", "ü/ä", "a")}
    places = [(name, (i, j)) for name in whole for i in range(2) for j in range(3)]
    with filled_tensors(tmp_path / "filled", {name: values.shape for name, values in whole.items()}) as put:
        for which in rng.permutation(len(places) - 1):
            name, place = places[which]
            put(name, place, whole[name][place])
        assert not (tmp_path / "filled").exists()
    found = load_file(tmp_path / "filled")
    whole["a"][1, 2] = 0  # the last place was left out
    assert set(found) == set(whole)
    for name, values in whole.items():
        np.testing.assert_array_equal(found[name], values)


def test_a_file_half_filled_does_not_appear(tmp_path: Path) -> None:
    def interrupted() -> None:
        with filled_tensors(tmp_path / "filled", {"a": (2, 3)}) as put:
            put("a", (0,), np.ones(3, np.float32))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (tmp_path / "filled").exists()


def test_a_plan_without_tokens_is_what_it_was_before_there_were_any() -> None:
    """So stores made then are found again; the hash is that of the release before."""
    assert replace(PLAN, precision="float32").hash() == "56ee4098415c8cda"
    assert not {"token_samples", "tokens_per_sample"} & set(PLAN.to_dict())
    assert replace(PLAN, token_samples=1).to_dict().items() >= {"token_samples": 1, "tokens_per_sample": 0}.items()


def test_another_manifest_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    written(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"holds features of another run \(different: num_shards, plan"):
        begin_store(tmp_path, {"num_shards": 9}, {"ids": np.arange(1)})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interrupted_write_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("layerprobe.extraction.features.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(shard_path(tmp_path, 0), {"a": np.zeros(3)})
    assert not shard_path(tmp_path, 0).exists()


def test_the_hash_of_a_plan_changes_with_every_field() -> None:
    others: dict[str, Any] = {
        "layers": ("blocks.1",),
        "noise_levels": (0.1,),
        "draws": 2,
        "pool_cells": 2,
        "condition": "label",
        "precision": "bfloat16",
        "seed": 1,
        "shard_size": 8,
        "token_samples": 2,
    }
    kept = replace(PLAN, token_samples=2)
    assert kept.hash() != replace(kept, tokens_per_sample=1).hash()
    assert {*others, "tokens_per_sample"} == {field.name for field in fields(PLAN)}
    hashes = [PLAN.hash(), *(replace(PLAN, **{name: value}).hash() for name, value in others.items())]
    assert len(set(hashes)) == len(hashes)
    assert ExtractionPlan(["blocks.0"], [0.1, 0.5]).hash() == PLAN.hash()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ("a", "b", "a")}, "a layer is named twice in a, b, a; name each layer once"),
        ({"noise_levels": ()}, r"distinct and ascending, got \[\]"),
        ({"noise_levels": (0.5, 0.1)}, r"distinct and ascending, got \[0.5, 0.1\]"),
        ({"noise_levels": (0.5, 0.5)}, "distinct and ascending"),
        ({"noise_levels": (-0.1, 0.5)}, "lie between 0"),
        ({"noise_levels": (0.5, 1.5)}, r"lie between 0 \(clean\) and 1 \(pure noise\), got \[0.5, 1.5\]"),
        ({"noise_levels": (0.1, float("nan"), 0.5)}, "lie between 0"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"pool_cells": 0}, "pool_cells must be at least 1"),
        ({"shard_size": -1}, "shard_size must be at least 1"),
        ({"condition": "lable"}, "unknown condition 'lable'; use null or label"),
        ({"precision": "fp16"}, "unknown precision 'fp16'; use auto, float32, tf32 or bfloat16"),
        ({"seed": -1}, "seed must be between 0 and"),
        ({"token_samples": -1}, "token_samples must be at least 0, got -1"),
        ({"token_samples": 1, "tokens_per_sample": -1}, "tokens_per_sample must be at least 0, got -1"),
        ({"tokens_per_sample": 4}, "tokens_per_sample is 4 but no tokens are kept; pass token_samples"),
    ],
)
def test_impossible_plans_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        replace(PLAN, **options)
    assert "\n" not in str(refused.value)
