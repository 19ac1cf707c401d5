"""Several processes make the run that one makes, byte for byte, whatever happened before."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from started import Started
from tiny import tiny_samples, tiny_sit, tiny_splits

from layerprobe.analyses.experiments.arms import ConfirmationPlan, arms_for
from layerprobe.analyses.experiments.confirmation import confirm_pair
from layerprobe.analyses.experiments.pair_sweep import PairSweepPlan, all_pairs, sweep_pairs
from layerprobe.analyses.generation.extractors import Extractor, all_features
from layerprobe.analyses.measures import cka_matrix
from layerprobe.analyses.runs import probe
from layerprobe.analyses.runs.folder import RunPlan
from layerprobe.analyses.runs.probe import analysis_forecast, measure_run
from layerprobe.analyses.runs.stages import PROBES, SIMILARITY, Cost
from layerprobe.analyses.selection import Selection
from layerprobe.analyses.tables import measurements
from layerprobe.checkpoints.source import CheckpointSource
from layerprobe.data.latents import vae
from layerprobe.data.samples import TensorSamples
from layerprobe.data.sources import DataSource
from layerprobe.extraction.features import FeatureStore
from layerprobe.extraction.plan import ExtractionPlan
from layerprobe.files import IN_MEMORY
from layerprobe.layersync.pair import LayerPair
from layerprobe.progress import TaskProgress
from layerprobe.ranks import processes
from layerprobe.sampling.plan import SamplingPlan
from layerprobe.training.plan import TrainingPlan

# Twelve shards, so that each process has some in every store; two draws and tokens, so that everything is measured.
PLAN = RunPlan(
    CheckpointSource(f"{IN_MEMORY}a SiT"),
    DataSource(f"{IN_MEMORY}samples"),
    ExtractionPlan(noise_levels=(0.2, 0.6), draws=2, shard_size=5, token_samples=4),
)


def measured(folder: Path, seed: int = 0, progress: TaskProgress | None = None) -> Selection:
    """A run of all stages but the figures; a seed for each process, or one for all."""
    opened = tiny_sit(shape=(1, 8, 8)), tiny_splits(60, shape=(1, 8, 8), seed=seed)
    return measure_run(PLAN, folder, opened=opened, trust_convention=True, device="cpu", progress=progress)


def measured_with_other_data(folder: Path) -> None:
    measured(folder, seed=int(os.environ["RANK"]))


def killed(folder: Path) -> None:
    """A run in which the second process is killed in its third shard."""
    if os.environ["RANK"] == "1":
        from layerprobe.extraction import forward

        def write(path: Path, tensors: Any, whole: Any = forward.write_tensors) -> None:
            write.calls += 1  # type: ignore[attr-defined]
            if write.calls == 3:  # type: ignore[attr-defined]
                os.kill(os.getpid(), 9)
            whole(path, tensors)

        write.calls = 0  # type: ignore[attr-defined]
        forward.write_tensors = write
    measured(folder)


def contents(folder: Path) -> dict[str, Any]:
    """The files of a run, without what differs between any two: the record of when and where it began."""
    files: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("environment.json", "times.json")
    }
    record = json.loads(files.pop("checksums.json"))["files"]
    for name in ("environment.json", "times.json"):
        del record[name]
    return files | {"checksums of files": record}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Selection]:
    folder = tmp_path_factory.mktemp("one") / "run"
    selection = measured(folder)
    return contents(folder), selection


def test_two_processes_make_the_run_of_one(one: tuple[dict[str, Any], Selection], tmp_path: Path) -> None:
    assert Started(tmp_path, measured, tmp_path / "run").results() == [one[1]] * 2
    found = contents(tmp_path / "run")
    assert found.keys() == one[0].keys()
    assert [name for name, content in found.items() if content != one[0][name]] == []


def test_three_processes_continue_what_two_began(one: tuple[dict[str, Any], Selection], tmp_path: Path) -> None:
    started = Started(tmp_path, killed, tmp_path / "run")
    assert started.exit_codes() == [2, -9]
    assert re.fullmatch(
        r"ConnectionError: another process was killed, or its machine is unreachable; repeat the command to continue "
        r"from what is finished\n",
        started.stderr_files[0].read_text().split("layerprobe: ")[-1],
    )
    shards = sorted((tmp_path / "run" / "features" / "model").glob("shard-*"))
    before = {path: path.stat().st_mtime_ns for path in shards}
    assert 2 < len(before) < 12
    assert Started(tmp_path, measured, tmp_path / "run", num=3).results() == [one[1]] * 3
    assert contents(tmp_path / "run") == one[0]
    assert {path: path.stat().st_mtime_ns for path in before} == before  # kept


def test_an_interrupted_measurement_is_continued(
    one: tuple[dict[str, Any], Selection], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(task: str, done: int, total: int) -> None:
        if task == "measuring layers" and done == 5:
            raise KeyboardInterrupt

    measured_by: list[str] = []

    def counted(x: Any, whole: Any = measurements.spectrum) -> Any:
        measured_by.append("")
        return whole(x)

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        measured(folder, progress=interrupt)
    kept = len([*folder.glob("measured/*/*.safetensors")])
    num = sum(len(store.layers) * len(store.noise_levels) for store in map(FeatureStore.open, stores(folder)))
    assert 5 <= kept < num
    monkeypatch.setattr(probe, "analysis_cost", lambda *_, **__: Cost({PROBES: 1.0, SIMILARITY: 1.0}, 0, None, 0))
    assert analysis_forecast(folder).seconds == {PROBES: pytest.approx(1 - kept / num), SIMILARITY: 1.0}
    monkeypatch.setattr(measurements, "spectrum", counted)
    assert measured(folder) == one[1]
    assert len(measured_by) == (num - kept) * PLAN.extraction.draws
    assert contents(folder) == one[0]


def stores(run: Path) -> list[Path]:
    return [run / "features" / name for name in ("model", "random-weights", "raw-input")]


def test_processes_with_other_data_are_refused(tmp_path: Path) -> None:
    started = Started(tmp_path, measured_with_other_data, tmp_path / "run")
    assert started.exit_codes() == [1, 2]
    assert (
        "ValueError: process 1 has another model or other data than the first one (different: data.test, data.train, "
        "data.validation); give all processes the same files\n"
    ) in started.stderr_files[1].read_text()


TRAINING = TrainingPlan(steps=4, batch_size=5, learning_rate=1e-2, ema_decay=0.5)
SAMPLING = SamplingPlan("heun", 2)
LAYERS = ("blocks.0", "blocks.1", "blocks.2")
PIXELS = Extractor("pixels", lambda x: x.flatten(1))


def trained(folder: Path, weights: str = "equal") -> pd.DataFrame:
    """A confirmation and a pair sweep, both of four trainings."""
    splits = tiny_splits(24)
    own = int(os.environ["RANK"]) if weights == "different" else 0
    confirm_pair(
        lambda seed: tiny_sit(seed=seed + own),
        splits,
        arms_for([LayerPair("blocks.0", "blocks.2")], LAYERS)[:2],
        ConfirmationPlan(TRAINING, (3, 4), num_evaluations=1, num_samples=9, sampling=SAMPLING),
        folder / "confirmation",
        start_name="from scratch",
        extractor=PIXELS,
    )
    plan = PairSweepPlan(TRAINING, seeds=(3, 4), num_samples=9, sampling=SAMPLING)
    return sweep_pairs(tiny_sit(), splits, all_pairs(LAYERS)[:1], plan, folder / "sweep", extractor=PIXELS)


def test_arms_and_branches_are_shared(tmp_path: Path) -> None:
    one = trained(tmp_path / "one")
    for table in Started(tmp_path, trained, tmp_path / "two").results():
        pd.testing.assert_frame_equal(table, one)
    for name in ("confirmation/confirmation.csv", "confirmation/verdict.json", "sweep/atlas.csv"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def test_arms_that_start_from_different_weights_are_refused(tmp_path: Path) -> None:
    started = Started(tmp_path, trained, tmp_path / "run", "different")
    assert sorted(started.exit_codes()) == [1, 2]
    lines = [path.read_text().splitlines() for path in started.stderr_files]
    (told,) = (line for line in [*lines[0], *lines[1]] if line.startswith("ValueError"))
    assert told.startswith("ValueError: the processes start from different weights, so their arms cannot be compared")


def encoded(folder: Path) -> tuple[torch.Tensor, int, list[np.ndarray]]:
    """Latents of images, how many of them this process has encoded, and the features and CKA that processes share."""

    class Autoencoder:
        count = 0

        def encode(self, x: torch.Tensor) -> Any:
            self.count += len(x)
            time.sleep(0.05)  # Each process comes to some.
            distribution = type("Distribution", (), {"mean": x * 2, "std": x * 0 + 1})
            return type("Output", (), {"latent_dist": distribution})

    autoencoder = Autoencoder()
    vae._autoencoder, vae.PART = (lambda *_: autoencoder), 4
    images = TensorSamples(torch.rand(43, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    with processes() as ranks:
        latents = vae.encode(images, folder, folder / "cache", batch_size=2).batch(range(43)).x
        features = all_features(PIXELS, tiny_samples(11), batch_size=2, ranks=ranks)
        wide = torch.randn(4, 40, 60, generator=torch.Generator().manual_seed(0))
        by_gram = cka_matrix(wide, share=ranks.map, tile_bytes=30000)  # several tiles
        by_features = cka_matrix(wide[:, :, :3], share=ranks.map)
    return latents, autoencoder.count, [features, by_gram.values, by_features.values]


def test_images_to_encode_samples_to_score_and_cka_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae, "_autoencoder", None)  # set in this process too
    monkeypatch.setattr(vae, "PART", None)
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        (folder / "config.json").write_text('{"_class_name": "AutoencoderKL", "latent_channels": 3}')
        (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    latents, count, arrays = encoded(tmp_path / "one")
    assert count == 43
    results = Started(tmp_path, encoded, tmp_path / "two").results()
    assert sum(count for _, count, _ in results) == 43
    assert all(count for _, count, _ in results)
    for shared in results:
        assert torch.equal(shared[0], latents)
        assert all(map(np.array_equal, shared[2], arrays))
    assert [path.name for path in (tmp_path / "two" / "cache").glob("*/*.npy")] == ["moments.npy"]


def squares(numbers: range) -> tuple[list[int], list[int]]:
    """The squares of some numbers, and the numbers of this process."""
    mine = []

    def square(number: int) -> int:
        mine.append(number)
        return number**2

    with processes() as ranks:
        return [*ranks.map(square, numbers)], mine


@pytest.mark.parametrize("num", [1, 2, 3])
def test_work_that_becomes_less_is_divided_evenly(num: int, tmp_path: Path) -> None:
    numbers = range(23, 0, -1)
    results = Started(tmp_path, squares, numbers, num=num).results()
    assert all(found == [number**2 for number in numbers] for found, _ in results)
    parts = [mine for _, mine in results]
    assert sorted(number for part in parts for number in part) == sorted(numbers)
    sums = [sum(part) for part in parts]
    assert max(sums) - min(sums) <= 3
