"""The pair sweep: training with every layer pair, to measure what each pair is worth.

From one start a branch is trained for every (student, teacher) pair, and a baseline without alignment, for the same
steps on the same batches with the same noise. The difference between a branch and the baseline is the effect of its
pair. A rule for picking pairs has to be judged by these measurements, which hold for this model at this stage on this
data; branches of few steps say nothing about long trainings.

A branch scores the Fréchet distance of its samples, the loss on held-out samples by noise level and, with labels, the
error of linear probes of its layers; lower is better in all of them. The benefit of a pair is the share by which its
score is below the baseline's: 0.1 is ten percent lower, a negative benefit is worse. One seed gives no estimate of the
noise; several seeds do.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from layerprobe.analyses.experiments.arms import BASELINE, FRECHET, HELD_OUT, Arm
from layerprobe.analyses.experiments.confirmation import EXTRACTOR, TRAINING, read_scores, run_folder, staged, train_arm
from layerprobe.analyses.experiments.evaluation import Scorer, ScoresByStep
from layerprobe.analyses.experiments.probe_errors import probing_errors
from layerprobe.analyses.generation import Extractor, classifier_extractor
from layerprobe.analyses.tables import read_table, write_table
from layerprobe.backbones import Backbone, fresh_sit, network_record
from layerprobe.checkpoints import weights_hash
from layerprobe.checksums import recorded_write
from layerprobe.data import Splits
from layerprobe.files import locked
from layerprobe.layersync import LayerPair
from layerprobe.progress import TaskProgress, TrainingProgress
from layerprobe.ranks import Ranks, alone, processes
from layerprobe.records import check_claim, claim
from layerprobe.sampling import SamplingPlan
from layerprobe.training import TrainingPlan, checkpoints, read_checkpoint, train

_RECORD, _WHAT = "atlas.json", "a pair sweep"  # of the folder, see `claim`
PAIR_SWEEP_COLUMNS = ("student", "teacher", "seed", "step", "metric", "value", "benefit")


@dataclass(frozen=True)
class PairSweepPlan:
    """How the branches of a pair sweep are trained and scored.

    Attributes:
        training: Training plan that all branches share; its pairs and seed are set for each branch. Where the branches
            continue a training, its `steps` include the steps of that training.
        first_step: Step at which the branches begin; 0 unless they continue a training.
        seeds: Seeds of the branches. Each seed has its own data order and noise, and its own initial weights where the
            branches start from scratch.
        num_evaluations: Number of evaluations, evenly spaced over the steps of a branch; the last one is at the end.
        num_samples: Number of samples drawn for each Fréchet distance.
        sampling: Sampling plan for these samples.
        from_scratch: Whether each seed starts from its own fresh weights.
    """

    training: TrainingPlan
    first_step: int = 0
    seeds: tuple[int, ...] = (0,)
    num_evaluations: int = 1
    num_samples: int = 1000
    sampling: SamplingPlan = field(default_factory=lambda: SamplingPlan(solver="heun", steps=12))
    from_scratch: bool = False

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"the seeds are {list(self.seeds)}; pass at least one, and each only once")
        if not 1 <= self.num_evaluations <= self.branch_steps:
            raise ValueError(
                f"{self.num_evaluations} evaluations do not fit into branches of {self.branch_steps} steps"
            )
        if self.num_samples < 2:
            raise ValueError(f"a Fréchet distance needs at least 2 samples, got {self.num_samples}")

    @property
    def branch_steps(self) -> int:
        """Number of optimizer steps of one branch."""
        return self.training.steps - self.first_step

    @property
    def evaluation_steps(self) -> tuple[int, ...]:
        """Steps at which a branch is scored: `num_evaluations` evenly spaced steps after the first one."""
        n = self.num_evaluations
        return tuple(self.first_step + round(i * self.branch_steps / n) for i in range(1, n + 1))


def all_pairs(layers: Sequence[str]) -> tuple[LayerPair, ...]:
    """Returns every earlier layer as student of every later one; `layers` in execution order, all of one shape."""
    return tuple(LayerPair(*names) for names in combinations(layers, 2))


def sweep_pairs(
    backbone: Backbone,
    splits: Splits,
    pairs: Sequence[LayerPair],
    plan: PairSweepPlan,
    folder: str | Path,
    *,
    state: Path | None = None,
    shard: tuple[int, int] = (1, 1),
    extractor: Extractor | None = None,
    begin: Callable[[str], None] = lambda stage: None,
    progress: TaskProgress | None = None,
) -> pd.DataFrame:
    """Trains a branch for every pair, and the baseline, and measures the benefit of each pair.

    Branches are trained on the training split and scored on the test split. A finished branch leaves its scores in
    `seed-S/STUDENT-from-TEACHER.json` and nothing else. Interrupted work continues when the call is repeated, and pairs
    and seeds may be added. The processes of torchrun or srun share the branches; separate calls share them as shards in
    one folder. For machines without a common disk, copy the `seed-*` folders into one folder and repeat the call, which
    then only writes the table.

    Args:
        backbone: Model from which all branches start; from scratch, the network without its weights.
        splits: Data of the training and the evaluation.
        pairs: Pairs to train.
        plan: Steps, seeds and evaluations.
        folder: Folder for `atlas.json` (the record of the sweep), the scores and `atlas.csv`.
        state: Checkpoint of a training whose weights, optimizer and averaged weights the branches take over at
            `plan.first_step`. None for branches that begin with an empty optimizer.
        shard: Part of the branches that this call trains: (i, N) is every N-th from the i-th on.
        extractor: Extractor of the Fréchet distance; by default a small classifier trained on the training split.
        begin: Called with the name of each stage that begins, once the folder belongs to this sweep.
        progress: Callback with (name of the running branch, steps done, total steps), counted over this process.

    Returns:
        The content of `atlas.csv`, see `pair_sweep_table`, with the pairs and seeds of earlier calls; it lacks the
        branches that no shard has finished.

    Raises:
        ValueError: If a pair is listed twice, the shard does not exist, or the folder belongs to another run.
    """
    folder = Path(folder)
    number, count = shard
    if not 1 <= number <= count:
        raise ValueError(f"there is no shard {number} of {count}; pass 1/{count} to {count}/{count}")
    record = sweep_record(backbone, splits, plan, state, extractor)
    check_sweep(pairs, record, folder)
    arms = (Arm(BASELINE, None), *(Arm(f"{pair.student} from {pair.teacher}", pair) for pair in pairs))
    runs = [(seed, arm) for seed in plan.seeds for arm in arms]

    def begun() -> Extractor:
        with locked(folder, wait=True):  # Shards share the folder, so each holds it for moments only.
            claim(folder, _RECORD, record, what=_WHAT)
            begin(EXTRACTOR)
            return extractor or classifier_extractor(splits.train, folder / "extractor.safetensors")

    def unfinished() -> list[tuple[int, Arm]]:
        return [run for run in runs[number - 1 :: count] if not _finished(run_folder(folder, run[1], run[0]), plan)]

    def table() -> pd.DataFrame:
        with locked(folder, wait=True):
            scores = {(seed, arm.pair): _scores(run_folder(folder, arm, seed)) for seed, arm in runs}
            sweep = _with_earlier(pair_sweep_table(scores), folder / "atlas.csv")
            write_table(sweep, folder / "atlas.csv")
        return sweep

    with processes() as ranks:
        extractor = ranks.first_alone(begun)
        todo = ranks.mine(ranks.once(unfinished))
        _train_branches(todo, backbone, splits, plan, folder, state, extractor, ranks, begin, progress)
        ranks.barrier()
        return ranks.once(table)


def sweep_record(
    backbone: Backbone, splits: Splits, plan: PairSweepPlan, state: Path | None, extractor: Extractor | None = None
) -> dict[str, Any]:
    """Returns the settings that all branches share, as JSON values; pairs and seeds may be added later."""
    training = plan.training.identity() | {"steps": plan.training.steps}
    fresh = {"weights": "fresh for each seed"}
    return {
        "training": {key: value for key, value in training.items() if key not in ("pairs", "seed")},
        "first_step": plan.first_step,
        "evaluations": plan.num_evaluations,
        "num_samples": plan.num_samples,
        "sampling": asdict(plan.sampling),
        "start": fresh | network_record(backbone) if plan.from_scratch else weights_hash(backbone.module),
        "optimizer": "empty" if state is None else "of the training",
        "data": {name: samples.fingerprint for name, samples in splits.items()},
        "extractor": extractor.name if extractor else None,
    }


def check_sweep(pairs: Sequence[LayerPair], record: Mapping[str, Any], folder: str | Path) -> None:
    """Checks that `sweep_pairs` would begin or continue in a folder; nothing is written.

    Args:
        pairs: Pairs to train.
        record: Settings of the sweep, see `sweep_record`.
        folder: Folder of the sweep.

    Raises:
        ValueError: If a pair is listed twice, or the folder belongs to another run.
    """
    if len(set(pairs)) < len(pairs):
        raise ValueError("a pair is listed twice; pass each pair once")
    check_claim(Path(folder), _RECORD, record, what=_WHAT)


def _train_branches(
    todo: Sequence[tuple[int, Arm]],
    backbone: Backbone,
    splits: Splits,
    plan: PairSweepPlan,
    folder: Path,
    state: Path | None,
    extractor: Extractor,
    ranks: Ranks,
    begin: Callable[[str], None],
    progress: TaskProgress | None,
) -> None:
    """Trains the branches of this process, given as seed and arm."""
    if not todo:
        return
    scorer = Scorer(splits.test, extractor, num_samples=plan.num_samples, sampling=plan.sampling)
    score = staged(partial(branch_scores, scorer=scorer, splits=splits), begin)
    for index, (seed, arm) in enumerate(todo):
        ranks.check()

        def report(step: int, _: int, __: float, index: int = index, what: str = f"seed {seed}, {arm.name}") -> None:
            if progress:
                progress(what, index * plan.branch_steps + step - plan.first_step, len(todo) * plan.branch_steps)

        start = fresh_sit(backbone, seed) if plan.from_scratch else backbone
        with locked(run_folder(folder, arm, seed)), alone():
            _train_branch(start, splits, arm, replace(plan, seeds=(seed,)), folder, state, score, report)
            begin(TRAINING)  # The folder is largest now.
            # The checkpoints of dozens of branches fill a disk, and nothing continues a branch.
            shutil.rmtree(run_folder(folder, arm, seed))


def _with_earlier(sweep: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The table with those branches of the table in a file that this call did not ask for."""
    if not path.is_file():
        return sweep
    earlier, branch = read_pair_sweep(path), ["student", "teacher", "seed"]
    asked = set(sweep[branch].itertuples(index=False, name=None))
    kept = [row not in asked for row in earlier[branch].itertuples(index=False, name=None)]
    return pd.concat([sweep, earlier[kept]], ignore_index=True) if any(kept) else sweep


