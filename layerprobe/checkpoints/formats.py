"""Which file holds the weights, and how its tensors are read: safetensors, PyTorch, distributed and sharded files."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

from layerprobe.checkpoints.torch_files import LazyTensor, mapped, read_distributed, read_stream, read_zip
from layerprobe.checkpoints.unpickling import Refused, mapping, printable
from layerprobe.files import MissingWeights

METADATA_KEY = "layerprobe"
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl")
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
# Where people put their weights, the more usual first.
CONTAINERS = (
    *("ema", "model_ema", "ema_model", "model_avg", "ema_state_dict", "params_ema"),
    *("model", "state_dict", "model_state_dict", "module", "network", "net", "params", "weights", "online_model"),
)
NO_WEIGHTS = re.compile(r"(opt|optim|optimi[sz]er)(s|_.*)?$|.*(scaler|sched|random)|(rng|loops|collected_params)$")


@dataclass(frozen=True, eq=False)
class FileContent:
    format: str
    tree: Any
    foreign: tuple[str, ...] = ()
    record: Mapping[str, Any] | None = None


def weight_files(path: str | Path) -> tuple[Path, ...]:
    """The files that `read_weights` would read.

    Raises:
        FileNotFoundError: If there are none, or one is missing.
        ValueError: If a folder has several checkpoints, or names files outside of it.
    """
    path = Path(path)
    with one_line_errors(path):
        place = _located(path)
        if place.name == ".metadata":
            return place, *(_inside(place.parent, file.name) for file in sorted(place.parent.glob("*.distcp")))
        if place.name.endswith(".index.json"):
            return place, *(_inside(place.parent, name) for name in sorted(set(_weight_map(place).values())))
        return (place,)


@contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """Every failure as one printable line that names the file: a damaged file can fail in any way."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Such as of odd escapes in a text: it either opens or does not.
            yield
    except Refused as error:
        raise ValueError(f"{path} {error}") from error
    except FileNotFoundError as error:
        raise type(error)(str(error)) from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({printable(str(error))}); check its disk and permissions") from error
    except Exception as error:
        kind = "safetensors file" if ".safetensors" in path.name else "PyTorch checkpoint"
        why = printable((str(error).strip() or type(error).__name__).splitlines()[0])
        raise ValueError(f"{path} is not a whole {kind} ({why}); copy or download it again") from error


def _located(path: Path) -> Path:
    """The file to begin with: the path itself, or the one checkpoint in a folder."""
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"there is no checkpoint file {path}; pass a .safetensors or .pt file, or a folder")
        return path
    entries = sorted(entry.name for entry in path.iterdir())
    indices = [name for name in entries if name.endswith(INDEX_SUFFIXES)]
    shards = {shard for name in indices for shard in _weight_map(_inside(path, name)).values()}
    files = [name for name in entries if name.endswith(SUFFIXES) and name not in shards]
    found = [name for name in entries if name == ".metadata"] + indices + files
    if not found:
        seen = ", ".join(map(printable, entries[:4])) or "nothing"
        raise FileNotFoundError(f"{path} has no checkpoint in it, but {seen}; pass a .safetensors or .pt file")
    if len(found) > 1:
        raise Refused(f"has several checkpoints in it ({', '.join(map(printable, found[:6]))}); pass one of them")
    return _inside(path, found[0])


def _inside(folder: Path, name: str) -> Path:
    """A file of a folder; neither its name nor a link may lead out of it.

    In the cache of the Hub a snapshot links to `blobs` beside `snapshots`, and nowhere else.
    """
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise Refused(f"names a file {printable(str(name))!r} outside of its folder; get it from a source you trust")
    place, root = folder / name, folder.resolve()
    real = place.resolve()
    cache = next((parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"), None)
    if not real.is_relative_to(root) and not (cache and real.is_relative_to(cache)):
        raise Refused(f"has {printable(name)}, which is a link out of the folder; pass the file that is meant")
    if not place.is_file():
        raise MissingWeights(f"{folder} lacks {printable(name)}; copy or download it again")
    return place


def file_content(path: Path) -> FileContent:
    place = _located(path)
    if place.name == ".metadata":
        part = _cached_parts(place.parent)
        tree, foreign = read_distributed(mapped(place), part, lambda name: not NO_WEIGHTS.match(name))
        return FileContent("DCP folder", tree, foreign)
    if place.name.endswith(".index.json"):
        return _sharded(place)
    return _single(place)


def _cached_parts(folder: Path) -> Any:
    views: dict[str, memoryview] = {}

    def part(name: str) -> memoryview:
        if name not in views:
            views[name] = mapped(_inside(folder, name))
        return views[name]

    return part


def _single(place: Path) -> FileContent:
    view = mapped(place)
    begin = bytes(view[:64])
    if place.suffix == ".safetensors" or (begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") < len(view)):
        return _safetensors(place)
    if begin.startswith(b"version https://git-lfs"):
        raise Refused("is the pointer of a file in Git LFS and not the file; fetch it with `git lfs pull`")
    if begin.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise Refused("is a web page and no checkpoint; download the file itself")
    if begin.startswith(b"PK"):
        tree, foreign = read_zip(view)
        return FileContent("PyTorch zip", tree, foreign)
    return FileContent(*read_stream(view))


def _safetensors(place: Path) -> FileContent:
    file: Any = safe_open(place, framework="pt")  # Not closed: tensors are read from it later.
    record = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    if not isinstance(record, dict):
        raise Refused(f"has a damaged record ({printable(str(record)[:40])!r}); copy or download it again")
    names = list(file.keys())
    tree = {name: LazyTensor(tuple(file.get_slice(name).get_shape()), partial(file.get_tensor, name)) for name in names}
    return FileContent("safetensors", tree, record=record)


def _sharded(index: Path) -> FileContent:
    names = _weight_map(index)
    shards = {name: _single(_inside(index.parent, name)) for name in sorted(set(names.values()))}
    tree = {}
    for tensor, shard in names.items():
        if not isinstance(mapping(shards[shard].tree).get(tensor), LazyTensor):
            raise Refused(f"has no {printable(tensor)} in {printable(shard)}, where its index says; download it again")
        tree[tensor] = shards[shard].tree[tensor]
    foreign = tuple(dict.fromkeys(name for shard in shards.values() for name in shard.foreign))
    kind = "sharded safetensors" if index.name.endswith(".safetensors.index.json") else "sharded PyTorch"
    return FileContent(kind, tree, foreign)


def _weight_map(index: Path) -> dict[str, str]:
    content = json.loads(index.read_text(encoding="utf-8"))
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
        raise Refused(f"has an index, {printable(index.name)}, without a weight map; copy or download it again")
    return names
