"""`layerprobe convert`: what it writes equals what was read, and nothing else is touched."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from checkpoint_files import Payload
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from layerprobe.checkpoints import conversion
from layerprobe.checkpoints.conversion import convert_checkpoint
from layerprobe.checkpoints.weight_sets import read_weights
from layerprobe.cli.convert import convert as command


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A training checkpoint with tied weights, a view with gaps, several types, and a command."""
    base = torch.arange(24.0)
    average = {"w": base.view(4, 6).T, "tied": base[:6], "again": base[:6], "half": torch.ones(3).bfloat16()}
    settings = argparse.Namespace(lr=1e-4, clip=float("inf"), name="a\nb")
    content = {"model": {"w": torch.zeros(2)}, "ema": average, "args": settings, "x": Payload(tmp_path / "planted")}
    torch.save(content, tmp_path / "c.pt")
    return tmp_path / "c.pt"


def run(*arguments: object) -> None:
    app = typer.Typer()
    app.command()(command)
    app([str(argument) for argument in arguments], standalone_mode=False)


def test_the_weights_come_back_as_they_were_read(source: Path, tmp_path: Path) -> None:
    record = convert_checkpoint(source, tmp_path / "new" / "out.safetensors")
    written, wanted = load_file(tmp_path / "new" / "out.safetensors"), read_weights(source).tensors
    assert set(written) == set(wanted)
    assert all(
        torch.equal(written[name], wanted[name]) and written[name].dtype == wanted[name].dtype for name in wanted
    )
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out.json", "out.safetensors"]
    assert json.loads((tmp_path / "new" / "out.json").read_text()) == record
    assert record["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert (record["format"], record["container"], record["containers"]) == ("PyTorch zip", "ema", ["ema", "model"])
    assert record["args"] == {"lr": 1e-4, "clip": "inf", "name": "a\nb"}
    assert record["foreign"] == ["posix.system"] and not (tmp_path / "planted").exists()
    assert (record["tensors"], record["values"], record["dtypes"]) == (4, 39, ["bfloat16", "float32"])


def test_the_json_file_is_json_for_every_reader(source: Path, tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    convert_checkpoint(source, tmp_path / "out.safetensors")
    json.loads((tmp_path / "out.json").read_text(), parse_constant=refuse)


def test_our_own_record_goes_along(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"layerprobe": '{"family": "sit"}'})
    convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    assert read_weights(tmp_path / "out.safetensors").record == {"family": "sit"}
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"  # Without it other libraries refuse the file.


def test_repeating_does_nothing_and_other_weights_are_not_overwritten(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    record = convert_checkpoint(source, out)
    before = {path: path.stat().st_mtime_ns for path in (out, out.with_suffix(".json"))}
    assert convert_checkpoint(source, out) == record
    with pytest.raises(
        ValueError, match=r"out.safetensors exists and does not hold these weights; choose another --out"
    ):
        convert_checkpoint(source, out, weights="model")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    out.unlink()
    out.with_suffix(".json").write_text("mine")
    with pytest.raises(ValueError, match=r"out.json exists and does not hold these weights; choose another --out"):
        convert_checkpoint(source, out)
    assert out.with_suffix(".json").read_text() == "mine" and not out.exists()


@pytest.mark.parametrize("name", ["out.pt", "out", "safetensors"])
def test_other_names_are_refused(source: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"is not the name of a safetensors file; end it in .safetensors$"):
        convert_checkpoint(source, tmp_path / name)


def test_types_without_a_place_in_safetensors_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, dtype=torch.complex128)}, tmp_path / "c.pt")
    with pytest.raises(
        ValueError, match=r"c.pt cannot be written as safetensors \(.*complex128.*\); convert its types first$"
    ):
        convert_checkpoint(tmp_path / "c.pt", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_an_interrupted_conversion_can_be_repeated(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists() and not (tmp_path / "out.json").exists()
    monkeypatch.undo()
    convert_checkpoint(source, tmp_path / "out.safetensors")


def test_sharded_sources_have_a_hash_of_all_their_files(tmp_path: Path) -> None:
    for i in range(2):
        save_file({f"w{i}": torch.ones(2)}, tmp_path / f"{i}.safetensors")
    index = {"weight_map": {"w0": "0.safetensors", "w1": "1.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    before = convert_checkpoint(tmp_path, tmp_path / "out" / "a.safetensors")
    save_file({"w1": torch.zeros(2)}, tmp_path / "1.safetensors")
    after = convert_checkpoint(tmp_path, tmp_path / "out" / "b.safetensors")
    assert before["source_sha256"] != after["source_sha256"] and len(after["source_sha256"]) == 64


def test_the_command_says_what_it_did(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.safetensors"
    run(source, "--out", out, "--dry-run")
    text = capsys.readouterr().out
    assert "would write" in text and not out.exists() and not out.with_suffix(".json").exists()
    run(source, "--out", out)
    text = capsys.readouterr().out
    assert "PyTorch zip: 4 tensors, 39 values, bfloat16, float32" in text
    assert "weights: ema (also there: model)" in text and "left as data, not run: posix.system" in text
    run(source, "--out", tmp_path / "b.safetensors", "--weights", "model", "--json")
    record = json.loads(capsys.readouterr().out)
    assert record["container"] == "model" and record["out"].endswith("b.safetensors")
    with pytest.raises(ValueError, match=r"has no weights called 'emma'; it has ema, model; did you mean ema"):
        run(source, "--out", tmp_path / "d.safetensors", "--weights", "emma")
