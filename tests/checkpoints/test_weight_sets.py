"""Checkpoints of every format, whole, damaged and hostile: weights or one line, and nothing in them is ever run."""

from __future__ import annotations

import argparse
import collections
import copyreg
import enum
import io
import json
import os
import pathlib
import pickle
import struct
import sys
import time
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn

from layerprobe.checkpoints.weight_sets import Weights, read_weights
from layerprobe.files import MissingWeights

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


# --- one writer a format; each file also wants to run a command


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


# --- what would show that something was run or written

_HARM = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.remove",
    "os.rename",
    "socket.connect",
)
_seen: list[str] | None = None


def _watch(event: str, arguments: Any) -> None:
    if _seen is None:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if event in (*_HARM, "pickle.find_class") or writes:
        _seen.append(f"{event} {arguments!r:.80}")


sys.addaudithook(_watch)


@pytest.fixture
def watched() -> Iterator[list[str]]:
    """What was run, written or looked up by pickle while the test ran, as Python's own auditing sees it."""
    global _seen
    _seen = []
    yield _seen
    _seen = None


# --- every format


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


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors", "pickle"])
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64],
)
def test_types_are_as_stored(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    state = {
        "odd": torch.tensor([1], dtype=torch.uint8),
        "w": torch.arange(5).to(dtype),
        "empty": torch.empty(0, 3).to(dtype),
    }
    path = tmp_path / ("c.safetensors" if form == "safetensors" else "c.pt")
    if form == "safetensors":
        save_file(state, path)
    elif form == "pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    found = read_weights(path).tensors
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: tensor.dtype for name, tensor in state.items()
    }
    assert found["empty"].shape == (0, 3)
    assert torch.equal(found["w"].to(torch.complex64), state["w"].to(torch.complex64))


def test_views_strides_and_shared_memory_survive(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    state = {"a": base.view(4, 6).T, "b": base[5:9], "c": torch.ones(1).expand(7), "tied": nn.Parameter(base[5:9])}
    found = saved(tmp_path, state).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert found["a"].stride() == (1, 6) and found["b"].data_ptr() == found["tied"].data_ptr()


@pytest.mark.parametrize("form", ["zip", "dcp"])
def test_values_are_views_of_the_file_that_cannot_change_it(tmp_path: Path, form: str) -> None:
    path = written(tmp_path / "files", form)
    before = {file: file.read_bytes() for file in (tmp_path / "files").iterdir()}
    read_weights(path).tensors["blocks.0.weight"].fill_(5)
    assert {file: file.read_bytes() for file in (tmp_path / "files").iterdir()} == before
    same(read_weights(path).tensors, network(2))


def test_a_tensor_that_several_ranks_wrote_is_put_together(tmp_path: Path) -> None:
    """As FSDP leaves it: each rank's rows in a file of its own."""
    whole = torch.arange(40.0).view(10, 4)
    folder = dcp_of_ranks(tmp_path, whole, [(0, 4), (4, 9), (9, 10)])
    same(read_weights(folder).tensors, {"weight": whole})
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks __1_0.distcp; copy or download it again$"):
        read_weights(folder)


def dcp_of_ranks(folder: Path, whole: Tensor, rows: list[tuple[int, int]]) -> Path:
    from torch.distributed.checkpoint import metadata as dcp_metadata
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    chunks, places = [], {}
    for rank, (start, stop) in enumerate(rows):
        buffer = io.BytesIO()
        torch.save(whole[start:stop].clone(), buffer)
        (folder / f"__{rank}_0.distcp").write_bytes(bytes(13) + buffer.getvalue())
        offset, size = torch.Size([start, 0]), torch.Size([stop - start, whole.shape[1]])
        chunks.append(dcp_metadata.ChunkStorageMetadata(offset, size))
        places[dcp_metadata.MetadataIndex("model.weight", offset)] = _StorageInfo(
            f"__{rank}_0.distcp", 13, len(buffer.getvalue())
        )
    properties = dcp_metadata.TensorProperties(dtype=whole.dtype)
    tensors = {"model.weight": dcp_metadata.TensorStorageMetadata(properties, whole.shape, chunks)}
    content = dcp_metadata.Metadata(tensors, planner_data=None, storage_data=places)
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    return folder


# --- names


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module.", "module.module."]
)
def test_wrappers_are_taken_off_names(tmp_path: Path, prefix: str) -> None:
    inner = {
        f"{prefix}{name}".replace("blocks.", "blocks._checkpoint_wrapped_module."): t for name, t in network().items()
    }
    same(saved(tmp_path, {"model": inner}).tensors, network())


