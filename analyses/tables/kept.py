"""Measurements that are kept until the tables are written, so that an interrupted call continues behind them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from layerprobe import __version__
from layerprobe.analyses.tables.measurements import Analysis, Measurement
from layerprobe.checksums import check, recorded_digest, recorded_write, told_again
from layerprobe.extraction import FeatureStore
from layerprobe.records import parse


class KeptMeasurements:
    """Measurements of representations in a folder, a file for each.

    The folder is named after all that they depend on: the features, the analyses, the kind of device and the software.
    So what another call has kept is never taken for them.

    Args:
        folder: Folder that the folder is in.
        stores: Features by source.
        analyses: Functions that measure them.
        device: Device of the measures.
    """

    def __init__(
        self, folder: Path, stores: Mapping[str, FeatureStore], analyses: Sequence[Analysis], device: torch.device
    ) -> None:
        features = {source: recorded_digest(store.folder) for source, store in stores.items()}
        names = [f"{analysis.__module__}.{analysis.__qualname__}" for analysis in analyses]
        record = [features, names, device.type, __version__, torch.__version__]
        self._folder = folder / hashlib.sha256(json.dumps(record).encode()).hexdigest()[:16]

    def count(self) -> int:
        """Returns how many representations have been measured."""
        return len([*self._folder.glob("*.safetensors")])

    def read(self, index: int) -> list[Measurement] | None:
        """Returns the measurements of a representation, counted from 0; None if they are not there."""
        path = self._path(index)
        if not path.is_file():
            return None
        try:
            check(path, "it is measured again")
            return _read(path)
        except (SafetensorError, ValueError, RecursionError):
            told_again(path)
            return None

    def write(self, index: int, measurements: Sequence[Measurement]) -> None:
        """Keeps the measurements of a representation."""
        self._folder.mkdir(parents=True, exist_ok=True)
        # Safetensors silently writes strided arrays in memory order.
        scores = {str(i): np.ascontiguousarray(m.scores) for i, m in enumerate(measurements) if m.scores is not None}
        rows = [(m.metric, m.split, m.value, m.note) for m in measurements]
        with recorded_write(self._path(index)) as partial:
            save_file(scores, partial, metadata={"rows": json.dumps(rows)})

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:05d}.safetensors"


def _read(path: Path) -> list[Measurement]:
    with safe_open(path, framework="np") as file:
        record = (file.metadata() or {}).get("rows", "")
    rows: list[tuple[str, str, float, str]] = parse(list[tuple[str, str, float, str]], json.loads(record))
    scores = load_file(path)
    if any(values.dtype != np.float64 or values.ndim != 1 for values in scores.values()):
        raise ValueError(f"{path} holds no scores of samples")
    return [Measurement(*row, scores.get(str(i))) for i, row in enumerate(rows)]
