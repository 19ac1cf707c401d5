"""Training the arms that put the pick of a run to the test."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerprobe.analyses.experiments import (
    Arm,
    ConfirmationPlan,
    Resolution,
    Spread,
    Verdict,
    arms_for,
    confirm_pair,
    kept_spread,
    resolution,
)
from layerprobe.analyses.report import write_report
from layerprobe.analyses.runs.data import training_splits
from layerprobe.analyses.runs.figures import draw_figures
from layerprobe.analyses.runs.folder import read_plan, read_selection
from layerprobe.analyses.selection import Selection
from layerprobe.backbones import alignable_layers, fresh_sit
from layerprobe.checkpoints import open_checkpoint, training_record
from layerprobe.progress import TaskProgress
from layerprobe.sampling import SamplingPlan
from layerprobe.training import TrainingPlan


def confirm_run(
    run: str | Path,
    training: TrainingPlan,
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    arms: Sequence[str] | None = None,
    stop_early: bool = False,
    from_scratch: bool = False,
    num_evaluations: int = 4,
    num_samples: int = 1000,
    sampling: SamplingPlan | None = None,
    device: str = "auto",
    progress: TaskProgress | None = None,
) -> Verdict:
    """Trains the arms that put the pick of a run to the test, and writes verdict, figures and report.

    Args:
        run: A folder with a selection.
        training: Steps, batch size, learning rate and weight; shared by all arms.
        seeds: At least two.
        arms: See `arms_for`.
        stop_early: See `ConfirmationPlan`.
        from_scratch: Fresh weights for every seed instead of branching from the checkpoint.
        num_evaluations: See `ConfirmationPlan`, like the next two.
        num_samples: Drawn for each Fréchet distance.
        sampling: How samples are drawn.
        device: Where the models run.
        progress: Called with (what is running, steps done, steps in all).
    """
    run, plan = Path(run), read_plan(run)
    selection = read_selection(run)
    backbone = open_checkpoint(plan.checkpoint, device=device, **plan.checkpoint_options)
    confirmation = ConfirmationPlan(
        training,
        seeds,
        num_evaluations,
        num_samples,
        sampling or SamplingPlan(solver="heun", steps=12),
        stop_early,
    )
    chosen = _arms(selection, alignable_layers(backbone), arms, seeds)
    splits = training_splits(plan.data, backbone.shape, plan.data_options, progress=progress)
    verdict = confirm_pair(
        lambda seed: fresh_sit(backbone, seed) if from_scratch else backbone,
        splits,
        chosen,
        confirmation,
        run / "confirmation",
        start_name="from scratch" if from_scratch else "from the checkpoint",
        progress=progress,
    )
    for name in ("confirmation.csv", "verdict.json"):
        shutil.copyfile(run / "confirmation" / name, run / name)
    draw_figures(run)
    write_report(run)
    return verdict


def confirmation_training(run: str | Path, *, steps: int, from_scratch: bool = False, **given: Any) -> TrainingPlan:
    """How the arms of a run are trained: as its checkpoint was, where the checkpoint says so, unless given otherwise.

    The averaged weights look back over a tenth of the steps, so that they show what the arm has learned. A branch
    starts with an empty optimizer state, so its learning rate warms up over the first tenth. From scratch it warms up
    as the checkpoint's did: a longer warm-up is worse without alignment, and the gains would be too large.
    """
    path = read_plan(run).checkpoint
    trained = training_record(path)
    known: dict[str, Any] = {
        name: trained[name]
        for name in ("batch_size", "learning_rate", "weight_decay", "clip_norm", "label_drop")
        if name in trained
    }
    if from_scratch and "warmup_steps" in trained:
        known["warmup_steps"] = trained["warmup_steps"]
    default = {"steps": steps, "warmup_steps": steps // 10, "ema_decay": max(0.0, 1 - 10 / steps)}
    return TrainingPlan(**default | known | given)


def trained_steps(run: str | Path) -> int | None:
    """How long the checkpoint of a run was trained, where it says so."""
    steps: int | None = training_record(read_plan(run).checkpoint).get("steps")
    return steps


def _arms(
    selection: Selection, layers: Sequence[str], wanted: Sequence[str] | None, seeds: Sequence[int]
) -> tuple[Arm, ...]:
    ranked = [pair.pair for pair in selection.ranked]
    return arms_for(ranked, layers, wanted=wanted, advised=selection.pick is not None, seed=seeds[0])


def arm_names(run: str | Path, wanted: Sequence[str] | None = None, *, seed: int = 0) -> list[str]:
    """The arms that a confirmation of this run would train, with their pairs; see `arms_for`."""
    selection = read_selection(run)
    return [str(arm) for arm in _arms(selection, selection.criteria.layers, wanted, (seed,))]


def confirmation_resolution(
    run: str | Path,
    *,
    num_seeds: int,
    stop_early: bool = False,
    spread: float | None = None,
    pilot: str | Path | None = None,
) -> Resolution:
    """The difference that a confirmation of a run can be expected to find.

    Args:
        run: The run folder; what its confirmation has trained already tells the spread, if nothing else does.
        num_seeds: In all.
        stop_early: See `ConfirmationPlan`.
        spread: Standard deviation over seeds of a difference, as a share of the distance, where it is known.
        pilot: Another run that was confirmed with two seeds or more, or an atlas of them, whose spread to take.

    Raises:
        ValueError: If both are given, or the pilot tells no spread.
    """
    if spread is not None and pilot is not None:
        raise ValueError("both a spread and a pilot are given; pass one of them")
    if spread is not None:
        known: Spread | None = Spread(spread, None, "as stated")
    elif pilot is not None:
        inner = Path(pilot) / "confirmation"
        known = kept_spread(inner if inner.is_dir() else Path(pilot), "the pilot")
        if known is None:
            raise ValueError(f"{pilot} holds no arms of two seeds that differ; pass a confirmed run or an atlas")
    else:
        known = kept_spread(Path(run) / "confirmation", "this confirmation")
    return resolution(num_seeds, stop_early=stop_early, spread=known)
