"""The files of a run folder that the page shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from layerprobe.analyses.experiments import RecordedTrial, Verdict, read_curves
from layerprobe.analyses.selection import Selection
from layerprobe.analyses.tables import MODEL, PairEvidence, headlines, read_quality, read_similarity
from layerprobe.records import read_record, typed

T = TypeVar("T")
Record = Mapping[str, Any]

RECORDS = {
    "Features": "features/model/manifest.json",
    "Features of pairs": "features/evidence/manifest.json",
    "Plan": "plan.json",
    "Data": "data.json",
    "Convention check": "convention.json",
    "Precision": "rounding.json",
    "Environment": "environment.json",
}


@dataclass(frozen=True)
class RunFiles:
    """Contents of a run folder; None for a file that does not exist.

    Attributes:
        folder: Run folder.
        quality: Quality table.
        similarity: Similarity table.
        evidence: Evidence of layers and pairs.
        selection: Selection of layer pairs.
        verdict: Result of the confirmation.
        confirmation: Curves of the confirmation's arms.
        recorded: Trial that was trained beforehand.
        records: JSON records of what was run, by title.
        pictures: PNG files of samples.
    """

    folder: Path
    quality: pd.DataFrame
    similarity: pd.DataFrame | None
    evidence: PairEvidence | None
    selection: Selection | None
    verdict: Verdict | None
    confirmation: pd.DataFrame | None
    recorded: RecordedTrial | None
    records: Mapping[str, Record | None]
    pictures: tuple[Path, ...]

    @property
    def model_rows(self) -> pd.DataFrame:
        """Rows of the quality table that measure the model, not a control."""
        return self.quality[self.quality["source"] == MODEL]

    @property
    def metrics(self) -> list[str]:
        """Metrics of the model, the most informative first."""
        measured = self.model_rows["metric"].unique()
        first = headlines(measured)
        return first + [metric for metric in measured if metric not in first]

    @property
    def headlines(self) -> list[str]:
        """Metrics that are shown in detail."""
        return headlines(self.metrics) or self.metrics[:1]


def read_run(folder: Path) -> RunFiles:
    """Reads a run folder.

    Raises:
        FileNotFoundError: If `quality.csv` is missing.
        ValueError: If a file does not have the content that its name promises.
    """
    quality = _read(folder / "quality.csv", read_quality)
    if quality is None:
        raise FileNotFoundError(f"{folder} holds no quality.csv; run `layerprobe probe` first")
    return RunFiles(
        folder=folder,
        quality=quality,
        similarity=_read(folder / "similarity.csv", read_similarity),
        evidence=_read(folder / "evidence.csv", PairEvidence.read_csv),
        selection=_read(folder / "selection.json", _record_of(Selection.from_dict, "select")),
        verdict=_read(folder / "verdict.json", _record_of(Verdict.from_dict, "confirm")),
        confirmation=_read(folder / "confirmation.csv", read_curves),
        recorded=RecordedTrial.read(folder / "recorded") if (folder / "recorded").is_dir() else None,
        records={title: _read(folder / name, _record_of(typed(dict), "probe")) for title, name in RECORDS.items()},
        pictures=tuple(sorted((folder / "figures").glob("samples*.png"))),
    )


def _read(path: Path, reader: Callable[[Path], T]) -> T | None:
    """What the reader returns for a file, or None if the file does not exist."""
    return reader(path) if path.is_file() else None


def _record_of(build: Callable[[Any], T], command: str) -> Callable[[Path], T]:
    return lambda path: read_record(path, build, remedy=f"repeat the `layerprobe {command}` that made it")