def branch_scores(model: Backbone, scorer: Scorer, splits: Splits) -> dict[str, float]:
    """Returns the scores of a branch at one step, by metric.

    The metrics are the Fréchet distance, the held-out loss (mean and by noise level) and, with labels, probe errors.
    """
    losses = scorer.losses(model)
    by_level = {f"{HELD_OUT} at noise level {level:g}": loss for level, loss in losses.items()}
    scores = {FRECHET: scorer.distance(model), HELD_OUT: float(np.mean(list(losses.values())))}
    return scores | by_level | probing_errors(model, splits)


def pair_sweep_table(scores: dict[tuple[int, LayerPair | None], ScoresByStep]) -> pd.DataFrame:
    """Returns a table with one row for each pair, seed, step and metric.

    Columns student and teacher (empty for the baseline), seed, step, metric, value, and benefit: the share by which the
    value is below the baseline's at the same seed and step; nan where the baseline's is 0 or missing.

    Args:
        scores: Scores by (seed, pair); the pair of the baseline is None.
    """
    rows = []
    for (seed, pair), by_step in scores.items():
        names = ("", "") if pair is None else (pair.student, pair.teacher)
        for step, values in by_step.items():
            baseline = scores.get((seed, None), {}).get(step, {})
            rows += [
                (*names, seed, step, metric, value, 1 - value / baseline[metric] if baseline.get(metric) else np.nan)
                for metric, value in values.items()
            ]
    return pd.DataFrame(rows, columns=list(PAIR_SWEEP_COLUMNS))


