"""A finished run as notebooks use it: tables as data frames, figures, the pick."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from layerprobe.analyses.figures import (
    cka_heatmap,
    confirmation_curves,
    knowledge_curves,
    layer_quality_curves,
    quality_heatmap,
    shown_in_notebooks,
)
from layerprobe.analyses.front.pair_matrix import PairMatrix
from layerprobe.analyses.runs import RunFolder
from layerprobe.analyses.selection import Selection
from layerprobe.analyses.tables import MODEL, PROBE, RANDOM_WEIGHTS, RANK, RAW_INPUT
from layerprobe.analyses.wording import selection_headline, selection_reason
from layerprobe.layersync import LayerPair

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_CONTROLS = (RANDOM_WEIGHTS, RAW_INPUT)
_FIGURES = ("cka", "label columns", "confirmation")


class Run:
    """A run that `probe` or `layerprobe probe` has finished.

    Args:
        path: Folder of the run.

    Attributes:
        path: Folder of the run.
        quality: Quality table, one row per source, layer, noise level, metric and split.
        selection: The run's selection, with all ranked and refused pairs.

    Raises:
        FileNotFoundError: If the folder holds no finished run.
    """

    def __init__(self, path: str | Path) -> None:
        self._folder = RunFolder(path)
        self.path = self._folder.path
        self._plan = self._folder.plan()
        self.quality: pd.DataFrame = self._folder.quality()
        self.selection: Selection = self._folder.selection()

    @property
    def pick(self) -> LayerPair | None:
        """The pair that is ranked first; None if no pair is admissible, which `print(run)` explains."""
        return self.selection.pick

    @property
    def report(self) -> Path:
        """Path of the report, a page for a browser."""
        return self.path / "report.html"

    @property
    def pairs(self) -> pd.DataFrame:
        """The ranked pairs, the pick first: student, teacher, score with its 95 % interval, and what adds to it."""
        return pd.DataFrame(
            {
                "student": pair.student,
                "teacher": pair.teacher,
                "score": pair.score,
                "low": pair.score_low,
                "high": pair.score_high,
                "gap": pair.gap,
                "cka": pair.mean_cka,
                "ties_with_first": pair.ties_with_first,
            }
            | {f"{part.criterion} adds": part.adds for part in pair.parts}
            for pair in self.selection.ranked
        )

    @property
    def pair_matrix(self) -> PairMatrix:
        """The scores of all admissible pairs, students x teachers."""
        return PairMatrix.of(self.selection)

    @property
    def cka(self) -> pd.DataFrame:
        """CKA of each two layers at equal noise levels, averaged over the levels; layers x layers, 1 is equal."""
        table = self._folder.similarity()
        equal = table[table["noise_level_a"] == table["noise_level_b"]]
        one_order = equal.groupby(["layer_a", "layer_b"])["cka"].mean().unstack()
        layers = list(dict.fromkeys(self._model_rows["layer"]))
        values = one_order.reindex(index=layers, columns=layers).to_numpy(copy=True)
        values = np.where(np.isnan(values), values.T, values)
        return pd.DataFrame(values, index=layers, columns=layers)

    def best_layers(self, num: int = 5, *, metric: str | None = None) -> pd.DataFrame:
        """Returns the best layers, each at its best noise level, beside the controls at that level.

        Layers and levels are chosen on the validation split and the values are of the test split, where the metric has
        them. The largest value is the best one, or the smallest of an error.

        Args:
            num: Number of layers.
            metric: Metric of the quality table; the probe, or without labels its stand-in, the effective rank.

        Raises:
            ValueError: If the metric was not measured.
        """
        metric = metric or self._usual_metric
        rows = self._rows_of(metric)
        splits = [split for split in ("validation", "test", "train") if (rows["split"] == split).any()]
        split = "test" if "test" in splits else splits[0]
        smallest = metric.endswith(" error")
        candidates = rows[(rows["source"] == MODEL) & (rows["split"] == splits[0])]
        chosen = _first_by_layer(candidates, smallest=smallest)
        shown = rows[rows["split"] == split]
        records = []
        for layer, level in list(zip(chosen["layer"], chosen["noise_level"], strict=True))[:num]:
            at_level = shown[shown["noise_level"] == level]
            here = at_level[(at_level["source"] == MODEL) & (at_level["layer"] == layer)].iloc[0]
            record = {"layer": layer, "noise_level": level, metric: here["value"]}
            record |= {"low": here["low"], "high": here["high"]}
            for source in _CONTROLS:
                control = at_level[at_level["source"] == source]
                control = control[control["layer"] == layer] if source == RANDOM_WEIGHTS else control
                record[source] = np.nan if control.empty else control["value"].agg("min" if smallest else "max")
            records.append(record)
        return pd.DataFrame(records)

    def features(self, layer: str, noise_level: float, *, split: str | None = None) -> NDArray[np.float32]:
        """Returns the stored features of a layer, shape (n, D), as `FeatureStore.features`."""
        return self._folder.store(MODEL).features(layer, noise_level, split=split)

    def plot(self, name: str | None = None, *, kind: Literal["curves", "heatmap"] = "curves") -> Figure:
        """Draws a figure of the run.

        Args:
            name: A metric of the quality table, that of `best_layers` if None; or "cka", "label columns" or
                "confirmation".
            kind: For a metric: a line for each noise level, or a table of layers and levels in colors.

        Returns:
            The figure; a notebook shows it as a picture.

        Raises:
            ValueError: If the name or kind is unknown, or was not measured in this run.
        """
        return shown_in_notebooks(self._draw(name or self._usual_metric, kind))

    def _draw(self, name: str, kind: str) -> Figure:
        if name == "cka":
            return cka_heatmap(self._folder.similarity(), selection=self.selection)
        if name == "label columns":
            return knowledge_curves(self.quality)
        if name == "confirmation":
            verdict = self._folder.verdict()
            if verdict is None:
                raise ValueError(f"{self.path} has no confirmation; run `layerprobe confirm {self.path}` first")
            return confirmation_curves(*verdict)
        self._rows_of(name)
        if kind not in ("curves", "heatmap"):
            raise ValueError(f"unknown kind {kind!r}; use curves or heatmap")
        if kind == "heatmap":
            return quality_heatmap(self.quality, name)
        return layer_quality_curves(self.quality, name, selection=self.selection)

    @property
    def _model_rows(self) -> pd.DataFrame:
        return self.quality[self.quality["source"] == MODEL].sort_values("layer_index", kind="stable")

    @property
    def _usual_metric(self) -> str:
        return PROBE if PROBE in set(self.quality["metric"]) else RANK

    def _rows_of(self, metric: str) -> pd.DataFrame:
        rows = self.quality[self.quality["metric"] == metric].dropna(subset="value")
        if rows.empty:
            known = [*dict.fromkeys(self.quality["metric"]), *_FIGURES]
            raise ValueError(f"the run has no {metric!r}; use one of {', '.join(known)}")
        return rows

    def _facts(self) -> list[tuple[str, str]]:
        layers = list(dict.fromkeys(self._model_rows["layer"]))
        levels = ", ".join(f"{level:g}" for level in self._plan.extraction.noise_levels)
        best = self.best_layers(1)
        text = "nothing could be measured"
        if len(best):
            row = best.iloc[0]
            text = f"{row['layer']} at noise level {row['noise_level']:g}: {best.columns[2]} {row.iloc[2]:.3g}"
        return [
            ("model", self._plan.checkpoint.path),
            ("data", self._plan.data.source),
            ("measured", f"{len(layers)} layers at noise levels {levels}"),
            ("richest", text),
            ("pick", selection_headline(self.selection)),
        ]

    def __repr__(self) -> str:
        return "\n".join([f"Run {self.path}", *(f"  {name}: {text}" for name, text in self._facts())])

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{name}</th><td>{escape(text)}</td></tr>" for name, text in self._facts())
        why = f"<p>{escape(selection_reason(self.selection))}</p>" if self.pick else ""
        return f"<b>Run {escape(str(self.path))}</b><table>{rows}</table>{why}{self.best_layers().to_html(index=False)}"


def made_run(out: str | Path | None, make: Callable[[Path], object]) -> Run:
    """Makes a run and returns it.

    Args:
        out: Run folder. None makes a temporary one, which is removed with the returned run.
        make: Function that makes the run in a folder.
    """
    if out is not None:
        make(Path(out))
        return Run(out)
    folder = Path(tempfile.mkdtemp(prefix="layerprobe-"))
    try:
        make(folder)
        run = Run(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(run, shutil.rmtree, folder, ignore_errors=True)
    return run


def _first_by_layer(rows: pd.DataFrame, *, smallest: bool) -> pd.DataFrame:
    """The best row of each layer, the best layer first; of equal values, the first."""
    return rows.sort_values("value", ascending=smallest, kind="stable").drop_duplicates("layer")
