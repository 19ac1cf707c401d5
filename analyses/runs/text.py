"""Records of a run as readable lines."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from layerprobe.analyses.figures import CLASS
from layerprobe.analyses.runs.check import pick_findings
from layerprobe.analyses.runs.folder import RunFolder
from layerprobe.analyses.selection import Answers, Selection, probe_cautions, read_decisions
from layerprobe.analyses.tables import MODEL, PROBE, RANDOM_WEIGHTS, RAW_INPUT, probed_column, read_quality
from layerprobe.analyses.wording import (
    TRUST,
    answer_lines,
    caution_texts,
    copy_sentences,
    decision_text,
    probe_caution_text,
    selection_brief,
    selection_headline,
    selection_reason,
)
from layerprobe.checkpoints import convention_cautions, convention_message

_CONTROLS = (RANDOM_WEIGHTS, RAW_INPUT)


def describe_convention(run: str | Path) -> list[str]:
    """Returns the result of a run's convention check as readable lines."""
    check, _ = RunFolder(run).convention_check()
    return [f"weights  {convention_message(check)}", *(f"caution  {text}" for text in convention_cautions(check))]


def describe_copies(run: str | Path) -> list[str]:
    """Returns a readable line for each split that had copies; no lines if there were none."""
    return [f"copies   {sentence}" for sentence in copy_sentences(RunFolder(run).copies())]


def describe_labels(run: str | Path) -> list[str]:
    """Returns the probe accuracy of each label column as readable lines; no lines if the class is the only label.

    A line has the accuracy of the model on the test split at the layer and noise level that are best on the validation
    split, and those of both controls at that noise level, whose layers are chosen in the same way.
    """
    quality = read_quality(Path(run) / "quality.csv")
    columns = {probed_column(metric) or CLASS: metric for metric in quality["metric"].unique() if _is_probe(metric)}
    lines = []
    for column, metric in columns.items() if set(columns) - {CLASS} else ():
        rows = quality[quality["metric"] == metric]
        best = _best_on_validation(rows[rows["source"] == MODEL])
        if best is None:
            lines.append(f"knows    {column}: nothing could be measured")
            continue
        at_level = rows[rows["noise_level"] == best["noise_level"]]
        controls = {source: _best_on_validation(at_level[at_level["source"] == source]) for source in _CONTROLS}
        beside = (f"{source} {control['value']:.2f}" for source, control in controls.items() if control is not None)
        lines.append(
            f"knows    {column}: {best['value']:.2f} at {best['layer']}, noise level {best['noise_level']:g} "
            f"({', '.join(beside)})"
        )
        lines += [f"caution  {column}: {counts}" for counts in re.findall("left out of.*", best["note"])]
        if metric != PROBE:  # those of the class are cautions of the selection
            cautions = probe_cautions(quality, metric, "test")
            lines += [f"caution  {column}: {probe_caution_text(caution)}" for caution in cautions]
    return lines


def _best_on_validation(rows: pd.DataFrame) -> pd.Series[Any] | None:
    """The row of the test split at the layer and noise level that are best on the validation split; None without one.

    Choosing on the test split itself would report the luckiest of many numbers.
    """
    places = ["layer", "noise_level"]
    chosen = rows[rows["split"] == "validation"].dropna(subset="value").sort_values("value", kind="stable")
    tested = rows[rows["split"] == "test"].dropna(subset="value").set_index(places, drop=False)
    for place in reversed(list(chosen[places].itertuples(index=False, name=None))):
        if place in tested.index:
            return tested.loc[[place]].iloc[0]
    return None


def _is_probe(metric: str) -> bool:
    return metric == PROBE or probed_column(metric) != ""


def describe_selection(selection: Selection, *, num_pairs: int = 3) -> list[str]:
    """Returns a selection as readable lines, with its first `num_pairs` ranked pairs."""
    lines = [f"pick     {selection_headline(selection)}"]
    if selection.ranked:
        lines += [f"         {selection_reason(selection)}"]
        lines += [f"{'rank':<8} {'student':<16} {'teacher':<16} {'score':>7} {'gap':>7} {'CKA':>7}"]
    lines += [
        f"{rank:<8} {pair.student:<16} {pair.teacher:<16} {pair.score:>7.2f} {pair.gap:>7.4f} {pair.mean_cka:>7.3f}"
        + ("  tie" if pair.ties_with_first else "")
        for rank, pair in enumerate(selection.ranked[:num_pairs], 1)
    ]
    lines += [f"caution  {text}" for text in caution_texts(selection) if text not in lines[0]]
    lines += _described_findings(selection)
    return [*lines, f"trust    {TRUST}"] if selection.pick else lines


def describe_pick(selection: Selection) -> list[str]:
    """Returns the pick, why it is the pick, and what speaks against it as readable lines."""
    headline, brief = selection_headline(selection), selection_brief(selection)
    lines = [f"pick     {headline}", *([f"why      {brief}"] if brief else [])]
    lines += [f"caution  {text}" for text in caution_texts(selection) if text not in headline]
    return [*lines, *_described_findings(selection)]


def _described_findings(selection: Selection) -> list[str]:
    return [f"{finding['severity']:<8} {finding['code']}: {finding['text']}" for finding in pick_findings(selection)]


def describe_options(record: Mapping[str, Any]) -> list[str]:
    """Returns the pick as another trainer writes it (`pick_for`) as readable lines, the options ready to paste."""
    if record["options"] is None:
        return [f"for      {record['trainer']}: there is no pick to write"]
    lines = [f"for      {record['trainer']}, of {record['blocks']} blocks", *record["options"].splitlines()]
    return [*lines, *(f"note     {note}" for note in record["notes"])]


def describe_ownership(run: str | Path, selection: Selection) -> list[str]:
    """Returns a line if a selection is not the run's own, on which its figures, report and confirmation stand."""
    own = RunFolder(run).selection()
    if own == selection:
        return []
    return [
        f"what-if  the run keeps its own selection ({own.pick or 'no pick'}); `layerprobe select --keep` replaces it"
    ]


def describe_answers(answers: Answers) -> list[str]:
    """Returns the single answers of a run as readable lines."""
    return [f"{line.question:<20} {line.sentence}" for line in answer_lines(answers)]


def selection_record(selection: Selection) -> dict[str, Any]:
    """Returns a selection as JSON values, with headline, reason and cautions in words."""
    return selection.to_dict() | {
        "headline": selection_headline(selection),
        "reason": selection_reason(selection),
        "caution_texts": caution_texts(selection),
        "findings": pick_findings(selection),
    }


def describe_decisions(training: str | Path) -> list[str]:
    """The decisions of `--sync auto` in a training folder in lines for people; no lines where there were none."""
    return [f"step {row['step']}: {decision_text(row['record'])}" for row in read_decisions(Path(training))]
