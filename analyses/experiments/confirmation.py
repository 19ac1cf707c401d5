"""Proof by training: the same run with and without the picked pair, seed by seed.

All arms of a seed (see `arms`) share initial weights, data order, noise and noise levels, so their difference is the
pair's doing. What a difference over so many seeds can tell stands in `power`, what is made of it in `verdict`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from layerprobe.analyses.experiments.arms import BASELINE as BASELINE
from layerprobe.analyses.experiments.arms import CONTROL, ConfirmationPlan
from layerprobe.analyses.experiments.arms import FRECHET as FRECHET
from layerprobe.analyses.experiments.arms import Arm as Arm
from layerprobe.analyses.experiments.evaluation import Scorer, ScoresByStep
from layerprobe.analyses.experiments.power import Spread
from layerprobe.analyses.experiments.verdict import Verdict, check_arms, is_clear, judge, judged_arm, spread_of
from layerprobe.analyses.generation import Extractor, classifier_extractor
from layerprobe.backbones import Backbone
from layerprobe.data import Samples, Splits
from layerprobe.files import claim, write_text
from layerprobe.progress import TaskProgress, TrainingProgress
from layerprobe.training import TrainingPlan, train

# Steps whose mean length is measured: enough for AdamW's running means to show how well gradients agree.
MEASURED_STEPS = 50


def confirm_pair(
    start: Callable[[int], Backbone],
    splits: Splits,
    arms: Sequence[Arm],
    plan: ConfirmationPlan,
    folder: str | Path,
    *,
    start_name: str,
    extractor: Extractor | None = None,
    progress: TaskProgress | None = None,
) -> Verdict:
    """Trains every arm with every seed and compares them; interrupted work continues when the call is repeated.

    Arms learn from the training samples. Fréchet distance and held-out loss are measured against the test samples, which
    no arm has seen. A plan that stops early ends after the first look at which the difference is clear.

    Args:
        start: The model to start from, by seed: the same checkpoint for a branch, fresh weights from scratch.
        splits: The data.
        arms: The first is the baseline.
        plan: Seeds, steps, evaluations.
        folder: Gets one training run per arm and seed, `confirmation.csv` and `verdict.json`.
        start_name: "from scratch", or which checkpoint; goes into the verdict.
        extractor: For the Fréchet distance; a small classifier trained on the training samples where not given.
        progress: Called with (what is running, steps done, steps in all) over all arms.

    Raises:
        ValueError: If the arms do not compare, see `check_arms`, or the folder holds another run.
    """
    folder = Path(folder)
    check_arms(arms)
    record = {
        "plan": plan.identity(),
        "start": start_name,
        "data": splits.test.fingerprint,
        "extractor": extractor.name if extractor else None,
    }
    claim(folder, "confirmation.json", record, what="a confirmation")
    extractor = extractor or classifier_extractor(splits.train, folder / "extractor.safetensors")
    scorer = Scorer(splits.test, extractor, num_samples=plan.num_samples, sampling=plan.sampling)
    training = replace(plan.training, checkpoint_every=_checkpoint_every(plan))
    # Each seed starts once, so that its arms start equal even if `start` draws fresh weights at every call.
    first = start(plan.seeds[0])
    arms = [_matched(arm, first, splits.train, plan.training, folder) for arm in arms]
    starts = zip(plan.seeds, chain([first], (start(seed) for seed in plan.seeds[1:])), strict=True)
    runs = ((seed, backbone, arm) for seed, backbone in starts for arm in arms)
    total = len(plan.seeds) * len(arms) * plan.training.steps
    rows: list[dict[str, Any]] = []
    beginnings: dict[int, ScoresByStep] = {}
    for index, (seed, backbone, arm) in enumerate(runs):
        done = index * plan.training.steps

        def report(step: int, _: int, __: float, done: int = done, what: str = f"seed {seed}, {arm.name}") -> None:
            if progress:
                progress(what, done + step, total)

        scores = train_arm(
            backbone,
            splits.train,
            arm,
            replace(training, seed=seed),
            run_folder(folder, arm, seed),
            score=scorer.means,
            score_at=plan.evaluation_steps,
            # The arms of a seed start from the same weights: what the first scored there, all score.
            known=beginnings.get(seed, {}),
            progress=report,
        )
        beginnings[seed] = {0: scores[0]}
        rows += [
            {"arm": arm.name, "seed": seed, "step": step, "metric": metric, "value": value}
            for step, values in scores.items()
            for metric, value in values.items()
        ]
        if plan.stop_early and arm is arms[-1] and is_clear(pd.DataFrame(rows), arms, plan):
            break
    curves = pd.DataFrame(rows, columns=["arm", "seed", "step", "metric", "value"])
    verdict = judge(
        curves,
        arms,
        plan,
        extractor_name=extractor.name,
        start_name=start_name,
        looked=earlier_looks(folder, judged_arm(arms).name),
    )
    write_text(folder / "confirmation.csv", curves.to_csv(index=False))
    write_text(folder / "verdict.json", verdict.to_json())
    return verdict


def earlier_looks(folder: Path, judged: str) -> dict[int, float]:
    """Looks of the verdict in a folder, {number of seeds: level}, if that was on this arm; {} without one.

    Raises:
        ValueError: If the verdict cannot be read.
    """
    place = folder / "verdict.json"
    if not place.is_file():
        return {}
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
        looks = {int(n): float(level) for n, level in found["looks"].items()}
        return looks if found["judged"] == judged else {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{place} is damaged ({error}); delete it") from error


def kept_spread(folder: Path, source: str) -> Spread | None:
    """The spread over seeds of what finished arms in a folder differ from no alignment by; None before two seeds.

    Args:
        folder: Of a confirmation or of an atlas.
        source: What it is, as "this confirmation".
    """
    runs: dict[str, dict[str, dict[int, float]]] = {}
    for place in folder.glob("seed-*/*.json"):
        scores = json.loads(place.read_text(encoding="utf-8"))
        by_step = {int(step): values[FRECHET] for step, values in scores.items()}
        runs.setdefault(place.stem, {})[place.parent.name] = by_step
    last = max((step for seeds in runs.values() for by_step in seeds.values() for step in by_step), default=0)
    ends = {
        arm: {seed: by_step[last] for seed, by_step in seeds.items() if last in by_step} for arm, seeds in runs.items()
    }
    baseline = ends.pop(_stem(BASELINE), {})
    ends.pop(_stem(CONTROL), None)
    differences = [
        [end[seed] - baseline[seed] for seed in baseline] for end in ends.values() if end.keys() >= baseline.keys()
    ]
    if len(baseline) < 2 or not differences:
        return None
    told = f"{len(baseline)} seeds of {source}, after {last} steps"
    return spread_of(np.array(differences), [*baseline.values()], told)


def _stem(name: str) -> str:
    return name.replace(" ", "-")


def run_folder(folder: Path, arm: Arm, seed: int) -> Path:
    """Where a seed of an arm is trained; its scores lie beside it, under the same name with .json."""
    return folder / f"seed-{seed}" / _stem(arm.name)


def _matched(arm: Arm, backbone: Backbone, samples: Samples, training: TrainingPlan, folder: Path) -> Arm:
    """An arm that matches a pair's steps, with the learning rate that does it, measured once and kept."""
    if arm.matched is None:
        return arm
    place, pair = folder / "learning-rate.json", [arm.matched.student, arm.matched.teacher]
    kept = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
    if kept.get("pair") != pair:
        aligned, plain = (
            step_length(backbone, samples, replace(training, pairs=pairs)) for pairs in ((arm.matched,), ())
        )
        kept = {
            "pair": pair,
            "steps": min(MEASURED_STEPS, training.steps),
            "mean_step_aligned": aligned,
            "mean_step": plain,
            "learning_rate": training.learning_rate * aligned / plain,
        }
        write_text(place, json.dumps(kept, indent=1))
    return replace(arm, learning_rate=kept["learning_rate"])


