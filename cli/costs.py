"""What a run costs, in lines: forecast, and beside it what it took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerprobe.cli.output import span


def cost_lines(forecast: Mapping[str, Any] | None, took: Mapping[str, Any] | None = None) -> list[str]:
    """Returns a line for each stage, and for memory and disk; those of one record, or both beside each other.

    Args:
        forecast: Record of `Cost`, before the run; None if there is none.
        took: Record of `Cost`, after the run; None before it.
    """
    from layerprobe.analyses.wording import gigabytes

    either: Mapping[str, Any] = forecast or took or {}
    records = [record for record in (took, forecast) if record is not None]

    def line(name: str, texts: list[str]) -> str:
        return f"{name:<18} {f'{texts[0]} (forecast {texts[1]})' if len(texts) > 1 else texts[0]}"

    stages = [
        line(stage, [span(record["seconds"].get(stage, 0.0)) for record in records]) for stage in either["seconds"]
    ]
    rows = [*stages, line("in all", [span(sum(record["seconds"].values())) for record in records])]
    for key, name in (("memory_bytes", "memory"), ("device_bytes", "GPU memory"), ("disk_bytes", "disk")):
        if all(record[key] for record in records):
            rows.append(line(name, [gigabytes(record[key]) for record in records]))
    return rows
