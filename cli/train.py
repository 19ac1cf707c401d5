"""`layerprobe train`: a diffusion transformer with or without LayerSync."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerprobe.analyses.runs import NewNetwork
from layerprobe.cli import options
from layerprobe.cli.costs import emit_forecast, tell_forecast, tell_took
from layerprobe.cli.fields import from_dataclasses, without
from layerprobe.cli.output import emit, progress_bar, tell, tell_reading, warn
from layerprobe.cli.parsing import layer_pairs
from layerprobe.data import DataSource
from layerprobe.layersync import LayerPair, SyncOptions
from layerprobe.options import CHECKPOINT_PANEL, LAYERSYNC_PANEL, OUTPUT_PANEL, PROBING_PANEL, RUNNING_PANEL
from layerprobe.progress import TaskProgress, named_progress
from layerprobe.training import TrainingPlan

if TYPE_CHECKING:
    from layerprobe.analyses.selection import AutoPick, AutoStop


def _flag(panel: str, text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **settings)


@from_dataclasses(several_processes=True)
def train(
    *,
    data: Annotated[DataSource, without(*options.COUNTS)],
    out: Annotated[Path, _flag(OUTPUT_PANEL, "Folder of the training; repeat the command to continue it.")],
    start: Annotated[
        str | None,
        _flag(
            CHECKPOINT_PANEL,
            "Checkpoint to start from instead of fresh weights.",
            "--from",
            callback=options.existing_checkpoint,
        ),
    ] = None,
    network: NewNetwork,
    pair: Annotated[
        list[str] | None,
        _flag(
            LAYERSYNC_PANEL, "Pair to align, student:teacher such as 2:5, or 2:5:0.5 for half the weight; repeatable."
        ),
    ] = None,
    selection: Annotated[
        Path | None, _flag(LAYERSYNC_PANEL, "Run folder whose pick is aligned.", callback=options.existing_run)
    ] = None,
    sync: Annotated[
        str | None, _flag(LAYERSYNC_PANEL, "auto to choose the pair during the training, without labels.")
    ] = None,
    sync_begin: Annotated[
        int | None, _flag(LAYERSYNC_PANEL, "Step of the first choice of --sync auto; 1000 if not given.", min=0)
    ] = None,
    sync_every: Annotated[
        int | None,
        _flag(
            LAYERSYNC_PANEL,
            "Number of steps between choices of --sync auto; 5000 if not given, 0 for one choice.",
            min=0,
        ),
    ] = None,
    stop_sync: Annotated[
        str | None,
        _flag(LAYERSYNC_PANEL, "auto to end the alignment when the cosine of the pairs has reached a plateau."),
    ] = None,
    sync_options: SyncOptions,
    plan: TrainingPlan,
    probe_every: Annotated[
        int | None,
        _flag(PROBING_PANEL, "Number of steps between measurements of all layers; none if not given.", min=1),
    ] = None,
    probe_share: Annotated[
        float | None,
        _flag(
            PROBING_PANEL,
            "Largest share of the time for these measurements, 0.02 if not given; others are left out. 1 leaves out "
            "none.",
            max=1,
        ),
    ] = None,
    drift_from: Annotated[
        str | None,
        _flag(PROBING_PANEL, "Checkpoint that the layers are compared with; the start of the training if not given."),
    ] = None,
    tracker: Annotated[
        list[str] | None,
        _flag(RUNNING_PANEL, "Tracker beside log.csv: tensorboard, wandb or trackio; may be repeated."),
    ] = None,
    fsdp: Annotated[
        bool, _flag(RUNNING_PANEL, "Shard the model over the processes instead of copying it.", "--fsdp")
    ] = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    deterministic: options.Deterministic = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Train a SiT on the training split of a data set, with LayerSync if a pair is given, in one or several processes.

    Several processes are started by `torchrun --no-python --nproc-per-node 2 -- layerprobe train ...`, or by srun.

    Examples:
        # A small model of your images, without LayerSync.
        layerprobe train --data images/ --preset small --steps 20000 --out runs/plain
        # The same with the pick of a run, or with a pair that you name.
        layerprobe train --data images/ --preset small --steps 20000 --selection runs/mine --out runs/sync
        layerprobe train --data digits --steps 500 --pair 2:5 --out runs/digits-sync
    """
    from layerprobe.analyses.experiments import TRAINING
    from layerprobe.analyses.runs import (
        ENCODING,
        Cost,
        CurvePlan,
        StageClock,
        auto_pick,
        auto_stop,
        describe_decisions,
        narrowness,
        other_depth,
        pair_warnings,
        picked_pairs,
        plan_left,
        rough_seconds,
        train_run,
        training_cost,
        training_size,
        training_start,
    )
    from layerprobe.checkpoints import open_checkpoint
    from layerprobe.ranks import processes
    from layerprobe.training import check_training, require

    # Everything that may fail is inside, so that only one of several processes reports it.
    with processes() as ranks:
        pairs, factors = _weighted_pairs(pair or [])
        _one_choice(pair=pair, selection=selection, sync=sync, **{"sync-begin": sync_begin, "sync-every": sync_every})
        _stop_choice(stop_sync, sync)
        _needs_probes(probe_every, **{"probe-share": probe_share, "drift-from": drift_from})
        sync_options = replace(sync_options, pair_weights=factors)
        plan = replace(plan, pairs=pairs or picked_pairs(selection), sync=sync_options, seed=seed)
        require(tracker or [])
        splits = data.load()
        shape, num_classes = data.model_shape(splits), splits.train.num_classes
        backbone = training_start(start, network, shape, num_classes, seed=seed, device=device)
        backbone = backbone.in_precision(plan.precision)
        auto: AutoPick | AutoStop | None = None
        if sync:
            auto = auto_pick(splits, plan, out, begin=sync_begin, every=sync_every)
        elif stop_sync:
            auto = auto_stop(splits, plan, out, every=probe_every or CurvePlan.every)
        curves = None
        if probe_every:
            share = CurvePlan.max_share if probe_share is None else probe_share
            curves = CurvePlan(every=probe_every, max_share=share, seed=seed)
        if data.vae is None:  # Latents are known once they are encoded.
            check_training(backbone, splits.train, plan, out)
        record = training_size(backbone, splits, plan, auto=auto, num_processes=ranks.world_size)
        record["out"] = str(out)
        if ranks.is_first:
            tell_reading(splits.train.reading)
        for warning in (narrowness(backbone), other_depth(selection, backbone)):
            if ranks.is_first and warning:
                warn(warning)
        for aligned, weight in zip(plan.pairs if ranks.is_first else (), record["weights"], strict=False):
            for line in pair_warnings(aligned, backbone.layers, weight=weight):
                warn(line)

        def cost(plan: TrainingPlan) -> Cost:
            return training_cost(
                backbone, splits, plan, vae=data.vae, auto=auto, curves=curves, processes=ranks.world_size
            )

        if dry_run:
            record |= {"device": str(backbone.device), "precision": backbone.precision}
            emit_forecast(record, cost(plan), as_json=as_json)
        else:
            clock = StageClock(out)
            if ranks.is_first and not fsdp:  # The timed steps would have the whole model on one device.
                left = plan_left(plan, out)
                rough_s = partial(rough_seconds, backbone, splits, left, data.vae)
                clock.foretell(TRAINING, rough_s, partial(cost, left), tell_forecast)
            bars: AbstractContextManager[TaskProgress | None] = nullcontext()
            if ranks.is_first:
                bars = progress_bar({"training": plan.batch_size})
            with bars as progress:
                if data.vae is not None:
                    clock.begin(ENCODING)
                splits = data.encode(splits, progress=named_progress(progress, "encoding images"))
                train_run(
                    backbone,
                    splits,
                    plan,
                    out,
                    auto=auto,
                    curves=curves,
                    drift_from=open_checkpoint(drift_from, device=device) if drift_from and ranks.is_first else None,
                    trackers=tracker or [],
                    fsdp=fsdp,
                    clock=clock,
                    warn=warn,
                    say=tell,
                    progress=progress,
                )
            record["checkpoint"] = str(out / "model.safetensors")
            if ranks.is_first:
                tell_took(out)
                emit(record, [*describe_decisions(out), record["checkpoint"]], as_json=as_json)


