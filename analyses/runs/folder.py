"""The run folder: its plan, its records and tables, and the environment that they were made in."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from layerprobe import __version__
from layerprobe.analyses.runs.data import encoded_splits, split_options
from layerprobe.analyses.selection import Selection
from layerprobe.analyses.tables import read_quality, read_similarity
from layerprobe.backbones import Backbone
from layerprobe.checkpoints import open_checkpoint
from layerprobe.data import Splits, for_probing, load
from layerprobe.extraction import ExtractionPlan
from layerprobe.files import write_text
from layerprobe.progress import TaskProgress

PACKAGES = ("torch", "numpy", "scikit-learn", "pandas", "matplotlib", "safetensors", "datasets")


@dataclass(frozen=True)
class RunPlan:
    """What a run is of; enough to open checkpoint and data again.

    Attributes:
        checkpoint: Path or "digits".
        checkpoint_options: Of `open_checkpoint`.
        data: Source of the data, as `data.load` takes it.
        data_options: Of `data.load`.
        token_samples: See `ExtractionPlan`, like the fields around it.
    """

    checkpoint: str
    data: str
    noise_levels: tuple[float, ...]
    checkpoint_options: Mapping[str, Any] = field(default_factory=dict)
    data_options: Mapping[str, Any] = field(default_factory=dict)
    draws: int = 1
    pool_cells: int = 1
    token_samples: int = 0
    condition: str = "null"
    precision: str = "float32"
    seed: int = 0

    def open(
        self, *, device: str = "auto", encode: bool = True, progress: TaskProgress | None = None
    ) -> tuple[Backbone, Splits]:
        """The checkpoint and the data; with a VAE its latents, unless `encode` is off."""
        backbone = open_checkpoint(self.checkpoint, device=device, **self.checkpoint_options)
        reading, encoding = split_options(self.data_options)
        shape = None if encoding else backbone.shape
        splits = for_probing(load(self.data, expect_shape=shape, **reading), given=reading)
        if encoding and encode:
            splits = encoded_splits(splits, encoding, backbone.shape, progress)
        return backbone, splits

    def extraction(self, backbone: Backbone) -> ExtractionPlan:
        """What is read from this backbone."""
        return ExtractionPlan(
            layers=backbone.layers,
            noise_levels=self.noise_levels,
            draws=self.draws,
            pool_cells=self.pool_cells,
            token_samples=self.token_samples,
            condition=self.condition,  # type: ignore[arg-type]
            precision=self.precision,  # type: ignore[arg-type]
            seed=self.seed,
        )


def read_plan(run: str | Path) -> RunPlan:
    """The plan of a run folder.

    Raises:
        FileNotFoundError: If the folder holds no run.
    """
    place = Path(run) / "plan.json"
    if not place.is_file():
        raise FileNotFoundError(f"{run} holds no run (no plan.json); pass a folder that `layerprobe probe` has made")
    record = json.loads(place.read_text(encoding="utf-8"))
    return RunPlan(**record | {"noise_levels": tuple(record["noise_levels"])})


def store_folder(run: Path, source: str) -> Path:
    return run / "features" / source.replace(" ", "-")


def read_selection(run: str | Path) -> Selection:
    """The selection of a run."""
    place = Path(run) / "selection.json"
    if not place.is_file():
        raise FileNotFoundError(f"{run} holds no selection.json; run `layerprobe select {run}` first")
    return Selection.from_json(place.read_text(encoding="utf-8"))


def write_environment(run: Path) -> None:
    """Which software and machine the numbers come from."""
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
    if not (run / "quality.csv").is_file():
        raise FileNotFoundError(f"{run} holds no quality.csv; run `layerprobe probe` first")
    return read_quality(run / "quality.csv"), read_similarity(run / "similarity.csv")
