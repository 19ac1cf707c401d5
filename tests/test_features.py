"""A plan says what was read; a store gives back what was written, and says so when something is missing."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from layerprobe.features import SPLITS, ExtractionPlan, FeatureStore, begin_store, shard_path, write_tensors

LAYERS, LEVELS, DRAWS = ("late", "early"), (0.1, 0.5, 1.0), 2
SIZES, WIDTHS = (5, 3), {"late": 4, "early": 2}
NUM = sum(SIZES)
PLAN = ExtractionPlan(("blocks.0",), (0.1, 0.5))


def written(folder: Path, *, labelled: bool = True) -> dict[str, NDArray[np.float32]]:
    """Writes a store of two shards; gives the features as one array (levels, draws, n, D) per layer."""
    rng = np.random.default_rng(0)
    whole = {
        name: rng.normal(size=(len(LEVELS), DRAWS, NUM, width)).astype(np.float32) for name, width in WIDTHS.items()
    }
    plan = {"layers": LAYERS, "noise_levels": LEVELS, "draws": DRAWS}
    samples = {"ids": np.arange(NUM) + 100, "splits": np.repeat([0, 1, 2], [4, 1, 3])}
    if labelled:
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
    assert store.splits.tolist() == ["fit"] * 4 + ["choose"] + ["report"] * 3
    assert store.ids.tolist() == list(range(100, 108))
    assert store.labels is not None
    assert store.labels.tolist() == [0, 1] * 4
    for split, rows in zip(SPLITS, (slice(0, 4), slice(4, 5), slice(5, 8)), strict=True):
        np.testing.assert_array_equal(store.features("early", 0.5, draw=1, split=split), whole["early"][1, 1, rows])


def test_unlabelled_samples_have_no_labels(tmp_path: Path) -> None:
    written(tmp_path, labelled=False)
    assert FeatureStore.open(tmp_path).labels is None


@pytest.mark.parametrize(
    ("layer", "level", "options"),
    [("blocks.9", 0.1, {}), ("early", 0.3, {}), ("early", 0.1, {"draw": 2}), ("early", 0.1, {"draw": -1})],
)
def test_what_was_not_extracted_is_refused(tmp_path: Path, layer: str, level: float, options: dict[str, Any]) -> None:
    written(tmp_path)
    with pytest.raises(KeyError, match=r"stored are \('late', 'early'\), \(0.1, 0.5, 1.0\), 2 draws"):
        FeatureStore.open(tmp_path).features(layer, level, **options)


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(KeyError, match="no split 'test'; use one of fit, choose, report"):
        FeatureStore.open(tmp_path).features("early", 0.1, split="test")


def test_unfinished_and_absent_stores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no features; run `layerprobe probe`"):
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
    with pytest.raises(ValueError, match=rf"{name} is damaged .*; delete it and repeat") as refused:
        FeatureStore.open(tmp_path)["late", 0.1]
    assert "\n" not in str(refused.value)


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

    monkeypatch.setattr("layerprobe.features.save_file", interrupted)
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
    }
    assert set(others) == {field.name for field in fields(PLAN)}
    hashes = [PLAN.hash(), *(replace(PLAN, **{name: value}).hash() for name, value in others.items())]
    assert len(set(hashes)) == len(hashes)
    assert ExtractionPlan(["blocks.0"], [0.1, 0.5]).hash() == PLAN.hash()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ()}, "no layers to read; pass at least one"),
        ({"layers": ("a", "b", "a")}, "a layer stands twice in a, b, a; name each layer once"),
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
        ({"precision": "fp16"}, "unknown precision 'fp16'; use float32 or bfloat16"),
        ({"seed": -1}, "seed must be between 0 and"),
    ],
)
def test_impossible_plans_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        replace(PLAN, **options)
    assert "\n" not in str(refused.value)
