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
    rows = [(name, text) for name, text in _checkpoint_rows(record) if text]
    rows += [("assumed", assumption) for assumption in record["assumptions"]]
    lines = [f"{name:<14} {text}" for name, text in rows]
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


def _checkpoint_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the description of a checkpoint as names and texts; empty texts are of what it does not have."""
    named = (
        ", ".join(map(str, record.get(key, ()))) for key in ("other_weights", "arguments", "left_unbuilt", "unused")
    )
    other_weights, arguments, left_unbuilt, unused = named
    pairs = zip(record["value_range"][::2], record["value_range"][1::2], strict=True)
    classes = record["classes"]
    return [
        ("checkpoint", record["checkpoint"]),
        ("model", record["model"]),
        ("family", record.get("family", "")),
        ("format", record["format"]),
        ("weights", record.get("weights", "")),
        ("other weights", other_weights),
        ("settings from", arguments),
        ("left unbuilt", left_unbuilt),
        ("unused", unused),
        ("parameters", str(record["parameters"])),
        ("input shape", " x ".join(map(str, record["shape"]))),
        ("input values", ", ".join(f"{low:g} to {high:g}" for low, high in pairs) + " for -1 to 1 of the data"),
        ("latents", record.get("latents", "")),
        ("heads", str(record["heads"] or "")),
        ("classes", f"{classes}, and the null label {classes}" if classes else "none"),
        (
            "schedule",
            f"{record['schedule']}, time {record['data_at_time']:g} at data, {record['noise_at_time']:g} at noise",
        ),
        ("prediction", record["prediction"]),
        ("weights hash", record["weights_hash"]),
    ]


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
