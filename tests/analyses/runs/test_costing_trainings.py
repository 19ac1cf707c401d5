"""The forecast of trainings is that of their steps, evaluations and files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import tiny_sit, tiny_splits

from layerprobe.analyses.experiments import EXTRACTOR, SCORING, TRAINING, Arm, ConfirmationPlan, PairSweepPlan
from layerprobe.analyses.experiments.arms import BASELINE, LEARNING_RATE, PICK
from layerprobe.analyses.runs import costing_trainings as costing
from layerprobe.analyses.runs.layer_curves import CurvePlan
from layerprobe.analyses.runs.stages import CHOICES, CURVES, ENCODING, FIGURES, HELD_OUT
from layerprobe.analyses.selection import AutoPick
from layerprobe.layersync import LayerPair, SyncOptions
from layerprobe.sampling import SamplingPlan
from layerprobe.training import TrainingPlan

PAIR = LayerPair("blocks.0", "blocks.2")
PLAN = ConfirmationPlan(TrainingPlan(steps=100, batch_size=5), (0, 1), 4, 50, SamplingPlan("heun", 3))
ARMS = (Arm(BASELINE, None), Arm(PICK, PAIR))
SPLITS = tiny_splits(60)


def test_every_piece_is_timed() -> None:
    """Nothing is replaced here."""
    plan = PairSweepPlan(TrainingPlan(steps=20, batch_size=4), num_samples=4, sampling=SamplingPlan("heun", 2))
    branches = costing.sweep_cost(tiny_sit(), SPLITS, (PAIR,), plan, branches=2)
    assert [*branches.seconds] == [EXTRACTOR, TRAINING, SCORING, FIGURES]
    assert all(0 < seconds < 60 for seconds in branches.seconds.values())


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[TrainingPlan]:
    """A plain step of 1 s, an aligned one of 3 s, one with a gap of 4 s; an evaluation of 7 s, an extractor of 20 s."""
    plans: list[TrainingPlan] = []

    def step_seconds(backbone: object, samples: object, plan: TrainingPlan) -> float:
        plans.append(plan)
        return (3.0 + bool(plan.sync.noise_gap)) if plan.pairs else 1.0

    pieces = {
        "step_seconds": step_seconds,
        "byte_seconds": lambda: 0.0,
        "_score_seconds": lambda *_: 7.0,
        "extractor_seconds": lambda splits: (None, 20.0),
        "held_out_seconds": lambda backbone, samples: float(len(samples)),
        "figure_seconds": lambda cells: cells / 10,
        "picture_seconds": lambda: 1.0,
        "encoding_seconds": lambda splits, vae: 60.0 if vae else 0.0,
        "_probe_error_seconds": lambda *_: 5.0,
    }
    for name, piece in pieces.items():
        monkeypatch.setattr(costing, name, piece)
    return plans


def seconds(arms: tuple[Arm, ...] = ARMS, plan: ConfirmationPlan = PLAN, **options: object) -> dict[str, float]:
    return costing.confirmation_cost(tiny_sit(), SPLITS, arms, plan, **options).seconds


def test_arms_and_evaluations_are_counted(timed: list[TrainingPlan]) -> None:
    evaluations = 2 * (2 * 4 + 1) * 7  # The start is scored once for all arms of a seed.
    expected = {EXTRACTOR: 20, TRAINING: 2 * 100 * (1 + 3), SCORING: evaluations, FIGURES: 0.6}
    assert seconds(cells=6) == pytest.approx(expected)
    assert len(timed) == 2  # arms that align alike are timed once
    with_gap = seconds((*ARMS, replace(ARMS[1], name="SRA", options={"noise_gap": 0.2}), replace(ARMS[1], name="b")))
    assert with_gap[TRAINING] == 2 * 100 * (1 + 3 + 4 + 3)
    # Aligned for a part of the steps only.
    stopped = replace(PLAN, training=replace(PLAN.training, sync=SyncOptions(stop_step=25)))
    assert seconds(plan=stopped)[TRAINING] == 2 * (100 + 25 * 3 + 75)
    # The steps by which a learning rate is measured, plain and aligned.
    matched = seconds((*ARMS, Arm(LEARNING_RATE, None, matched=PAIR)))
    assert matched[TRAINING] == 2 * 100 * (1 + 3 + 1) + 50 * (1 + 3)


@pytest.mark.usefixtures("timed")
def test_whole_arms_go_to_one_process_each() -> None:
    """Two processes train two arms of two seeds in half the time; of three, one trains two."""
    training = [seconds(processes=num)[TRAINING] for num in (1, 2, 3, 4)]
    assert training == [800, 400, 400, 200]
    early = replace(PLAN, seeds=(0, 1, 2, 3), stop_early=True)
    assert [seconds(plan=early, processes=num)[TRAINING] for num in (1, 2, 4)] == [1600, 800, 800]
    assert seconds(vae="vae", processes=2)[ENCODING] == 30


@pytest.mark.usefixtures("timed")
def test_files_of_a_training_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costing, "byte_seconds", lambda: 1.0)
    backbone = tiny_sit()
    weights = 4 * sum(p.numel() for p in backbone.module.parameters())
    plan = TrainingPlan(steps=10, checkpoint_every=4, keep_last=2, more_ema_decays=(0.9,))
    cost = costing.training_cost(backbone, SPLITS, plan)
    # Three checkpoints of weights, two moments and two averages, of which two are kept, and two models.
    assert cost.seconds[TRAINING] == 10 + (3 * 5 + 2) * weights
    assert cost.disk_bytes == (2 * 5 + 2) * weights


def test_a_training_is_that_of_a_processs_share_of_the_batch(timed: list[TrainingPlan]) -> None:
    plan = TrainingPlan(steps=100, batch_size=16, accumulate=2, pairs=(PAIR,))
    cost = costing.training_cost(tiny_sit(), SPLITS, plan, processes=2)
    assert cost.seconds == {TRAINING: 300, HELD_OUT: 11 * len(SPLITS.validation), FIGURES: 1}
    assert (timed[0].batch_size, timed[0].accumulate) == (8, 2)
    # What decides quickly whether a forecast is worth its time.
    assert costing.rough_seconds(tiny_sit(), SPLITS, plan, "vae") == 60 + 300


def test_of_a_training_that_was_begun_the_steps_that_are_left_count(tmp_path: Path, timed: list[TrainingPlan]) -> None:
    """From its newest checkpoint on; of 100 steps, the first 70 are aligned."""
    plan = TrainingPlan(100, batch_size=4, pairs=(PAIR,), sync=SyncOptions(warmup_steps=65, stop_step=70))
    (tmp_path / "checkpoints").mkdir()
    for step, seconds in ((None, 70 * 3 + 30), (60, 10 * 3 + 30), (80, 20), (100, 0), (120, 0)):
        if step is not None:
            (tmp_path / "checkpoints" / f"step-{step:07d}.pt").touch()
        left = costing.plan_left(plan, tmp_path)
        assert costing.training_cost(tiny_sit(), SPLITS, left).seconds[TRAINING] == seconds
    auto = AutoPick(SPLITS.train, str(tmp_path), warmup_steps=40)
    done = costing.training_cost(tiny_sit(), SPLITS, costing.plan_left(replace(plan, pairs=()), tmp_path), auto=auto)
    assert done.seconds[TRAINING] == 0
    assert costing.plan_left(replace(plan, sync=SyncOptions()), tmp_path / "new").steps == 100


@pytest.mark.usefixtures("timed")
def test_choices_and_measured_layers_are_counted(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costing, "seconds_of", lambda call: 10.0)
    auto = AutoPick(SPLITS.train, str(tmp_path), warmup_steps=40, every=20)
    plan = TrainingPlan(steps=100, batch_size=4)
    monkeypatch.setattr(costing, "prior_pair", lambda layers: PAIR)
    cost = costing.training_cost(tiny_sit(), SPLITS, plan, auto=auto)
    assert cost.seconds[TRAINING] == 40 * 1 + 60 * 3
    assert cost.seconds[CHOICES] == 3 * 10
    monkeypatch.setattr(costing, "LayerCurves", lambda *_, **__: type("L", (), {"measure": print}))
    for share, measured in ((1.0, 11), (0.3, 1 + ((100 + 11 * 15) * 0.3 - 10) / 10), (0.02, 2)):
        curves = CurvePlan(every=10, max_share=share)
        cost = costing.training_cost(tiny_sit(), SPLITS, plan, curves=curves)
        assert cost.seconds[CURVES] == pytest.approx(10 * measured)


@pytest.mark.usefixtures("timed")
def test_branches_go_to_one_process_each() -> None:
    pairs = (PAIR, LayerPair("blocks.1", "blocks.2"))
    plan = PairSweepPlan(TrainingPlan(steps=110, batch_size=5), first_step=10, num_evaluations=2)
    branch, score = (100 + 2 * 300) / 3, 2 * (7 + 5)
    for branches, processes, mine in ((3, 1, 3), (3, 2, 2), (2, 4, 1)):
        cost = costing.sweep_cost(tiny_sit(), SPLITS, pairs, plan, branches=branches, processes=processes)
        expected = {EXTRACTOR: 20, TRAINING: mine * branch, SCORING: mine * score, FIGURES: 1}
        assert cost.seconds == pytest.approx(expected)
