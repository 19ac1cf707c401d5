"""The job of `layerprobe train`: start, alignment, measurements on the way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from layerprobe.analyses.experiments import TRAINING
from layerprobe.analyses.runs.folder import RunFolder
from layerprobe.analyses.runs.layer_curves import CurvePlan, LayerCurves
from layerprobe.analyses.runs.network import NewNetwork
from layerprobe.analyses.runs.stages import CHOICES, CURVES, FIGURES, HELD_OUT, StageClock
from layerprobe.analyses.tables import read_table
from layerprobe.analyses.wording import selection_reason
from layerprobe.backbones import Backbone, SiT, layer_shapes
from layerprobe.checkpoints import open_checkpoint
from layerprobe.checksums import write_recorded_text
from layerprobe.data import Samples, Splits, take
from layerprobe.files import locked
from layerprobe.layersync import LayerPair
from layerprobe.progress import TaskProgress
from layerprobe.ranks import processes
from layerprobe.records import read_bounded
from layerprobe.training import Decision, Trackers, TrainingPlan, held_out_loss, open_trackers, train

if TYPE_CHECKING:
    from layerprobe.analyses.selection import AutoPick, AutoStop


def training_start(
    checkpoint: str | None,
    network: NewNetwork,
    shape: tuple[int, ...],
    num_classes: int,
    *,
    seed: int,
    device: str = "auto",
) -> Backbone:
    """Returns the model that a training starts from: a checkpoint, or a SiT with fresh weights if there is none.

    Args:
        checkpoint: Path of the checkpoint; it keeps its network, path and prediction.
        network: Network to build if there is no checkpoint.
        shape: Shape (C, *grid) of one sample.
        num_classes: Number of classes; 0 for an unconditional model.
        seed: Seed of the fresh weights.
        device: Device of the model.

    Raises:
        ValueError: If the network does not fit the samples, or a checkpoint should be trained on another path.
    """
    if checkpoint is None:
        return network.build(shape, num_classes, seed=seed, device=device)
    if network.path or network.prediction:
        raise ValueError(f"{checkpoint} has a path and a prediction; leave out --path and --prediction with --from")
    return open_checkpoint(checkpoint, dtype="float32", device=device)


def other_depth(run: str | Path | None, backbone: Backbone) -> str | None:
    """Returns a warning if the pick of a run lies at other depths in this network; None otherwise."""
    if run is None:
        return None
    layers = RunFolder(run).selection().basis.layers
    # A run of named layers has fewer of the same network.
    if len(layers) == len(backbone.layers) or RunFolder(run).plan().checkpoint.layers is not None:
        return None
    return (
        f"{run} measured a network of {len(layers)} layers and this one has {len(backbone.layers)}, so its pick lies "
        "at other depths here; pass --pair for the layers of this network"
    )


def narrowness(backbone: Backbone) -> str | None:
    """Returns a warning if tokens have fewer channels than a patch has values; None otherwise.

    Each value has its own noise, which the network must predict.
    """
    if not isinstance(backbone.module, SiT):
        return None
    config = backbone.module.config
    num_values = config.shape[0] * math.prod(config.patch)
    if num_values <= config.hidden_size:
        return None
    return (
        f"a patch of {config.patch_name} has {num_values} values but a token only {config.hidden_size}, so the network "
        f"cannot predict the noise of each; pass a smaller --patch-size or --width {num_values} or more"
    )


def auto_pick(
    splits: Splits, plan: TrainingPlan, folder: str | Path, *, begin: int | None = None, every: int | None = None
) -> AutoPick:
    """Returns the rule that decides during a training which layers are aligned.

    Args:
        splits: Data of the training; the rule measures samples of the training split.
        plan: Training plan.
        folder: Folder of the training.
        begin: Step of the first decision; the default of `AutoPick` if None.
        every: Number of steps between decisions; the default of `AutoPick` if None.

    Raises:
        ValueError: If the training ends before the first decision.
    """
    from layerprobe.analyses.selection import AutoPick

    steps: dict[str, Any] = {"warmup_steps": begin, "every": every}
    steps = {name: value for name, value in steps.items() if value is not None}
    auto = AutoPick(splits.train, folder, seed=plan.seed, **steps)
    if not auto.direct_at(plan.steps):
        raise ValueError(
            f"the first pick at step {auto.warmup_steps} is not before the end at step {plan.steps}; "
            "pass a smaller --sync-begin"
        )
    return auto


def auto_stop(splits: Splits, plan: TrainingPlan, folder: str | Path, *, every: int) -> AutoStop:
    """Returns the rule that ends the alignment of a training on a plateau.

    Args:
        splits: Data of the training; the rule measures samples of the training split.
        plan: Training plan.
        folder: Folder of the training.
        every: Number of steps between measurements.

    Raises:
        ValueError: If nothing is aligned, or a projector is trained between student and teacher.
    """
    from layerprobe.analyses.selection import AutoStop

    if not plan.pairs:
        raise ValueError("--stop-sync auto ends the alignment of given layers; pass --pair or --selection too")
    if plan.sync.projector_width:
        raise ValueError(
            "--stop-sync auto compares the tokens of student and teacher, and a projector makes their cosine "
            "meaningless; leave out --sync-projector-width or --stop-sync"
        )
    return AutoStop(plan.pairs, splits.train, folder, every=every, begin=plan.sync.warmup_steps, seed=plan.seed)


def training_size(
    backbone: Backbone,
    splits: Splits,
    plan: TrainingPlan,
    *,
    auto: AutoPick | AutoStop | None = None,
    num_processes: int = 1,
) -> dict[str, Any]:
    """Returns the size of a training, as JSON values.

    Raises:
        ValueError: If the model does not have a layer that the plan aligns.
    """
    aligned = (layer for pair in plan.pairs for layer in (pair.student, pair.teacher))
    shapes = layer_shapes(backbone, tuple(dict.fromkeys((backbone.layers[0], *aligned))))
    tokens, width = shapes[backbone.layers[0]]
    factors = plan.sync.pair_weights or (1.0,) * len(plan.pairs)
    return {
        "model": backbone.name,
        "parameters": sum(p.numel() for p in backbone.module.parameters() if p.requires_grad),
        "tokens": f"{tokens} of width {width}",
        "path": backbone.schedule.name,
        "prediction": backbone.prediction,
        "samples": len(splits.train),
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "epochs": round(plan.steps * plan.batch_size / len(splits.train), 2),
        "pairs": [str(pair) for pair in plan.pairs],
        "weights": [plan.weight * factor for factor in factors],
        "decisions_at": list(auto.direct_at(plan.steps)) if auto else [],
        "processes": num_processes,
    }


def train_run(
    backbone: Backbone,
    splits: Splits,
    plan: TrainingPlan,
    folder: str | Path,
    *,
    auto: AutoPick | AutoStop | None = None,
    curves: CurvePlan | None = None,
    drift_from: Backbone | None = None,
    trackers: Sequence[str] = (),
    fsdp: bool = False,
    clock: StageClock | None = None,
    warn: Callable[[str], None],
    say: Callable[[str], None] | None = None,
    progress: TaskProgress | None = None,
) -> Backbone:
    """Trains on the training samples and writes the loss on the validation samples to `held_out.csv` at eleven steps.

    With `curves` the layers of the model with averaged weights are measured too, see `LayerCurves`, by the first
    process while the others wait. At the end, `curves.png` and `curves.svg` show the logged and the held-out losses.
    Several processes all call this function, and the first one writes.

    Args:
        backbone: Initial model.
        splits: Data of the training, encoded if the model takes latents.
        plan: Training plan.
        folder: Folder of the training.
        auto: Rule that decides during the training what is aligned; it measures the training samples of `splits`.
        curves: Steps at which the layers are measured, and how; None measures none.
        drift_from: Model whose layers the measured ones are compared with; the start of the training if None.
        trackers: Services that also get every row of the log and the held-out losses, see `open_trackers`.
        fsdp: Whether to shard the model over the processes.
        clock: Clock of the stages, whose times are kept in the folder.
        warn: Called with one line if a tracker fails.
        say: Called with one line for what the measurements of the layers show; `warn` if None.
        progress: Called with ("training", steps done, steps in total).

    Returns:
        The model with averaged weights.
    """
    folder, clock = Path(folder), clock or StageClock(folder)
    held_out = take(splits, num_validation=min(len(splits.validation), 1000)).validation
    config = {"model": backbone.name, "data": splits.train.fingerprint, "plan": json.loads(json.dumps(asdict(plan)))}
    name = folder.resolve().name
    auto = replace(auto, samples=splits.train) if auto else None  # The rule was made before images were encoded.
    report = None if progress is None else lambda step, total, _: progress("training", step, total)
    with (
        processes() as ranks,
        locked(folder) if ranks.is_first else nullcontext(),
        closing(open_trackers(trackers, folder, config=config, run_name=name, warn=warn)) as tracked,
    ):
        examined_at = [round(i * plan.steps / 10) for i in range(11)]
        measured_at = [*range(0, plan.steps, curves.every), plan.steps] if curves else []
        layers = None
        if curves and ranks.is_first:
            layers = LayerCurves(
                splits, folder, curves, pairs=plan.pairs, drift_from=drift_from, log=tracked, say=say or warn
            )

        def observe(step: int, model: Backbone) -> None:
            if step in examined_at:
                clock.begin_own(HELD_OUT)
                _examine(step, model, held_out, folder, tracked)
            if layers and step in measured_at and layers.is_due(step, last=step == plan.steps):
                clock.begin_own(CURVES)
                layers.measure(step, model)
            clock.begin_own(TRAINING)

        def direct(step: int, model: Backbone) -> Decision | None:
            assert auto is not None
            clock.begin_own(CHOICES)
            decision = auto.direct(step, model)
            clock.begin_own(TRAINING)
            return decision

        clock.begin(TRAINING)

        model = train(
            backbone,
            splits.train,
            plan,
            folder,
            observe=observe,
            observe_at={*examined_at, *measured_at},
            progress=report,
            log=tracked,
            direct=direct if auto else None,
            direct_at=auto.direct_at(plan.steps) if auto else (),
            fsdp=fsdp,
        )
        if ranks.is_first:
            clock.begin_own(FIGURES)
            _draw(folder)
            if layers:
                layers.close()
            clock.end()
    return model


def picked_pairs(run: str | Path | None) -> tuple[LayerPair, ...]:
    """Returns the layer pair that a run picked, or no pair if there is no run.

    Raises:
        ValueError: If the run has no admissible pair.
    """
    if run is None:
        return ()
    selection = RunFolder(run).selection()
    if selection.pick is None:
        raise ValueError(f"{run} has no admissible pair ({selection_reason(selection)}); pass --pair")
    return (selection.pick,)


def _examine(step: int, model: Backbone, held_out: Samples, folder: Path, tracked: Trackers) -> None:
    losses = held_out_loss(model, held_out)
    path = folder / "held_out.csv"
    remedy = "delete it, and the curves lack the losses before this step"
    lines = read_bounded(path, remedy=remedy).splitlines() if path.is_file() else []
    other_lines = [line for line in lines if not line.startswith(f"{step},")]
    header = "step," + ",".join(f"noise level {level:g}" for level in losses)
    row = f"{step}," + ",".join(f"{loss:.6f}" for loss in losses.values())
    write_recorded_text(path, "\n".join([*(other_lines or [header]), row]) + "\n")
    tracked(step, {f"held-out loss {level:g}": loss for level, loss in losses.items()})


def _draw(folder: Path) -> None:
    """Draws the curves, unless they are newer than the log."""
    from layerprobe.analyses.figures import save_figure, training_curves

    log, figure = folder / "log.csv", folder / "curves.svg"  # the last file that is drawn
    drawn = figure.is_file() and figure.stat().st_mtime_ns > log.stat().st_mtime_ns
    table, held_out = (_read_curves(path) for path in (log, folder / "held_out.csv"))
    if not drawn and len(table):
        save_figure(training_curves(table, held_out), folder, "curves")


def _read_curves(path: Path) -> pd.DataFrame:
    """The table of a training, whose columns are all numbers."""
    return read_table(path, ("step",), None, remedy="delete it, and the next checkpoint or evaluation begins it again")
