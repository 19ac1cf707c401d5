"""Comparisons of runs on planted cases: blocks that were inserted, and layers whose quality is known."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_sit, tiny_splits

from layerprobe.analyses.tables import (
    BEST,
    NO_SCORES,
    PAIRED,
    ComparedRun,
    block_map,
    in_order,
    network_cka,
    quality_differences,
    what_differs,
)
from layerprobe.backbones import Backbone
from layerprobe.extraction import ExtractionPlan, extract

LEVELS = (0.1, 0.4)
SPLITS = tiny_splits(120)


def with_blocks(backbone: Backbone, order: list[int]) -> Backbone:
    """The network with its blocks in this order; a repeated block changes nothing, as its gates are 0."""
    module = copy.deepcopy(backbone.module)
    blocks = []
    for place, index in enumerate(order):
        block = copy.deepcopy(backbone.module.blocks[index])
        if place and order[place - 1] == index:
            for parameter in block.adaLN_modulation.parameters():
                torch.nn.init.zeros_(parameter)
        blocks.append(block)
    module.blocks = torch.nn.ModuleList(blocks)
    layers = tuple(f"blocks.{place}" for place in range(len(order)))
    return dataclasses.replace(backbone, module=module, layers=layers)


def compared(name: str, backbone: Backbone, folder: Path, *, splits=SPLITS, seed: int = 0) -> ComparedRun:
    store = extract(backbone, splits, ExtractionPlan(backbone.layers, LEVELS, seed=seed), folder / f"{name}-{seed}")
    rows = [
        ("model", layer, level, "probe accuracy", split, index / 10 + level)
        for index, layer in enumerate(backbone.layers)
        for level in LEVELS
        for split in ("validation", "test")
    ]
    quality = pd.DataFrame(rows, columns=["source", "layer", "noise_level", "metric", "split", "value"])
    generator = np.random.default_rng(len(backbone.layers))
    n = int((store.splits == "test").sum())
    scores = {(layer, level): generator.integers(0, 2, n) * 1.0 for layer in backbone.layers for level in LEVELS}
    return ComparedRun(name, store, quality, scores)


SHALLOW = tiny_sit(depth=4)


def test_inserted_blocks_are_found(tmp_path: Path) -> None:
    order = [0, 1, 1, 2, 3, 3]
    shallow = compared("shallow", SHALLOW, tmp_path)
    deep = compared("deep", with_blocks(SHALLOW, order), tmp_path)
    table = block_map(deep, shallow, network_cka(deep, shallow))
    assert table["layer_b"].tolist() == [f"blocks.{index}" for index in order]
    assert np.allclose(table["cka"], 1)
    back = block_map(shallow, deep, network_cka(shallow, deep))
    assert back["as_alike"].tolist() == ["", "blocks.2", "", "blocks.5"]
    assert in_order(list(back["layer_b"]), deep.store.layers)


def test_a_map_that_goes_back_is_told() -> None:
    assert not in_order(["blocks.1", "blocks.0"], ("blocks.0", "blocks.1"))


def test_the_difference_of_the_best_layers_is_paired_by_sample(tmp_path: Path) -> None:
    a, b = compared("a", SHALLOW, tmp_path), compared("b", tiny_sit(depth=3, seed=1), tmp_path)
    table = quality_differences(a, b)
    best = table[table["compared"] == BEST]
    assert best["layer_a"].tolist() == ["blocks.3"] * 2
    assert best["layer_b"].tolist() == ["blocks.2"] * 2
    assert np.allclose(best["difference"], -0.1)
    assert set(best["interval"]) == {PAIRED}
    scores = b.scores["blocks.2", 0.1] - a.scores["blocks.3", 0.1]
    half = 1.959963985 * scores.std(ddof=1) / np.sqrt(len(scores))
    assert best[["low", "high"]].iloc[0].tolist() == pytest.approx([scores.mean() - half, scores.mean() + half])
    assert len(table) == 2 * (1 + 3)


def test_runs_that_cannot_be_paired_say_why(tmp_path: Path) -> None:
    a = compared("a", SHALLOW, tmp_path)
    others = {
        "different seeds": compared("b", SHALLOW, tmp_path, seed=1),
        "different samples": compared("c", SHALLOW, tmp_path, splits=tiny_splits(100)),
        "differ in content": compared("d", SHALLOW, tmp_path, splits=tiny_splits(120, seed=1)),
    }
    for reason, other in others.items():
        assert reason in what_differs(a, other)
        with pytest.raises(ValueError, match=f"cannot be compared layer by layer: .*{reason}"):
            network_cka(a, other)
    unpaired = quality_differences(a, others["different samples"])
    assert set(unpaired["interval"]) == {"unpaired"}
    without = dataclasses.replace(a, scores={})
    assert set(quality_differences(without, a)["interval"]) == {NO_SCORES}