def read_pair_sweep(path: str | Path) -> pd.DataFrame:
    """Reads the table in an `atlas.csv`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds another table.
    """
    remedy = "pass an atlas.csv of `layerprobe atlas`; a damaged one is deleted and made again by that command"
    return read_table(path, PAIR_SWEEP_COLUMNS, PAIR_SWEEP_COLUMNS[2:4] + PAIR_SWEEP_COLUMNS[5:], remedy=remedy)


def benefits(sweep: pd.DataFrame, *, metric: str = FRECHET) -> pd.Series:
    """Returns the benefit of each pair at the last step, averaged over seeds, best first; index (student, teacher).

    Args:
        sweep: Table of a pair sweep, see `pair_sweep_table`.
        metric: Metric of the benefit.

    Raises:
        ValueError: If no pair has a benefit in this metric.
    """
    rows = sweep[(sweep["metric"] == metric) & (sweep["student"] != "") & (sweep["step"] == sweep["step"].max())]
    mean: pd.Series[float] = rows.groupby(["student", "teacher"])["benefit"].mean().dropna()
    if mean.empty:
        metrics = ", ".join(dict.fromkeys(sweep["metric"]))
        raise ValueError(f"the pair sweep has no benefit in {metric!r} (metrics: {metrics}); finish the branches first")
    ranked: pd.Series[float] = mean.sort_values(ascending=False, kind="stable")
    return ranked


