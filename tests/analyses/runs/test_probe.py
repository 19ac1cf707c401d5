"""A probing run: what its pick rests on, and what it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from undrawn import undrawn

from layerprobe.data.embedded_digits import digits

Cli = Callable[..., tuple[int, str, str]]


def digit_folders(folder: Path, *, corrupted: bool) -> Path:
    """Class folders of embedded digits in two parts; corrupted test images are noise with the labels of others."""
    rng = np.random.default_rng(0)
    samples = digits()
    for part, source, count in (("train", samples.train, 330), ("test", samples.test, 120)):
        batch = source.batch(range(count))
        assert batch.labels is not None
        pixels = ((batch.x[:, 0].numpy() + 1) * 127.5).round().astype(np.uint8)
        labels = batch.labels.numpy()
        if corrupted and part == "test":
            pixels, labels = rng.integers(0, 256, pixels.shape, dtype=np.uint8), rng.permutation(labels)
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            path = folder / part / str(label) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return folder


@pytest.mark.slow
def test_the_test_split_takes_no_part_in_the_pick(cli: Cli, tmp_path: Path) -> None:
    """Noise with permuted labels in its place changes what is reported, and nothing that a pick rests on."""
    runs = {}
    for name in ("whole", "corrupted"):
        data = digit_folders(tmp_path / f"{name}-data", corrupted=name == "corrupted")
        counts = ("--num-train", 230, "--num-validation", 66)
        read = ("--data", data, "--channels", 1, "--noise-levels", "0.3", "--batch-size", 512)
        with undrawn():
            code, _, error = cli("probe", "digits", *read, *counts, "--out", tmp_path / name)
        assert code == 0, error
        runs[name] = {
            "selection": (tmp_path / name / "selection.json").read_bytes(),
            "evidence": (tmp_path / name / "evidence.csv").read_bytes(),
            "similarity": (tmp_path / name / "similarity.csv").read_bytes(),
        }
        quality = pd.read_csv(tmp_path / name / "quality.csv")
        runs[name]["quality"] = quality[quality["split"] != "test"].to_csv().encode()
        reported = quality[(quality["split"] == "test") & (quality["metric"] == "probe accuracy")]
        runs[name]["reported"] = reported["value"].mean()
    whole, corrupted = runs["whole"], runs["corrupted"]
    assert whole.pop("reported") > corrupted.pop("reported") + 0.3
    assert whole == corrupted


def test_a_run_tells_what_is_read_before_the_model_runs_and_keeps_it(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    for i in range(60):
        path = folder / ("bus", "car", "train")[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 4 * i, np.uint8)).save(path)
    (folder / "README.md").touch()
    command = ("extract", "digits", "--data", folder, "--noise-levels", "0.3", "--trust-convention")
    code, out, error = cli(*command, "--out", tmp_path / "run")
    assert code == 0, error
    told = ["layerprobe: files: 60 of 61 read; left: 1 .md", "layerprobe: labels: top folder, 3 classes"]
    assert error.splitlines()[:2] == told
    record = json.loads((tmp_path / "run" / "data.json").read_text())["reading"]
    assert (record["files_read"], record["files_left"], record["label"]) == (60, {".md": 1}, "folder")
    code, out, _ = cli(*command, "--out", tmp_path / "other", "--dry-run")
    assert code == 0
    assert {"files: 60 of 61 read; left: 1 .md", "labels: top folder, 3 classes"} <= set(out.splitlines())
    for path in (folder / "bus").iterdir():
        path.unlink()
    for path in (folder / "car").iterdir():
        path.unlink()
    code, out, error = cli(*command, "--out", tmp_path / "unlabeled")
    assert code == 0, error
    assert error.splitlines()[1].startswith("layerprobe: labels: none: the files are not in one folder per class")
