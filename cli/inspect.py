"""`layerprobe inspect`: description of a checkpoint or of a data set."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from layerprobe.checkpoints import CheckpointSource
from layerprobe.cli import options
from layerprobe.cli.fields import from_dataclasses, without
from layerprobe.cli.output import emit
from layerprobe.data import DataSource
from layerprobe.messages import MAX_MESSAGE, safe
from layerprobe.options import OUTPUT_PANEL

# What the description of a checkpoint has rows of its own for, and other names for its keys.
_NOT_ROWS = ("layers", "parts", "training", "assumptions", "data_at_time", "noise_at_time")
_ROW_NAMES = {"arguments": "settings from", "shape": "input shape", "value_range": "input values"}
_SHOWN = 6  # members of a list that are shown


@from_dataclasses()
def inspect(
    checkpoint: CheckpointSource | None,
    *,
    data: Annotated[DataSource | None, without(*options.COUNTS)],
    out: Annotated[
        Path | None, typer.Option(help="Folder for peek.png, a picture of some samples.", rich_help_panel=OUTPUT_PANEL)
    ] = None,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Describe a checkpoint or a data set.

    For a checkpoint: layers, shapes, schedule, prediction, training; with --data also whether schedule and prediction
    fit the weights. For --data alone: columns, lengths, classes, unreadable items.

    Examples:
        # What layerprobe reads of a checkpoint.
        layerprobe inspect model.safetensors
        # Do its schedule and its prediction fit the weights?
        layerprobe inspect digits --data digits
        # What is in a data set, with a picture of it.
        layerprobe inspect --data images/ --out peek/
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
    convention = [] if data is None else _describe_fit(checkpoint, data, record, rows)
    lines = [*(f"{name:<14} {text}" for name, text in rows), *convention]
    lines += [f"{'layer':<24} tokens x width", *_layer_lines(record["layers"])]
    lines += _part_lines(record["parts"])
    lines += [safe(f"trained: {key} {value}", MAX_MESSAGE) for key, value in record.get("training", {}).items()]
    return record, lines


def _describe_fit(
    checkpoint: CheckpointSource, data: DataSource, record: dict[str, Any], rows: list[tuple[str, str]]
) -> list[str]:
    """Adds what was read of the data to record and rows; returns whether the convention fits, as lines."""
    from layerprobe.analyses.runs import RunPlan, examine_convention
    from layerprobe.checkpoints import convention_lines
    from layerprobe.data import Reading, reading_lines

    def add(reading: Reading | None) -> None:
        record["reading"] = None if reading is None else reading.to_dict()
        rows.extend((f"data {subject}", text) for subject, text in (reading_lines(reading) if reading else {}).items())

    check = examine_convention(RunPlan(checkpoint, data), on_reading=add)
    record["convention"] = check.to_dict()
    return convention_lines(check)


def _layer_lines(layers: dict[str, list[int]]) -> list[str]:
    """Returns a line for each layer, or one for four or more of the same shape after each other."""
    lines = []
    for (tokens, width), run in groupby(layers, key=lambda name: tuple(layers[name])):
        names = list(run)
        shown = names if len(names) < 4 else [f"{names[0]} ... {names[-1]}"]
        each = f" each, {len(names)} layers" if len(names) >= 4 else ""
        lines += [f"{name:<24} {tokens} x {width}{each}" for name in shown]
    return lines


def _part_lines(parts: dict[str, list[str]]) -> list[str]:
    """Returns what else can be named in blocks, a line for each kind of block."""
    lines = [f"{pattern:<24} {', '.join(names)}" for pattern, names in parts.items()]
    note = "queries, keys and values are those before norms and rotary positions"
    return [f"{'inside the blocks':<24} {note}", *lines] if lines else []


def _checkpoint_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the description of a checkpoint as names and texts; empty texts are of what it does not have."""
    pairs = zip(record["value_range"][::2], record["value_range"][1::2], strict=True)
    classes, times = record["classes"], (record["data_at_time"], record["noise_at_time"])
    files = record.get("files", [])
    in_words = {
        "files": [] if files == [record["checkpoint"]] else files,
        "other_weights": [name or "'' (the rest of the file)" for name in record.get("other_weights", [])],
        "shape": " x ".join(map(str, record["shape"])),
        "value_range": ", ".join(f"{low:g} to {high:g}" for low, high in pairs) + " for -1 to 1 of the data",
        "classes": f"{classes}, and the null label {classes}" if classes else "none",
        "schedule": "{}, time {:g} at data, {:g} at noise".format(record["schedule"], *times),
    }
    return [
        (_ROW_NAMES.get(key, key.replace("_", " ")), _text(value))
        for key, value in (record | in_words).items()
        if key not in _NOT_ROWS
    ]


def _text(value: Any) -> str:
    """Returns a JSON value in one line; an empty text for what there is none of."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {text}" for key, of in value.items() if (text := _text(of)))
    if isinstance(value, list):
        more = f" and {len(value) - _SHOWN} more" if len(value) > _SHOWN else ""
        return ", ".join(map(str, value[:_SHOWN])) + more
    return "" if value is None else str(value)


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
