"""Whatever a training left behind -> its weights by name, without running what the files say.

A file may hold several sets of weights; averaged ones (EMA) are preferred, since they make the better samples. Names
lose what wrappers put into them: `module.` of data parallelism, `_orig_mod.` of torch.compile, FSDP's. A prefix that
all names share is left in place, unless it is what says that the weights are averaged, as `ema_model.` does.

Values are read from disk when they are used; see `torchfiles`.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from layerprobe.files import MissingWeights
from layerprobe.torchfiles import LazyTensor, mapped, read_distributed, read_stream, read_zip
from layerprobe.unpickling import Budget, Inert, Refused, mapping, plain, printable, state

METADATA_KEY = "layerprobe"
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl")
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
# Where people put their weights, the more usual first.
CONTAINERS = (
    *("ema", "model_ema", "ema_model", "model_avg", "ema_state_dict", "params_ema"),
    *("model", "state_dict", "model_state_dict", "module", "network", "net", "params", "weights", "online_model"),
)
# What torch.compile, FSDP and checkpointing put into names, anywhere; data parallelism puts "module" in front.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Settings of the training, by the names that training code saves them under.
_ARGUMENTS = ("args", "hyper_parameters", "hparams", "config", "cfg", "opt", "options", "model_args", "model_config")
_AVERAGED = re.compile(r"(^|[^a-z])ema([^a-z]|$|callback|weight|model)|averaged|(^|_)swa(_|$)|shadow", re.IGNORECASE)
_NO_WEIGHTS = re.compile(r"(opt|optim|optimi[sz]er)(s|_.*)?$|.*(scaler|sched|random)|(rng|loops|collected_params)$")
# A part of a network that is a copy of the rest of it, by the names that wrappers give it.
_COPIES = ("ema_model", "model_ema", "net_ema", "ema_net", "module_ema", "ema_module", "ema")
_COUNTERS = ("n_averaged", "initted", "inited", "step", "num_updates", "decay")


@dataclass(frozen=True, eq=False)
class Weights:
    """One set of weights from a checkpoint, and what the file says about it.

    Attributes:
        tensors: By names without wrappers, of the type that is stored; views of the file where its format allows.
        record: layerprobe's own record, or {} for other people's files.
        container: Where in the file they are: "ema", "state_dict", "" for a file that holds nothing else.
        containers: Every set of weights that the file has, the chosen one first.
        args: Numbers, texts, lists and dictionaries: the settings of the training that are saved beside the weights.
        foreign: Full names of what the file wanted to be built or called, and what was left as data instead.
        format: "safetensors", "sharded safetensors", "PyTorch zip", "PyTorch legacy", "sharded PyTorch", "DCP folder",
            "EDM pickle" or "pickle".
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]
    container: str
    containers: tuple[str, ...]
    args: dict[str, Any]
    foreign: tuple[str, ...]
    format: str


@dataclass(frozen=True, eq=False)
class _Content:
    format: str
    tree: Any
    foreign: tuple[str, ...] = ()
    record: Mapping[str, Any] | None = None


_Set = dict[str, LazyTensor]


def read_weights(path: str | Path, *, weights: str | None = None) -> Weights:
    """Reads the weights of a checkpoint and runs nothing.

    Args:
        path: A file of `torch.save` (old or new), safetensors, or a pickle; the index of a sharded checkpoint; a folder
            with one of these or of torch.distributed.checkpoint.
        weights: Which set, one of `Weights.containers`; averaged weights are preferred where it is not given.

    Raises:
        FileNotFoundError: If there is no such file, or a file that it needs is missing.
        ValueError: If it is damaged, holds no weights, or holds several sets and none is the obvious one; if a folder
            names files outside of it.
    """
    path = Path(path)
    with _one_line(path):
        content = _content(path)
        sets = _weight_sets(content)
        chosen = _chosen(sets, weights)
        tensors = {name: tensor.read() for name, tensor in sets[chosen].items()}
        return Weights(
            tensors=tensors,
            record=dict(content.record or {}),
            container=chosen,
            containers=(chosen, *(name for name in sets if name != chosen)),
            args=_arguments(content.tree),
            foreign=content.foreign,
            format=content.format,
        )


def weight_files(path: str | Path) -> tuple[Path, ...]:
    """The files that `read_weights` would read.

    Raises:
        FileNotFoundError: If there are none, or one is missing.
        ValueError: If a folder has several checkpoints, or names files outside of it.
    """
    path = Path(path)
    with _one_line(path):
        place = _located(path)
        if place.name == ".metadata":
            return place, *(_inside(place.parent, file.name) for file in sorted(place.parent.glob("*.distcp")))
        if place.name.endswith(".index.json"):
            return place, *(_inside(place.parent, name) for name in sorted(set(_weight_map(place).values())))
        return (place,)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
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


def _content(path: Path) -> _Content:
    place = _located(path)
    if place.name == ".metadata":
        part = _cached_parts(place.parent)
        tree, foreign = read_distributed(mapped(place), part, lambda name: not _NO_WEIGHTS.match(name))
        return _Content("DCP folder", tree, foreign)
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


