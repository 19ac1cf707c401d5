"""`layerprobe inspect`: what a checkpoint is."""

from __future__ import annotations

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
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Open a checkpoint and say what it is: layers, shapes, schedule, prediction, training."""
    from layerprobe.checkpoints import describe_checkpoint

    record = describe_checkpoint(
        checkpoint,
        **options.checkpoint_options(
            family=family,
            num_heads=num_heads,
            model=model,
            layers=layers,
            schedule=schedule,
            prediction=prediction,
            shape=shape,
            num_classes=num_classes,
        ),
    )
    lines = [f"{key:<14} {value}" for key, value in record.items() if key not in ("layers", "training")]
    lines += [f"{'layer':<24} tokens x width"]
    lines += [f"{name:<24} {tokens} x {width}" for name, (tokens, width) in record["layers"].items()]
    lines += [f"trained: {key} {value}" for key, value in record["training"].items()]
    emit(record, lines, as_json=as_json)
