"""`layerprobe train`: a SiT with or without LayerSync."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.output import emit, progress_bar


@options.spread(reading=options.READING)
def train(
    *,
    data: options.Data,
    out: Annotated[Path, typer.Option(help="Folder of the training; repeat the command to continue it.")],
    steps: options.Steps,
    preset: Annotated[str | None, typer.Option(help="S/2 to XL/8; or give the sizes below.")] = None,
    patch_size: Annotated[int, typer.Option(min=1, help="Edge of a patch.")] = 2,
    width: Annotated[int, typer.Option(min=2, help="Width of a token.")] = 128,
    depth: Annotated[int, typer.Option(min=1, help="Number of blocks.")] = 8,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 4,
    start: Annotated[
        str | None, typer.Option("--from", help="Checkpoint to start from instead of fresh weights.")
    ] = None,
    pair: Annotated[list[str] | None, typer.Option(help="student:teacher, as 2:5; may be repeated.")] = None,
    selection: Annotated[Path | None, typer.Option(help="Run folder whose pick to align.")] = None,
    weight: options.Weight = 0.3,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-4,
    warmup_steps: Annotated[int, typer.Option(min=0, help="Steps of linear warm-up.")] = 0,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of AdamW.")] = 0.0,
    clip_norm: Annotated[float, typer.Option(min=0, help="Largest gradient norm; 0 never clips.")] = 0.0,
    ema_decay: Annotated[float, typer.Option(help="Of the averaged weights.")] = 0.9999,
    label_drop: Annotated[float, typer.Option(min=0, max=1, help="Share of labels dropped.")] = 0.1,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    compile_network: Annotated[bool, typer.Option("--compile", help="Compile the network.")] = False,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    reading: options.Given,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Train a SiT on the fit samples of a data set, with LayerSync where a pair is given."""
    from layerprobe.analyses import runs, training_runs
    from layerprobe.backbones.sit import SiTConfig
    from layerprobe.layersync import LayerPair
    from layerprobe.training import TrainingPlan

    pairs = tuple(LayerPair(*names) for names in options.layer_pairs(pair or []))
    plan = TrainingPlan(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        ema_decay=ema_decay,
        label_drop=label_drop,
        pairs=pairs or training_runs.picked_pairs(selection),
        weight=weight,
        precision=precision,  # type: ignore[arg-type]
        compile=compile_network,
        seed=seed,
        checkpoint_every=checkpoint_every,
    )
    reading = options.located_vae(reading)
    splits, shape = runs.load_splits(data, reading)
    num_classes = splits.fit.num_classes
    if preset is None:
        sit = SiTConfig(shape, patch_size, width, depth, heads, num_classes)
    else:
        sit = SiTConfig.preset(preset, shape=shape, num_classes=num_classes)
    backbone = training_runs.training_start(start, sit, seed=seed, device=device)
    record = {
        "model": backbone.name,
        "samples": len(splits.fit),
        "pairs": [str(pair) for pair in plan.pairs],
        "steps": steps,
        "out": str(out),
    }
    if dry_run:
        emit(record, [f"{key}: {value}" for key, value in record.items()], as_json=as_json)
        return
    with progress_bar() as progress:
        splits = runs.encoded(splits, reading, progress=progress)
        training_runs.train_run(backbone, splits, plan, out, progress=progress)
    path = str(out / "model.safetensors")
    emit(record | {"checkpoint": path}, [path], as_json=as_json)
