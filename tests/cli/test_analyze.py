"""`layerprobe analyze --features` as the shell runs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from undrawn import undrawn


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers that know more and more of the label."""
    generator, labels = np.random.default_rng(0), np.arange(90) % 3
    content = {f"blocks.{i}@0.3": generator.normal(size=(90, 6)) + i * np.eye(6)[labels] for i in range(4)}
    path = tmp_path_factory.mktemp("features") / "own.npz"
    np.savez(path, labels=np.array(["cat", "dog", "owl"])[labels], **content)  # type: ignore[arg-type]
    return path


def test_features_become_a_run_that_other_commands_read(features: Path, tmp_path: Path, cli, monkeypatch) -> None:
    run = tmp_path / "run"
    with undrawn():
        code, out, err = cli("analyze", run, "--features", features)
    assert (code, [line for line in err.splitlines() if "warning" in line]) == (0, [])
    assert "The features came without the network, so there are no controls" in out
    assert "blocks.3" in out
    assert {path.name for path in run.iterdir()} >= {
        "report.html",
        "quality.csv",
        "selection.json",
        "figures",
        "plan.json",
    }
    assert "no control was measured" in (run / "report.html").read_text(encoding="utf-8")
    for place in ("", ".own_features"):  # once is enough
        monkeypatch.setattr(f"layerprobe.analyses.runs{place}.draw_figures", lambda run: None)
    before = (run / "quality.csv").read_bytes()
    for again in (("analyze", run, "--features", features), ("analyze", run), ("select", run)):
        assert cli(*again)[0] == 0
    assert (run / "quality.csv").read_bytes() == before
    code, out, _ = cli("analyze", run, "--dry-run", "--json")
    assert (code, json.loads(out)["total_s"]) == (0, 300)
    code, _, err = cli("confirm", run, "--from-scratch", "--dry-run")
    assert code == 2
    assert "made from features alone (own.npz, " in err and "so it has no network; probe a checkpoint for this" in err
    code, out, _ = cli("analyze", tmp_path / "two", "--features", features, "--layers", "blocks.3, blocks.1", "--json")
    assert json.loads(out)["basis"]["layers"] == ["blocks.3", "blocks.1"]


def test_what_does_not_go_together_is_one_line(features: Path, tmp_path: Path, cli, monkeypatch) -> None:
    for arguments, message in (
        (("--layers", "blocks.1"), "--layers names layers of --features; pass it too, or leave out --layers"),
        (("--features", features, "--encoder", "x"), "--encoder needs the samples, which --features does not have"),
        (("--features", features, "--analysis", "x.py:f"), "--analysis runs on a finished run, which --features"),
        (("--features", features, "--dry-run"), "--dry-run tells the cost of a run, and --features makes one"),
        (("--features", tmp_path / "no.npz"), "there is no file"),
    ):
        code, _, err = cli("analyze", tmp_path / "run", *arguments)
        assert (code, message in err, len(err.splitlines())) == (2, True, 1), err
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "own.h5").write_bytes(b"x")
    code, _, err = cli("analyze", tmp_path / "run", "--features", tmp_path / "own.h5")
    assert (code, "h5py is not installed; install layerprobe[h5]" in err) == (3, True)
    assert not (tmp_path / "run").exists()
