"""What a finished run shows first: layers and noise levels as a grid of numbers, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from layerprobe.analyses.runs.folder import RunFolder
from layerprobe.analyses.selection import Answers, Cell, Selection
from layerprobe.analyses.tables import MODEL, PROBE, RANDOM_WEIGHTS, RAW_INPUT, PairEvidence

_MEANINGS = {
    PROBE: "the share of test samples whose class a linear classifier reads from the layer",
    "noise-LiDAR": "the number of directions in which samples differ more than noise moves them",
    "effective rank": "the number of directions that the features use",
}


@dataclass(frozen=True)
class LevelGrid:
    """One number of every layer at every noise level, and those of the controls.

    Attributes:
        metric: Name of the metric.
        meaning: What the metric is, in a few words.
        levels: Noise levels, ascending.
        rows: Name and values of each layer, None where one is missing.
        controls: Name and values of each control: the best layer with random weights, and the raw input.
        richest: Layer and level of the richest features.
        added_most: Layer and level where training added most; None where it is not known or not certain.
    """

    metric: str
    meaning: str
    levels: tuple[float, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]
    controls: tuple[tuple[str, tuple[float | None, ...]], ...]
    richest: tuple[str, float | None]
    added_most: tuple[str, float | None] | None


def level_grid(run: str | Path, answers: Answers) -> LevelGrid | None:
    """Returns the grid of the metric that tells which features are richest; None if nothing tells it.

    Accuracies are those of the test split, on which nothing was chosen.
    """
    if answers.features is None:
        return None
    folder, metric = RunFolder(run), answers.features.metric
    gained = answers.training if answers.training and answers.training.is_certain else None
    if metric == PROBE:
        table = folder.quality()
        table = table[(table["metric"] == PROBE) & (table["split"] == "test")]
    else:
        table = _evidence_table(folder.evidence(), metric)
    levels = tuple(sorted(float(level) for level in table["noise_level"].unique()))
    by_source = {source: table[table["source"] == source] for source in (MODEL, RANDOM_WEIGHTS, RAW_INPUT)}
    model = by_source.pop(MODEL).sort_values("layer_index", kind="stable")
    return LevelGrid(
        metric,
        _MEANINGS.get(metric, ""),
        levels,
        tuple((str(layer), _values(rows, levels)) for layer, rows in model.groupby("layer", sort=False)),
        tuple((source, _values(rows, levels)) for source, rows in by_source.items() if not rows.empty),
        _place(answers.features.best),
        None if gained is None else _place(gained.cell),
    )


def _evidence_table(evidence: PairEvidence, metric: str) -> pd.DataFrame:
    values = evidence.by_layer[metric].value
    return pd.DataFrame(
        [
            (MODEL, layer, i, level, values[v, i])
            for v, level in enumerate(evidence.noise_levels)
            for i, layer in enumerate(evidence.layers)
        ],
        columns=["source", "layer", "layer_index", "noise_level", "value"],
    )


def _values(rows: pd.DataFrame, levels: Sequence[float]) -> tuple[float | None, ...]:
    """The largest value at each level: of a control with several layers the best one counts."""
    best = rows.dropna(subset="value").groupby("noise_level")["value"].max()
    return tuple(float(best[level]) if level in best.index else None for level in levels)


def _place(cell: Cell) -> tuple[str, float | None]:
    return cell.layer, cell.noise_level


def next_commands(run: str | Path, selection: Selection) -> list[tuple[str, str]]:
    """Returns the two commands that follow a probed run, each with what it is for."""
    folder = shlex.quote(str(run))
    if selection.pick is None:
        return [
            ("every pair and all that speaks against it", f"layerprobe select {folder}"),
            ("figures for a paper", f"layerprobe plot {folder}"),
        ]
    return [
        (
            "a pick is a hypothesis: what a trial by training takes",
            f"layerprobe confirm {folder} --from-scratch --dry-run",
        ),
        ("every pair with its reasons; --for NAME writes the pick for another trainer", f"layerprobe select {folder}"),
    ]
