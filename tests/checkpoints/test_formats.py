"""Every file format gives its weights or a one-line error, whole, damaged or hostile, and nothing in it is run."""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import (
    FORMATS,
    ONE_LINE,
    Payload,
    as_zip,
    network,
    same,
    tiny_net,
    write_safetensors,
    written,
)
from torch import nn

from layerprobe.checkpoints.weight_sets import read_weights
from layerprobe.files import MissingWeights


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_its_weights_and_runs_nothing(tmp_path: Path, form: str, watched: list[str]) -> None:
    path = written(tmp_path / "files", form, Payload(tmp_path / "planted"))
    del watched[:]
    found = read_weights(path)
    assert not watched
    assert not (tmp_path / "planted").exists() and not Path("planted").exists()
    kind, container, _ = FORMATS[form]
    assert (found.format, found.container, found.record) == (kind, container, {})
    if form in ("module", "edm"):
        prefix = "model." if form == "edm" else ""
        same(found.tensors, {f"{prefix}{name}": tensor for name, tensor in tiny_net().state_dict().items()})
    else:
        wanted = {f"net.{name}" if form == "lightning" else name: tensor for name, tensor in network(2).items()}
        same(dict(sorted(found.tensors.items())), dict(sorted(wanted.items())))
    assert ("posix.system" in found.foreign) == ("safetensors" not in form)


