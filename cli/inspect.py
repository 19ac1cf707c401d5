"""`layerprobe inspect`: what a checkpoint is."""

from __future__ import annotations

from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.output import emit


@options.spread(opening=options.OPENING, reading=options.READING)
def inspect(
    checkpoint: options.Checkpoint,
    *,
    opening: options.Given,
    data: Annotated[
        str | None, typer.Option(help="Also check on this data, as `probe` takes it, that the convention fits.")
    ] = None,
    reading: options.Given,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Open a checkpoint and say what it is: layers, shapes, schedule, prediction, training."""
    from layerprobe.checkpoints import describe_checkpoint

    given = options.checkpoint_options(opening)
    record = describe_checkpoint(checkpoint, **given)
    lines = [f"{key:<14} {value}" for key, value in record.items() if key not in ("layers", "training") and value != []]
    lines += [f"{'layer':<24} tokens x width"]
    lines += [f"{name:<24} {tokens} x {width}" for name, (tokens, width) in record["layers"].items()]
    lines += [f"trained: {key} {value}" for key, value in record.get("training", {}).items()]
    if data is not None:
        from layerprobe.analyses.runs import RunPlan, examine_convention

        check = examine_convention(RunPlan(checkpoint, data, (), given, options.located_vae(reading)))
        record["convention"] = check.to_dict()
        lines += check.lines
    emit(record, lines, as_json=as_json)
