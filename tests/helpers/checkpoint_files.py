"""Writes small checkpoints in every format, whole or hostile, for the tests of the checkpoint room."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import sys
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn

from layerprobe.checkpoints.weight_sets import Weights, read_weights

ONE_LINE = r"\A[^\n]{10,600}\Z"


def network(scale: float = 1.0) -> dict[str, Tensor]:
    """A state dict; every value tells the scale."""
    return {
        "blocks.0.weight": scale * torch.arange(1.0, 13.0).view(3, 4),
        "blocks.0.bias": scale * torch.arange(1.0, 4.0),
        "blocks.1.weight": scale * torch.arange(1.0, 7.0).view(2, 3).half(),
        "steps": torch.tensor(7),
    }


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


class Payload:
    """Runs a shell command when it is unpickled by a reader that trusts it."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.place}'",)


class Net(nn.Module):
    """A network with tied weights, a buffer that is not saved, and a child without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.norm = nn.Linear(3, 4), nn.SiLU(), nn.BatchNorm1d(4)
        self.last = nn.ModuleList([nn.Linear(4, 3), nn.Linear(3, 4)])
        self.last[1].weight = self.first.weight
        self.register_buffer("table", torch.arange(5.0))
        self.register_buffer("scratch", torch.arange(6.0), persistent=False)


def write_zip(folder: Path, extra: Any) -> Path:
    torch.save({"model": network(), "ema": network(2), "args": argparse.Namespace(lr=0.1), "x": extra}, folder / "c.pt")
    return folder / "c.pt"


def write_legacy(folder: Path, extra: Any) -> Path:
    content = {"model": network(), "ema": network(2), "x": extra}
    torch.save(content, folder / "c.pth", _use_new_zipfile_serialization=False)
    return folder / "c.pth"


def write_lightning(folder: Path, extra: Any) -> Path:
    state = {f"net.{name}": tensor for name, tensor in network(2).items()}
    content = {
        "epoch": 3,
        "state_dict": state,
        "callbacks": {"ModelCheckpoint": {"best": torch.tensor(1.0), "x": extra}},
    }
    torch.save(content, folder / "c.ckpt")
    return folder / "c.ckpt"


def write_safetensors(folder: Path, extra: Any) -> Path:
    save_file(network(2), folder / "c.safetensors")
    return folder / "c.safetensors"


def write_sharded(folder: Path, extra: Any, *, suffix: str = "safetensors") -> Path:
    names = list(network())
    shards = {f"c-{i}-of-2.{suffix}": names[2 * i : 2 * i + 2] for i in range(2)}
    for shard, own in shards.items():
        state = {name: network(2)[name] for name in own}
        if suffix == "bin":
            torch.save(state | {"x": extra}, folder / shard)
        else:
            save_file(state, folder / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, own in shards.items() for name in own}}
    (folder / f"c.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def write_sharded_bin(folder: Path, extra: Any) -> Path:
    return write_sharded(folder, extra, suffix="bin")


def write_dcp(folder: Path, extra: Any) -> Path:
    content = {"model": network(), "ema": network(2), "args": {"lr": 0.1}, "x": [extra]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That it is one process.
        dcp.save(content, checkpoint_id=folder)
    return folder


def write_pickle(folder: Path, extra: Any) -> Path:
    (folder / "c.pkl").write_bytes(pickle.dumps({"ema": network(2), "x": extra}))
    return folder / "c.pkl"


def persistent(value: nn.Module) -> Any:
    """A module that is pickled as NVIDIA's decorator does it: source code, the name of a class, its state."""

    class Persistent:
        def __reduce__(self) -> tuple[Any, ...]:
            source = "import os; os.system('touch planted')"
            meta = {"type": "class", "version": 6, "module_src": source, "class_name": "Net", "state": vars(value)}
            return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None

    return Persistent()


def write_edm(folder: Path, extra: Any) -> Path:
    def _reconstruct_persistent_obj(meta: Any) -> None:
        raise AssertionError("the file's code was run")

    module = types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    outer = nn.Module()
    outer.model = persistent(tiny_net())  # type: ignore[assignment]
    del outer.model
    outer._modules["model"] = persistent(tiny_net())
    sys.modules.update({"torch_utils": types.ModuleType("torch_utils"), module.__name__: module})
    try:
        data = pickle.dumps({"ema": persistent(outer), "loss_fn": None, "x": extra})
    finally:
        del sys.modules["torch_utils"], sys.modules[module.__name__]
    (folder / "network-snapshot-000001.pkl").write_bytes(data)
    return folder / "network-snapshot-000001.pkl"


def write_module(folder: Path, extra: Any) -> Path:
    torch.save({"ema": tiny_net(), "x": extra}, folder / "c.pt")
    return folder / "c.pt"


def tiny_net() -> Net:
    torch.manual_seed(0)
    return Net()


FORMATS: dict[str, tuple[str, str, Callable[[Path, Any], Path]]] = {
    "zip": ("PyTorch zip", "ema", write_zip),
    "legacy": ("PyTorch legacy", "ema", write_legacy),
    "lightning": ("PyTorch zip", "state_dict", write_lightning),
    "module": ("PyTorch zip", "ema", write_module),
    "safetensors": ("safetensors", "", write_safetensors),
    "sharded safetensors": ("sharded safetensors", "", write_sharded),
    "sharded bin": ("sharded PyTorch", "", write_sharded_bin),
    "dcp": ("DCP folder", "ema", write_dcp),
    "pickle": ("pickle", "ema", write_pickle),
    "edm": ("EDM pickle", "ema", write_edm),
}


def written(folder: Path, form: str, extra: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    return FORMATS[form][2](folder, extra)


def saved(folder: Path, content: Any, **options: Any) -> Weights:
    torch.save(content, folder / "model.pt")
    return read_weights(folder / "model.pt", **options)


def as_zip(raw: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", raw)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def as_legacy(raw: bytes) -> bytes:
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(part, protocol=2) for part in head) + raw + pickle.dumps([])
