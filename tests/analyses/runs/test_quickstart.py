"""The recorded trial is what its curves say, stands in every quickstart, and is called recorded."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from layerprobe.analyses.experiments import (
    BASELINE,
    Arm,
    ConfirmationPlan,
    RecordedTrial,
    judge,
)
from layerprobe.analyses.runs.quickstart import RECORDED
from layerprobe.analyses.wording import beside_recorded_sentence, recorded_paragraph, verdict_paragraph
from layerprobe.layersync import LayerPair
from layerprobe.training import TrainingPlan


def test_the_verdict_of_the_recorded_trial_follows_from_its_curves() -> None:
    trial = RecordedTrial.read(RECORDED)
    arms = [
        Arm(arm.name, LayerPair(arm.student, arm.teacher) if arm.student and arm.teacher else None)
        for arm in trial.verdict.arms
    ]
    seeds = tuple(int(seed) for seed in trial.curves["seed"].unique())
    training = TrainingPlan(steps=trial.verdict.steps, weight=trial.verdict.arms[1].weight)
    plan = ConfirmationPlan(training, seeds, trial.curves["step"].nunique() - 1)
    again = judge(trial.curves, arms, plan, extractor_name=trial.verdict.extractor, start_name=trial.verdict.start)
    assert arms[0].name == BASELINE
    assert (again.answer, again.cautions) == (trial.verdict.answer, trial.verdict.cautions)
    for before, now in zip(trial.verdict.arms, again.arms, strict=True):
        assert now.final == pytest.approx(before.final)
        assert (now.difference, now.low, now.high) == (
            pytest.approx(before.difference),
            pytest.approx(before.low),
            pytest.approx(before.high),
        )


def test_the_files_of_the_recorded_trial_have_their_checksums() -> None:
    sums = json.loads((RECORDED / "checksums.json").read_text(encoding="utf-8"))["files"]
    files = [path for path in RECORDED.iterdir() if path.name != "checksums.json"]
    assert {path.name: [hashlib.sha256(path.read_bytes()).hexdigest()] for path in files} == sums


def test_a_recorded_trial_is_called_recorded_and_names_what_remakes_it() -> None:
    trial = RecordedTrial.read(RECORDED)
    text = recorded_paragraph(trial, None)
    assert text.startswith("This trial was recorded")
    assert verdict_paragraph(trial.verdict) in text
    assert all(f"`{command}`" in text for command in trial.commands)
    options = trial.commands[-1].split()
    said = {name: float(options[options.index(f"--{name}") + 1]) for name in ("steps", "num-seeds", "weight")}
    verdict = trial.verdict
    assert said == {"steps": verdict.steps, "num-seeds": verdict.num_seeds, "weight": verdict.arms[1].weight}


def test_a_trial_beside_the_recorded_one_tells_how_they_differ_and_how_that_one_began() -> None:
    recorded = RecordedTrial.read(RECORDED)
    strong = replace(recorded.verdict.arms[1], weight=0.3)
    short = replace(recorded.verdict, steps=200, arms=[recorded.verdict.arms[0], strong])
    assert beside_recorded_sentence(short, recorded) == (
        "This trial has weight 0.3 and 200 steps, the recorded one weight 0.03 and 4000 steps. That one stood at 2.7 "
        "against 2.44 at step 1000 and ended at 0.162 against 0.165, so the start of a trial does not tell its end."
    )


@pytest.mark.parametrize("missing", ["confirmation.csv", "verdict.json", "recorded.json"])
def test_half_a_recorded_trial_is_refused_in_one_line(tmp_path: Path, missing: str) -> None:
    shutil.copytree(RECORDED, tmp_path / "recorded")
    (tmp_path / "recorded" / missing).unlink()
    with pytest.raises(ValueError, match=r"holds no whole recorded trial .*; delete the folder"):
        RecordedTrial.read(tmp_path / "recorded")
