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
    if "cosines" in record:
        return _alignment_text(record)
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


def _alignment_text(record: Mapping[str, Any]) -> str:
    courses = {pair: [f"{value:.3f}" for value in values] for pair, values in record["cosines"].items()}
    if record["decision"] == "aligned":
        latest = ", ".join(f"{pair} at a cosine of {values[-1]}" for pair, values in courses.items())
        return f"The alignment goes on: {latest}."
    shown = record["patience"] + 1
    rest = "; ".join(f"{pair} {', '.join(values[-shown:])}" for pair, values in courses.items())
    return (
        f"The alignment has ended: no cosine has risen by {record['least_gain']:g} over the last {record['patience']} "
        f"measurements ({rest})."
    )


def _pair(names: Sequence[str]) -> str:
    return " <- ".join(names)


def _reason(record: Mapping[str, Any]) -> str:
    return selection_reason(Selection.from_dict(record["selection"]))
