"""The pair atlas: what every layer pair is worth, by experiment.

From one start every (student, teacher) pair is trained for the same steps, and no alignment too, on the same batches
with the same noise: what a branch scores beyond the one without alignment is its pair's doing. That is the
ground truth that a rule for picking pairs has to be judged by, at this stage of this model on these data; a branch of
few steps says nothing about many.

A branch scores the Fréchet distance of what it draws, the loss on held-out samples by noise level and, with labels,
the error of linear probes of its layers; lower is better in all. The benefit is the share by which the score without
alignment is undercut: 0.1 is ten per cent less, negative is worse. One seed gives no idea of the noise; the spread over
seeds does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from layerprobe.analyses.experiments.arms import BASELINE, FRECHET, HELD_OUT, Arm
from layerprobe.analyses.experiments.confirmation import run_folder, train_arm
from layerprobe.analyses.experiments.evaluation import Scorer, ScoresByStep
from layerprobe.analyses.experiments.probe_errors import probe_errors
from layerprobe.analyses.generation import Extractor, classifier_extractor
from layerprobe.backbones import Backbone, fresh_sit, network_record
from layerprobe.checkpoints import weights_hash
from layerprobe.data import Splits
from layerprobe.files import claim, whole, write_text
from layerprobe.layersync import LayerPair
from layerprobe.progress import TaskProgress, TrainingProgress
from layerprobe.sampling import SamplingPlan
from layerprobe.training import TrainingPlan, checkpoints, train

COLUMNS = ("student", "teacher", "seed", "step", "metric", "value", "benefit")


@dataclass(frozen=True)
class PairSweepPlan:
    """How the branches are trained and scored.

    Attributes:
        training: What all branches share; its pairs and seed are set by branch. `steps` counts from the start of the
            training that the branches continue, where they continue one.
        first_step: Step at which the branches begin; 0 unless they continue a training.
        seeds: Each is another order of the data and other noise, and fresh initial weights where branches start from
            scratch.
        num_evaluations: Evenly spaced over the steps of a branch, the last one at the end.
        num_samples: Drawn for each Fréchet distance.
        sampling: How they are drawn.
        from_scratch: Whether every seed has its own weights to start from.
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
            raise ValueError(f"the seeds are {list(self.seeds)}; pass one or more different ones")
        if not 1 <= self.num_evaluations <= self.branch_steps:
            raise ValueError(
                f"{self.num_evaluations} evaluations do not fit into branches of {self.branch_steps} steps"
            )
        if self.num_samples < 2:
            raise ValueError(f"a Fréchet distance needs at least 2 samples, got {self.num_samples}")

    @property
    def branch_steps(self) -> int:
        """Optimizer steps of one branch."""
        return self.training.steps - self.first_step

    @property
    def evaluation_steps(self) -> tuple[int, ...]:
        """`num_evaluations` steps after the first."""
        n = self.num_evaluations
        return tuple(self.first_step + round(i * self.branch_steps / n) for i in range(1, n + 1))


