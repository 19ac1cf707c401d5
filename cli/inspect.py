"""`layerprobe inspect`: what a checkpoint is."""

from __future__ import annotations

from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.output import emit


def inspect(
    checkpoint: options.Checkpoint,
    family: options.Family = None,
    num_heads: options.NumHeads = None,
    model: options.Model = None,
    layers: options.Layers = None,
    schedule: options.Schedule = None,
    prediction: options.Prediction = None,
    shape: options.Shape = None,
    num_classes: options.NumClasses = None,
    data: Annotated[
        str | None, typer.Option(help="Also check on this data, as `probe` takes it, that the convention fits.")
    ] = None,
    size: options.Size = None,
    channels: options.Channels = None,
    split: options.Split = None,
    image_column: options.ImageColumn = None,
    label_column: options.LabelColumn = None,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Open a checkpoint and say what it is: layers, shapes, schedule, prediction, training."""
    from layerprobe.checkpoints import describe_checkpoint, open_checkpoint

    opening = options.checkpoint_options(
        family=family,
        num_heads=num_heads,
        model=model,
        layers=layers,
        schedule=schedule,
        prediction=prediction,
        shape=shape,
        num_classes=num_classes,
    )
    record = describe_checkpoint(checkpoint, **opening)
    lines = [f"{key:<14} {value}" for key, value in record.items() if key not in ("layers", "training")]
    lines += [f"{'layer':<24} tokens x width"]
    lines += [f"{name:<24} {tokens} x {width}" for name, (tokens, width) in record["layers"].items()]
    lines += [f"trained: {key} {value}" for key, value in record["training"].items()]
    if data is not None:
        from layerprobe.convention import check_convention
        from layerprobe.data.sources import load

        backbone = open_checkpoint(checkpoint, **opening)
        reading = options.given(
            size=size, channels=channels, split=split, image_column=image_column, label_column=label_column
        )
        check = check_convention(backbone, load(data, expect_shape=backbone.shape, **reading).fit)
        record["convention"] = check.to_dict()
        lines += check.lines
    emit(record, lines, as_json=as_json)