def _single(place: Path) -> _Content:
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
        return _Content("PyTorch zip", tree, foreign)
    return _Content(*read_stream(view))


def _safetensors(place: Path) -> _Content:
    file: Any = safe_open(place, framework="pt")  # Not closed: tensors are read from it later.
    record = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    if not isinstance(record, dict):
        raise Refused(f"has a damaged record ({printable(str(record)[:40])!r}); copy or download it again")
    names = list(file.keys())
    tree = {name: LazyTensor(tuple(file.get_slice(name).get_shape()), partial(file.get_tensor, name)) for name in names}
    return _Content("safetensors", tree, record=record)


def _sharded(index: Path) -> _Content:
    names = _weight_map(index)
    shards = {name: _single(_inside(index.parent, name)) for name in sorted(set(names.values()))}
    tree = {}
    for tensor, shard in names.items():
        if not isinstance(mapping(shards[shard].tree).get(tensor), LazyTensor):
            raise Refused(f"has no {printable(tensor)} in {printable(shard)}, where its index says; download it again")
        tree[tensor] = shards[shard].tree[tensor]
    foreign = tuple(dict.fromkeys(name for shard in shards.values() for name in shard.foreign))
    kind = "sharded safetensors" if index.name.endswith(".safetensors.index.json") else "sharded PyTorch"
    return _Content(kind, tree, foreign)


def _weight_map(index: Path) -> dict[str, str]:
    content = json.loads(index.read_text(encoding="utf-8"))
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
        raise Refused(f"has an index, {printable(index.name)}, without a weight map; copy or download it again")
    return names


def _weight_sets(content: _Content) -> dict[str, _Set]:
    """Every set of weights in a file by its place there, the preferred first."""
    if content.record:  # Our own file holds one network, which may well have a part called "ema".
        return {"": _cleaned(mapping(content.tree))}
    budget = Budget()
    found: dict[str, _Set] = {}
    lists: dict[str, Sequence[LazyTensor]] = {}
    for name, value in _candidates(content.tree, "", 0, budget):
        if isinstance(value, dict):
            found |= _without_copies(name, _cleaned(value))
        else:
            lists[name] = value
    if not found:
        seen = ", ".join(printable(str(key)) for key in [*_children(content.tree)][:4]) or "nothing with a name"
        raise Refused(
            f"holds no weights, only {seen}; expected tensors by name, also under ema, model, state_dict, ..."
        )
    networks = [found[name] for name in sorted(found, key=_rank)]
    for name, values in lists.items():
        named = next((named for network in networks if (named := _with_names(values, network))), None)
        if named is not None:
            found[name] = named
    return {name: found[name] for name in sorted(found, key=_rank)}


def _chosen(sets: Mapping[str, _Set], weights: str | None) -> str:
    names = [name or "'' (the file itself)" for name in sets]
    if weights is not None:
        if weights not in sets:
            raise Refused(f"has no weights called {weights!r}; it has {', '.join(names)}")
        return weights
    first, *others = sets
    if others and _rank(first)[0] == _rank(others[0])[0] == 3:
        raise Refused(f"holds several sets of weights ({', '.join(names[:8])}); pass --weights with one of them")
    return first


def _rank(name: str) -> tuple[int, int]:
    """Averaged weights, then those with a usual name, then those on top, then others."""
    parts = name.split(".")
    usual = min((CONTAINERS.index(part) for part in parts if part in CONTAINERS), default=len(CONTAINERS))
    if parts[-1] != "online_model" and any(_AVERAGED.search(part) for part in parts):
        return 0, usual
    if usual < len(CONTAINERS):
        return 1, usual
    return (3 if name else 2), 0


def _candidates(value: Any, name: str, depth: int, budget: Budget) -> Iterator[tuple[str, _Set | list[LazyTensor]]]:
    """Whatever may be a set of weights, by its place: tensors by name, modules, lists of averaged tensors."""
    budget.spend()
    if isinstance(value, Inert) and "_modules" in state(value):
        if tensors := dict(_module_tensors(value, "", budget)):
            yield name, tensors
        return
    children = _children(value)
    budget.spend(len(children))
    tensors = {key: child for key, child in children.items() if isinstance(child, LazyTensor)}
    if any(math.prod(tensor.shape) > 1 for tensor in tensors.values()):
        if not isinstance(value, (list, tuple)):
            yield name, tensors
        elif len(tensors) == len(children) and _AVERAGED.search(name):
            yield name, list(tensors.values())
    for key, child in children.items() if depth < 4 else ():
        if isinstance(child, (dict, list, tuple, Inert)) and not _NO_WEIGHTS.match(key):
            yield from _candidates(child, f"{name}.{printable(key)}".lstrip("."), depth + 1, budget)