def all_pairs(layers: Sequence[str]) -> tuple[LayerPair, ...]:
    """Every earlier layer with every later one; `layers` in execution order, all of one shape."""
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
    progress: TaskProgress | None = None,
) -> pd.DataFrame:
    """Trains every pair and no alignment from one start, and tells what each was worth.

    Branches learn from the training samples and are scored on the test samples. Each keeps its scores in
    `seed-S/STUDENT-from-TEACHER.json`, and nothing else once it is finished; work that was interrupted goes on when the
    call is repeated, and pairs and seeds may be added. Several processes share the work as shards in one folder. For
    machines without a common disk, copy the `seed-*` folders together and repeat the call: it then only writes the
    table.

    Args:
        backbone: Where all branches start; from scratch, what the network is.
        splits: The data.
        pairs: To train; no alignment is always one of the branches.
        plan: Steps, seeds, evaluations.
        folder: Gets `atlas.json` (what this is), the scores, and `atlas.csv`.
        state: A training's state, to go on with its optimizer and averaged weights at `plan.first_step`; the weights
            are then this state's too. Without it every branch begins with an empty optimizer.
        shard: (i, N): this call trains every N-th branch from the i-th on.
        extractor: For the Fréchet distance; a small classifier trained on the training samples where not given.
        progress: Called with (what is running, steps done, steps in all) over the branches of this shard.

    Returns:
        What `atlas.csv` holds, see `table`; branches that no shard has finished are not in it.

    Raises:
        ValueError: If a pair stands twice, there is no such shard, or the folder holds another atlas.
    """
    folder = Path(folder)
    number, count = shard
    if not 1 <= number <= count:
        raise ValueError(f"there is no shard {number} of {count}; pass 1/{count} to {count}/{count}")
    if len(set(pairs)) < len(pairs):
        raise ValueError("a pair stands twice; pass each once")
    claim(folder, "atlas.json", _record(backbone, splits, plan, state, extractor), what="an atlas")
    extractor = extractor or classifier_extractor(splits.train, folder / "extractor.safetensors")
    arms = (Arm(BASELINE, None), *(Arm(f"{pair.student} from {pair.teacher}", pair) for pair in pairs))
    runs = [(seed, arm) for seed in plan.seeds for arm in arms]
    mine = [run for run in runs[number - 1 :: count] if not _finished(run_folder(folder, run[1], run[0]), plan)]
    scorer = Scorer(splits.test, extractor, num_samples=plan.num_samples, sampling=plan.sampling) if mine else None
    for index, (seed, arm) in enumerate(mine):
        assert scorer is not None

        def report(step: int, _: int, __: float, index: int = index, what: str = f"seed {seed}, {arm.name}") -> None:
            if progress:
                progress(what, index * plan.branch_steps + step - plan.first_step, len(mine) * plan.branch_steps)

        start = fresh_sit(backbone, seed) if plan.from_scratch else backbone
        _train_branch(start, splits, arm, replace(plan, seeds=(seed,)), folder, state, scorer, report)
    found = {(seed, arm.pair): kept for seed, arm in runs if (kept := _kept(run_folder(folder, arm, seed))).keys()}
    atlas = table(found)
    write_text(folder / "atlas.csv", atlas.to_csv(index=False))
    return atlas


def branch_scores(model: Backbone, scorer: Scorer, splits: Splits) -> dict[str, float]:
    """What a branch scores at one step, by metric: Fréchet distance, held-out loss by noise level, probe errors."""
    losses = scorer.losses(model)
    by_level = {f"{HELD_OUT} at noise level {level:g}": loss for level, loss in losses.items()}
    scores = {FRECHET: scorer.distance(model), HELD_OUT: float(np.mean(list(losses.values())))}
    return scores | by_level | probe_errors(model, splits)


