"""No pickle stream runs code, claims of any size end in one line, and settings become plain data."""

from __future__ import annotations

import argparse
import collections
import copyreg
import enum
import json
import os
import pathlib
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import (
    ONE_LINE,
    as_legacy,
    as_zip,
    network,
    same,
    saved,
    written,
)
from torch import nn

from layerprobe.checkpoints.weight_sets import read_weights


class Color(enum.Enum):
    RED = "red"


class AttributeDict(dict[str, Any]):
    pass


def test_settings_of_the_training_become_plain(tmp_path: Path) -> None:
    settings = argparse.Namespace(
        lr=1e-4, out=pathlib.PurePosixPath("runs/a"), color=Color.RED, scale=np.float64(0.18215), betas=(0.9, 0.99)
    )
    content = {"ema": network(), "args": settings, "epoch": 7, "config": AttributeDict(depth=4, big=10**9999)}
    found = saved(tmp_path, content)
    assert found.args["lr"] == 1e-4 and found.args["betas"] == [0.9, 0.99] and found.args["epoch"] == 7
    assert found.args["out"] == "runs/a" and found.args["color"] == "red" and found.args["scale"] == 0.18215
    assert found.args["depth"] == 4 and found.args["big"] == "<a number of 33216 bits>"
    assert any("PurePosixPath" in name for name in found.foreign) and any("scalar" in name for name in found.foreign)
    assert "argparse.Namespace" not in found.foreign
    json.dumps(found.args)


