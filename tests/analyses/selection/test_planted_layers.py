"""Planted: in the embedded checkpoint one block is made useless. It is never picked as a teacher, labels or not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from layerprobe.analyses.measures.linear_probes import linear_probe
from layerprobe.analyses.selection.ranking import rank_pairs
from layerprobe.analyses.selection.records import Selection
from layerprobe.analyses.tables.evidence import PROBE_GAP, PairEvidence
from layerprobe.analyses.tables.evidence_measures import measure_evidence
from layerprobe.checkpoints.opening import open_checkpoint
from layerprobe.data.loading import load
from layerprobe.data.samples import Splits
from layerprobe.extraction.ablation import LOSS_INCREASE, ablate_layers
from layerprobe.extraction.evidence import extract_evidence
from layerprobe.extraction.plan import ExtractionPlan

LEVELS = (0.1, 0.4)
BLOCK = 5  # what the rule picks as a teacher where nothing was planted


def zeroed(network: Any) -> None:
    """It adds nothing: what goes in comes out."""
    for parameter in network.blocks[BLOCK].adaLN_modulation[-1].parameters():
        torch.nn.init.zeros_(parameter)


def duplicated(network: Any) -> None:
    """It does again what an earlier block has done."""
    network.blocks[BLOCK].load_state_dict(network.blocks[BLOCK - 2].state_dict())


def _outputs(network: Any) -> list[torch.Tensor]:
    """The weights that give the block's output channels, one row each."""
    block = network.blocks[BLOCK]
    return [block.attn.proj.weight.data, block.attn.proj.bias.data, block.mlp.fc2.weight.data, block.mlp.fc2.bias.data]


def shuffled(network: Any) -> None:
    """What it computes arrives in other channels."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for weight in _outputs(network):
        weight.copy_(weight[order])


def noised(network: Any) -> None:
    """Its output channels drown in noise."""
    generator = torch.Generator().manual_seed(0)
    for weight in _outputs(network):
        weight.add_(3 * weight.std() * torch.randn(weight.shape, generator=generator))


def untouched(network: Any) -> None:
    """The checkpoint as it is."""


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load("digits", num_train=200, num_validation=100, num_test=64)


def evidence_of(plant: Callable[[Any], None], splits: Splits, folder: Path) -> PairEvidence:
    """With labels: probes of the small extraction, scored on the validation split."""
    whole = open_checkpoint("digits", device="cpu")
    network = copy.deepcopy(whole.module)
    plant(network)
    backbone = replace(whole, module=network)
    skipped = ablate_layers(backbone, splits.validation, LEVELS, split="validation", num_samples=64)
    plan = ExtractionPlan(backbone.layers, LEVELS)
    store = extract_evidence(backbone, splits, plan, folder / "store", num_samples=200)
    assert store.labels is not None
    fit, choose = (store.splits == name for name in ("train", "validation"))
    scores = {}
    for layer in store.layers:
        for level in LEVELS:
            x, y = store[layer, level], store.labels
            parts = (x[fit], y[fit], x[choose], y[choose], x[choose], y[choose])
            probed = linear_probe(*parts, inverse_penalties=(0.1,))
            scores["probe accuracy", layer, level] = probed.validation_correct.astype(np.float64)
            scores["knn accuracy", layer, level] = scores["probe accuracy", layer, level]
    return measure_evidence(store, scores=scores, ablation=pd.DataFrame(skipped.rows()))


def teachers(selection: Selection) -> set[str]:
    return {pair.teacher for pair in selection.ranked}


@pytest.mark.parametrize("plant", [zeroed, duplicated, shuffled, noised, untouched])
def test_a_useless_block_is_never_a_teacher(plant: Callable[[Any], None], splits: Splits, tmp_path: Path) -> None:
    evidence = evidence_of(plant, splits, tmp_path)
    for label_free in (False, True):
        selection = rank_pairs(evidence, label_free=label_free)
        if plant is untouched:
            assert selection.pick is not None
            assert f"blocks.{BLOCK}" in teachers(selection)
            continue
        assert f"blocks.{BLOCK}" not in teachers(selection)
        objections = [
            p.objections for p in selection.rejected if (p.student, p.teacher) == ("blocks.1", f"blocks.{BLOCK}")
        ]
        assert "teacher not needed" in [objection.code for objection in objections[0]]
    assert (evidence.layer_number(LOSS_INCREASE, f"blocks.{BLOCK}").low > 0) == (plant is untouched)
    if plant is zeroed:
        # What a probe reads would not have told: it finds the same there as in the block before.
        gap = evidence.number(PROBE_GAP, evidence.pairs.index((f"blocks.{BLOCK - 1}", f"blocks.{BLOCK}")))
        assert (gap.low, gap.high) == (0, 0)