def test_a_count_of_averaged_models_is_no_weight(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(tiny_net())
    same(saved(tmp_path, averaged.state_dict()).tensors, dict(tiny_net().state_dict()))


def test_one_name_with_and_without_prefix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds both blocks.0.weight and module.blocks.0.weight; save one of the two"):
        saved(tmp_path, {f"module.{name}": t for name, t in network().items()} | network())


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "\ud800"])
def test_names_that_a_terminal_would_obey_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "c.pkl").write_bytes(pickle.dumps({name: torch.ones(2)}))
    with pytest.raises(ValueError, match=ONE_LINE) as caught:
        read_weights(tmp_path / "c.pkl")
    assert str(caught.value).isprintable()


# --- which weights


@pytest.mark.parametrize(
    ("content", "containers"),
    [
        ({"model": 1, "ema": 2, "opt": {"state": {0: {"exp_avg": torch.ones(3)}}}}, ("ema", "model")),
        ({"state_dict": 1, "model_ema": 2}, ("model_ema", "state_dict")),
        ({"params": 1, "params_ema": 2}, ("params_ema", "params")),
        ({"net": 1, "unet_ema_0.999": 2}, ("unet_ema_0.999", "net")),
        ({"state_dict": 1, "callbacks": {"EMACallback{'decay': 1}": {"ema_weights": 2}}}, None),
        ({"model": 1, "ema": [2, 3]}, ("ema.0", "ema.1", "model")),
        ({"models": {"unet": 1, "unet_ema": 2}}, ("models.unet_ema", "models.unet")),
        ({"ema_model": {"model": 2}, "model": 1}, ("ema_model.model", "model")),
        ({"optimizer": {"m": 1}, "scaler": {"s": 1}, "whatever": 2}, ("whatever",)),
        ({"schema": 1, "state_dict": 2}, ("state_dict", "schema")),
    ],
)
def test_averaged_weights_are_preferred(tmp_path: Path, content: Any, containers: tuple[str, ...] | None) -> None:
    found = saved(tmp_path, _scaled(content))
    same(found.tensors, network(2))
    assert containers is None or found.containers == containers
    for name in found.containers:
        assert saved(tmp_path, _scaled(content), weights=name).container == name