def _one_choice(*, pair: object, selection: object, sync: str | None, **details: object) -> None:
    if (pair is not None) + (selection is not None) + (sync is not None) > 1:
        raise ValueError("--pair, --selection and --sync each say what is aligned; pass only one of them")
    if sync not in (None, "auto"):
        raise ValueError(f"unknown --sync {sync!r}; write --sync auto, or name the layers with --pair")
    for name, value in details.items():
        if value is not None and sync is None:
            raise ValueError(f"--{name} has no effect without --sync auto; pass it too, or leave out --{name}")


def _stop_choice(stop_sync: str | None, sync: str | None) -> None:
    if stop_sync not in (None, "auto"):
        raise ValueError(f"unknown --stop-sync {stop_sync!r}; write --stop-sync auto, or a step as --sync-stop-step")
    if stop_sync and sync:
        raise ValueError("--sync auto chooses the pair again and again, and --stop-sync auto ends it; pass one of them")


def _needs_probes(probe_every: int | None, **details: object) -> None:
    for name, value in details.items():
        if value is not None and probe_every is None:
            raise ValueError(f"--{name} has no effect without --probe-every; pass it too, or leave out --{name}")


def _weighted_pairs(texts: Sequence[str]) -> tuple[tuple[LayerPair, ...], tuple[float, ...]]:
    """Parses "2:5:0.5" as the pair and its factor; no factors if all are 1."""
    pairs: list[LayerPair] = []
    factors: list[float] = []
    for text in texts:
        names, factor = text.rsplit(":", 1) if text.count(":") == 2 else (text, "1")
        pairs += [LayerPair(*layers) for layers in layer_pairs([names])]
        try:
            factors.append(float(factor))
        except ValueError:
            raise ValueError(
                f"--pair {text} does not end with a number; write it as 2:5:0.5 for half the weight"
            ) from None
    return tuple(pairs), () if set(factors) <= {1.0} else tuple(factors)