def table(found: dict[tuple[int, LayerPair | None], ScoresByStep]) -> pd.DataFrame:
    """One row for each pair, seed, step and metric.

    Columns student and teacher (empty for no alignment), seed, step, metric, value, and benefit: the share by which the
    value undercuts that of no alignment at the same seed and step; nan where that is 0 or not there.

    Args:
        found: Scores by (seed, pair), pair None for no alignment.
    """
    rows = []
    for (seed, pair), scores in found.items():
        names = ("", "") if pair is None else (pair.student, pair.teacher)
        for step, values in scores.items():
            without = found.get((seed, None), {}).get(step, {})
            rows += [
                (*names, seed, step, metric, value, 1 - value / without[metric] if without.get(metric) else np.nan)
                for metric, value in values.items()
            ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def read_pair_sweep(path: str | Path) -> pd.DataFrame:
    """The table in an `atlas.csv`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is another table.
    """
    atlas = pd.read_csv(path, dtype={"student": str, "teacher": str}, keep_default_na=False, na_values={"benefit": ""})
    if tuple(atlas.columns) != COLUMNS:
        raise ValueError(f"{path} has the columns {', '.join(atlas.columns)}; pass an atlas.csv of `layerprobe atlas`")
    return atlas


def benefits(atlas: pd.DataFrame, *, metric: str = FRECHET) -> pd.Series:
    """Benefit of each pair at the last step, averaged over seeds, best first; index (student, teacher).

    Raises:
        ValueError: If the table has no pair with this metric and a score without alignment.
    """
    rows = atlas[(atlas["metric"] == metric) & (atlas["student"] != "") & (atlas["step"] == atlas["step"].max())]
    mean: pd.Series[float] = rows.groupby(["student", "teacher"])["benefit"].mean().dropna()
    if mean.empty:
        known = ", ".join(dict.fromkeys(atlas["metric"]))
        raise ValueError(f"the atlas has no benefit in {metric!r} (it knows {known}); finish the branches first")
    ranked: pd.Series[float] = mean.sort_values(ascending=False, kind="stable")
    return ranked


def _train_branch(
    backbone: Backbone,
    splits: Splits,
    arm: Arm,
    plan: PairSweepPlan,
    folder: Path,
    state: Path | None,
    scorer: Scorer,
    report: TrainingProgress,
) -> None:
    training, place = replace(plan.training, seed=plan.seeds[0]), run_folder(folder, arm, plan.seeds[0])

    score = partial(branch_scores, scorer=scorer, splits=splits)
    if state is not None:
        _begin(backbone, splits, replace(training, steps=0, pairs=(arm.pair,) if arm.pair else ()), place, state)
    train_arm(
        backbone, splits.train, arm, training, place, score=score, score_at=plan.evaluation_steps, progress=report
    )
    shutil.rmtree(place)  # dozens of states fill a disk, and nothing continues a branch


def _begin(backbone: Backbone, splits: Splits, nothing: TrainingPlan, place: Path, state: Path) -> None:
    """Makes a branch's folder one in which the training of this state was interrupted; nothing if it has begun."""
    if any(content != place / "checkpoints" / "step-0000000.pt" for content in checkpoints(place)):
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    train(backbone, splits.train, nothing, place)  # no steps: the folder is this branch's from now on
    shutil.rmtree(place / "checkpoints")
    content = torch.load(state, map_location="cpu", weights_only=True)
    # A branch has averages of its own and takes over none of the training's decisions.
    average, decays = next(iter(content["averages"].values())), (nothing.ema_decay, *nothing.more_ema_decays)
    branch = {name: content[name] for name in ("step", "module", "optimizer")}
    branch |= {"averages": dict.fromkeys(decays, average), "log": [], "decisions": []}
    (place / "checkpoints").mkdir()
    with whole(place / "checkpoints" / f"step-{content['step']:07d}.pt") as partial:
        torch.save(branch, partial)


def _kept(place: Path) -> ScoresByStep:
    scores = place.with_name(f"{place.name}.json")
    return {int(step): values for step, values in json.loads(scores.read_text()).items()} if scores.is_file() else {}


def _finished(place: Path, plan: PairSweepPlan) -> bool:
    return not place.is_dir() and set(plan.evaluation_steps) <= _kept(place).keys()


def _record(
    backbone: Backbone, splits: Splits, plan: PairSweepPlan, state: Path | None, extractor: Extractor | None
) -> dict[str, Any]:
    """What every branch shares. Pairs and seeds may be added later."""
    training = plan.training.identity() | {"steps": plan.training.steps}
    return {
        "training": {key: value for key, value in training.items() if key not in ("pairs", "seed")},
        "first_step": plan.first_step,
        "evaluations": plan.num_evaluations,
        "num_samples": plan.num_samples,
        "sampling": asdict(plan.sampling),
        "start": {"weights": "fresh for each seed"} | network_record(backbone)
        if plan.from_scratch
        else weights_hash(backbone.module),
        "optimizer": "empty" if state is None else "of the training",
        "data": {name: samples.fingerprint for name, samples in splits.items()},
        "extractor": extractor.name if extractor else None,
    }
