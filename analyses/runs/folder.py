"""The run folder: its plan, its records and tables, and the environment that produced them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from layerprobe.analyses.experiments import Verdict, read_curves
from layerprobe.analyses.runs.machine import describe_machine
from layerprobe.analyses.selection import Selection
from layerprobe.analyses.tables import PairEvidence, read_quality, read_similarity, write_table
from layerprobe.backbones import Backbone
from layerprobe.checkpoints import CheckpointSource, ConventionCheck
from layerprobe.checksums import check, is_damaged, recorded_write, told_again, was_recorded, write_recorded_text
from layerprobe.data import DataSource, Splits
from layerprobe.extraction import ExtractionPlan, FeatureStore
from layerprobe.files import locked, one_line, similar_path
from layerprobe.options import to_record
from layerprobe.records import check_claim, claim, damaged, parse, read_record, typed, write_record

EXTRACT = "repeat the `layerprobe probe` or `extract` that made the run, which makes it again"
_CONFIRM = "repeat the `layerprobe confirm` that made it, which trains nothing again"


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

    def open(self, *, device: str = "auto") -> tuple[Backbone, Splits]:
        """Opens the checkpoint and the data, whose images are not encoded yet.

        Args:
            device: Device of the model.
        """
        backbone = self.checkpoint.open(device=device).in_precision(self.extraction.precision)
        return backbone, self.data.probing_splits(expect_shape=backbone.shape)

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
        plan: RunPlan = parse(cls, record)
        return plan


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
        rounding: Path of the record of what the precision changes, see `RoundingError`; absent in float32.
        confirmation: Folder of the confirmation runs.
        figures: Folder of the figures.
        recorded: Folder of a trial that was trained beforehand, see `RecordedTrial`; only the quickstart has one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.features, self.figures = self.path / "features", self.path / "figures"
        self.confirmation = self.path / "confirmation"
        self.recorded, self.measured = self.path / "recorded", self.path / "measured"
        self.ablation, self.convention = self.path / "ablation.csv", self.path / "convention.json"
        self.data, self.rounding = self.path / "data.json", self.path / "rounding.json"

    def check_claim(self, plan: RunPlan) -> None:
        """Checks that `claim` would find the folder free or its own; nothing is written.

        Raises:
            ValueError: As `claim`.
        """
        check_claim(self.path, "plan.json", plan.to_dict(), what="the results")

    def claim(self, plan: RunPlan) -> None:
        """Claims the folder for this run, and records the software and machine that produce its numbers.

        Raises:
            ValueError: If the folder belongs to another run, or contains other things.
        """
        claim(self.path, "plan.json", plan.to_dict(), what="the results")
        if not self.is_intact(self.path / "environment.json"):
            write_record(self.path / "environment.json", _environment())

    def write_data(self, splits: Splits) -> None:
        """Writes what was read of the data, how many samples each split has, and which samples were copies."""
        reading = splits.train.reading
        counts = {name: len(samples) for name, samples in splits.items()}
        copies = [asdict(copies) for copies in splits.copies]
        record = {"reading": None if reading is None else reading.to_dict(), "samples": counts, "copies": copies}
        write_record(self.data, record)

    def copies(self) -> list[dict[str, Any]]:
        """Reads which samples of the data were copies; [] for a run that has not recorded it."""
        if not self.data.is_file():
            return []
        record: _Data = read_record(self.data, typed(_Data), remedy=EXTRACT)
        return record["copies"]

    def plan(self) -> RunPlan:
        """Reads the plan.

        Raises:
            FileNotFoundError: If the folder contains no run.
        """
        place = self.path / "plan.json"
        if not place.is_file():
            raise FileNotFoundError(
                f"{self.path} holds no run (no plan.json); pass a folder that `layerprobe probe` has made"
                f"{'' if self.path.exists() else similar_path(self.path)}"
            )
        remedy = "repeat the `layerprobe probe` or `extract` that made the run, with the same options"
        return read_record(place, RunPlan.from_dict, remedy=remedy)

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

    def drop_measured(self) -> None:
        """Deletes the measurements that were kept for the tables, which are written."""
        shutil.rmtree(self.measured, ignore_errors=True)

    def write_probe_scores(self, scores: Mapping[tuple[str, float], NDArray[np.float64]]) -> None:
        """Writes which samples of the test split the probes classify correctly, by layer and noise level."""
        tensors = {f"{level!r} {layer}": values.astype(np.float32) for (layer, level), values in scores.items()}
        with recorded_write(self.path / "probe-scores.safetensors") as partial:
            save_file(tensors, partial)

    def probe_scores(self) -> dict[tuple[str, float], NDArray[np.float64]]:
        """Reads what `write_probe_scores` wrote; empty for runs without labels, and those of earlier versions."""
        path = self.path / "probe-scores.safetensors"
        if not path.is_file():
            return {}
        remedy = f"run `layerprobe analyze {self.path}` again"
        check(path, remedy)
        scores = {}
        try:
            for name, values in load_file(path).items():
                level, layer = name.split(" ", 1)
                if values.dtype != np.float32 or values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
                    raise ValueError(f"{name} holds no shares of correct answers")
                scores[layer, float(level)] = values.astype(np.float64)
        except (SafetensorError, ValueError) as error:
            raise damaged(path, one_line(error), remedy) from error
        return scores

    def is_intact(self, path: Path) -> bool:
        """Whether a file of the run exists and has the content that was written; tells if it is made again."""
        if is_damaged(path):
            told_again(path)
            return False
        return path.is_file()

    @property
    def has_selection(self) -> bool:
        """Whether the run has a selection of its own, and it is not damaged."""
        place = self.path / "selection.json"
        return place.is_file() and not is_damaged(place)

    @property
    def is_measured(self) -> bool:
        """Whether the run has been measured; a damaged table is told of and counts as none."""
        tables = [self.path / f"{name}.csv" for name in ("quality", "similarity", "evidence", "recoverability")]
        lost = [path for path in (*tables, self.path / "probe-scores.safetensors") if is_damaged(path)]
        for path in lost:
            told_again(path)
        return tables[0].is_file() and not lost

    def quality(self) -> pd.DataFrame:
        """Reads the quality table.

        Raises:
            FileNotFoundError: If the run has not been measured.
        """
        return read_quality(self._needed("quality.csv", "run `layerprobe probe` first"))

    def similarity(self) -> pd.DataFrame:
        """Reads the similarity table.

        Raises:
            FileNotFoundError: If the run has not been measured.
        """
        return read_similarity(self._needed("similarity.csv", f"run `layerprobe analyze {self.path}` first"))

    def ablation_table(self) -> pd.DataFrame:
        """Reads the table of layer ablation, which has the columns of the quality table.

        Raises:
            FileNotFoundError: If the extraction has not finished.
        """
        return read_quality(self._needed("ablation.csv", EXTRACT), remedy=EXTRACT)

    def evidence(self) -> PairEvidence:
        """Reads the evidence of layers and pairs.

        Raises:
            FileNotFoundError: If the run has not been measured.
        """
        return PairEvidence.read_csv(self._needed("evidence.csv", f"run `layerprobe analyze {self.path}` first"))

    def convention_check(self) -> tuple[ConventionCheck, bool]:
        """Reads the convention check, and whether the user trusts the declared convention against it."""
        return read_record(self.convention, _convention, remedy=EXTRACT)

    def write_convention(self, check: ConventionCheck, *, trusted: bool, assumptions: Sequence[str]) -> None:
        """Writes the convention check, and what was assumed of the network, as in `Backbone`."""
        record = check.to_dict() | {"trusted": trusted, "assumptions": list(assumptions)}
        write_record(self.convention, record)

    def keep_selection(self, selection: Selection, *, replace: bool = False) -> None:
        """Makes a selection the run's own if the run has none yet.

        Args:
            selection: The selection.
            replace: Whether to replace the run's own selection too.

        Raises:
            ValueError: If a confirmation tests the pick of the selection that would be replaced.
        """
        if self.has_selection and not replace:
            return
        with locked(self.path):
            self._check_lost(selection)
            if self.has_selection:
                own = self.selection()
                if own == selection:
                    return
                if self.confirmation.is_dir() and own.pick != selection.pick:
                    raise ValueError(
                        f"{self.confirmation} tests the run's own selection ({own.pick or 'no pick'}); to "
                        "keep another, copy the run without confirmation/, confirmation.csv and verdict.json, or "
                        "delete these"
                    )
            write_recorded_text(self.path / "selection.json", selection.to_json())

    def _check_lost(self, selection: Selection) -> None:
        """Tells that this selection replaces a damaged one.

        Raises:
            ValueError: If a confirmation tests the pick that is lost.
        """
        place = self.path / "selection.json"
        if not is_damaged(place):
            return
        is_same = was_recorded(place, selection.to_json())
        if self.confirmation.is_dir() and not is_same:
            raise ValueError(
                f"{place} is damaged, and {self.confirmation} tests the pick that it held; restore it from a copy, or "
                "delete both, confirmation.csv and verdict.json"
            )
        told_again(place, "" if is_same else "by the rule now; what it held before is lost")

    def selection(self) -> Selection:
        """Reads the selection.

        Raises:
            FileNotFoundError: If the run has no selection.
        """
        place = self._needed("selection.json", f"run `layerprobe select {self.path}` first")
        return read_record(place, Selection.from_dict, remedy="repeat `layerprobe probe`, or delete it to pick again")

    def write_verdict(self) -> None:
        """Copies the curves and the verdict of the confirmation beside the tables."""
        for name in ("confirmation.csv", "verdict.json"):
            with recorded_write(self.path / name) as partial:
                partial.write_bytes((self.confirmation / name).read_bytes())

    def mend_verdict(self) -> None:
        """Copies curves and verdict again if the copies are damaged."""
        if any(is_damaged(self.path / name) for name in ("confirmation.csv", "verdict.json")):
            told_again(self.path / "verdict.json")
            read_curves(self.confirmation / "confirmation.csv")
            read_record(self.confirmation / "verdict.json", Verdict.from_dict, remedy=_CONFIRM)
            self.write_verdict()

    def verdict(self) -> tuple[pd.DataFrame, Verdict] | None:
        """Reads the curves and the verdict of the confirmation; returns None before the first verdict."""
        place = self.path / "verdict.json"
        if not place.is_file():
            return None
        return read_curves(self._needed("confirmation.csv", _CONFIRM)), read_record(
            place, Verdict.from_dict, remedy=_CONFIRM
        )

    def _needed(self, name: str, cure: str) -> Path:
        if not (self.path / name).is_file():
            raise FileNotFoundError(f"{self.path} holds no {name}; {cure}")
        return self.path / name


class _Data(TypedDict):
    reading: dict[str, Any] | None
    samples: dict[str, int]
    copies: list[dict[str, Any]]


def _convention(record: Mapping[str, Any]) -> tuple[ConventionCheck, bool]:
    return ConventionCheck.from_dict(record), parse(bool, record.get("trusted", False), "trusted")


def _environment() -> dict[str, Any]:
    """Which software and machine produce the numbers."""
    return {
        "command": " ".join(sys.argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **describe_machine(),
    }