def _children(value: Any) -> dict[str, Any]:
    if isinstance(value, (list, tuple)):
        return {str(i): child for i, child in enumerate(value)}
    entries = mapping(value) or (state(value) if isinstance(value, Inert) else {})
    return {key: child for key, child in entries.items() if isinstance(key, str)}


def _module_tensors(module: Inert, prefix: str, budget: Budget) -> Iterator[tuple[str, LazyTensor]]:
    """What the state dict of a module would be that was saved as a whole."""
    attributes = state(module)
    transient = attributes.get("_non_persistent_buffers_set") or ()
    parameters, buffers = mapping(attributes.get("_parameters")), mapping(attributes.get("_buffers"))
    for name, value in {**parameters, **{k: v for k, v in buffers.items() if k not in transient}}.items():
        budget.spend()
        if isinstance(value, LazyTensor):
            yield f"{prefix}{name}", value
    for name, child in mapping(attributes["_modules"]).items():
        budget.spend()
        if isinstance(child, Inert) and "_modules" in state(child):
            yield from _module_tensors(child, f"{prefix}{name}.", budget)


def _cleaned(tensors: Mapping[str, LazyTensor]) -> _Set:
    """Names without what wrappers of the network add to them."""
    unprintable = next((name for name in tensors if not name.isprintable()), None)
    if unprintable is not None:  # Names are shown in messages, and a terminal would obey them.
        raise Refused(f"is damaged: it has a tensor called {printable(unprintable)!r}; copy or download it again")
    cleaned: dict[str, str] = {}
    for name in tensors:
        other = cleaned.setdefault(stripped(name), name)
        if other != name:
            raise Refused(f"holds both {name} and {other}; save one of the two networks by itself")
    averaged = cleaned.get("n_averaged") == "n_averaged"  # torch.optim.swa_utils.AveragedModel counts its updates.
    return {short: tensors[name] for short, name in cleaned.items() if not (averaged and short == "n_averaged")}


def stripped(name: str) -> str:
    """A tensor's name without what wrappers of the network add to it."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def _without_copies(name: str, tensors: _Set) -> dict[str, _Set]:
    """A network and the average of it that a wrapper keeps under the same names with a prefix, as sets of their own."""
    for head in _COPIES:
        average = {key: value for key, value in _below(f"{head}.", tensors).items() if key not in _COUNTERS}
        rest = {key: v for key, v in tensors.items() if not key.startswith(f"{head}.") and key not in _COUNTERS}
        if not average:
            continue
        if rest:
            prefixes = ["", *dict.fromkeys(key.partition(".")[0] + "." for key in rest)]
            average = next((both for p in prefixes if (both := _completed(average, _below(p, rest)))), {})
        if average:
            online = all(key.startswith("online_model.") for key in rest)
            rests = {f"{name}.online_model".lstrip("."): _below("online_model.", rest)} if online else {name: rest}
            return {f"{name}.{head}".lstrip("."): _cleaned(average)} | (rests if rest else {})
    return {name: tensors}


def _below(prefix: str, tensors: _Set) -> _Set:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _completed(average: _Set, network: _Set) -> _Set | None:
    """Averaged weights with the network's buffers, which are not averaged; None if they are of another network."""
    # The LitEma of latent diffusion takes the dots out of names.
    compact = {key.replace(".", ""): key for key in network}
    names = {key: key if key in network else compact.get(key, "") for key in average}
    if "" in names.values():
        return None
    average = {names[key]: value for key, value in average.items()}
    parts = {key.partition(".")[0] for key in average}
    return {key: average.get(key, value) for key, value in network.items() if key.partition(".")[0] in parts}


def _with_names(values: Sequence[LazyTensor], network: _Set) -> _Set | None:
    """Averaged parameters that are kept as a list, by the names of the network, if their shapes leave no doubt."""
    names = [_fitting(values, list(network.items())), _fitting(values[::-1], list(network.items())[::-1])]
    if names[0] is None or names[1] is None or names[0] != names[1][::-1]:
        return None  # The first fit is not the last: buffers between the parameters have the shapes of parameters.
    return network | dict(zip(names[0], values, strict=True))


def _fitting(values: Iterable[LazyTensor], network: Iterable[tuple[str, LazyTensor]]) -> list[str] | None:
    """Names of the first tensors of a network, in its order, that have the shapes of these; None if it has none."""
    remaining, names = iter(network), []
    for value in values:
        name = next((name for name, tensor in remaining if tensor.shape == value.shape), None)
        if name is None:
            return None
        names.append(name)
    return names


def _arguments(tree: Any) -> dict[str, Any]:
    """Settings of the training that stand beside the weights, and single values such as the step."""
    children = _children(tree) if not isinstance(tree, (list, tuple)) else {}
    found = {key: plain(value) for key, value in children.items() if isinstance(value, (bool, int, float, str))}
    for key in reversed(_ARGUMENTS):
        if isinstance(children.get(key), (dict, Inert)):
            settings = plain(children[key])
            found |= settings if isinstance(settings, dict) else {}
    return found
