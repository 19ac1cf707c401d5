"""Records of a run as readable lines."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerprobe.analyses.figures import CLASS
from layerprobe.analyses.runs.folder import RunFolder
from layerprobe.analyses.selection import Recommendation, Selection, probe_cautions
from layerprobe.analyses.tables import MODEL, PROBE, RANDOM_WEIGHTS, RAW_INPUT, probed_column, read_quality
from layerprobe.analyses.wording import (
    TRUST,
    caution_texts,
    decision_text,
    probe_caution_text,
    recommendation_text,
    selection_reason,
)
from layerprobe.checkpoints import ConventionCheck, convention_cautions, convention_message


def describe_convention(run: str | Path) -> list[str]:
    """Returns the result of a run's convention check as readable lines."""
    check = ConventionCheck.from_dict(json.loads(RunFolder(run).convention.read_text(encoding="utf-8")))
    return [f"weights  {convention_message(check)}", *(f"caution  {text}" for text in convention_cautions(check))]


def describe_labels(run: str | Path) -> list[str]:
    """Returns the probe accuracy of each label column as readable lines; no lines if the class is the only label.

    A line has the highest accuracy of the model on the test split, and those of both controls at that noise level.
    """
    quality = read_quality(Path(run) / "quality.csv")
    columns = {probed_column(metric) or CLASS: metric for metric in quality["metric"].unique() if _is_probe(metric)}
    lines = []
    for column, metric in columns.items() if set(columns) - {CLASS} else ():
        rows = quality[(quality["metric"] == metric) & (quality["split"] == "test")].dropna(subset="value")
        of = {source: rows[rows["source"] == source] for source in (MODEL, RANDOM_WEIGHTS, RAW_INPUT)}
        if of[MODEL].empty:
            lines.append(f"knows    {column}: nothing could be measured")
            continue
        best = of[MODEL].loc[of[MODEL]["value"].idxmax()]
        beside = (
            f"{source} {part['value'].max():.2f}"
            for source in (RANDOM_WEIGHTS, RAW_INPUT)
            if not (part := of[source][of[source]["noise_level"] == best["noise_level"]]).empty
        )
        lines.append(
            f"knows    {column}: {best['value']:.2f} at {best['layer']}, noise level {best['noise_level']:g} "
            f"({', '.join(beside)})"
        )
        lines += [f"caution  {column}: {counts}" for counts in re.findall("left out of.*", best["note"])]
        if metric != PROBE:  # those of the class are cautions of the selection
            cautions = probe_cautions(quality, metric, "test")
            lines += [f"caution  {column}: {probe_caution_text(caution)}" for caution in cautions]
    return lines


def _is_probe(metric: str) -> bool:
    return metric == PROBE or probed_column(metric) != ""


def describe_selection(selection: Selection, *, num_pairs: int = 3) -> list[str]:
    """Returns a selection as readable lines, with its first `num_pairs` ranked pairs."""
    pick = selection.pick
    lines = [f"pick     {f'{pick.student} should learn from {pick.teacher}' if pick else 'none'}"]
    lines += [f"         {selection_reason(selection)}"]
    if selection.ranked:
        lines += [f"{'rank':<8} {'student':<16} {'teacher':<16} {'score':>7} {'gap':>7} {'CKA':>7}"]
    lines += [
        f"{rank:<8} {pair.student:<16} {pair.teacher:<16} {pair.score:>7.2f} {pair.gap:>7.4f} {pair.mean_cka:>7.3f}"
        + ("  tie" if pair.ties_with_first else "")
        for rank, pair in enumerate(selection.ranked[:num_pairs], 1)
    ]
    lines += [f"caution  {text}" for text in caution_texts(selection)]
    return [*lines, f"trust    {TRUST}"] if pick else lines


def describe_recommendations(answers: Sequence[Recommendation]) -> list[str]:
    """Returns recommendations of single layers as readable lines."""
    return [f"{answer.purpose:<8} {recommendation_text(answer)}" for answer in answers]


def selection_record(selection: Selection) -> dict[str, Any]:
    """Returns a selection as JSON values, with the reason for the pick and the cautions in words."""
    return selection.to_dict() | {"reason": selection_reason(selection), "caution_texts": caution_texts(selection)}


def describe_decisions(training: str | Path) -> list[str]:
    """The decisions of `--sync auto` in a training folder in lines for people; no lines where there were none."""
    path = Path(training) / "decisions.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return [f"step {row['step']}: {decision_text(row['record'])}" for row in rows]