def test_the_watch_sees_what_a_trusting_reader_does(tmp_path: Path, watched: list[str]) -> None:
    """The control of every test that nothing was run."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "planted")))
    assert (tmp_path / "planted").exists()
    assert any("os.system" in event for event in watched) and any("find_class" in event for event in watched)


def test_files_that_nobody_here_wrote(shared_checkpoints: Path) -> None:
    """Saved on a GPU, by an older PyTorch."""
    path = shared_checkpoints / "ddpm_mnist.pt"
    found = read_weights(path)
    same(found.tensors, torch.load(path, map_location="cpu", weights_only=True))
    assert len(found.tensors) == 173 and sum(tensor.numel() for tensor in found.tensors.values()) == 606852


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty; copy or download it again$"),
        (b"hello", r"is not a valid PyTorch checkpoint \(.*\); copy or download it again$"),
        (b"PK\x03\x04", r"is not a valid PyTorch checkpoint \(File is not a zip file\); copy or download"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            r"is a Git LFS pointer, not the file itself; .*`git lfs pull`$",
        ),
        (b"<!DOCTYPE html><html>", r"is a web page, not a checkpoint; download the file itself$"),
        (
            pickle.dumps({"step": 3, "lr": 0.1}),
            r"holds no weights, only step, lr; expected named tensors, possibly under ema",
        ),
        (pickle.dumps({"ema": nn.SiLU()}), r"holds no weights, only ema; expected named tensors"),
        (pickle.dumps(torch.ones(3)), r"holds no weights; expected named tensors"),
        (as_zip(b"N.").replace(b"data.pkl", b"dada.pkx"), r"is a zip archive without data.pkl, so not from torch.save"),
        (struct.pack("<Q", 2**60) + b"{}", r"is not a valid PyTorch checkpoint .*; copy or download it again$"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"c.pt {message}") as caught:
        read_weights(tmp_path / "c.pt")
    caught.match(ONE_LINE)


@pytest.mark.parametrize("form", [form for form in FORMATS if FORMATS[form][0] not in ("pickle", "EDM pickle")])
def test_half_written_files_are_refused(tmp_path: Path, form: str) -> None:
    path = written(tmp_path / "files", form)
    for file in read_weights(path).files:
        whole = file.read_bytes()
        for length in (0, 1, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:length])
            with pytest.raises(
                ValueError, match=r"(is empty|is not a valid|half-written|ends before|lacks|has \d+ of)"
            ):
                read_weights(path)
        file.write_bytes(whole)
    read_weights(path)


def test_the_one_checkpoint_of_a_folder_is_found(tmp_path: Path) -> None:
    for form in ("zip", "legacy", "safetensors", "sharded safetensors", "sharded bin", "dcp", "edm"):
        folder = tmp_path / form
        written(folder, form)
        (folder / "config.json").write_text("{}")
        assert read_weights(folder).format == FORMATS[form][0]
        index = next((path for path in read_weights(folder).files if path.name.endswith((".json", ".metadata"))), None)
        if index:
            assert read_weights(index).format == FORMATS[form][0]


def test_folders_without_or_with_several_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint file \S+/nothing.pt; pass a .safetensors"):
        read_weights(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match=r"contains no checkpoint; pass a"):
        read_weights(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"contains no checkpoint, only config.json; pass a"):
        read_weights(tmp_path)
    written(tmp_path, "zip")
    written(tmp_path, "safetensors")
    with pytest.raises(ValueError, match=r"contains several checkpoints \(c.pt, c.safetensors\); pass one of them$"):
        read_weights(tmp_path)


@pytest.mark.parametrize("name", ["../c.safetensors", "/etc/passwd", "a/../../c.safetensors", "", "link"])
@pytest.mark.parametrize("form", ["sharded safetensors", "dcp"])
def test_folders_that_lead_out_of_themselves_are_refused(tmp_path: Path, name: str, form: str) -> None:
    write_safetensors(tmp_path, None)
    folder = written(tmp_path / "files", form)
    (folder / "link").symlink_to(tmp_path / "c.safetensors")
    if form == "dcp":
        raw = (folder / ".metadata").read_bytes()
        shard = b"\x8c\x0c__0_0.distcp"
        assert shard in raw
        (folder / ".metadata").write_bytes(raw.replace(shard, b"\x8c" + bytes([len(name)]) + name.encode()))
        # The frame of the pickle has another length now, which readers do not mind.
    else:
        index = {"weight_map": dict.fromkeys(network(), name)}
        (folder / "c.safetensors.index.json").write_text(json.dumps(index))
        for shard_path in folder.glob("c-*"):
            shard_path.unlink()
    with pytest.raises(ValueError, match=r"(outside of its folder; get it|a link out of the folder; pass)") as caught:
        read_weights(folder if form == "dcp" else folder / "c.safetensors.index.json")
    caught.match(ONE_LINE)


def test_a_link_out_of_a_folder_is_refused_and_the_cache_of_the_hub_is_not(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    write_safetensors(repository / "blobs", None).rename(repository / "blobs" / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    same(dict(sorted(read_weights(snapshot).tensors.items())), dict(sorted(network(2).items())))
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(write_safetensors(tmp_path, None))
    with pytest.raises(ValueError, match=r"contains model.safetensors, a link out of the folder; pass the file"):
        read_weights(snapshot)


def test_indices_that_do_not_fit_their_shards_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "files", "sharded safetensors")
    index = folder / "c.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["blocks.9.weight"] = "c-0-of-2.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"has no blocks.9.weight in c-0-of-2.safetensors, contrary to its index"):
        read_weights(folder)
    (folder / "c-0-of-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"files lacks c-0-of-2.safetensors; copy or download it again$"):
        read_weights(folder)
    index.write_text("[]")
    with pytest.raises(ValueError, match=r"c.safetensors.index.json holds a list, not keys and values"):
        read_weights(index)


def damaged(whole: bytes, generator: np.random.Generator) -> bytes:
    """Cut short, with flipped bits, with a stretch of zeros, or with a piece of itself in another place."""
    place = int(generator.integers(len(whole)))
    if generator.random() < 0.5:  # The structure stands at the beginning, or at the end.
        place = min(int(generator.exponential(200)), len(whole) - 1)
        place = place if generator.random() < 0.6 else len(whole) - 1 - place
    content = bytearray(whole)
    kind = generator.integers(5)
    if kind == 0:
        return whole[:place]
    if kind == 1:
        content[place] ^= 1 << int(generator.integers(8))
    elif kind == 2:
        for other in (place, *generator.integers(len(whole), size=3)):
            content[other] = int(generator.integers(256))
    elif kind == 3:
        content[place : place + 9] = bytes(len(content[place : place + 9]))
    else:
        other = int(generator.integers(len(whole)))
        content[place:place] = content[other : other + 20]
    return bytes(content)


FUZZ_CASES = int(os.environ.get("LAYERPROBE_FUZZ_CASES", "60"))


@pytest.mark.parametrize("form", FORMATS)
def test_any_damage_gives_weights_or_one_line(tmp_path: Path, form: str, watched: list[str]) -> None:
    """Set LAYERPROBE_FUZZ_CASES for more cases of each format."""
    generator = np.random.default_rng(list(form.encode()))
    path = written(tmp_path / "files", form, Payload(tmp_path / "planted"))
    files = {file: file.read_bytes() for file in read_weights(path).files}
    refused, slowest = 0, 0.0
    for case in range(FUZZ_CASES):
        file = list(files)[case % len(files)]
        file.write_bytes(damaged(files[file], generator))
        del watched[:]
        began = time.perf_counter()
        try:
            assert read_weights(path).tensors, case
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert type(error) in (ValueError, FileNotFoundError, MissingWeights), (case, error)  # noqa: PT017
            assert str(error).isprintable() and len(str(error)) < 600, (case, error)  # noqa: PT017
        slowest = max(slowest, time.perf_counter() - began)
        assert not watched, case
        file.write_bytes(files[file])
    assert refused > FUZZ_CASES // 5
    assert slowest < 10
    assert {entry.name for entry in tmp_path.iterdir()} == {"files"}
    assert {entry.name for entry in (tmp_path / "files").iterdir()} == {file.name for file in files}
