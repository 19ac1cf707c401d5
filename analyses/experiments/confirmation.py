"""Confirmation of a pair: the same training with and without it, seed by seed.

All arms of a seed (see `arms`) share initial weights, data order, noise and noise levels, so a difference between them
is the effect of the pair. `power` says which difference a number of seeds can find, `verdict` judges the difference.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TypedDict

import numpy as np
import pandas as pd
from torch import Tensor

from layerprobe.analyses.experiments.arms import BASELINE, FRECHET, NEGATIVE_CONTROL, Arm, ConfirmationPlan
from layerprobe.analyses.experiments.branching import BRANCHED, BranchCourse, branch_course
from layerprobe.analyses.experiments.evaluation import Scorer, ScoresByStep
from layerprobe.analyses.experiments.power import Spread, SpreadSource
from layerprobe.analyses.experiments.verdict import Verdict, check_arms, is_clear, judge, judged_arm, spread_of
from layerprobe.analyses.generation import Extractor, classifier_extractor
from layerprobe.analyses.tables import read_table, write_table
from layerprobe.backbones import Backbone
from layerprobe.checkpoints import weights_hash
from layerprobe.checksums import CHECKSUMS, write_recorded_text
from layerprobe.data import Samples, Splits
from layerprobe.progress import TaskProgress, TrainingProgress
from layerprobe.ranks import Ranks, alone, current, together
from layerprobe.records import claim, read_record, typed, write_record
from layerprobe.training import TrainingPlan, train

# Steps over which the mean step length is measured: AdamW's moving averages need them to reflect how well the gradients
# of successive steps agree.
MEASURED_STEPS = 50
CONFIRMATION_COLUMNS = ("arm", "seed", "step", "metric", "value")
# The stages of a confirmation and of a pair sweep.
EXTRACTOR, TRAINING, SCORING = "extractor", "training", "scoring"


class _LearningRate(TypedDict):
    pair: list[str]
    steps: int
    mean_step_aligned: float
    mean_step: float
    learning_rate: float


@together("folder")
def confirm_pair(
    start: Callable[[int], Backbone],
    splits: Splits,
    arms: Sequence[Arm],
    plan: ConfirmationPlan,
    folder: str | Path,
    *,
    start_name: str,
    trained_steps: int | None = None,
    extractor: Extractor | None = None,
    on_converged: Callable[[BranchCourse], None] | None = None,
    begin: Callable[[str], None] = lambda stage: None,
    progress: TaskProgress | None = None,
) -> Verdict:
    """Trains every arm with every seed and compares them; interrupted work continues when the call is repeated.

    The arms are trained on the training split. Fréchet distance and held-out loss are measured against the test split,
    which no arm has seen. A plan that stops early ends after the first look at which the difference is clear.

    The processes of torchrun or srun share the arms of all seeds, and each trains its own; of a plan that stops early,
    the arms of a seed. All call this function and get the verdict.

    Args:
        start: Function from a seed to the initial model: the same checkpoint for a branch, fresh weights from scratch.
            It must return the same weights in every process.
        splits: Data of the training and the evaluation.
        arms: Arms of the confirmation, the baseline first.
        plan: Seeds, steps and evaluations.
        folder: Folder for one training run per arm and seed, `confirmation.csv` and `verdict.json`.
        start_name: Where the arms start, "from scratch" or "from the checkpoint".
        trained_steps: Steps of training that they start after: 0 from scratch; None where they are not recorded.
        extractor: Extractor of the Fréchet distance; by default a small classifier trained on the training split.
        on_converged: Called if the first baseline that branches from a checkpoint no longer improves, before this
            process trains an aligned arm.
        begin: Called with the name of each stage that begins, once the folder belongs to this confirmation.
        progress: Callback with (name of the running arm, steps done, total steps), over all arms of this process.

    Raises:
        ValueError: If the arms cannot be compared, see `check_arms`, the folder belongs to another run, or processes
            start from different weights.
    """
    folder, ranks = Path(folder), current()
    check_arms(arms)
    record = {
        "plan": plan.identity(),
        "start": start_name,
        "data": splits.test.fingerprint,
        "extractor": extractor.name if extractor else None,
    }
    if ranks.is_first:
        claim(folder, "confirmation.json", record, what="a confirmation")
    ranks.barrier()
    begin(EXTRACTOR)
    extractor = extractor or ranks.first_alone(
        lambda: classifier_extractor(splits.train, folder / "extractor.safetensors")
    )
    scorer = Scorer(splits.test, extractor, num_samples=plan.num_samples, sampling=plan.sampling)
    score = staged(scorer.means, begin)
    starts = _Starts(start)
    _check_equal(starts(plan.seeds[0]), ranks)
    with alone():
        # The learning rates are measured by training.
        arms = ranks.once(
            lambda: [_matched(arm, starts(plan.seeds[0]), splits.train, plan.training, folder) for arm in arms]
        )
    on_converged = on_converged if start_name == BRANCHED else None
    curves = _train_arms(starts, splits.train, arms, plan, folder, score, ranks, on_converged, progress)

    def conclude() -> Verdict:
        verdict = judge(
            curves,
            arms,
            plan,
            extractor_name=extractor.name,
            start_name=start_name,
            looked=earlier_looks(folder, judged_arm(arms).name),
            trained_steps=trained_steps,
        )
        write_table(curves, folder / "confirmation.csv")
        write_recorded_text(folder / "verdict.json", verdict.to_json(), durable=True)
        return verdict

    return ranks.once(conclude)


def staged(
    score: Callable[[Backbone], dict[str, float]], begin: Callable[[str], None]
) -> Callable[[Backbone], dict[str, float]]:
    """Begins the stage of training, and returns a function that scores in a stage of its own within it.

    Args:
        score: Function from a model to its metrics.
        begin: Called with the name of each stage that begins.
    """

    def scored(model: Backbone) -> dict[str, float]:
        begin(SCORING)
        scores = score(model)
        begin(TRAINING)
        return scores

    begin(TRAINING)
    return scored


class _Starts:
    """The initial models. Each seed starts once, so that its arms are equal even if `start` draws weights each time."""

    def __init__(self, start: Callable[[int], Backbone]) -> None:
        self._start = start
        self._last: tuple[int, Backbone] | None = None

    def __call__(self, seed: int) -> Backbone:
        if self._last is None or self._last[0] != seed:
            self._last = seed, self._start(seed)
        return self._last[1]


def _check_equal(start: Backbone, ranks: Ranks) -> None:
    """Refuses arms that start from different weights in different processes."""
    if ranks.world_size > 1 and len({*ranks.whole([weights_hash(start.module)])}) > 1:
        raise ValueError(
            "the processes start from different weights, so their arms cannot be compared; give all processes the same "
            "checkpoint, or draw fresh weights with the seed"
        )


def _train_arms(
    starts: Callable[[int], Backbone],
    samples: Samples,
    arms: Sequence[Arm],
    plan: ConfirmationPlan,
    folder: Path,
    score: Callable[[Backbone], dict[str, float]],
    ranks: Ranks,
    on_converged: Callable[[BranchCourse], None] | None,
    progress: TaskProgress | None,
) -> pd.DataFrame:
    """Trains the arms seed by seed, up to an early stop; returns a table of scores with `CONFIRMATION_COLUMNS`."""
    training = replace(plan.training, checkpoint_every=checkpoint_every(plan))
    runs = [(seed, arm) for seed in plan.seeds for arm in arms]
    # A plan that stops early looks at the curves after every seed.
    size = len(arms) if plan.stop_early else len(runs)
    groups = [runs[begin : begin + size] for begin in range(0, len(runs), size)]
    total = training.steps * sum(len(ranks.mine(group)) for group in groups)
    initial_scores: dict[int, ScoresByStep] = {}
    done = 0

    def curve(seed: int, arm: Arm) -> list[tuple[str, int, int, str, float]]:
        nonlocal done

        def report(step: int, _: int, __: float, done: int = done, what: str = f"seed {seed}, {arm.name}") -> None:
            if progress:
                progress(what, done + step, total)

        scores = train_arm(
            starts(seed),
            samples,
            arm,
            replace(training, seed=seed),
            run_folder(folder, arm, seed),
            score=score,
            score_at=plan.evaluation_steps,
            # The arms of a seed start from the same weights, so the scores at step 0 are computed once.
            known=initial_scores.get(seed, {}),
            progress=report,
        )
        initial_scores[seed] = {0: scores[0]}
        done += training.steps
        rows = [
            (arm.name, seed, step, metric, value) for step, values in scores.items() for metric, value in values.items()
        ]
        if on_converged and (seed, arm) == runs[0] and (course := branch_course(_table(rows))).looks_converged:
            on_converged(course)
        return rows

    rows: list[tuple[str, int, int, str, float]] = []
    for group in groups:
        mine = []
        for seed, arm in ranks.mine(group):
            ranks.check()
            mine.append(curve(seed, arm))
        rows += chain.from_iterable(ranks.whole(mine))
        if plan.stop_early and is_clear(_table(rows), arms, plan):
            break
    return _table(rows)


def _table(rows: Sequence[tuple[str, int, int, str, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(CONFIRMATION_COLUMNS))


def read_curves(path: Path) -> pd.DataFrame:
    """Reads the curves of a confirmation, with the columns `CONFIRMATION_COLUMNS`.

    Raises:
        FileNotFoundError: If there is no such file.
        Damaged: If the file is damaged.
    """
    remedy = "repeat the `layerprobe confirm` that made it, which trains nothing again"
    return read_table(path, CONFIRMATION_COLUMNS, ("seed", "step", "value"), remedy=remedy)


def earlier_looks(folder: Path, judged: str) -> dict[int, float]:
    """Returns the looks of the verdict in a folder, {number of seeds: level}.

    Returns {} if the folder has no verdict, or a verdict on another arm.

    Args:
        folder: Folder of a confirmation.
        judged: Name of the judged arm.

    Raises:
        ValueError: If the verdict cannot be read.
    """
    path = folder / "verdict.json"
    if not path.is_file():
        return {}
    remedy = "delete it, and the next verdict counts no look before its own"
    verdict = read_record(path, Verdict.from_dict, remedy=remedy)
    return verdict.looks if verdict.judged == judged else {}


def kept_spread(folder: Path, source: SpreadSource) -> Spread | None:
    """Returns the spread over seeds of the finished arms in a folder; None before two seeds are finished.

    The negative control does not count.

    Args:
        folder: Folder of a confirmation or of a pair sweep.
        source: What the folder is to the planned confirmation.
    """
    runs: dict[str, dict[str, dict[int, float]]] = {}
    for path in folder.glob("seed-*/*.json"):
        if path.name == CHECKSUMS:
            continue
        by_step = {step: values[FRECHET] for step, values in read_scores(path).items() if FRECHET in values}
        runs.setdefault(path.stem, {})[path.parent.name] = by_step
    last = max((step for seeds in runs.values() for by_step in seeds.values() for step in by_step), default=0)
    finals = {
        arm: {seed: by_step[last] for seed, by_step in seeds.items() if last in by_step} for arm, seeds in runs.items()
    }
    baseline = finals.pop(_stem(BASELINE), {})
    finals.pop(_stem(NEGATIVE_CONTROL), None)
    differences = [
        [final[seed] - baseline[seed] for seed in baseline]
        for final in finals.values()
        if final.keys() >= baseline.keys()
    ]
    if len(baseline) < 2 or not differences:
        return None
    return spread_of(np.array(differences), [*baseline.values()], source, steps=last)


def read_scores(path: Path) -> ScoresByStep:
    """Reads the scores of an arm or branch by step; {} before the first.

    Raises:
        Damaged: If the file is damaged.
    """
    if not path.is_file():
        return {}
    remedy = f"delete it and {path.with_suffix('')}, and that training is repeated"
    scores: ScoresByStep = read_record(path, typed(dict[int, dict[str, float]]), remedy=remedy)
    return scores


def _stem(name: str) -> str:
    return name.replace(" ", "-")


def run_folder(folder: Path, arm: Arm, seed: int) -> Path:
    """Returns where a seed of an arm is trained; its scores lie beside it, under the same name with .json."""
    return folder / f"seed-{seed}" / _stem(arm.name)


def _matched(arm: Arm, backbone: Backbone, samples: Samples, training: TrainingPlan, folder: Path) -> Arm:
    """An arm that matches a pair's step length, with its learning rate, which is measured once and kept in a file."""
    if arm.matched is None:
        return arm
    path, pair = folder / "learning-rate.json", [arm.matched.student, arm.matched.teacher]
    remedy = "delete it, and the learning rate is measured again"
    record = read_record(path, typed(_LearningRate), remedy=remedy) if path.is_file() else None
    if record is None or record["pair"] != pair:
        aligned = step_length(backbone, samples, replace(training, pairs=(arm.matched,)))
        plain = step_length(backbone, samples, replace(training, pairs=()))
        record = {
            "pair": pair,
            "steps": min(MEASURED_STEPS, training.steps),
            "mean_step_aligned": aligned,
            "mean_step": plain,
            "learning_rate": training.learning_rate * aligned / plain,
        }
        write_record(path, record)
    return replace(arm, learning_rate=record["learning_rate"])


