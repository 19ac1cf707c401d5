"""`layerprobe train` from start to finish: where a training starts, what it aligns, what is measured on the way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from layerprobe.analyses.runs import data as runs
from layerprobe.analyses.runs.folder import read_selection
from layerprobe.backbones import Backbone, SiT, SiTConfig, layer_shapes, new_sit
from layerprobe.checkpoints import open_checkpoint, resolve_device
from layerprobe.data import Samples, Splits, take
from layerprobe.files import write_text
from layerprobe.layersync import LayerPair
from layerprobe.noise import Prediction, schedule_from_name
from layerprobe.progress import TaskProgress
from layerprobe.training import Ranks, Trackers, TrainingPlan, held_out_loss, open_trackers, processes, train

if TYPE_CHECKING:
    from layerprobe.analyses.selection import AutoPick

# The paths of SiT, from data to noise, by the schedules that follow them.
PATHS = {"linear": "sit", "gvp": "sit-gvp", "vp": "sit-vp"}


def new_config(
    shape: tuple[int, ...],
    num_classes: int,
    *,
    preset: str | None = None,
    patch_size: int | tuple[int, ...] | None = None,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
) -> SiTConfig:
    """The shape of a fresh network: a preset's, or 8 blocks of width 128 with 4 heads on patches of 2.

    Args:
        shape: Shape (C, *grid) of one sample.
        num_classes: 0 for an unconditional model.
        preset: See `SiTConfig.preset`; what follows replaces its numbers.
        patch_size: Edge of a patch, or one per axis.
        width: Of a token.
        depth: Number of blocks.
        heads: Attention heads.

    Raises:
        ValueError: If these make no network.
    """
    if preset is None:
        patch_size = 2 if patch_size is None else patch_size
        return SiTConfig(shape, patch_size, width or 128, depth or 8, heads or 4, num_classes)
    config = SiTConfig.preset(preset, shape=shape, num_classes=num_classes, patch_size=patch_size)
    return replace(
        config,
        hidden_size=width or config.hidden_size,
        depth=depth or config.depth,
        num_heads=heads or config.num_heads,
    )


def training_start(
    checkpoint: str | None,
    config: SiTConfig | None,
    *,
    seed: int,
    device: str = "auto",
    path: str | None = None,
    prediction: Prediction | None = None,
) -> Backbone:
    """The model that a training starts from: a checkpoint, or a SiT with fresh weights where there is none.

    Args:
        checkpoint: Its path and prediction are those that it was trained with.
        config: The shape of a fresh network; None with a checkpoint.
        seed: Of the fresh weights.
        device: "auto", "cpu", "cuda" and so on.
        path: For fresh weights, one of `PATHS`; linear where not given.
        prediction: For fresh weights; the velocity where not given.

    Raises:
        ValueError: If the path is unknown, or a checkpoint is to be trained on another one than its own.
    """
    if checkpoint is not None:
        if path or prediction:
            raise ValueError(f"{checkpoint} has a path and a prediction; leave out --path and --prediction with --from")
        return open_checkpoint(checkpoint, device=device)
    if path not in (None, *PATHS):
        raise ValueError(f"unknown path {path!r}; use {', '.join(PATHS)}")
    schedule = schedule_from_name(PATHS[path or "linear"])
    assert config is not None
    backbone = new_sit(config, seed=seed, schedule=schedule, prediction=prediction or "velocity")
    backbone.module.to(resolve_device(device))
    return backbone


def narrowness(backbone: Backbone) -> str | None:
    """What is wrong where tokens have fewer channels than a patch has numbers, each with noise of its own to tell."""
    if not isinstance(backbone.module, SiT):
        return None
    config = backbone.module.config
    numbers = config.shape[0] * math.prod(config.patch)
    if numbers <= config.hidden_size:
        return None
    return (
        f"a patch of {config.patch_name} holds {numbers} numbers and a token only {config.hidden_size}, so the network "
        f"cannot tell the noise of each; pass a smaller --patch-size or --width {numbers} or more"
    )


def encoded_once(
    splits: Splits, reading: Mapping[str, Any], ranks: Ranks, *, progress: TaskProgress | None = None
) -> Splits:
    """The splits as latents where `reading` asks for it; the first process encodes, the others find what it wrote."""
    for turn in (True, False):
        if ranks.is_first is turn:
            splits = runs.encoded(splits, reading, progress=progress)
        ranks.barrier()
    return splits


def auto_pick(
    splits: Splits, plan: TrainingPlan, folder: str | Path, *, begin: int | None = None, every: int | None = None
) -> AutoPick:
    """What decides on the way which layers a training aligns; its defaults where a number is not given.

    Raises:
        ValueError: If it would never decide.
    """
    from layerprobe.analyses.selection import AutoPick

    given: dict[str, Any] = {
        name: value for name, value in (("warmup_steps", begin), ("every", every)) if value is not None
    }
    auto = AutoPick(splits.train, folder, seed=plan.seed, **given)
    if not auto.direct_at(plan.steps):
        raise ValueError(
            f"the first pick at step {auto.warmup_steps} is not before the end at step {plan.steps}; "
            "pass a smaller --sync-begin"
        )
    return auto


def training_forecast(
    backbone: Backbone, splits: Splits, plan: TrainingPlan, *, auto: AutoPick | None = None, num_processes: int = 1
) -> dict[str, Any]:
    """What a training is, in numbers.

    Raises:
        ValueError: If a layer to align is not in the model.
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
    auto: AutoPick | None = None,
    trackers: Sequence[str] = (),
    fsdp: bool = False,
    warn: Callable[[str], None],
    progress: TaskProgress | None = None,
) -> Backbone:
    """Trains on the training samples; `held_out.csv` gets the loss on the validation samples, ten times on the way.

    At the end, `curves.png` and `curves.svg` show log and held-out losses. With several processes, all of them call
    this and the first one writes.

    Args:
        backbone: The model to start from.
        splits: The data.
        plan: How it is trained.
        folder: Where the run is kept.
        auto: Decides on the way what is aligned; it gets the training samples of `splits`.
        trackers: Services that get every row of the log and the held-out losses too, see `open_trackers`.
        fsdp: Shard the model over the processes.
        warn: Called with one line when a tracker fails.
        progress: Called with ("training", steps done, steps in all).
    """
    folder = Path(folder)
    held_out = take(splits, num_validation=min(len(splits.validation), 1000)).validation
    config = {"model": backbone.name, "data": splits.train.fingerprint, "plan": json.loads(json.dumps(asdict(plan)))}
    name = folder.resolve().name
    auto = replace(auto, samples=splits.train) if auto else None  # as latents, where they were encoded meanwhile
    report = None if progress is None else lambda step, total, _: progress("training", step, total)
    with (
        processes() as ranks,
        closing(open_trackers(trackers, folder, config=config, run_name=name, warn=warn)) as tracked,
    ):
        model = train(
            backbone,
            splits.train,
            plan,
            folder,
            observe=lambda step, model: _examine(step, model, held_out, folder, tracked),
            observe_at=[round(i * plan.steps / 10) for i in range(11)],
            progress=report,
            log=tracked,
            direct=auto.direct if auto else None,
            direct_at=auto.direct_at(plan.steps) if auto else (),
            fsdp=fsdp,
        )
        if ranks.is_first:
            _draw(folder)
    return model


