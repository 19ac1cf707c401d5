"""Confirmation of a run: training the arms that test its pick."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from layerprobe.analyses.runs.figures import draw_figures
from layerprobe.analyses.runs.folder import RunFolder
from layerprobe.analyses.selection import Selection
from layerprobe.backbones import alignable_layers, fresh_sit
from layerprobe.checkpoints import training_record
from layerprobe.data import Reading
from layerprobe.files import holding
from layerprobe.progress import TaskProgress, named_progress
from layerprobe.sampling import SamplingPlan
from layerprobe.training import TrainingPlan


@holding("run")
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
    on_reading: Callable[[Reading | None], None] | None = None,
    progress: TaskProgress | None = None,
) -> Verdict:
    """Trains the arms that test the pick of a run, and writes verdict, figures and report.

    Args:
        run: Run folder with a selection.
        training: Training plan that all arms share, see `confirmation_training`.
        seeds: Seeds of the runs, at least two.
        arms: Names of the requested arms, see `arms_for`.
        stop_early: Whether to stop once the difference is clear, see `ConfirmationPlan`.
        from_scratch: Whether each seed starts from fresh weights instead of the checkpoint.
        num_evaluations: Number of evaluations, evenly spaced over the steps.
        num_samples: Number of samples drawn for each Fréchet distance.
        sampling: Sampling plan for these samples.
        device: Device of the models.
        on_reading: Called with what was read of the data, before a model is trained.
        progress: Called with (name of the running arm, steps done, steps in total).

    Raises:
        ValueError: If the run has a verdict on more arms or seeds, or as `confirm_pair`.
    """
    folder = RunFolder(run)
    plan, selection = folder.plan(), folder.selection()
    backbone = plan.checkpoint.open(device=device)
    confirmation = ConfirmationPlan(
        training,
        seeds,
        num_evaluations,
        num_samples,
        sampling or SamplingPlan(solver="heun", steps=12),
        stop_early,
    )
    trained_arms = _arms(selection, alignable_layers(backbone), arms, seeds)
    _check_nothing_is_dropped(folder, trained_arms, seeds)
    encoding = named_progress(progress, "encoding images")
    splits = plan.data.training_splits(backbone.shape, progress=encoding)
    if on_reading:
        on_reading(splits.train.reading)
    verdict = confirm_pair(
        lambda seed: fresh_sit(backbone, seed) if from_scratch else backbone,
        splits,
        trained_arms,
        confirmation,
        folder.confirmation,
        start_name="from scratch" if from_scratch else "from the checkpoint",
        progress=progress,
    )
    folder.write_verdict()
    draw_figures(run)
    write_report(run)
    return verdict


def _check_nothing_is_dropped(folder: RunFolder, arms: Sequence[Arm], seeds: Sequence[int]) -> None:
    """Refuses to replace a verdict by one on fewer arms or seeds, since the report has one verdict only."""
    folder.mend_verdict()
    before = folder.verdict()
    if before is None:
        return
    curves, verdict = before
    lost = [f"the arm {name!r}" for name in curves["arm"].unique() if name not in {arm.name for arm in arms}]
    lost += [f"seed {seed}" for seed in sorted(set(curves["seed"]) - set(seeds))]
    if lost:
        raise ValueError(
            f"{folder.path} has a verdict on {verdict.judged!r}, and these options would replace it by one without "
            f"{lost[0]}; ask for all of its arms and seeds, or use a copy of the run without confirmation/ and "
            "verdict.json"
        )


def confirmation_training(run: str | Path, *, steps: int, from_scratch: bool = False, **options: Any) -> TrainingPlan:
    """Returns the training plan of the arms of a run: that of its checkpoint, where recorded, changed by the options.

    The averaged weights average over about a tenth of the steps, so that they show what the arm has learned. A branch
    starts with an empty optimizer state, so its learning rate warms up over the first tenth of the steps. From scratch
    it warms up as in the checkpoint's training: a longer warm-up harms the baseline and would make gains too large.

    Args:
        run: Run folder.
        steps: Training steps of each arm.
        from_scratch: Whether the arms start from fresh weights.
        **options: Fields of `TrainingPlan`.
    """
    trained = training_record(RunFolder(run).plan().checkpoint.path)
    recorded: dict[str, Any] = {
        name: trained[name]
        for name in ("batch_size", "learning_rate", "weight_decay", "clip_norm", "label_drop")
        if name in trained
    }
    if from_scratch and "warmup_steps" in trained:
        recorded["warmup_steps"] = trained["warmup_steps"]
    default = {"steps": steps, "warmup_steps": steps // 10, "ema_decay": max(0.0, 1 - 10 / steps)}
    return TrainingPlan(**default | recorded | options)


def trained_steps(run: str | Path) -> int | None:
    """Returns the number of steps that the checkpoint of a run was trained for; None if it is not recorded."""
    steps: int | None = training_record(RunFolder(run).plan().checkpoint.path).get("steps")
    return steps


def _arms(
    selection: Selection, layers: Sequence[str], names: Sequence[str] | None, seeds: Sequence[int]
) -> tuple[Arm, ...]:
    ranked = [pair.pair for pair in selection.ranked]
    return arms_for(ranked, layers, names=names, seed=seeds[0])


def arm_names(run: str | Path, names: Sequence[str] | None = None, *, seed: int = 0) -> list[str]:
    """Returns the arms that a confirmation of this run would train, with their pairs; see `arms_for`."""
    selection = RunFolder(run).selection()
    return [str(arm) for arm in _arms(selection, selection.basis.layers, names, (seed,))]


def confirmation_resolution(
    run: str | Path,
    *,
    num_seeds: int,
    stop_early: bool = False,
    spread: float | None = None,
    pilot: str | Path | None = None,
) -> Resolution:
    """Returns the difference that a confirmation of a run can be expected to find.

    Args:
        run: Run folder; without `spread` and `pilot` the spread is that of the seeds its confirmation has finished.
        num_seeds: Number of seeds.
        stop_early: Whether the seeds may stop early, see `ConfirmationPlan`.
        spread: Standard deviation of a difference over seeds, as a share of the distance.
        pilot: Folder of another confirmed run or of a pair sweep, with two seeds or more, whose spread is used.

    Raises:
        ValueError: If both a spread and a pilot are given, or the pilot has no spread.
    """
    if spread is not None and pilot is not None:
        raise ValueError("both a spread and a pilot are given; pass one of them")
    if spread is not None:
        estimate: Spread | None = Spread(spread, None, "stated")
    elif pilot is not None:
        inner = Path(pilot) / "confirmation"
        estimate = kept_spread(inner if inner.is_dir() else Path(pilot), "pilot")
        if estimate is None:
            raise ValueError(f"{pilot} holds no two seeds whose differences vary; pass a confirmed run or a pair sweep")
    else:
        estimate = kept_spread(Path(run) / "confirmation", "this confirmation")
    return resolution(num_seeds, stop_early=stop_early, spread=estimate)
