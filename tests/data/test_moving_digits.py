"""The script that makes labeled video does what its page says, and `layerprobe` reads what it writes."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from places import DOCS

from layerprobe.data.loading import guess_modality
from layerprobe.data.sequences.video import load_video

SCRIPT = DOCS / "examples" / "moving_digits.py"
DIGITS = {
    part: np.random.default_rng(number).integers(0, 255, (20, 28, 28), np.uint8)
    for number, part in enumerate(["train", "test"])
}


def make(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> dict[str, Any]:
    """Runs the script as from the shell, on distinct images of noise."""
    from datasets import Dataset, Features, Value, enable_progress_bars
    from datasets import Image as ImageFeature

    (folder / "mnist").mkdir(exist_ok=True)
    for part, pictures in DIGITS.items():
        rows = {"image": [Image.fromarray(x) for x in pictures], "label": [i % 10 for i in range(len(pictures))]}
        features = Features({"image": ImageFeature(), "label": Value("int64")})
        Dataset.from_dict(rows, features=features).to_parquet(folder / "mnist" / f"{part}.parquet")
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["moving_digits.py", str(folder / "mnist"), str(folder / "out"), *arguments])
    try:
        return runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        enable_progress_bars()  # the script disables them for the whole process


def test_labeled_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = make(tmp_path, monkeypatch, clips=160)
    source = tmp_path / "out"
    assert guess_modality(source) == "video"
    digits = load_video(source, size=32, channels=1, label_column="digit")
    parts = load_video(source, size=32, channels=1, label_column="direction")
    assert (len(parts["train"]), len(parts["test"])) == (160, 16)
    assert parts["train"].shape == (1, 16, 32, 32)
    assert parts["train"].class_names == tuple(names["DIRECTIONS"])
    assert set(torch.bincount(parts["train"].labels).tolist()) == {20}
    for part, samples in parts.items():
        batch = samples.batch(range(len(samples)))
        clips = ((batch.x[:, 0] + 1) * 127.5).round().to(torch.uint8)
        assert batch.mask is None
        for clip, direction in zip(clips, batch.labels, strict=True):
            row, column = list(names["DIRECTIONS"].values())[int(direction)]
            assert torch.equal(clip[:-1].roll((row, column), (1, 2)), clip[1:])
        # Whatever its place, a picture keeps its pixels.
        known = {np.sort(np.pad(picture, 2), axis=None).tobytes(): i for i, picture in enumerate(DIGITS[part])}
        used = [known[np.sort(clip[5], axis=None).tobytes()] for clip in clips.numpy()]
        assert [number % 10 for number in used] == digits[part].labels.tolist()
        assert len(set(used[:20])) == min(20, len(used))  # no digit twice before each was there once


def test_the_digit_is_near_the_middle_halfway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, monkeypatch, clips=160)
    middles = (
        load_video(tmp_path / "out", size=32, channels=1, label_column="digit")["train"].batch(range(160)).x[:, 0, 8]
    )
    # A digit of 28 pixels is at most one pixel off the middle of 32, so a pixel of each edge is empty at least.
    assert (middles[:, [0, -1]] == -1).all()
    assert (middles[:, :, [0, -1]] == -1).all()
    seen = {tuple(int(edge) for edge in (middle > -1).nonzero().amin(0)) for middle in middles}
    assert seen == {(row, column) for row in (1, 2, 3) for column in (1, 2, 3)}


def test_more_clips_begin_with_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = {}
    for number in (80, 160):
        make(tmp_path, monkeypatch, clips=number, seed=3)
        clips[number] = (
            load_video(tmp_path / "out", size=32, channels=1, label_column="digit")["train"].batch(range(80)).x
        )
    assert torch.equal(clips[80], clips[160])


def test_too_few_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        make(tmp_path, monkeypatch, clips=79)
    assert "pass at least 80" in capsys.readouterr().err
