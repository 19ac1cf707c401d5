"""A probing run: what its pick rests on, and what it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

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
