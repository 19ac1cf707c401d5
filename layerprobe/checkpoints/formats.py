"""Finds the files of a checkpoint and reads their tensors: safetensors, PyTorch, distributed and sharded files."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

from layerprobe.checkpoints.foreign import refuse_foreign_file, refuse_foreign_folder, refuse_other_order
from layerprobe.checkpoints.torch_files import LazyTensor, mapped, read_distributed, read_stream, read_zip
from layerprobe.checkpoints.unpickling import Refused, mapping, printable
from layerprobe.checksums import is_damaged
from layerprobe.configs import parse_config, read_config
from layerprobe.files import PASS_CHECKPOINT, MissingWeights, one_line, similar_path
from layerprobe.memory import pass_on

METADATA_KEY = "layerprobe"
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl")
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
# Usual names of a set of weights in a checkpoint, the most usual first.
CONTAINERS = (
    *("ema", "model_ema", "ema_model", "model_avg", "ema_state_dict", "params_ema"),
    *("model", "state_dict", "model_state_dict", "module", "network", "net", "params", "weights", "online_model"),
)
# Names, without their ends, of files with other states of a training.
_STATES = re.compile(
    r"(optimizer|optim|opt|(lr_)?scheduler|random_states|rng_state|sampler|(grad_)?scaler|training_args|dl_state_dict"
    r"|.*_optim_states|.*_model_states|model_optim_rng|model_rng|distrib_optim|adapter_model|pytorch_lora_weights)([_-]\d+)*"
)
_BESIDE_DCP = ("meta.pt", "common.pt")  # Settings that Lightning and Megatron write into folders of DCP.
_DEPTH, _MOST_FILES = 3, 20_000  # of the search below a folder
# Names of other tensors in a checkpoint: states of optimizers, schedulers and random generators.
NO_WEIGHTS = re.compile(r"(opt|optim|optimi[sz]er)(s|_.*)?$|.*(scaler|sched|random)|(rng|loops|collected_params)$")


@dataclass(frozen=True, eq=False)
class FileContent:
    """The content of a checkpoint, before a set of weights is chosen.

    Attributes:
        format: Name of the file format, one of those of `Weights`.
        files: The files that hold it, an index first.
        tree: The saved tree, with `LazyTensor` for tensors and `Inert` for objects other than plain data.
        foreign: Full names of unknown classes and functions that the file refers to.
        record: Record of layerprobe in the header of a safetensors file; None in other formats.
    """

    format: str
    files: tuple[Path, ...]
    tree: Any
    foreign: tuple[str, ...] = ()
    record: Mapping[str, Any] | None = None


@contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """Turns every failure into one printable line that names the file: a damaged file can fail in any way."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # For example of odd escapes in a text, which do no harm.
            yield
    except Refused as error:
        raise ValueError(f"{path} {error}") from error
    except FileNotFoundError as error:
        raise type(error)(str(error)) from error
    except OSError as error:
        pass_on(error)
        raise ValueError(f"{path} cannot be read ({printable(str(error))}); check its disk and permissions") from error
    except Exception as error:
        pass_on(error)
        kind = "safetensors file" if ".safetensors" in path.name else "PyTorch checkpoint"
        raise ValueError(
            f"{path} is not a valid {kind} ({printable(one_line(error))}); copy or download it again"
        ) from error


def file_content(path: Path) -> FileContent:
    """Finds the checkpoint at a path and reads it; the values of tensors are read later.

    Raises:
        FileNotFoundError: If the checkpoint, or a file that it refers to, is missing.
        Refused: If it cannot be read safely.
        Exception: Of any kind, if it is damaged.
    """
    file = _checkpoint_file(path)
    if file.name == ".metadata":
        return _distributed(file)
    if file.name.endswith(".index.json"):
        return _sharded(file)
    return _single(file)


def _checkpoint_file(path: Path) -> Path:
    """Returns the file to read first: the path itself, or the only checkpoint in a folder."""
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"there is no checkpoint file {path}; {PASS_CHECKPOINT}{similar_path(path)}")
        return path
    checkpoints = _checkpoints_in(path)
    below = [] if checkpoints else _names_below(path)
    folders = dict.fromkeys(name.rpartition("/")[0] for name in below if "/" in name)
    checkpoints += [f"{folder}/{name}" for folder in folders for name in _checkpoints_in(path / folder)]
    if not checkpoints:
        refuse_foreign_folder(below)
        entries = sorted(entry.name for entry in path.iterdir())
        content = f", only {', '.join(map(printable, entries[:4]))}" if entries else ""
        raise FileNotFoundError(f"{path} contains no checkpoint{content}; pass a .safetensors or .pt file")
    if len(checkpoints) > 1:
        names = ", ".join(map(printable, checkpoints[:6]))
        raise Refused(f"contains several checkpoints ({names}); pass one of them")
    return _inside(path, checkpoints[0])


