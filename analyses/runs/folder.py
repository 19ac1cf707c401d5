"""The run folder: its plan, its records and tables, and the software environment that produced them."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from layerprobe import __version__
from layerprobe.analyses.selection import Selection
from layerprobe.analyses.tables import read_quality, read_similarity
from layerprobe.backbones import Backbone
from layerprobe.checkpoints import CheckpointSource
from layerprobe.data import DataSource, Splits
from layerprobe.extraction import ExtractionPlan
from layerprobe.files import write_text
from layerprobe.options import from_record, to_record
from layerprobe.progress import TaskProgress, named_progress

PACKAGES = ("torch", "numpy", "scikit-learn", "pandas", "matplotlib", "safetensors", "datasets")


@dataclass(frozen=True)
class RunPlan:
    """What a run measures; enough to open the checkpoint and the data again.

    Attributes:
        checkpoint: The checkpoint.
        data: The data set.
        extraction: What is read from the model; without layers, since these are the backbone's.
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
        """Returns the plan as JSON."""
        extraction = {name: value for name, value in self.extraction.to_dict().items() if name != "layers"}
        return {"checkpoint": to_record(self.checkpoint), "data": to_record(self.data), "extraction": extraction}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> RunPlan:
        """Returns the plan that `to_dict` wrote."""
        return cls(
            from_record(CheckpointSource, record["checkpoint"]),
            from_record(DataSource, record["data"]),
            from_record(ExtractionPlan, record["extraction"]),
        )


def read_plan(run: str | Path) -> RunPlan:
    """Reads the plan of a run folder.

    Raises:
        FileNotFoundError: If the folder contains no run.
    """
    path = Path(run) / "plan.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run} holds no run (no plan.json); pass a folder that `layerprobe probe` has made")
    return RunPlan.from_dict(json.loads(path.read_text(encoding="utf-8")))


def store_folder(run: Path, source: str) -> Path:
    """Returns the folder of the features of a source: the model or one of its controls."""
    return run / "features" / source.replace(" ", "-")


def read_selection(run: str | Path) -> Selection:
    """Reads the selection of a run.

    Raises:
        FileNotFoundError: If the run has no selection.
    """
    path = Path(run) / "selection.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run} holds no selection.json; run `layerprobe select {run}` first")
    return Selection.from_json(path.read_text(encoding="utf-8"))


def write_environment(run: Path) -> None:
    """Writes which software and machine produce the numbers, unless the run folder already says so."""
    record = {
        "layerprobe": __version__,
        "command": " ".join(sys.argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in PACKAGES},
    }
    if not (run / "environment.json").is_file():
        write_text(run / "environment.json", json.dumps(record, indent=1))


def read_tables(run: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Reads the quality table and the similarity table of a run.

    Raises:
        FileNotFoundError: If the run has not been measured.
    """
    if not (run / "quality.csv").is_file():
        raise FileNotFoundError(f"{run} holds no quality.csv; run `layerprobe probe` first")
    return read_quality(run / "quality.csv"), read_similarity(run / "similarity.csv")
