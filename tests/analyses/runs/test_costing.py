"""The forecast of a probing run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_samples, tiny_sit

from layerprobe.analyses.runs import RunPlan, costing, probe
from layerprobe.analyses.runs.costing import forecast_cost
from layerprobe.analyses.runs.folder import RunFolder
from layerprobe.analyses.runs.stages import (
    ENCODING,
    EXTRACTION,
    FORECAST,
    MODEL_FEATURES,
    PAIRS,
    PROBES,
    STAGES,
    Cost,
    cost_record,
)
from layerprobe.backbones import layer_shapes
from layerprobe.checkpoints import CheckpointSource, check_convention, open_checkpoint
from layerprobe.checkpoints.convention import FIRST
from layerprobe.data import DataSource, Splits, Subset
from layerprobe.extraction import ExtractionPlan

FREE = ("CKA", "pairs", "controls")  # may be too short for the clock


def patterned(shape: tuple[int, ...] = (1, 4, 4)) -> tuple[RunPlan, Splits]:
    samples = tiny_samples(96, shape=shape)
    parts = zip(("train", "validation", "test"), (range(64), range(64, 80), range(80, 96)), strict=True)
    splits = Splits(*(Subset(samples, rows, name=name) for name, rows in parts))
    plan = ExtractionPlan(noise_levels=(0.2, 0.5))
    return RunPlan(CheckpointSource("memory"), DataSource("memory"), plan), splits


def test_a_forecast_has_every_stage_and_the_disk_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run of which it was asked records both; its figures are left out here."""
    backbone, (plan, splits) = tiny_sit().in_precision("auto"), patterned()
    told: list[Cost] = []
    monkeypatch.setattr("layerprobe.analyses.runs.stages.LONG_S", 0.0)
    options = {"opened": (backbone, splits), "trust_convention": True, "on_forecast": told.append}
    probe.extract_run(plan, tmp_path / "run", stages=STAGES, **options)
    folder = RunFolder(tmp_path / "run")
    (cost,) = told
    assert tuple(cost.seconds) == STAGES[1:]
    assert all(seconds > 0 for stage, seconds in cost.seconds.items() if stage not in FREE)
    assert json.loads((folder.path / FORECAST).read_text()) == cost.to_dict()
    stores = sum(file.stat().st_size for file in folder.features.rglob("*.safetensors"))
    assert cost.disk_bytes == pytest.approx(stores, rel=0.3)
    _, took = cost_record(folder.path)
    assert took is not None
    assert set(took["seconds"]) == set(EXTRACTION[1:])
    assert cost.memory_bytes >= took["memory_bytes"] / 1.5
    # What remains is forecast from the features.
    rest = probe.analysis_forecast(folder.path, device="cpu")
    assert tuple(rest.seconds) == STAGES[len(EXTRACTION) :]
    assert rest.seconds[PROBES] > 0


def test_extraction_alone_counts_encoding_and_kept_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of 3 x 8 x 8 for a network of latents of 1 x 4 x 4, a second each, and a second for each byte."""
    backbone, (plan, images) = tiny_sit().in_precision("auto"), patterned((3, 8, 8))
    monkeypatch.setattr(costing, "row_seconds", lambda *_: 0.0)
    monkeypatch.setattr(costing, "load_seconds", lambda samples: 0.0)
    monkeypatch.setattr(costing, "byte_seconds", lambda: 1.0)
    monkeypatch.setattr(costing, "encoding_seconds", lambda splits, vae: 96.0 if vae else 0.0)
    extraction = plan.extraction_from(backbone)
    costs = [
        forecast_cost(backbone, images, ExtractionPlan(extraction.layers, (0.2, 0.5), token_samples=kept), **options)
        for kept, options in (
            (0, {"vae": "vae", "stages": EXTRACTION}),
            (8, {"vae": "vae", "stages": EXTRACTION, "processes": 2}),
        )
    ]
    assert costs[0].seconds[ENCODING] == 96
    assert costs[1].seconds[ENCODING] == 48
    assert PROBES not in costs[0].seconds
    tokens = 3 * 8 * 2 * 3 * 4 * 16 * 4  # splits, samples, levels, layers, tokens, channels, bytes
    assert 2 * costs[1].seconds[MODEL_FEATURES] == pytest.approx(costs[0].seconds[MODEL_FEATURES] + tokens)
    assert costs[1].disk_bytes == costs[0].disk_bytes + 2 * tokens


def test_measures_of_kept_tokens_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every timed piece takes a second; those of the tokens come on top."""
    _, splits = patterned()
    monkeypatch.setattr(costing, "seconds_of", lambda call: (call(), 1.0)[1])
    shapes = {f"blocks.{i}": (4, 16) for i in range(3)}
    costs = [
        costing._measure_seconds(splits, ExtractionPlan(tuple(shapes), (0.2,), token_samples=kept), shapes, CPU)
        for kept in (0, 8)
    ]
    assert costs[1][PROBES] == 2 * costs[0][PROBES] > 0
    assert costs[1][PAIRS] == pytest.approx(2 * costs[0][PAIRS])


CPU = torch.device("cpu")


def test_the_rows_of_the_convention_check_are_about_those_that_it_asks_for() -> None:
    backbone, splits = open_checkpoint("digits", device="cpu"), DataSource("digits").load()
    passed = []

    def forward(module: torch.nn.Module, x: torch.Tensor, *arguments: torch.Tensor | None) -> torch.Tensor:
        passed.append(len(x))
        return backbone.forward(module, x, *arguments)

    check_convention(replace(backbone, forward=forward), splits.train)
    counts = costing._Counts(backbone, splits, ExtractionPlan(), layer_shapes(backbone, backbone.layers))
    assert 1 < counts.checked_rows / sum(passed) < 1.5
    assert costing.CHECKED_FIRST == FIRST