def _checkpoints_in(folder: Path) -> list[str]:
    """Returns the names of the checkpoints in a folder, without shards and without other states of a training."""
    entries = sorted(entry.name for entry in folder.iterdir())
    indices = [name for name in entries if name.endswith(INDEX_SUFFIXES)]
    shards = {shard for name in indices for shard in _weight_map(_inside(folder, name)).values()}
    distributed = [name for name in entries if name == ".metadata"]
    apart = {*shards, *(_BESIDE_DCP if distributed else ())}
    files = [name for name in entries if name.endswith(SUFFIXES) and name not in apart]
    return distributed + indices + [name for name in files if not _STATES.fullmatch(name.rpartition(".")[0])]


def _names_below(folder: Path) -> list[str]:
    """Returns the names of the files below a folder, as deep as trainings put them; not those in hidden folders."""
    names: list[str] = []
    for at, folders, files in os.walk(folder):
        depth = len(Path(at).relative_to(folder).parts)
        folders[:] = [f for f in sorted(folders) if depth < _DEPTH and f[0] != "." and not NO_WEIGHTS.match(f)]
        names += [(Path(at) / file).relative_to(folder).as_posix() for file in sorted(files)]
        if len(names) > _MOST_FILES:
            break
    return names


def _inside(folder: Path, name: str) -> Path:
    """Returns a file of a folder, and refuses names and links that lead out of the folder.

    In the Hub's cache, a snapshot links to `blobs` beside `snapshots`, which is allowed.
    """
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise Refused(f"names a file {printable(str(name))!r} outside of its folder; get it from a source you trust")
    file, root = folder / name, folder.resolve()
    target = file.resolve()
    blobs = next((parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"), None)
    if not target.is_relative_to(root) and not (blobs and target.is_relative_to(blobs)):
        raise Refused(f"contains {printable(name)}, a link out of the folder; pass the file that it points to")
    if not file.is_file():
        raise MissingWeights(f"{folder} lacks {printable(name)}; copy or download it again")
    return file


def _distributed(metadata: Path) -> FileContent:
    views: dict[str, memoryview] = {}

    def part(name: str) -> memoryview:
        if name not in views:
            views[name] = mapped(_inside(metadata.parent, name))
        return views[name]

    tree, foreign = read_distributed(mapped(metadata), part, lambda name: not NO_WEIGHTS.match(name))
    files = (metadata, *(metadata.parent / name for name in sorted(views)))
    return FileContent("DCP folder", files, tree, foreign)


def _single(file: Path) -> FileContent:
    if is_damaged(file):
        raise Refused(
            "is damaged: its content is not what was written there; repeat the `layerprobe train` that made it"
        )
    view = mapped(file)
    start = bytes(view[:64])
    refuse_foreign_file(file, start)
    if file.suffix == ".safetensors" or (start[8:9] == b"{" and int.from_bytes(start[:8], "little") < len(view)):
        return _safetensors(file)
    if bytes(view[257:262]) == b"ustar":
        raise Refused("is a tar archive; unpack it and pass the weight file in it")
    if start.startswith(b"PK"):
        tree, foreign = read_zip(view)
        return FileContent("PyTorch zip", (file,), tree, foreign)
    kind, tree, foreign = read_stream(view)
    return FileContent(kind, (file,), tree, foreign)


def _safetensors(file: Path) -> FileContent:
    tensors: Any = safe_open(file, framework="pt")  # Not closed: tensors are read from it later.
    header = tensors.metadata() or {}
    refuse_other_order(header)
    record = parse_config(header.get(METADATA_KEY, "{}"), "JSON")
    if not isinstance(record, dict):
        raise Refused(f"has a damaged record ({printable(str(record)[:40])!r}); copy or download it again")
    tree = {
        name: LazyTensor(tuple(tensors.get_slice(name).get_shape()), partial(tensors.get_tensor, name))
        for name in list(tensors.keys())
    }
    return FileContent("safetensors", (file,), tree, record=record)


def _sharded(index: Path) -> FileContent:
    weight_map = _weight_map(index)
    files = {shard: _inside(index.parent, shard) for shard in sorted(set(weight_map.values()))}
    shards = {shard: _single(file) for shard, file in files.items()}
    tree = {}
    for name, shard in weight_map.items():
        if not isinstance(mapping(shards[shard].tree).get(name), LazyTensor):
            raise Refused(
                f"has no {printable(name)} in {printable(shard)}, contrary to its index; copy or download it again"
            )
        tree[name] = shards[shard].tree[name]
    foreign = tuple(dict.fromkeys(name for content in shards.values() for name in content.foreign))
    kind = "sharded safetensors" if index.name.endswith(".safetensors.index.json") else "sharded PyTorch"
    return FileContent(kind, (index, *files.values()), tree, foreign)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_config(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise Refused(f"has an index, {printable(index.name)}, without a weight map; copy or download it again")
    return weight_map
