"""`layerprobe inspect`: description of a checkpoint or of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from layerprobe.checkpoints import CheckpointSource
from layerprobe.cli import options
from layerprobe.cli.fields import from_dataclasses, without
from layerprobe.cli.output import emit
from layerprobe.data import DataSource


@from_dataclasses()
def inspect(
    checkpoint: CheckpointSource | None,
    *,
    data: Annotated[DataSource | None, without(*options.COUNTS)],
    out: Annotated[Path | None, typer.Option(help="Folder for peek.png, a picture of some samples.")] = None,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Describe a checkpoint or a data set.

    For a checkpoint: layers, shapes, schedule, prediction, training; with --data also whether schedule and prediction
    fit the weights. For --data alone: columns, lengths, classes, unreadable items.
    """
    if checkpoint is not None:
        if out is not None:
            raise ValueError("--out is for pictures of --data without a checkpoint; leave one of them out")
        record, lines = _describe_checkpoint(checkpoint, data)
    elif data is not None:
        record, lines = _describe_data(data, out)
    else:
        raise ValueError("nothing to inspect; pass a checkpoint, or a data set as --data")
    emit(record, lines, as_json=as_json)


def _describe_checkpoint(checkpoint: CheckpointSource, data: DataSource | None) -> tuple[dict[str, Any], list[str]]:
    record = checkpoint.describe()
    apart = ("layers", "training", "assumptions")
    lines = [f"{key:<14} {value}" for key, value in record.items() if key not in apart and value != []]
    lines += [f"{'assumed':<14} {assumption}" for assumption in record["assumptions"]]
    lines += [f"{'layer':<24} tokens x width"]
    lines += [f"{name:<24} {tokens} x {width}" for name, (tokens, width) in record["layers"].items()]
    lines += [f"trained: {key} {value}" for key, value in record.get("training", {}).items()]
    if data is not None:
        from layerprobe.analyses.runs import RunPlan, examine_convention
        from layerprobe.checkpoints import convention_lines

        check = examine_convention(RunPlan(checkpoint, data))
        record["convention"] = check.to_dict()
        lines += convention_lines(check)
    return record, lines


def _describe_data(data: DataSource, out: Path | None) -> tuple[dict[str, Any], list[str]]:
    from layerprobe.analyses.runs import examine_data, lines_of, peek

    record, splits = examine_data(data)
    lines = lines_of(record)
    if out is not None:
        from layerprobe.analyses.figures import save_figure

        save_figure(peek(splits), out, "peek")
        record["peek"] = str(out / "peek.png")
        lines.append(record["peek"])
    return record, lines