def test_settings_of_omegaconf_become_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the state that omegaconf pickles; it need not be installed to read them."""
    module = types.ModuleType("omegaconf.dictconfig")
    for name in ("DictConfig", "AnyNode"):
        setattr(module, name, type(name, (), {"__module__": module.__name__, "__qualname__": name}))
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    config, leaf = module.DictConfig(), module.AnyNode()
    leaf.__dict__.update(_val=12, _parent=config)
    config.__dict__.update(_content={"depth": leaf}, _metadata=None, _parent=None)
    torch.save({"state_dict": network(), "hyper_parameters": config}, tmp_path / "c.ckpt")
    monkeypatch.undo()
    found = read_weights(tmp_path / "c.ckpt")
    assert found.args == {"depth": 12}
    assert found.foreign == ("omegaconf.dictconfig.DictConfig", "omegaconf.dictconfig.AnyNode")


def test_default_dictionaries_hold_weights_too(tmp_path: Path) -> None:
    state = collections.defaultdict(list, network())
    found = saved(tmp_path, {"model": state, "args": collections.defaultdict(int, lr=1)})
    same(found.tensors, network())
    assert found.args == {"lr": 1} and "collections.defaultdict" in found.foreign


def shell(place: Path) -> bytes:
    return f"touch {place}".encode()


RAW: dict[str, Callable[[bytes], bytes]] = {
    "reduce": lambda c: b"cposix\nsystem\n(S'" + c + b"'\ntR.",
    "inst": lambda c: b"(S'" + c + b"'\niposix\nsystem\n.",
    "obj": lambda c: b"(cposix\nsystem\nS'" + c + b"'\no.",
    "stack global": lambda c: b"\x80\x04\x8c\x05posix\x8c\x06system\x93(S'" + c + b"'\ntR.",
    "extension": lambda c: b"\x80\x02\x82\xf0(S'" + c + b"'\ntR.",
    "eval": lambda c: b"cbuiltins\neval\n(S\"__import__('os').system('" + c + b"')\"\ntR.",
    "getattr": lambda c: b"cbuiltins\ngetattr\n(cos\n__dict__\nS'get'\ntR(S'system'\ntR(S'" + c + b"'\ntR.",
    "newobj": lambda c: b"\x80\x02csubprocess\nPopen\n(]U\x05touchaU" + bytes([len(c[6:])]) + c[6:] + b"at\x81.",
    "newobj_ex": lambda c: b"\x80\x04csubprocess\nPopen\n(S'" + c + b"'\nt}S'shell'\n\x88s\x92.",
    "build": lambda c: b"cposix\nsystem\n)\x81S'" + c + b"'\nb.",
    "setstate": lambda c: b"cbuiltins\nobject\n)\x81}S'__setstate__'\ncposix\nsystem\nsbS'" + c + b"'\nb.",
    "persid": lambda c: b"Pcposix\nsystem\n(S'" + c + b"'\ntR.",
    "binpersid": lambda c: b"(S'storage'\ncposix\nsystem\nS'0'\nS'cpu'\nK\x01tQ(S'" + c + b"'\ntR.",
    "rebuild": lambda c: b"ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\nN(S'" + c + b"'\ntNtR.",
    "nested": lambda c: b"ctorch.storage\n_load_from_bytes\n(C" + bytes([len(r := RAW["reduce"](c))]) + r + b"tR.",
    "codec": lambda c: b"c_codecs\nencode\n(S'" + c + b"'\nS'unknown'\ntR.",
    "scalar": lambda c: (
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O'\ntRC" + bytes([len(r := RAW["reduce"](c))]) + r + b"tR."
    ),
}


@pytest.fixture
def extension() -> Iterator[None]:
    """A process in which somebody registered a short code for a dangerous function, and already used it."""
    copyreg.add_extension("posix", "system", 0xF0)
    copyreg._extension_cache[0xF0] = os.system  # type: ignore[attr-defined]
    yield
    copyreg.remove_extension("posix", "system", 0xF0)
    copyreg._extension_cache.pop(0xF0, None)  # type: ignore[attr-defined]


@pytest.mark.parametrize("attack", RAW)
@pytest.mark.parametrize("where", ["zip", "legacy", "pickle", "magic", "metadata", "shard", "dcp value"])
@pytest.mark.usefixtures("extension")
def test_no_opcode_runs_anything(tmp_path: Path, attack: str, where: str, watched: list[str]) -> None:
    raw = RAW[attack](shell(tmp_path / "planted"))
    path = tmp_path / "c.pt"
    if where in ("zip", "legacy", "pickle"):
        path.write_bytes({"zip": as_zip, "legacy": as_legacy, "pickle": bytes}[where](raw))
    elif where == "magic":  # The stream after which the values of the old format are listed.
        path.write_bytes(as_legacy(b"}.")[: -len(pickle.dumps([]))] + raw)
    elif where == "metadata":
        path = tmp_path / ".metadata"
        path.write_bytes(raw)
    elif where == "shard":
        path = written(tmp_path / "files", "sharded bin")
        (path / "c-0-of-2.bin").write_bytes(as_zip(raw))
    else:
        path = written(tmp_path / "files", "dcp")
        content = pickle.loads((path / ".metadata").read_bytes())
        for index, place in content.storage_data.items():
            if index.fqn == "args.lr":
                place.relative_path, place.offset, place.length = "__9_0.distcp", 0, len(as_zip(raw))
        (path / ".metadata").write_bytes(pickle.dumps(content))
        (path / "__9_0.distcp").write_bytes(as_zip(raw))
    del watched[:]
    try:
        read_weights(path)
    except (ValueError, FileNotFoundError) as error:
        assert str(error).isprintable() and len(str(error)) < 600  # noqa: PT017
    assert not watched and not (tmp_path / "planted").exists()


@pytest.mark.parametrize("attack", ["reduce", "inst", "obj", "stack global", "extension", "eval"])
@pytest.mark.usefixtures("extension")
def test_these_attacks_work_on_a_reader_that_trusts(tmp_path: Path, attack: str) -> None:
    """The control: each stream is a working one."""
    pickle.loads(RAW[attack](shell(tmp_path / "planted")))
    assert (tmp_path / "planted").exists()


@pytest.mark.parametrize(
    "raw",
    [
        b"\x80\x04B\xff\xff\xff\xff.",  # 4 GB of bytes that are not there
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
        b"\x80\x04\x96" + b"\xff" * 7 + b"\x7f.",
        b"\x80\x04]r\xff\xff\xff\xff.",  # a memo of 4 billion entries
        b"\x80\x02\x8b\xff\xff\xff\x7f.",  # a number of 2 GB
        b"\x80\x04" + b"(" * 20_000 + b"t" * 20_000 + b".",  # a tuple in a tuple in a tuple ...
        b"\x80\x04" + b"]" * 20_000 + b"a" * 19_999 + b".",
        b"\x80\x04}\x8c\x05model" + b"}\x8c\x01a" * 20_000 + b"N" + b"s" * 20_001 + b".",
        b"\x80\x09N.",
        b"\x80\x04.",
        b"0.",
        b"I" + b"9" * 5000 + b"\n.",
    ],
)
def test_claims_that_nothing_backs_end_in_one_line(tmp_path: Path, raw: bytes) -> None:
    for name, content in {"a.pt": as_zip(raw), "b.pt": raw, "c.pt": as_legacy(raw), ".metadata": raw}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=ONE_LINE) as caught:
            read_weights(tmp_path / name)
        assert str(caught.value).isprintable()


def doubled(levels: int) -> bytes:
    """A tree of 2**levels leaves in a few bytes: each level holds the one below twice."""
    return b"K\x01" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(levels))


@pytest.mark.parametrize(
    "raw",
    [
        b"\x80\x02}U\x04args}U\x01a" + doubled(60) + b"ssU\x05modelNs.",
        b"\x80\x02}" + doubled(60) + b"K\x01s.",  # As a key: its hash would never be known.
        b"\x80\x02cbuiltins\nset\n(](" + doubled(60) + b"etR.",
        b"\x80\x02ccollections\nOrderedDict\n(](" + doubled(60) + b"K\x01\x86etR.",
    ],
)
def test_trees_that_grow_by_sharing_end_in_one_line(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "c.pkl").write_bytes(raw)
    with pytest.raises(ValueError, match=ONE_LINE):
        read_weights(tmp_path / "c.pkl")


def test_modules_that_grow_by_sharing_end_in_one_line(tmp_path: Path) -> None:
    module = nn.Linear(1, 2)
    for _ in range(60):
        outer = nn.Module()
        outer._modules.update(a=module, b=module)
        module = outer
    with pytest.raises(ValueError, match=r"refers to its parts too many times for a checkpoint; get it from"):
        saved(tmp_path, {"ema": module})
