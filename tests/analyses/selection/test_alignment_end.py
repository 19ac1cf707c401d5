"""The end of an alignment: on planted cosines at the step that the rule says, also after an interruption."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_samples, tiny_sit

from layerprobe.analyses.runs.text import describe_decisions
from layerprobe.analyses.selection.alignment_end import AutoStop, on_plateau
from layerprobe.backbones import Backbone
from layerprobe.extraction import ExtractionPlan, read_features
from layerprobe.layersync import LayerPair
from layerprobe.training import TrainingPlan, train

PAIR = LayerPair("blocks.0", "blocks.2")
SAMPLES = tiny_samples(40)
COSINES = (0.2, 0.5, 0.6, 0.603, 0.604, 0.6, 0.9)
PLAN = TrainingPlan(steps=7, batch_size=8, pairs=(PAIR,), checkpoint_every=5, log_every=1, learning_rate=1e-3)


@pytest.mark.parametrize(
    ("values", "ended"),
    [
        ((0.2, 0.5, 0.6, 0.603, 0.604), False),  # two gains are too small, the third is not yet known
        ((0.2, 0.5, 0.6, 0.603, 0.604, 0.6), True),
        ((0.6, 0.5, 0.4, 0.3), True),
        ((0.6, 0.6, 0.6), False),
        ((0.2, 0.3, 0.4, 0.5, 0.6), False),
        ((0.6, 0.601, 0.602, 0.605), False),
    ],
)
def test_a_plateau_is_where_nothing_is_gained(values: tuple[float, ...], ended: bool) -> None:
    assert on_plateau(values) is ended


def test_the_alignment_ends_at_the_same_step_after_an_interruption(tmp_path: Path, monkeypatch: Any) -> None:
    def measure(self: AutoStop, model: Backbone) -> dict[str, float]:
        rows = Path(self.folder) / "decisions.jsonl"
        return {str(PAIR): COSINES[len(rows.read_text().splitlines()) if rows.is_file() else 0]}

    monkeypatch.setattr(AutoStop, "measure", measure)

    def trained(folder: Path, *steps: int) -> Backbone:
        for end in steps:
            rule = AutoStop((PAIR,), SAMPLES, folder, every=1)
            plan = replace(PLAN, steps=end)
            model = train(tiny_sit(), SAMPLES, plan, folder, direct=rule.direct, direct_at=rule.direct_at(7))
        return model

    whole, resumed = trained(tmp_path / "whole", 7), trained(tmp_path / "parts", 4, 7)
    for one, other in zip(whole.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(one, other)
    rows = [json.loads(line) for line in (tmp_path / "parts" / "decisions.jsonl").read_text().splitlines()]
    assert [(row["step"], row["record"]["decision"]) for row in rows[-2:]] == [(4, "aligned"), (5, "ended")]
    assert rows[-1]["pairs"] == []
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if f"cosine {PAIR}" in row] == list(range(1, 6))
    told = describe_decisions(tmp_path / "whole")
    assert told[0] == "step 0: The alignment goes on: blocks.0 <- blocks.2 at a cosine of 0.200."
    assert told[-1] == (
        "step 5: The alignment has ended: no cosine has risen by 0.005 over the last 3 measurements "
        "(blocks.0 <- blocks.2 0.600, 0.603, 0.604, 0.600)."
    )


def test_the_cosine_is_that_of_the_tokens(tmp_path: Path) -> None:
    backbone = tiny_sit()
    rule = AutoStop((PAIR,), SAMPLES, tmp_path, noise_levels=(0.2,), num_samples=40)
    (cosine,) = rule.measure(backbone).values()
    assert rule.measure(backbone) == {str(PAIR): cosine}
    plan = ExtractionPlan(("blocks.0", "blocks.2"), (0.2,))
    student, teacher = read_features(backbone, SAMPLES, plan, per_token=True).values()
    assert cosine == pytest.approx(float(torch.cosine_similarity(student, teacher, dim=-1).mean()), abs=1e-4)
    assert not list(tmp_path.iterdir())


def test_rules_that_cannot_decide(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no alignment to end; pass the pairs that are aligned"):
        AutoStop((), SAMPLES, tmp_path)
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        AutoStop((PAIR,), SAMPLES, tmp_path, patience=0)
