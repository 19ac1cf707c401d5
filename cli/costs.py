"""What a job costs, in lines: forecast, and beside it what it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerprobe.cli.output import emit, span, tell

if TYPE_CHECKING:
    from layerprobe.analyses.runs import Cost


def emit_forecast(
    record: Mapping[str, Any],
    cost: Cost,
    *,
    as_json: bool,
    lines: Sequence[str] = (),
    further: Mapping[str, Any] | None = None,
) -> None:
    """Prints what a dry run tells: the size of the work, and what it will cost.

    Args:
        record: Size of the work.
        cost: Its cost.
        as_json: Whether to print everything as one record.
        lines: Lines between the size and the cost.
        further: What the record has besides, in place of these lines.
    """
    size = [f"{key}: {value}" for key, value in record.items()]
    costs = cost.to_dict()
    emit({**record, **(further or {}), **costs}, [*size, *lines, *cost_lines(costs)], as_json=as_json)


def tell_forecast(cost: Cost) -> None:
    """Tells what a job will cost before it begins."""
    for line in cost_lines(cost.to_dict()):
        tell(f"forecast: {line}")


def tell_took(folder: Path) -> None:
    """Tells what a job has taken, if it was forecast."""
    from layerprobe.analyses.runs import cost_record

    expected, took = cost_record(folder)
    for line in cost_lines(expected, took) if expected and took else ():
        tell(f"took: {line}")


def cost_lines(forecast: Mapping[str, Any] | None, took: Mapping[str, Any] | None = None) -> list[str]:
    """Returns a line for each stage, and for memory and disk; those of one record, or both beside each other.

    A stage that was not forecast has no forecast beside it, nor then the time in all.

    Args:
        forecast: Record of `Cost`, before the run; None if there is none.
        took: Record of `Cost`, after the run; None before it.
    """
    from layerprobe.analyses.wording import gigabytes

    records = [record for record in (took, forecast) if record is not None]

    def line(name: str, texts: list[str]) -> str:
        return f"{name:<18} {f'{texts[0]} (forecast {texts[1]})' if len(texts) > 1 else texts[0]}"

    names = dict.fromkeys(stage for record in reversed(records) for stage in record["seconds"])
    first, *others = [record["seconds"] for record in records]
    rows = []
    for stage in names:
        expected = [seconds[stage] for seconds in others if stage in seconds]
        rows.append(line(stage, [span(seconds) for seconds in (first.get(stage, 0.0), *expected)]))
    compared = [seconds for seconds in others if seconds.keys() >= first.keys()]
    rows.append(line("in all", [span(sum(seconds.values())) for seconds in (first, *compared)]))
    for key, name in (("memory_bytes", "memory"), ("device_bytes", "GPU memory"), ("disk_bytes", "disk")):
        if all(record[key] for record in records):
            rows.append(line(name, [gigabytes(record[key]) for record in records]))
    return rows
