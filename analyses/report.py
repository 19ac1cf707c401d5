"""One page that answers the question of a run, with the evidence: a single HTML file that asks the network for nothing.

Everything is read from the run folder. Only `quality.csv` must be there; a section whose file is missing says which
command writes it. Whatever comes from a file is escaped, and the page allows itself no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd

from layerprobe.analyses import plots
from layerprobe.analyses.quality import KNN, MODEL, PROBE, RANK, read_quality, read_similarity
from layerprobe.features import write_text
from layerprobe.layersync import LayerPair

Record = Mapping[str, Any]

RECORDS = {"What was read from the model": "features/manifest.json", "Plan": "plan.json", "Environment": "environment.json"}
MAX_ITEMS = 40

ANSWERS = {"helps": "It helps", "hurts": "It hurts", "no difference found": "No difference found"}

HOW_TO_READ = (
    ("Noise level", "0 is a clean sample and 1 pure noise; equal noise levels mean equal signal-to-noise ratio."),
    ("Layers", "Named as in the model and counted from 0, from input to output."),
    (
        "Splits",
        "Probes are fitted on the split “fit”, penalties and layers are chosen on “choose”, and accuracies are "
        "shown on “report”, which decided nothing.",
    ),
    (
        "Probe and kNN accuracy",
        "Share of samples whose class a linear classifier, or a vote of near neighbours, reads from a layer. Bands are "
        "95 % bootstrap intervals over samples: two layers whose bands overlap widely are not known to differ.",
    ),
    (
        "Controls",
        "The same network with random weights, and the raw noisy input. What a layer has above both, training put there.",
    ),
    ("Effective rank", "How many directions a layer uses. It needs no labels; more is not always better."),
    ("CKA", "Similarity of two representations: 1 means equal up to rotation and scale, about 0 unrelated."),
    (
        "Pick and verdict",
        "The richest layer is not always the best teacher. The pick is a hypothesis from measurements of a finished "
        "model; the verdict comes from training with and without it, seed by seed.",
    ),
)


@dataclass(frozen=True)
class Run:
    """What a run folder holds; None for what has not been made.

    Attributes:
        folder: The folder, as the user named it.
        quality: Quality table.
        similarity: Similarity table.
        selection: Content of selection.json.
        verdict: Content of verdict.json.
        confirmation: Curves of the confirmation runs.
        records: Per title, the content of the manifest, plan.json and environment.json.
        samples: Pictures of samples.
    """

    folder: Path
    quality: pd.DataFrame
    similarity: pd.DataFrame | None
    selection: Record | None
    verdict: Record | None
    confirmation: pd.DataFrame | None
    records: Mapping[str, Record]
    samples: tuple[Path, ...]

    @property
    def pair(self) -> LayerPair | None:
        """The pair that was picked."""
        best = next(iter((self.selection or {}).get("pairs", ())), None)
        return LayerPair(best["student"], best["teacher"]) if best else None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics measured on the model, the most telling first."""
        known = self.quality.loc[self.quality["source"] == MODEL, "metric"].unique()
        return tuple(dict.fromkeys([*(m for m in (PROBE, KNN, RANK) if m in known), *known]))

    def command(self, name: str) -> str:
        """The command line that makes what is missing."""
        return f"layerprobe {name} {shlex.quote(str(self.folder))}"


def write_report(run_dir: Path | str) -> Path:
    """Writes `report.html` into a run folder.

    Args:
        run_dir: A run folder with at least `quality.csv`.

    Returns:
        The path of the page.

    Raises:
        ValueError: If `quality.csv` is missing, or a file is not what its name says.
    """
    run = read_run(run_dir)
    path = run.folder / "report.html"
    # Character references keep the page readable however the file is decoded.
    write_text(path, render(run).encode("ascii", "xmlcharrefreplace").decode())
    return path


def read_run(run_dir: Path | str) -> Run:
    """Reads a run folder; see `write_report`."""
    folder = Path(run_dir)
    if not (folder / "quality.csv").is_file():
        command = f"layerprobe analyze {shlex.quote(str(folder))}"
        raise ValueError(f"{folder} has no quality.csv, so there is nothing to report; run `{command}` first")
    similarity, confirmation = folder / "similarity.csv", folder / "confirmation.csv"
    return Run(
        folder=folder,
        quality=_read(read_quality, folder / "quality.csv"),
        similarity=_read(read_similarity, similarity) if similarity.is_file() else None,
        selection=_read_json(folder / "selection.json"),
        verdict=_read_json(folder / "verdict.json"),
        confirmation=_read(pd.read_csv, confirmation) if confirmation.is_file() else None,
        records={title: record for title, name in RECORDS.items() if (record := _read_json(folder / name)) is not None},
        samples=tuple(sorted((folder / "figures").glob("samples*.png"))),
    )


def figures(run: Run) -> dict[str, plots.Figure]:
    """Every figure that the files of a run allow, by file name without a suffix, in the order of the page."""
    found = {}
    for metric in run.metrics:
        name = metric.replace(" ", "-")
        found[f"{name}-curves"] = plots.layer_quality_curves(run.quality, metric, pair=run.pair)
    for metric in run.metrics:
        found[f"{metric.replace(' ', '-')}-heatmap"] = plots.quality_heatmap(run.quality, metric)
    if run.similarity is not None:
        layers = list(dict.fromkeys(run.quality.sort_values("layer_index", kind="stable")["layer"]))
        found["similarity"] = plots.cka_heatmap(run.similarity, pair=run.pair, layers=layers)
    if run.confirmation is not None and "no alignment" in set(run.confirmation["arm"]):
        for i, metric in enumerate(_confirmation_metrics(run.confirmation, run.verdict)):
            name = "confirmation" if i == 0 else f"confirmation-{metric.replace(' ', '-')}"
            found[name] = plots.confirmation_curves(run.confirmation, run.verdict, metric=metric)
    return found


def write_figures(run_dir: Path | str) -> list[Path]:
    """Writes every figure of a run to its folder `figures`, as PNG and SVG; see `write_report`."""
    run = read_run(run_dir)
    paths: list[Path] = []
    for name, figure in figures(run).items():
        paths += plots.save(figure, run.folder / "figures", name)
    return paths