def step_length(backbone: Backbone, samples: Samples, training: TrainingPlan) -> float:
    """Returns the mean Euclidean length of the first optimizer steps of a training.

    Args:
        backbone: Initial model; it is not changed.
        samples: Training samples.
        training: Training plan, of which at most `MEASURED_STEPS` steps are done.
    """
    steps = min(MEASURED_STEPS, training.steps)
    before: list[Tensor] = []
    lengths: list[float] = []

    def observe(_: int, model: Backbone) -> None:
        weights = [p.detach().clone() for p in model.module.parameters()]
        if before:
            squares = [float((now - then).double().square().sum()) for now, then in zip(weights, before, strict=True)]
            lengths.append(sum(squares) ** 0.5)
        before[:] = weights

    # The observed model is the average, which equals the weights at a decay of 0.
    plan = replace(training, steps=steps, ema_decay=0.0, more_ema_decays=())
    with tempfile.TemporaryDirectory() as folder:
        train(backbone, samples, plan, Path(folder) / "steps", observe=observe, observe_at=range(steps + 1))
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
    """Trains one seed of an arm in this process alone, and scores it on the way; finished work is not repeated.

    Args:
        backbone: Initial model.
        samples: Training samples.
        arm: The arm; its pair, learning rate and options take the place of those of the plan.
        training: Training plan, the same for all arms that are compared.
        folder: Folder of the training; the scores lie beside it.
        score: Function from an averaged model to its metrics.
        score_at: Steps at which the model is scored.
        known: Scores by step that need not be computed.
        progress: Callback as in `train`.

    Raises:
        ValueError: As `train`, or if a score of a finished training is missing.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}.json")
    evaluations = _Evaluations(path, score)
    evaluations.scores |= known or {}
    with alone():
        train(
            backbone,
            samples,
            arm.training(training),
            folder,
            observe=evaluations.observe,
            observe_at=score_at,
            progress=progress,
        )
    missing = [step for step in score_at if step not in evaluations.scores]
    if missing:
        raise ValueError(f"{path} lacks step {missing[0]} of a finished run; delete {folder} to repeat that run")
    return evaluations.scores


def checkpoint_every(plan: ConfirmationPlan) -> int:
    """Returns the steps between checkpoints: at least as often as evaluations, so that a short arm has some too."""
    return min(plan.training.checkpoint_every, max(1, plan.training.steps // plan.num_evaluations))


class _Evaluations:
    """Scores of one arm by step, written to a file after each evaluation."""

    def __init__(self, path: Path, score: Callable[[Backbone], dict[str, float]]) -> None:
        self._path, self._score = path, score
        self.scores: ScoresByStep = read_scores(path)

    def observe(self, step: int, model: Backbone) -> None:
        if step not in self.scores:
            self.scores[step] = self._score(model)
            write_recorded_text(self._path, json.dumps(self.scores))
