"""`layerprobe train`: a diffusion transformer with or without LayerSync."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerprobe.cli import options
from layerprobe.cli.options import ALIGNMENT, flag
from layerprobe.cli.output import emit, progress_bar, warn
from layerprobe.progress import TaskProgress

if TYPE_CHECKING:
    from layerprobe.layersync import LayerPair


MODEL = "The network, where it does not come from a checkpoint"
LEARNING = "What is learned"
OPTIMIZER = "The optimizer"
RUNNING = "How it runs and what it leaves"

# The options of `TrainingPlan`.
PLAN = {
    "label_drop": (Annotated[float, flag(LEARNING, "Share of labels dropped.", min=0, max=1)], 0.1),
    "time_sampling": (Annotated[str, flag(LEARNING, "Of the path's time: uniform or logit-normal.")], "uniform"),
    "time_mean": (Annotated[float, flag(LEARNING, "Of the logit-normal; above 0 is noisier.")], 0.0),
    "time_std": (Annotated[float, flag(LEARNING, "Of the logit-normal.")], 1.0),
    "loss_weighting": (Annotated[str, flag(LEARNING, "none, min-snr, velocity or likelihood.")], "none"),
    "snr_gamma": (Annotated[float, flag(LEARNING, "Of min-snr.")], 5.0),
    "batch_size": (Annotated[int, flag(OPTIMIZER, "Samples per step, over all processes.", min=1)], 128),
    "accumulate": (Annotated[int, flag(OPTIMIZER, "Parts of a step, where memory is short.", min=1)], 1),
    "learning_rate": (Annotated[float, flag(OPTIMIZER, "Of AdamW.")], 1e-4),
    "warmup_steps": (Annotated[int, flag(OPTIMIZER, "Steps of linear warm-up.", min=0)], 0),
    "weight_decay": (Annotated[float, flag(OPTIMIZER, "Of AdamW.", min=0)], 0.0),
    "clip_norm": (Annotated[float, flag(OPTIMIZER, "Largest gradient norm; 0 never clips.", min=0)], 0.0),
    "ema_decay": (Annotated[float, flag(OPTIMIZER, "Of the averaged weights.")], 0.9999),
    "more_ema_decays": (Annotated[str | None, flag(OPTIMIZER, "Of further averages: 0.999,0.99.")], None),
    "precision": (Annotated[str, flag(RUNNING, "float32 or bfloat16.")], "float32"),
    "compile": (Annotated[bool, flag(RUNNING, "Compile the network.", "--compile")], False),
    "checkpoint_every": (Annotated[int, flag(RUNNING, "Steps between checkpoints.", min=1)], 500),
    "keep_last": (Annotated[int, flag(RUNNING, "Checkpoints to keep.", min=1)], 1),
    "log_every": (Annotated[int, flag(RUNNING, "Steps between rows of the log.", min=1)], 50),
}


@options.spread(sync_options=options.SYNC, plan_options=PLAN, reading=options.READING)
def train(
    *,
    data: options.Data,
    out: Annotated[Path, typer.Option(help="Folder of the training; repeat the command to continue it.")],
    steps: options.Steps,
    start: Annotated[
        str | None, typer.Option("--from", help="Checkpoint to start from instead of fresh weights.")
    ] = None,
    preset: Annotated[str | None, flag(MODEL, "tiny, small (patches that suit the data), or S/2 to XL/8.")] = None,
    patch_size: Annotated[
        str | None, flag(MODEL, "Edge of a patch, or one per axis (1,4,4); 2, or the preset's, if not given.")
    ] = None,
    width: Annotated[int | None, flag(MODEL, "Width of a token; 128, or the preset's.", min=2)] = None,
    depth: Annotated[int | None, flag(MODEL, "Number of blocks; 8, or the preset's.", min=1)] = None,
    heads: Annotated[int | None, flag(MODEL, "Attention heads; 4, or the preset's.", min=1)] = None,
    path: Annotated[str | None, flag(MODEL, "From data to noise: linear (default), gvp or vp.")] = None,
    prediction: Annotated[
        str | None, flag(MODEL, "What the network gives: velocity (default), eps, x0, v or score.")
    ] = None,
    pair: Annotated[
        list[str] | None, flag(ALIGNMENT, "student:teacher, as 2:5, or 2:5:0.5 for half the weight; may be repeated.")
    ] = None,
    selection: Annotated[Path | None, flag(ALIGNMENT, "Run folder whose pick to align.")] = None,
    sync: Annotated[str | None, flag(ALIGNMENT, "auto: find the pair while training, without labels.")] = None,
    sync_begin: Annotated[int | None, flag(ALIGNMENT, "Step of its first decision; 1000 if not given.", min=0)] = None,
    sync_every: Annotated[int | None, flag(ALIGNMENT, "Steps between decisions; 5000, 0 decides once.", min=0)] = None,
    weight: Annotated[float, flag(ALIGNMENT, "Of the alignment.")] = 0.3,
    sync_options: options.Given,
    plan_options: options.Given,
    tracker: Annotated[
        list[str] | None, flag(RUNNING, "tensorboard, wandb or trackio, beside log.csv; may be repeated.")
    ] = None,
    fsdp: Annotated[bool, flag(RUNNING, "Shard the model over the processes instead of copying it.", "--fsdp")] = False,
    reading: options.Given,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Train a SiT on the training samples of a data set, with LayerSync where a pair is given; as many processes as started.

    Several processes: `torchrun --no-python --nproc-per-node 2 layerprobe train ...`, or srun.
    """
    from layerprobe.analyses.runs import (
        auto_pick,
        encoded_once,
        load_splits,
        narrowness,
        new_config,
        picked_pairs,
        train_run,
        training_forecast,
        training_start,
    )
    from layerprobe.training import TrainingPlan, processes, require

    # Everything that may fail is inside: of several processes, one says what is wrong.
    with processes() as ranks:
        pairs, factors = _weighted_pairs(pair or [])
        _one_choice(pair=pair, selection=selection, sync=sync, **{"sync-begin": sync_begin, "sync-every": sync_every})
        plan = TrainingPlan(
            steps=steps,
            pairs=pairs or picked_pairs(selection),
            weight=weight,
            sync=options.sync_options(sync_options, factors),
            seed=seed,
            **_plan_options(plan_options),
        )
        require(tracker or [])
        reading = options.located_vae(reading)
        splits, shape = load_splits(data, reading)
        network = options.given(preset=preset, patch_size=patch_size, width=width, depth=depth, heads=heads)
        backbone = training_start(
            start,
            None if start else new_config(shape, splits.train.num_classes, **_sizes(network)),
            seed=seed,
            device=device,
            path=path,
            prediction=prediction,  # type: ignore[arg-type]
        )
        auto = auto_pick(splits, plan, out, begin=sync_begin, every=sync_every) if sync else None
        record = training_forecast(backbone, splits, plan, auto=auto, num_processes=ranks.world_size)
        record["out"] = str(out)
        if ranks.is_first and (warning := narrowness(backbone)):
            warn(warning)
        lines = [f"{key}: {value}" for key, value in record.items()]
        if not dry_run:
            bars: AbstractContextManager[TaskProgress | None] = nullcontext()
            if ranks.is_first:
                bars = progress_bar({"training": plan.batch_size})
            with bars as progress:
                splits = encoded_once(splits, reading, ranks, progress=progress)
                train_run(
                    backbone,
                    splits,
                    plan,
                    out,
                    auto=auto,
                    trackers=tracker or [],
                    fsdp=fsdp,
                    warn=warn,
                    progress=progress,
                )
            record["checkpoint"] = str(out / "model.safetensors")
            lines = [record["checkpoint"]]
        if ranks.is_first:
            emit(record, lines, as_json=as_json)


