"""The run folder: its plan, its records and tables, and the environment that produced them."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from layerprobe import __version__
from layerprobe.analyses.experiments import Verdict
from layerprobe.analyses.selection import Selection
from layerprobe.analyses.tables import PairEvidence, read_quality, read_similarity, write_table
from layerprobe.backbones import Backbone
from layerprobe.checkpoints import CheckpointSource, ConventionCheck
from layerprobe.data import DataSource, Splits
from layerprobe.extraction import ExtractionPlan, FeatureStore
from layerprobe.files import atomic_write, claim, write_text
from layerprobe.options import from_record, to_record
from layerprobe.progress import TaskProgress, named_progress

PACKAGES = ("torch", "numpy", "scikit-learn", "pandas", "matplotlib", "safetensors", "datasets")


@dataclass(frozen=True)
class RunPlan:
    """What a run measures; enough to open the checkpoint and the data again.

    Attributes:
        checkpoint: Checkpoint to open.
        data: Data set to read.
        extraction: Plan of the extraction; its layers are those of the backbone.
    """

    checkpoint: CheckpointSource
    data: DataSource
    extraction: ExtractionPlan = field(default_factory=ExtractionPlan)

    @property
    def seed(self) -> int:
        """Seed of every random number of the run."""
        return self.extraction.seed

    def open(
        self, *, device: str = "auto", encode: bool = True, progress: TaskProgress | None = None
    ) -> tuple[Backbone, Splits]:
        """Opens the checkpoint and the data.

        Args:
            device: Device of the model.
            encode: Whether to encode images, if the data has an autoencoder.
            progress: Called with (task name, steps done, steps in total).
        """
        backbone = self.checkpoint.open(device=device)
        splits = self.data.probing_splits(expect_shape=backbone.shape)
        if encode:
            encoding = named_progress(progress, "encoding images")
            splits = self.data.encode(splits, expect_shape=backbone.shape, progress=encoding)
        return backbone, splits

    def extraction_from(self, backbone: Backbone) -> ExtractionPlan:
        """Returns the extraction plan with the layers of a backbone."""
        return replace(self.extraction, layers=backbone.layers)

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON values."""
        extraction = {name: value for name, value in self.extraction.to_dict().items() if name != "layers"}
        return {"checkpoint": to_record(self.checkpoint), "data": to_record(self.data), "extraction": extraction}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> RunPlan:
        """Reads what `to_dict` returns."""
        return cls(
            from_record(CheckpointSource, record["checkpoint"]),
            from_record(DataSource, record["data"]),
            from_record(ExtractionPlan, record["extraction"]),
        )


