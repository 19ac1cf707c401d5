"""Measurements that outlive an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from layerprobe.analyses.tables.kept import KeptMeasurements
from layerprobe.analyses.tables.measurements import Measurement, Representation, neighbors, spectra
from layerprobe.analyses.tables.quality import measure
from layerprobe.extraction import FeatureStore
from layerprobe.extraction.features import shard_path, write_tensors
from tests.analyses.tables.test_quality import LAYERS, LEVELS, make_store

CPU = torch.device("cpu")
NUM_REPRESENTATIONS = len(LAYERS) * len(LEVELS)
SCORES = np.arange(12.0)[::2]
ROWS = [
    Measurement("accuracy", "test", 0.1 + 0.2, "a note", SCORES),
    Measurement("rank", "train", float("nan"), "", None),
    Measurement("accuracy", "validation", 1.0, "é", np.array([0.5, np.nan])),
]


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return make_store(tmp_path / "store")


def kept_in(folder: Path, store: FeatureStore, *analyses: Any, device: torch.device = CPU) -> KeptMeasurements:
    return KeptMeasurements(folder, {"model": store}, analyses or (spectra,), device)


def the_file(folder: Path) -> Path:
    (path,) = folder.rglob("*.safetensors")
    return path


def test_measurements_are_read_as_they_were_written(tmp_path: Path, store: FeatureStore) -> None:
    kept_in(tmp_path / "kept", store).write(3, ROWS)
    again = kept_in(tmp_path / "kept", store)
    assert again.count() == 1 and again.read(2) is None
    for got, wanted in zip(again.read(3) or [], ROWS, strict=True):
        assert (got.metric, got.split, got.note) == (wanted.metric, wanted.split, wanted.note)
        np.testing.assert_array_equal(got.value, wanted.value)
        assert (got.scores is None) == (wanted.scores is None)
        np.testing.assert_array_equal(got.scores, wanted.scores)  # type: ignore[arg-type]


def test_nothing_is_taken_that_was_measured_otherwise(tmp_path: Path, store: FeatureStore) -> None:
    folder = tmp_path / "kept"
    kept_in(folder, store).write(0, ROWS)
    assert kept_in(folder, store).count() == 1
    assert kept_in(folder, store, spectra, neighbors).count() == 0
    assert kept_in(folder, store, device=torch.device("meta")).count() == 0
    assert kept_in(folder, make_store(tmp_path / "other", seed=1)).count() == 0
    changed = {layer: np.zeros((2, 1, len(store.ids), 6), np.float32) for layer in LAYERS}
    write_tensors(shard_path(store.folder, 0), changed)  # the same store with other features
    assert kept_in(folder, store).count() == 0


def test_damaged_measurements_are_told_of_and_made_again(
    tmp_path: Path, store: FeatureStore, caplog: pytest.LogCaptureFixture
) -> None:
    kept = kept_in(tmp_path / "kept", store)
    kept.write(0, ROWS)
    path = the_file(tmp_path / "kept")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert kept.read(0) is None
    assert "was damaged and is made again" in caplog.text
    kept.write(0, ROWS)
    assert the_file(tmp_path / "kept").read_bytes() == whole


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({}, {}),
        ({}, {"rows": "[[1, 2]]"}),
        ({}, {"rows": "[" * 10**5}),
        ({"0": np.zeros(3, np.float32)}, {"rows": '[["a", "test", 1.0, ""]]'}),
    ],
)
def test_files_of_other_content_are_made_again(
    tmp_path: Path, store: FeatureStore, tensors: Any, metadata: dict[str, str]
) -> None:
    from safetensors.numpy import save_file

    kept = kept_in(tmp_path / "kept", store)
    kept.write(0, ROWS)
    path = the_file(tmp_path / "kept")
    (path.parent / "checksums.json").unlink()
    save_file(tensors, path, metadata=metadata)
    assert kept.read(0) is None


def test_an_interrupted_measurement_continues_with_the_same_tables(tmp_path: Path, store: FeatureStore) -> None:
    wanted = measure({"model": store}, analyses=(neighbors, spectra))
    calls: list[str] = []

    def counted(representation: Representation) -> Any:
        calls.append(representation.layer)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return [*neighbors(representation), *spectra(representation)]

    kept = kept_in(tmp_path / "kept", store)
    with pytest.raises(KeyboardInterrupt):
        measure({"model": store}, analyses=(counted,), kept=kept)
    done = kept.count()
    assert 0 < done < NUM_REPRESENTATIONS
    heard: list[Any] = []
    calls = [""] * 10
    for num_calls in (NUM_REPRESENTATIONS - done, 0):  # the second time everything is there
        before = len(calls)
        tables = measure({"model": store}, analyses=(counted,), kept=kept, listener=lambda *key: heard.append(key[:3]))
        assert len(calls) - before == num_calls
        for table, same in zip(tables, wanted, strict=True):
            pd.testing.assert_frame_equal(table, same, check_exact=True)
    assert heard == 2 * [("model", layer, level) for layer in LAYERS for level in LEVELS]
