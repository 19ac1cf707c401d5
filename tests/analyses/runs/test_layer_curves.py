"""Curves of layer quality: planted changes are found at their step, and measuring costs what it may."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gated_network import CLASS, REST, classes, gated, let_through

from layerprobe.analyses.figures import layer_step_heatmaps
from layerprobe.analyses.runs.layer_curves import CurvePlan, LayerCurves
from layerprobe.analyses.wording import curve_finding_text
from layerprobe.layersync import LayerPair

PLAN = CurvePlan(every=10, noise_levels=(0.1, 0.3), num_samples=96, max_share=1)
PAIR = LayerPair("blocks.0", "blocks.2")


def curves(folder: Path, *, splits: Any = None, plan: CurvePlan = PLAN, **options: Any) -> LayerCurves:
    return LayerCurves(splits or classes(), folder, plan, **({"say": lambda _: None} | options))


def test_planted_changes_are_found_at_their_steps(tmp_path: Path) -> None:
    lines: list[str] = []
    logged: list[tuple[int, dict[str, float]]] = []
    network = gated(REST, (0, 1, 2, 3, 4), REST[:3])
    found = curves(tmp_path, pairs=[PAIR], say=lines.append, log=lambda step, row: logged.append((step, row)))
    (first,) = found.measure(0, network)
    assert (first.code, first.layers) == ("richest", ("blocks.1",))
    let_through(network, REST, REST, CLASS)
    moved, drifted = found.measure(10, network)
    assert (moved.code, moved.layers) == ("richest moved", ("blocks.1", "blocks.2"))
    assert moved.numbers["lead"] > 0.3
    assert (drifted.code, drifted.layers) == ("drifted", ("blocks.1", "blocks.2"))
    let_through(network, CLASS, (3,), CLASS)
    caught, drifted, collapsed = found.measure(20, network)
    assert (caught.code, caught.layers) == ("caught up", ("blocks.0", "blocks.2"))
    assert (drifted.layers, collapsed.code, collapsed.layers) == (("blocks.0",), "collapsed", ("blocks.1",))
    assert found.measure(30, network) == []  # nothing is told twice
    assert lines[1].startswith("step 10: the richest layer has moved from blocks.1 to blocks.2: probe accuracy higher")
    assert "blocks.1 has collapsed: effective rank down to 20% of its highest, below 25%" in lines[-1]
    assert "caught up with its teacher blocks.2: cosine 1.00 and CKA 1.00" in lines[-3]
    table = found.table.set_index(["step", "layer", "noise_level", "metric"])["value"]
    assert table[0, "blocks.1", 0.1, "probe accuracy"] > 0.9 > 0.6 > table[0, "blocks.0", 0.1, "probe accuracy"]
    assert table[0, "blocks.0", 0.3, "CKA with the start"] == 1
    assert logged[2][1]["cosine/blocks.0 <- blocks.2 at 0.1"] == pytest.approx(1)
    found.close()
    assert (tmp_path / "layer_curves.png").stat().st_size > 10_000
    assert lines[-1].startswith("layers measured at 4 steps: ")
    title = layer_step_heatmaps(found.table, found.findings).get_suptitle()
    assert title.startswith(
        "The richest layer (probe accuracy) moved from blocks.1 to blocks.2, the last time at step 10"
    )
    # A training that goes on after step 10 repeats what came after it, and compares with the same start.
    again = curves(tmp_path, pairs=[PAIR])
    let_through(network, CLASS, (3,), CLASS)
    assert [finding.code for finding in again.measure(20, network)] == ["caught up", "drifted", "collapsed"]
    assert sorted(set(again.table["step"])) == [0, 10, 20]
    assert [json.loads(line)["step"] for line in (tmp_path / "layer_findings.jsonl").read_text().splitlines()] == [
        0,
        10,
        10,
        20,
        20,
        20,
    ]


def test_without_labels_the_quality_is_noise_lidar(tmp_path: Path) -> None:
    found = curves(tmp_path, splits=classes(labeled=False))
    (first,) = found.measure(0, gated(REST, CLASS))
    assert set(found.table["metric"]) == {"noise-LiDAR", "effective rank", "CKA with the start"}
    assert "noise-LiDAR" in curve_finding_text(first, "noise-LiDAR")


def test_layers_are_compared_with_another_model(tmp_path: Path) -> None:
    network, other = gated(CLASS, REST), gated(CLASS, CLASS)
    found = curves(tmp_path, drift_from=other)
    _, drifted = found.measure(0, network)
    assert (drifted.code, drifted.layers) == ("drifted", ("blocks.1",))
    with pytest.raises(ValueError, match="compare with other weights than these; compare with the same ones, or"):
        curves(tmp_path, drift_from=network).measure(10, network)
    with pytest.raises(ValueError, match="has the features of other samples or noise; measure into another folder"):
        curves(tmp_path, splits=classes(90)).measure(10, network)
    with pytest.raises(ValueError, match=r"blocks\.2 is not a layer of the model to compare with"):
        curves(tmp_path).measure(10, gated(CLASS, REST, REST))


def test_the_same_step_gives_the_same_numbers_and_leaves_no_trace(tmp_path: Path) -> None:
    network = gated(REST, CLASS)
    network.module.train()
    network.module.blocks[1].eval()
    network.module.blocks[1].compile(backend=lambda graph, inputs: pytest.fail("compiled"))
    compiled = network.module.blocks[1]._compiled_call_impl
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        curves(tmp_path / "a").measure(0, network)
    curves(tmp_path / "b").measure(0, network)
    assert (tmp_path / "a" / "layer_curves.csv").read_text() == (tmp_path / "b" / "layer_curves.csv").read_text()
    assert torch.equal(state, torch.get_rng_state())
    assert [part.training for part in network.module.modules()] == [True, True, True, False]
    assert network.module.blocks[1]._compiled_call_impl is compiled


@pytest.mark.parametrize("share", [0.02, 0.1, 1])
def test_measuring_stays_within_its_share_of_the_time(share: float, tmp_path: Path, monkeypatch: Any) -> None:
    time, lines = [0.0], []
    plan = CurvePlan(every=10, num_samples=96, max_share=share)
    found = curves(tmp_path, plan=plan, clock=lambda: time[0], say=lines.append)

    def measured_at(step: int, _: object) -> list[Any]:
        time[0] += 3.0
        return []

    monkeypatch.setattr(found, "_measured_at", measured_at)
    steps = []
    for step in range(10_001):
        time[0] += 0.1
        if found.is_due(step, last=step == 10_000):
            found.measure(step, gated(CLASS))
            steps.append(step)
    assert found.spent_s <= max(share * time[0], 6.0)
    assert (steps[0], steps[-1]) == (0, 10_000)
    assert len(steps) == {0.02: 6, 0.1: 36, 1: 1001}[share]
    assert not any(step % 10 for step in steps)
    assert [line for line in lines if "layers are not measured at step 10: at 3.0 s" in line] == lines
    assert len(lines) == (share < 1)


def test_a_measurement_that_fails_later_does_not_end_the_training(tmp_path: Path) -> None:
    lines: list[str] = []
    network = gated(CLASS, REST)
    found = curves(tmp_path, say=lines.append)
    found.measure(0, network)
    network.module.blocks[0].matrix.data.fill_(torch.nan)
    assert found.measure(10, network) == []
    assert lines[-1].startswith("the layers could not be measured at step 10: ")
    with pytest.raises(ValueError, match=r"not finite in blocks\.0\.matrix"):
        curves(tmp_path).measure(20, network)


def test_plans_and_data_that_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every must be at least 1 step, got 0"):
        CurvePlan(every=0)
    with pytest.raises(ValueError, match="max_share must be above 0 and at most 1, got 0"):
        CurvePlan(max_share=0)
    with pytest.raises(ValueError, match="10 samples are too few to measure layers; pass num_samples of 24 or more"):
        CurvePlan(num_samples=10)
    with pytest.raises(ValueError, match="10 training and 4 validation samples are too few to measure layers; pass 12"):
        curves(tmp_path, splits=classes(20))
