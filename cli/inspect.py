"""`layerprobe inspect`: what a checkpoint is, and what a data set is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from layerprobe.cli import options
from layerprobe.cli.output import emit


@options.spread(opening=options.OPENING, reading=options.READING)
def inspect(
    checkpoint: Annotated[
        str | None,
        typer.Argument(help="A weight file or a folder of them, a diffusers folder, or 'digits' for the embedded one."),
    ] = None,
    *,
    opening: options.Given,
    data: Annotated[
        str | None,
        typer.Option(
            help="Without a checkpoint: say what this data set is, as `train` takes it. With one: check that "
            "the convention fits."
        ),
    ] = None,
    reading: options.Given,
    out: Annotated[Path | None, typer.Option(help="Folder for peek.png, some of the samples.")] = None,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Open a checkpoint or a data set and say what it is.

    Of a checkpoint: layers, shapes, schedule, prediction, training. Of data: columns, lengths, classes, what cannot be
    read.
    """
    if checkpoint is None:
        if data is None:
            raise ValueError("nothing to inspect; pass a checkpoint, or a data set as --data")
        if opening:
            raise ValueError(f"{_flags(opening)} opens a checkpoint; pass one, or leave it out")
        record, lines = _data(data, options.located_vae(reading), out)
    else:
        if out is not None:
            raise ValueError("--out is for pictures of --data without a checkpoint; leave one of them out")
        record, lines = _checkpoint(checkpoint, options.checkpoint_options(opening), data, reading)
    emit(record, lines, as_json=as_json)


def _checkpoint(
    checkpoint: str, given: dict[str, Any], data: str | None, reading: options.Given
) -> tuple[dict[str, Any], list[str]]:
    from layerprobe.checkpoints import describe_checkpoint

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
    return record, lines


def _data(data: str, reading: options.Given, out: Path | None) -> tuple[dict[str, Any], list[str]]:
    from layerprobe.analyses.runs import examine_data, lines_of, peek

    record, splits = examine_data(data, reading)
    lines = lines_of(record)
    if out is not None:
        from layerprobe.analyses.figures import save_figure

        save_figure(peek(splits), out, "peek")
        record["peek"] = str(out / "peek.png")
        lines.append(record["peek"])
    return record, lines


def _flags(opening: options.Given) -> str:
    return " ".join(f"--{name.replace('_', '-')}" for name in opening)