def _one_choice(*, pair: object, selection: object, sync: str | None, **details: object) -> None:
    if (pair is not None) + (selection is not None) + (sync is not None) > 1:
        raise ValueError("--pair, --selection and --sync each say what is aligned; give one of them")
    if sync not in (None, "auto"):
        raise ValueError(f"unknown --sync {sync!r}; write --sync auto, or name the layers with --pair")
    for name, value in details.items():
        if value is not None and sync is None:
            raise ValueError(f"--{name} is about --sync auto; add it, or leave --{name} out")


def _weighted_pairs(texts: Sequence[str]) -> tuple[tuple[LayerPair, ...], tuple[float, ...]]:
    """ "2:5:0.5" -> the pair and its factor; no factors where all are 1."""
    from layerprobe.layersync import LayerPair

    pairs: list[LayerPair] = []
    factors: list[float] = []
    for text in texts:
        names, factor = text.rsplit(":", 1) if text.count(":") == 2 else (text, "1")
        pairs += [LayerPair(*layers) for layers in options.layer_pairs([names])]
        try:
            factors.append(float(factor))
        except ValueError:
            raise ValueError(
                f"--pair {text} does not end in a number; write it as 2:5:0.5 for half the weight"
            ) from None
    return tuple(pairs), () if set(factors) <= {1.0} else tuple(factors)


def _plan_options(given: options.Given) -> dict[str, Any]:
    if "more_ema_decays" not in given:
        return given
    return given | {"more_ema_decays": options.numbers(given["more_ema_decays"], "--more-ema-decays")}


def _sizes(network: options.Given) -> dict[str, Any]:
    """The options of the network as `new_config` takes them; one edge of a patch holds for all axes."""
    if "patch_size" not in network:
        return network
    edges = options.integers(network["patch_size"], "--patch-size")
    return network | {"patch_size": edges[0] if len(edges) == 1 else edges}