def picked_pairs(run: str | Path | None) -> tuple[LayerPair, ...]:
    """The pick of a run as a training takes it; none for no run.

    Raises:
        ValueError: If the run has no admissible pair.
    """
    if run is None:
        return ()
    selection = read_selection(run)
    if selection.pick is None:
        raise ValueError(f"{run} has no admissible pair ({selection.reason}); pass --pair")
    return (selection.pick,)


def _examine(step: int, model: Backbone, held_out: Samples, folder: Path, tracked: Trackers) -> None:
    losses = held_out_loss(model, held_out)
    place = folder / "held_out.csv"
    lines = place.read_text(encoding="utf-8").splitlines() if place.is_file() else []
    before = [line for line in lines if not line.startswith(f"{step},")]
    header = "step," + ",".join(f"noise level {level:g}" for level in losses)
    row = f"{step}," + ",".join(f"{loss:.6f}" for loss in losses.values())
    write_text(place, "\n".join([*(before or [header]), row]) + "\n")
    tracked(step, {f"held-out loss {level:g}": loss for level, loss in losses.items()})


def _draw(folder: Path) -> None:
    """Draws the curves, unless they are there and nothing was trained since."""
    from layerprobe.analyses.figures import save_figure, training_curves

    log, figure = folder / "log.csv", folder / "curves.png"
    drawn = figure.is_file() and figure.stat().st_mtime_ns > log.stat().st_mtime_ns
    table = pd.read_csv(log)
    if not drawn and len(table):
        save_figure(training_curves(table, pd.read_csv(folder / "held_out.csv")), folder, "curves")
