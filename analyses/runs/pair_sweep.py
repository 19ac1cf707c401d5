"""The job of `layerprobe atlas`: start of the branches, their training, figures and summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from layerprobe.analyses.experiments import (
    FRECHET,
    HELD_OUT,
    PROBE_ERROR,
    PairSweepPlan,
    all_pairs,
    benefits,
    check_sweep,
    sweep_pairs,
    sweep_record,
)
from layerprobe.analyses.figures import pair_sweep_heatmap, save_figure
from layerprobe.analyses.runs.stages import FIGURES, StageClock
from layerprobe.backbones import Backbone, alignable_layers, fresh_sit
from layerprobe.checkpoints import open_checkpoint, training_record
from layerprobe.data import Splits
from layerprobe.layersync import LayerPair
from layerprobe.progress import TaskProgress
from layerprobe.ranks import processes
from layerprobe.training import TrainingPlan, checkpoints

# Fields of a checkpoint's training plan that its branches do not take over.
_OF_A_BRANCH = ("steps", "pairs", "sync", "seed", "ema_decay", "more_ema_decays", "keep_last", "precision")


@dataclass(frozen=True)
class PairSweepStart:
    """Start of a pair sweep, which all branches share.

    Attributes:
        backbone: Initial model.
        plan: Plan of the branches.
        state: Checkpoint of the training that the branches continue; None if they continue none.
        data: Fingerprint of the training data of the start; None if it is not recorded.
        trained_steps: Steps of the training that branches from scratch stand for; None where it is not known.
    """

    backbone: Backbone
    plan: PairSweepPlan
    state: Path | None
    data: str | None
    trained_steps: int | None = None


def pair_sweep_start(
    start: str | Path,
    *,
    steps: int,
    from_scratch: bool = False,
    seeds: tuple[int, ...] = (0,),
    num_evaluations: int = 1,
    num_samples: int = 1000,
    device: str = "auto",
    **options: Any,
) -> PairSweepStart:
    """Opens the start of a pair sweep and plans its branches.

    Branches are trained by the recorded plan of the start, changed by the options; their averaged weights average over
    about a tenth of their steps. Branches of a checkpoint begin with an empty optimizer, so their learning rate warms
    up over the first tenth; branches of a training folder continue with its optimizer. From scratch each seed has its
    own fresh weights, and the start only provides the architecture and the training plan, its warm-up included.

    Args:
        start: Folder of `layerprobe train`, or a checkpoint.
        steps: Training steps of each branch.
        from_scratch: Whether branches begin with fresh weights, as a training does whose pair is fixed beforehand.
        seeds: Seeds of the branches.
        num_evaluations: Number of evaluations, evenly spaced over the steps of a branch.
        num_samples: Number of samples drawn for each Fréchet distance.
        device: Device of the models.
        **options: Fields of `TrainingPlan`.
    """
    state = next(reversed(checkpoints(Path(start))), None)
    checkpoint = Path(start) / "model.safetensors" if state else start
    state = None if from_scratch else state
    trained = training_record(checkpoint)
    first = int(trained["steps"]) if state else 0
    recorded: dict[str, Any] = {
        field.name: tuple(value) if isinstance(value := trained[field.name], list) else value
        for field in fields(TrainingPlan)
        if field.name in trained and field.name not in _OF_A_BRANCH
    }
    default = {"ema_decay": max(0.0, 1 - 10 / steps)}
    if state is None and not (from_scratch and "warmup_steps" in recorded):
        default["warmup_steps"] = steps // 10
    training = TrainingPlan(**recorded | default | options, steps=first + steps)
    backbone = open_checkpoint(checkpoint, dtype="float32", device=device).in_precision(training.precision)
    training = replace(training, precision=backbone.precision or training.precision)
    plan = PairSweepPlan(training, first, seeds, num_evaluations, num_samples, from_scratch=from_scratch)
    if from_scratch:
        fresh_sit(backbone, seeds[0])  # raises before data is read if the network cannot be initialized
    return PairSweepStart(backbone, plan, state, trained.get("data"), trained.get("steps") if from_scratch else None)


def wanted_pairs(backbone: Backbone, names: Sequence[tuple[str, str]]) -> tuple[LayerPair, ...]:
    """Returns the named pairs, or all pairs of alignable layers if no pair is named.

    Args:
        backbone: Model whose layers are aligned.
        names: Names of student and teacher of each pair.

    Raises:
        ValueError: If a layer cannot be aligned.
    """
    layers = alignable_layers(backbone)
    unknown = [name for pair in names for name in pair if name not in layers]
    if unknown:
        raise ValueError(f"{unknown[0]} cannot be aligned in {backbone.name}; pass pairs of {', '.join(layers)}")
    return tuple(LayerPair(*pair) for pair in names) or all_pairs(layers)


def pair_sweep_run(
    start: PairSweepStart,
    splits: Splits,
    pairs: Sequence[LayerPair],
    folder: str | Path,
    *,
    shard: tuple[int, int] = (1, 1),
    clock: StageClock | None = None,
    progress: TaskProgress | None = None,
) -> pd.DataFrame:
    """Trains the branches and draws the benefits of the finished ones into `figures/`.

    Args:
        start: Start of the branches, see `pair_sweep_start`.
        splits: Data of the training and the evaluation.
        pairs: Pairs to train.
        folder: Folder of the pair sweep.
        shard: Part of the branches to train: (i, N) is every N-th from the i-th on.
        clock: Clock of the stages, whose times are kept in the folder unless shards share it.
        progress: Called with (name of the running branch, steps done, steps in total).

    Returns:
        The table of the pair sweep, see `sweep_pairs`.

    Raises:
        ValueError: If the branches would continue a training on other data than its own, or as `sweep_pairs`.
    """
    check_pair_sweep(start, splits, pairs, folder)
    clock = clock or StageClock(folder)
    with processes() as ranks:
        keeps = ranks.is_first and shard == (1, 1)
        sweep = sweep_pairs(
            start.backbone,
            splits,
            pairs,
            start.plan,
            folder,
            state=start.state,
            shard=shard,
            begin=clock.begin_own if keeps else clock.begin,
            progress=progress,
        )
        clock.begin(FIGURES)
        if ranks.is_first and sweep["benefit"].notna().any() and (sweep["student"] != "").any():
            metrics = (FRECHET, HELD_OUT, PROBE_ERROR) if _is_probed(sweep) else (FRECHET, HELD_OUT)
            figure = pair_sweep_heatmap(sweep, alignable_layers(start.backbone), metrics=metrics)
            save_figure(figure, Path(folder) / "figures", "atlas")
        clock.end()
    return sweep


def check_pair_sweep(start: PairSweepStart, splits: Splits, pairs: Sequence[LayerPair], folder: str | Path) -> None:
    """Checks what `pair_sweep_run` is asked for; nothing is written.

    Raises:
        ValueError: As `pair_sweep_run` before it trains.
    """
    if start.state is not None and start.data != splits.train.fingerprint:
        raise ValueError(f"the training of {start.state} had other data; pass its --data and --size")
    check_sweep(pairs, sweep_record(start.backbone, splits, start.plan, start.state), folder)


def describe_pair_sweep(sweep: pd.DataFrame, branches: int, *, num_pairs: int = 5) -> list[str]:
    """Returns a summary of a pair sweep, line by line.

    Args:
        sweep: Table of the pair sweep.
        branches: Number of planned branches.
        num_pairs: Number of best pairs to list.
    """
    done = len(sweep[["student", "teacher", "seed"]].drop_duplicates())
    lines = [f"branches {done} of {max(branches, done)} finished"]
    if done < branches:
        return lines
    for metric in (FRECHET, PROBE_ERROR) if _is_probed(sweep) else (FRECHET,):
        ranked = benefits(sweep, metric=metric)
        lines += [f"{int((ranked > 0).sum())} of {len(ranked)} pairs beat the baseline in {metric}"]
        best = zip(ranked.index.tolist()[:num_pairs], ranked.tolist(), strict=False)
        lines += [f"{student:<16} <- {teacher:<16} {benefit:+7.1%}" for (student, teacher), benefit in best]
    return lines


def _is_probed(sweep: pd.DataFrame) -> bool:
    """Whether some pair has a benefit in probe error; there is none without labels."""
    return bool(sweep.loc[(sweep["metric"] == PROBE_ERROR) & (sweep["student"] != ""), "benefit"].notna().any())