def step_length(backbone: Backbone, samples: Samples, training: TrainingPlan) -> float:
    """How far an optimizer step moves the weights, the Euclidean norm, in the mean of a training's first steps."""
    steps = min(MEASURED_STEPS, training.steps)
    before: list[Tensor] = []
    lengths: list[float] = []

    def observe(_: int, model: Backbone) -> None:
        weights = [p.detach().clone() for p in model.module.parameters()]
        if before:
            moves = [float((now - then).double().square().sum()) for now, then in zip(weights, before, strict=True)]
            lengths.append(sum(moves) ** 0.5)
        before[:] = weights

    # An average that forgets at once is the weights themselves.
    short = replace(training, steps=steps, ema_decay=0.0, more_ema_decays=())
    with tempfile.TemporaryDirectory() as folder:
        train(backbone, samples, short, Path(folder) / "steps", observe=observe, observe_at=range(steps + 1))
    return float(np.mean(lengths))


def train_arm(
    backbone: Backbone,
    samples: Samples,
    arm: Arm,
    training: TrainingPlan,
    folder: Path,
    *,
    score: Callable[[Backbone], dict[str, float]],
    score_at: Sequence[int],
    known: ScoresByStep | None = None,
    progress: TrainingProgress | None = None,
) -> ScoresByStep:
    """Trains one seed of an arm and scores it on the way; what is done already is not done again.

    Args:
        backbone: Where it starts.
        samples: What it learns from.
        arm: Its pair replaces those of the plan, and its learning rate, where it has one, that of the plan.
        training: How; the same for all arms that are to be compared.
        folder: Gets the training; the scores lie beside it.
        score: Metrics of an averaged model.
        score_at: Steps to score.
        known: Scores that need no repeating.
        progress: As in `train`.

    Raises:
        ValueError: As `train`, or if a score of a finished training is lost.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = folder.with_name(f"{folder.name}.json")
    evaluations = _Evaluations(place, score)
    evaluations.scores |= known or {}
    rate = arm.learning_rate or training.learning_rate
    plan = replace(training, pairs=(arm.pair,) if arm.pair else (), learning_rate=rate)
    train(backbone, samples, plan, folder, observe=evaluations.observe, observe_at=score_at, progress=progress)
    missing = [step for step in score_at if step not in evaluations.scores]
    if missing:
        raise ValueError(f"{place} lacks step {missing[0]} of a finished run; delete {folder} to repeat that run")
    return evaluations.scores


def _checkpoint_every(plan: ConfirmationPlan) -> int:
    """At least as often as evaluations, so that a short arm has checkpoints too."""
    return min(plan.training.checkpoint_every, max(1, plan.training.steps // plan.num_evaluations))


class _Evaluations:
    """What one arm scored, kept in a file as it goes."""

    def __init__(self, path: Path, score: Callable[[Backbone], dict[str, float]]) -> None:
        self._path, self._score = path, score
        kept = json.loads(path.read_text()) if path.is_file() else {}
        self.scores: ScoresByStep = {int(step): values for step, values in kept.items()}

    def observe(self, step: int, model: Backbone) -> None:
        if step not in self.scores:
            self.scores[step] = self._score(model)
            write_text(self._path, json.dumps(self.scores))
