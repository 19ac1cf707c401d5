"""Confirmation of a run: training the arms that test its pick."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from layerprobe.analyses.experiments import (
    BRANCHED,
    FROM_SCRATCH,
    TRAINING,
    Arm,
    ConfirmationPlan,
    Resolution,
    Spread,
    StartCaution,
    Verdict,
    arms_for,
    confirm_pair,
    kept_spread,
    recorded_fall,
    resolution,
    sra_options,
    start_cautions,
)
from layerprobe.analyses.report import write_report
from layerprobe.analyses.runs.costing_trainings import confirmation_cost
from layerprobe.analyses.runs.figures import draw_figures
from layerprobe.analyses.runs.folder import RunFolder
from layerprobe.analyses.runs.stages import ENCODING, FIGURES, Cost, StageClock
from layerprobe.analyses.tables import MODEL
from layerprobe.analyses.wording import converged_sentence
from layerprobe.backbones import Backbone, alignable_layers, fresh_sit, layer_shapes
from layerprobe.checkpoints import training_record
from layerprobe.data import Reading, Splits
from layerprobe.files import locked
from layerprobe.progress import TaskProgress, named_progress
from layerprobe.ranks import current, processes, together
from layerprobe.records import OtherRun, differences, read_record, typed
from layerprobe.sampling import SamplingPlan
from layerprobe.training import TrainingPlan


@dataclass(frozen=True)
class ConfirmationJob:
    """A confirmation that is checked as far as possible before its data are read, and has trained nothing yet.

    Attributes:
        folder: The run.
        backbone: Its checkpoint.
        num_layers: Number of its layers that can be aligned.
        arms: Arms to train, the baseline first.
        plan: How they are trained and scored.
        from_scratch: Whether each seed starts from fresh weights instead of the checkpoint.
        trained_steps: Recorded length of the checkpoint's training; None where it is not recorded.
        fall: Recorded fall of the checkpoint's held-out loss, see `recorded_fall`; None where it is not recorded.
    """

    folder: RunFolder
    backbone: Backbone
    num_layers: int
    arms: tuple[Arm, ...]
    plan: ConfirmationPlan
    from_scratch: bool
    trained_steps: int | None
    fall: float | None

    @property
    def start_name(self) -> str:
        """Where the arms start."""
        return FROM_SCRATCH if self.from_scratch else BRANCHED

    @property
    def start_step(self) -> int | None:
        """Steps of training that the arms start after; None where they are not recorded."""
        return 0 if self.from_scratch else self.trained_steps

    @property
    def end_step(self) -> int | None:
        """Steps since fresh weights at which the arms end; None where they are not recorded."""
        return None if self.start_step is None else self.start_step + self.plan.training.steps

    @property
    def start_cautions(self) -> tuple[StartCaution, ...]:
        """What is to be said about the start of the arms."""
        return start_cautions(from_scratch=self.from_scratch, fall=self.fall)

    @cached_property
    def splits(self) -> Splits:
        """The data, whose images are not encoded yet; read when it is first asked for."""
        return self.folder.plan().data.training_splits(self.backbone.shape)

    @cached_property
    def cost(self) -> Cost:
        """What the arms cost on this device; a few steps of them are timed."""
        plan = self.folder.plan()
        return confirmation_cost(
            self.backbone,
            self.splits,
            self.arms,
            self.plan,
            vae=plan.data.vae,
            cells=len(self.backbone.layers) * len(plan.extraction.noise_levels),
            processes=current().world_size,
        )

    def check_begun(self) -> None:
        """Refuses options other than those that the confirmation was begun with, without reading the data.

        Raises:
            ValueError: If it was begun with others.
        """
        path = self.folder.confirmation / "confirmation.json"
        if not path.is_file():
            return
        before = read_record(path, typed(dict), remedy=_A_COPY)
        now = json.loads(json.dumps({"plan": self.plan.identity(), "start": self.start_name}))
        if changed := differences({name: before.get(name) for name in now}, now):
            seen = f"{path.parent} holds a confirmation of other options (different: {', '.join(changed[:4])})"
            raise ValueError(f"{seen}; {_AS_BEGUN}")


@together("run")
def confirmation_job(
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
) -> ConfirmationJob:
    """Opens the checkpoint of a run and makes the arms that test its pick; nothing is written.

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

    Raises:
        ValueError: If the arms or the plan cannot be, or the run has a verdict on more arms or seeds.
    """
    folder = RunFolder(run)
    checkpoint = folder.plan().checkpoint
    ranked = [pair.pair for pair in folder.selection().ranked]
    # Updates of weights of 16 bits would be rounded away.
    backbone = replace(checkpoint, dtype="float32").open(device=device).in_precision(training.precision)
    training = replace(training, precision=backbone.precision or training.precision)
    sampling = sampling or SamplingPlan(solver="heun", steps=12)
    plan = ConfirmationPlan(training, seeds, num_evaluations, num_samples, sampling, stop_early)
    layers = alignable_layers(backbone)
    width = layer_shapes(backbone, layers[:1])[layers[0]][1]
    options = sra_options(training, token_width=width)
    chosen = arms_for(ranked, layers, names=arms, seed=seeds[0], options=options, sync=training.sync)
    _check_nothing_is_dropped(folder, chosen, seeds)
    return ConfirmationJob(
        folder=folder,
        backbone=backbone,
        num_layers=len(layers),
        arms=chosen,
        plan=plan,
        from_scratch=from_scratch,
        trained_steps=training_record(checkpoint.path).get("steps"),
        fall=_recorded_fall(Path(checkpoint.path)),
    )


def _recorded_fall(checkpoint: Path) -> float | None:
    """The fall of the held-out loss that `layerprobe train` has written beside the checkpoint; None without it."""
    held_out = checkpoint.parent / "held_out.csv"
    trained_here = checkpoint.is_file() and (checkpoint.parent / "training.json").is_file()
    return recorded_fall(pd.read_csv(held_out)) if trained_here and held_out.is_file() else None


def confirm_run(
    job: ConfirmationJob,
    *,
    on_reading: Callable[[Reading | None], None] | None = None,
    on_forecast: Callable[[Cost], None] | None = None,
    warn: Callable[[str], None] | None = None,
    progress: TaskProgress | None = None,
) -> Verdict:
    """Trains the arms that test the pick of a run, shared by all processes, and writes verdict, figures and report.

    Args:
        job: The confirmation.
        on_reading: Called with what was read of the data, before a model is trained.
        on_forecast: Called with what the arms cost, if none has begun and they take longer than a minute.
        warn: Called with one line about what weakens the confirmation: data that cannot be compared with those of the
            run, and a checkpoint that looks converged.
        progress: Called with (name of the running arm, steps done, steps in total).

    Raises:
        ValueError: If the data are not those that the run measured, or as `confirm_pair`.
    """
    folder, backbone = job.folder, job.backbone
    job.check_begun()
    clock = StageClock(folder.confirmation)
    with processes() as ranks, locked(folder.path) if ranks.is_first else nullcontext():
        data = folder.plan().data
        if on_reading:
            on_reading(job.splits.train.reading)
        if on_forecast and ranks.is_first:
            clock.foretell(TRAINING, lambda: job.cost.total_s, lambda: job.cost, on_forecast)
        if data.vae is not None:
            clock.begin(ENCODING)
        encoding = named_progress(progress, "encoding images")
        splits = data.encode(job.splits, expect_shape=backbone.shape, progress=encoding)
        tell = warn or (lambda line: None)
        _check_data(folder, backbone, splits, tell)
        try:
            verdict = confirm_pair(
                lambda seed: fresh_sit(backbone, seed) if job.from_scratch else backbone,
                splits,
                job.arms,
                job.plan,
                folder.confirmation,
                start_name=job.start_name,
                trained_steps=job.start_step,
                on_converged=lambda course: tell(converged_sentence(course)),
                begin=clock.begin_own if ranks.is_first else clock.begin,
                progress=progress,
            )
        except OtherRun as other:
            raise ValueError(f"{other.seen}; {_AS_BEGUN}") from other
        if ranks.is_first:
            clock.begin(FIGURES)
            folder.write_verdict()
            draw_figures(folder.path)
            write_report(folder.path)
            clock.end()
        ranks.barrier()
        return verdict


_A_COPY = "use a copy of the run without confirmation/, confirmation.csv and verdict.json"
_AS_BEGUN = f"pass the options it was begun with, or {_A_COPY}"


def _check_data(folder: RunFolder, backbone: Backbone, splits: Splits, tell: Callable[[str], None]) -> None:
    """Refuses data other than those that the run has measured, by which its pick was chosen."""
    if not folder.store_folder(MODEL).is_dir():
        tell(f"{folder.path} has lost its features, so nothing shows whether these are the data that it measured")
        return
    measured = folder.store(MODEL).manifest["data"]
    now = {name: samples.fingerprint for name, samples in splits.items()}
    # The arms train on the whole training split, of which the run may have measured a part.
    if measured["train"].startswith(f"{now['train']}/"):
        now["train"] = measured["train"]
    if now != measured:
        # Counts, copies and encodings change fingerprints too, so the samples of the run are read as it read them.
        probed = folder.plan().data
        samples = probed.encode(probed.probing_splits(expect_shape=backbone.shape), expect_shape=backbone.shape)
        now = {name: part.fingerprint for name, part in samples.items()}
    changed = [name for name in measured if measured[name] != now.get(name)]
    if changed:
        raise ValueError(
            f"the {' and '.join(changed)} data are not those that {folder.path} measured, by which its pick was "
            "chosen; restore them, or probe the new data into another folder"
        )


def _check_nothing_is_dropped(folder: RunFolder, arms: Sequence[Arm], seeds: Sequence[int]) -> None:
    """Refuses to replace a verdict by one on fewer arms or seeds, since the report has one verdict only."""
    current().first_alone(folder.mend_verdict)
    before = folder.verdict()
    if before is None:
        return
    curves, verdict = before
    present = {name for arm in arms for name in (arm.name, *arm.also)}
    lost = [f"the arm {name!r}" for name in curves["arm"].unique() if name not in present]
    lost += [f"seed {seed}" for seed in sorted(set(curves["seed"]) - set(seeds))]
    if f"the arm {_OLD_ARM!r}" in lost:
        raise ValueError(
            f"{folder.path} was confirmed by an earlier version, whose arm {_OLD_ARM!r} (student at 0.3, teacher at "
            f"0.6 of the depth) is no longer trained; its report stays readable, and for a new confirmation {_A_COPY}"
        )
    if lost:
        raise ValueError(
            f"{folder.path} has a verdict on {verdict.judged!r}, and these options would replace it by one without "
            f"{lost[0]}; ask for all of its arms and seeds, or {_A_COPY}"
        )


_OLD_ARM = "depth heuristic"


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
