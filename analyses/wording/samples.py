"""Sentences about the samples of a run: how many were read, and which are copies of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_USES = {"train": "to fit probes", "validation": "to choose", "test": "to report"}


def samples_sentence(data: Mapping[str, Any]) -> str:
    """Returns how many samples were read, out of how many, and what each split is for; "" if it was not recorded.

    Args:
        data: Record in `data.json` of a run.
    """
    counts = data.get("samples")
    if not counts:
        return ""
    reading, num = data.get("reading") or {}, sum(counts.values())
    total = max(num, sum((reading.get("rows") or {}).values()))
    uses = [f"{counts[split]:,} {use} ({split})" for split, use in _USES.items() if split in counts]
    begins = f"{num:,} of {total:,} samples read: {', '.join(uses)}."
    unreadable = sum((reading.get("unreadable") or {}).values())
    return begins + (f" {unreadable:,} could not be read and are left out." if unreadable else "")


def copy_sentences(copies: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns one sentence for each split that has copies; none if there are no copies.

    Args:
        copies: Records of `layerprobe.data.Copies`, as in `data.json` of a run.
    """
    by_split: dict[str, list[Mapping[str, Any]]] = {}
    for record in copies:
        by_split.setdefault(record["split"], []).append(record)
    return [_sentence(split, records) for split, records in by_split.items()]


def _sentence(split: str, records: Sequence[Mapping[str, Any]]) -> str:
    num, total = sum(record["num"] for record in records), records[0]["total"]
    sources = ", ".join(f"{record['num']} of {record['of']}" for record in records)
    begins = f"{num} of {total} {split} samples are copies, equal value for value to others ({sources} samples)"
    contradictions = sum(record.get("num_contradictions", 0) for record in records)  # absent in older records
    ends = f" {contradictions} of them have another class than the sample that they equal." if contradictions else ""
    if records[0]["is_left_out"]:
        return f"{begins}; they are left out, and {total - num} are left.{ends}"
    return f"{begins}; they stay in.{ends}"