class RunFolder:
    """The files of a run: their paths, and methods that read and write them.

    Args:
        path: Path of the folder; it need not exist yet.

    Attributes:
        path: Path of the folder.
        features: Folder of the feature stores.
        ablation: Path of the table of layer ablation.
        convention: Path of the record of the convention check.
        data: Path of the record of what was read of the data, and of copies among the samples.
        confirmation: Folder of the confirmation runs.
        figures: Folder of the figures.
        recorded: Folder of a trial that was trained beforehand, see `RecordedTrial`; only the quickstart has one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.features, self.figures = self.path / "features", self.path / "figures"
        self.confirmation = self.path / "confirmation"
        self.recorded = self.path / "recorded"
        self.ablation, self.convention = self.path / "ablation.csv", self.path / "convention.json"
        self.data = self.path / "data.json"

    def claim(self, plan: RunPlan) -> None:
        """Claims the folder for this run, and records the software and machine that produce its numbers.

        Raises:
            ValueError: If the folder belongs to another run, or contains other things.
        """
        claim(self.path, "plan.json", plan.to_dict(), what="the results")
        if not (self.path / "environment.json").is_file():
            write_text(self.path / "environment.json", json.dumps(_environment(), indent=1))

    def write_data(self, splits: Splits) -> None:
        """Writes what was read of the data, how many samples each split has, and which samples were copies."""
        reading = splits.train.reading
        counts = {name: len(samples) for name, samples in splits.items()}
        copies = [asdict(copies) for copies in splits.copies]
        record = {"reading": None if reading is None else reading.to_dict(), "samples": counts, "copies": copies}
        write_text(self.data, json.dumps(record, indent=1))

    def plan(self) -> RunPlan:
        """Reads the plan.

        Raises:
            FileNotFoundError: If the folder contains no run.
        """
        place = self.path / "plan.json"
        if not place.is_file():
            raise FileNotFoundError(
                f"{self.path} holds no run (no plan.json); pass a folder that `layerprobe probe` has made"
            )
        return RunPlan.from_dict(json.loads(place.read_text(encoding="utf-8")))

    def store(self, source: str) -> FeatureStore:
        """Opens the features of the model or of one of its controls."""
        return FeatureStore.open(self.store_folder(source))

    def store_folder(self, source: str) -> Path:
        """Returns the folder of the features of the model or of one of its controls."""
        return self.features / source.replace(" ", "-")

    def write_tables(
        self,
        quality: pd.DataFrame,
        similarity: pd.DataFrame,
        evidence: PairEvidence,
        recoverability: pd.DataFrame | None,
    ) -> None:
        """Writes the tables; the quality table comes last, because its presence marks the run as measured."""
        write_table(similarity, self.path / "similarity.csv")
        if recoverability is not None:
            write_table(recoverability, self.path / "recoverability.csv")
        evidence.write_csv(self.path / "evidence.csv")
        write_table(quality, self.path / "quality.csv")

    def write_probe_scores(self, scores: Mapping[tuple[str, float], NDArray[np.float64]]) -> None:
        """Writes which samples of the test split the probes classify correctly, by layer and noise level."""
        tensors = {f"{level!r} {layer}": values.astype(np.float32) for (layer, level), values in scores.items()}
        with atomic_write(self.path / "probe-scores.safetensors") as partial:
            save_file(tensors, partial)

    def probe_scores(self) -> dict[tuple[str, float], NDArray[np.float64]]:
        """Reads what `write_probe_scores` wrote; empty for runs without labels, and those of earlier versions."""
        path = self.path / "probe-scores.safetensors"
        tensors = load_file(path) if path.is_file() else {}
        places = {name: name.split(" ", 1) for name in tensors}
        return {(layer, float(level)): tensors[name].astype(np.float64) for name, (level, layer) in places.items()}

    @property
    def has_selection(self) -> bool:
        """Whether the run has a selection of its own."""
        return (self.path / "selection.json").is_file()

    @property
    def is_measured(self) -> bool:
        """Whether the run has been measured."""
        return (self.path / "quality.csv").is_file()

    def quality(self) -> pd.DataFrame:
        """Reads the quality table.

        Raises:
            FileNotFoundError: If the run has not been measured.
        """
        return read_quality(self._needed("quality.csv", "run `layerprobe probe` first"))

    def similarity(self) -> pd.DataFrame:
        """Reads the similarity table."""
        return read_similarity(self.path / "similarity.csv")

    def evidence(self) -> PairEvidence:
        """Reads the evidence of layers and pairs.

        Raises:
            FileNotFoundError: If the run has not been measured.
        """
        return PairEvidence.read_csv(self._needed("evidence.csv", f"run `layerprobe analyze {self.path}` first"))

    def convention_check(self) -> tuple[ConventionCheck, bool]:
        """Reads the convention check, and whether the user trusts the declared convention against it."""
        record = json.loads(self.convention.read_text(encoding="utf-8"))
        return ConventionCheck.from_dict(record), record.get("trusted", False)

    def write_convention(self, check: ConventionCheck, *, trusted: bool, assumptions: Sequence[str]) -> None:
        """Writes the convention check, and what was assumed of the network, as in `Backbone`."""
        record = check.to_dict() | {"trusted": trusted, "assumptions": list(assumptions)}
        write_text(self.convention, json.dumps(record, indent=1))

    def keep_selection(self, selection: Selection, *, replace: bool = False) -> None:
        """Makes a selection the run's own if the run has none yet.

        Args:
            selection: The selection.
            replace: Whether to replace the run's own selection too.

        Raises:
            ValueError: If a confirmation tests the pick of the selection that would be replaced.
        """
        if self.has_selection:
            own = self.selection()
            if not replace or own == selection:
                return
            if self.confirmation.is_dir() and own.pick != selection.pick:
                raise ValueError(
                    f"{self.confirmation} tests the run's own selection ({own.pick or 'no pick'}); to keep another, "
                    "copy the run without confirmation/, confirmation.csv and verdict.json, or delete these"
                )
        write_text(self.path / "selection.json", selection.to_json())

    def selection(self) -> Selection:
        """Reads the selection.

        Raises:
            FileNotFoundError: If the run has no selection.
        """
        place = self._needed("selection.json", f"run `layerprobe select {self.path}` first")
        return Selection.from_json(place.read_text(encoding="utf-8"))

    def write_verdict(self) -> None:
        """Copies the curves and the verdict of the confirmation beside the tables."""
        for name in ("confirmation.csv", "verdict.json"):
            shutil.copyfile(self.confirmation / name, self.path / name)

    def verdict(self) -> tuple[pd.DataFrame, Verdict] | None:
        """Reads the curves and the verdict of the confirmation; returns None before the first verdict."""
        place = self.path / "verdict.json"
        if not place.is_file():
            return None
        return pd.read_csv(self.path / "confirmation.csv"), Verdict.from_json(place.read_text(encoding="utf-8"))

    def _needed(self, name: str, cure: str) -> Path:
        if not (self.path / name).is_file():
            raise FileNotFoundError(f"{self.path} holds no {name}; {cure}")
        return self.path / name


def _environment() -> dict[str, Any]:
    """Which software and machine produce the numbers."""
    return {
        "layerprobe": __version__,
        "command": " ".join(sys.argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in PACKAGES},
    }