def _scaled(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _scaled(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_scaled(value) for value in content]
    return network(content) if isinstance(content, int) else content


def test_ema_pytorch_keeps_three_things_in_one_state_dict(tmp_path: Path) -> None:
    online, average = _below("online_model", network()), _below("ema_model", network(2))
    content = {"ema": {"initted": torch.tensor(True), "step": torch.tensor([9]), **online, **average}, "step": 9}
    found = saved(tmp_path, content)
    wanted = network(2)
    same(found.tensors, wanted)
    assert found.containers == ("ema.ema_model", "ema.online_model")
    same(saved(tmp_path, content, weights="ema.online_model").tensors, network())
    same(saved(tmp_path, {"ema": {"initted": torch.tensor(True), **average}}).tensors, wanted)


def _below(head: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{head}.{name}": tensor for name, tensor in state.items()}


def test_latent_diffusion_averages_without_dots_and_buffers(tmp_path: Path) -> None:
    average = {name.replace(".", ""): tensor for name, tensor in network(2).items() if name != "steps"}
    counters = {"decay": torch.tensor(0.9), "num_updates": torch.tensor(3)}
    state = _below("model", network()) | _below("model_ema", average | counters) | {"first_stage.w": torch.ones(5)}
    found = saved(tmp_path, {"state_dict": state})
    same(found.tensors, {name: t for name, t in network(2).items() if name != "steps"} | {})
    assert found.containers == ("state_dict.model_ema", "state_dict")
    whole = saved(tmp_path, {"state_dict": state}, weights="state_dict").tensors
    same(whole, _below("model", network()) | {"first_stage.w": torch.ones(5)})


def test_a_part_called_ema_that_is_no_copy_stays_a_part(tmp_path: Path) -> None:
    state = network() | {"ema.weight": torch.ones(3)}
    same(saved(tmp_path, state).tensors, state)


def test_averaged_parameters_in_a_list_get_the_names_of_the_network(tmp_path: Path) -> None:
    state = dict(tiny_net().state_dict())
    del state["norm.running_mean"], state["norm.running_var"], state["last.1.weight"]
    shadow = [2 * parameter.detach() for parameter in tiny_net().parameters()]
    found = saved(tmp_path, {"model": state, "ema": {"decay": 0.9, "shadow_params": shadow, "collected_params": None}})
    assert found.containers == ("ema.shadow_params", "model")
    parameters = dict(tiny_net().named_parameters())
    same(found.tensors, {name: 2 * t if name in parameters else t for name, t in state.items()})


def test_averaged_parameters_in_a_list_are_not_guessed(tmp_path: Path) -> None:
    """Batch normalization has four vectors of one length, two of them parameters: the list fits in several ways."""
    state = dict(tiny_net().state_dict())
    shadow = [2 * parameter.detach() for parameter in tiny_net().parameters()]
    found = saved(tmp_path, {"model": state, "ema": {"shadow_params": shadow}})
    assert found.containers == ("model",)
    same(found.tensors, state)


def test_weights_are_chosen_by_name_and_asked_for_where_none_is_obvious(tmp_path: Path) -> None:
    same(saved(tmp_path, {"model": network(), "ema": network(2)}, weights="model").tensors, network())
    with pytest.raises(ValueError, match=r"model.pt has no weights called 'emma'; it has ema, model$"):
        saved(tmp_path, {"model": network(), "ema": network(2)}, weights="emma")
    with pytest.raises(
        ValueError, match=r"holds several sets of weights \(encoder, decoder\); pass --weights with one"
    ):
        saved(tmp_path, {"encoder": network(), "decoder": network(2)})
    same(saved(tmp_path, {"encoder": network(), "decoder": network(2)}, weights="decoder").tensors, network(2))


def test_our_own_record_is_read_and_our_networks_are_left_whole(tmp_path: Path) -> None:
    state = _below("ema", network()) | network(2)
    save_file(state, tmp_path / "c.safetensors", metadata={"layerprobe": json.dumps({"family": "sit"})})
    found = read_weights(tmp_path / "c.safetensors")
    assert found.record == {"family": "sit"} and found.containers == ("",)
    assert set(found.tensors) == set(state)


# --- what stands beside


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


# --- hostile files


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


def as_zip(raw: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", raw)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def as_legacy(raw: bytes) -> bytes:
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(part, protocol=2) for part in head) + raw + pickle.dumps([])


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


def test_tensors_larger_than_their_values_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "c.pt").read_bytes()
    assert whole.count(b"K\x03\x85q") == 1
    for claim, stride in ((b"J\xff\xff\xff\x7f", b"K\x01"), (b"J\xff\xff\xff\x7f", b"K\x00"), (b"K\x04", b"K\x01")):
        damaged = whole.replace(b"K\x03\x85q", claim + b"\x85q").replace(b"K\x01\x85q", stride + b"\x85q")
        (tmp_path / "c.pt").write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"c.pt has a tensor of shape .* with 3 values; copy or download it again$"
        ):
            read_weights(tmp_path / "c.pt")


# --- what is refused, and how


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
        (as_zip(b"N.").replace(b"data.pkl", b"dada.pkl"), r"is a zip archive without data.pkl, so not from torch.save"),
        (struct.pack("<Q", 2**60) + b"{}", r"is not a valid PyTorch checkpoint .*; copy or download it again$"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"c.pt {message}") as caught:
        read_weights(tmp_path / "c.pt")
    caught.match(ONE_LINE)


def test_archives_that_are_code_or_compressed_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as archive:
        archive.writestr("c/data.pkl", b"N.")
        archive.writestr("c/constants.pkl", b"N.")
    with pytest.raises(ValueError, match=r"is a TorchScript archive, which is code; .* save .*state_dict\(\) instead$"):
        read_weights(tmp_path / "c.pt")
    written(tmp_path, "zip")
    with (
        zipfile.ZipFile(tmp_path / "c.pt") as old,
        zipfile.ZipFile(tmp_path / "d.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match=r"is a compressed or encrypted archive, .*; unpack and save it again$"):
        read_weights(tmp_path / "d.pt")


def test_quantized_tensors_are_refused(tmp_path: Path) -> None:
    raw = b"(U\x07storagectorch\nQInt8Storage\nU\x010U\x03cpuK\x01tQ."
    (tmp_path / "c.pt").write_bytes(as_zip(b"\x80\x02" + raw))
    with pytest.raises(ValueError, match=r"holds tensors in a torch.QInt8Storage, .*; save them dequantized$"):
        read_weights(tmp_path / "c.pt")


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


# --- folders


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
    with pytest.raises(ValueError, match=r"has an index, c.safetensors.index.json, without a weight map"):
        read_weights(index)


# --- any damage


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
