"""`layerprobe atlas` from start to finish: where the branches start, how they are trained, what is drawn of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
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
    sweep_pairs,
)
from layerprobe.analyses.figures import pair_sweep_heatmap, save_figure
from layerprobe.backbones import Backbone, alignable_layers, fresh_sit
from layerprobe.checkpoints import open_checkpoint, training_record
from layerprobe.data import Splits
from layerprobe.layersync import LayerPair
from layerprobe.progress import TaskProgress
from layerprobe.training import TrainingPlan, checkpoints

# Of the training that made the checkpoint, what its branches do differently.
_OF_A_BRANCH = ("steps", "pairs", "sync", "seed", "ema_decay", "more_ema_decays", "keep_last")


@dataclass(frozen=True)
class PairSweepStart:
    """What all branches share.

    Attributes:
        backbone: The model.
        plan: How they are trained.
        state: The state of the training that they continue, or None.
        data: Fingerprint of the data that the training learned from, or None.
        trained_steps: Of that training, where branches from scratch stand for it; None where not known.
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
    **given: Any,
) -> PairSweepStart:
    """Where the branches of an atlas start and how they are trained.

    They are trained as the start was, where it says so, unless given otherwise, and their averaged weights look back
    over a tenth of their steps. Branches of a checkpoint begin with an empty optimizer, so their learning rate warms up
    over the first tenth; those of a training's folder go on with its optimizer. From scratch, each seed has fresh
    weights of its own, and the start only says how the network looks and was trained, its warm-up included.

    Args:
        start: A folder of `layerprobe train`, or a checkpoint.
        steps: Of each branch.
        from_scratch: Begin with fresh weights, as a training that knows the pair beforehand does.
        seeds: See `PairSweepPlan`, like the next two.
        num_evaluations: Evenly spaced over the steps.
        num_samples: Drawn for each Fréchet distance.
        device: Where the models run.
        **given: Fields of `TrainingPlan`.
    """
    state = next(reversed(checkpoints(Path(start))), None)
    checkpoint = Path(start) / "model.safetensors" if state else start
    state = None if from_scratch else state
    trained = training_record(checkpoint)
    first = int(trained["steps"]) if state else 0
    known: dict[str, Any] = {
        field.name: tuple(value) if isinstance(value := trained[field.name], list) else value
        for field in fields(TrainingPlan)
        if field.name in trained and field.name not in _OF_A_BRANCH
    }
    default = {"ema_decay": max(0.0, 1 - 10 / steps)}
    if state is None and not (from_scratch and "warmup_steps" in known):
        default["warmup_steps"] = steps // 10
    training = TrainingPlan(**known | default | given, steps=first + steps)
    plan = PairSweepPlan(training, first, seeds, num_evaluations, num_samples, from_scratch=from_scratch)
    backbone = open_checkpoint(checkpoint, device=device)
    if from_scratch:
        fresh_sit(backbone, seeds[0])  # what cannot be initialized is refused before data is read
    return PairSweepStart(backbone, plan, state, trained.get("data"), trained.get("steps") if from_scratch else None)


def wanted_pairs(backbone: Backbone, names: Sequence[tuple[str, str]]) -> tuple[LayerPair, ...]:
    """These pairs, or all of the layers that can be aligned where none is named.

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
    progress: TaskProgress | None = None,
) -> pd.DataFrame:
    """Trains the branches and draws what they were worth, as far as they are finished, into `figures/`.

    Raises:
        ValueError: If the branches would go on with other data than their training had, or as `sweep_pairs`.
    """
    if start.state is not None and start.data != splits.train.fingerprint:
        raise ValueError(f"the training behind {start.state} had other data; pass the --data and --size it had")
    atlas = sweep_pairs(
        start.backbone, splits, pairs, start.plan, folder, state=start.state, shard=shard, progress=progress
    )
    if atlas["benefit"].notna().any() and (atlas["student"] != "").any():
        shown = (FRECHET, HELD_OUT, PROBE_ERROR) if _is_probed(atlas) else (FRECHET, HELD_OUT)
        figure = pair_sweep_heatmap(atlas, alignable_layers(start.backbone), metrics=shown)
        save_figure(figure, Path(folder) / "figures", "atlas")
    return atlas


def describe_pair_sweep(atlas: pd.DataFrame, branches: int, *, num_pairs: int = 5) -> list[str]:
    """An atlas in lines for people.

    Args:
        atlas: The table.
        branches: How many there are to be.
        num_pairs: How many of the best to show.
    """
    done = len(atlas[["student", "teacher", "seed"]].drop_duplicates())
    lines = [f"branches {done} of {branches} finished"]
    if done < branches:
        return lines
    for metric in (FRECHET, PROBE_ERROR) if _is_probed(atlas) else (FRECHET,):
        ranked = benefits(atlas, metric=metric)
        lines += [f"{int((ranked > 0).sum())} of {len(ranked)} pairs beat no alignment in {metric}"]
        best = zip(ranked.index.tolist()[:num_pairs], ranked.tolist(), strict=False)
        lines += [f"{student:<16} <- {teacher:<16} {benefit:+7.1%}" for (student, teacher), benefit in best]
    return lines


def _is_probed(atlas: pd.DataFrame) -> bool:
    """Whether some pair has a benefit in probe error; data without labels have none."""
    return bool(atlas.loc[(atlas["metric"] == PROBE_ERROR) & (atlas["student"] != ""), "benefit"].notna().any())