def _train_branch(
    backbone: Backbone,
    splits: Splits,
    arm: Arm,
    plan: PairSweepPlan,
    folder: Path,
    state: Path | None,
    score: Callable[[Backbone], dict[str, float]],
    report: TrainingProgress,
) -> None:
    training, branch = replace(plan.training, seed=plan.seeds[0]), run_folder(folder, arm, plan.seeds[0])
    if state is not None:
        _take_over(state, backbone, splits, replace(training, pairs=(arm.pair,) if arm.pair else ()), branch)
    train_arm(
        backbone, splits.train, arm, training, branch, score=score, score_at=plan.evaluation_steps, progress=report
    )


def _take_over(state: Path, backbone: Backbone, splits: Splits, training: TrainingPlan, branch: Path) -> None:
    """Makes a branch's folder look like that of an interrupted training in this state, unless the branch has begun."""
    folder = branch / "checkpoints"
    if any(path != folder / "step-0000000.pt" for path in checkpoints(branch)):
        return
    branch.parent.mkdir(parents=True, exist_ok=True)
    train(backbone, splits.train, replace(training, steps=0), branch)  # without a step, to claim the folder
    shutil.rmtree(folder)
    content = read_checkpoint(state)
    # A branch has averages of its own and takes over none of the training's decisions.
    average, decays = next(iter(content["averages"].values())), (training.ema_decay, *training.more_ema_decays)
    content = {name: content[name] for name in ("step", "module", "optimizer")}
    content |= {"averages": dict.fromkeys(decays, average), "log": [], "decisions": []}
    folder.mkdir()
    with recorded_write(folder / f"step-{content['step']:07d}.pt") as partial_path:
        torch.save(content, partial_path)


def _scores(branch: Path) -> ScoresByStep:
    """The scores of a branch so far; {} before the first."""
    return read_scores(branch.with_name(f"{branch.name}.json"))


def _finished(branch: Path, plan: PairSweepPlan) -> bool:
    return not branch.is_dir() and set(plan.evaluation_steps) <= _scores(branch).keys()
