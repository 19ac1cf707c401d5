"""Sentences about the decisions of a training on which layers are aligned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerprobe.analyses.selection import Selection
from layerprobe.analyses.wording.selection import selection_reason


def decision_text(record: Mapping[str, Any]) -> str:
    """Returns what a decision was and why.

    Args:
        record: Record of the decision in `decisions.jsonl`.
    """
    held, best = record["held"] and _pair(record["held"]), record["best"] and _pair(record["best"])
    if record["decision"] == "none":
        return f"No pair yet. {_reason(record)}"
    if record["decision"] == "picked":
        return f"{best} is picked. {_reason(record)}"
    if best is None:
        return f"{held} stays: no pair is admissible at this step."
    if record["lead"] is None:
        return f"{held} stays: it has the largest score of the admissible pairs."
    ahead, low, high = record["lead"]
    figures = f"by {ahead:+.2f} (95 % interval {low:+.2f} to {high:+.2f})"
    if record["decision"] == "kept":
        return f"{held} stays: {best} is ahead {figures}, which is not beyond the uncertainty."
    return f"{best} takes the place of {held}: it is ahead {figures}, beyond the uncertainty."


def _pair(names: Sequence[str]) -> str:
    return " <- ".join(names)


def _reason(record: Mapping[str, Any]) -> str:
    return selection_reason(Selection.from_dict(record["selection"]))
