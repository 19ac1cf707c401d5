"""Chooses the set of weights to read from a checkpoint: averaged weights, live weights, or the set the user names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from layerprobe.checkpoints.formats import CONTAINERS, NO_WEIGHTS, FileContent, file_content, one_line_errors
from layerprobe.checkpoints.torch_files import LazyTensor
from layerprobe.checkpoints.unpickling import Budget, Inert, Refused, mapping, plain, printable, state
from layerprobe.messages import did_you_mean

# Parts that torch.compile, FSDP and checkpointing add anywhere in a name; data parallelism adds a leading "module".
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Names under which training code saves its settings.
_ARGUMENTS = ("args", "hyper_parameters", "hparams", "config", "cfg", "opt", "options", "model_args", "model_config")
_AVERAGED = re.compile(
    # Adam's "exp_avg" is an average of gradients.
    r"(^|[^a-z])emas?([^a-z]|$|callback|weight|model)|averaged?|(?<!exp)(^|_)(swa|avg|polyak)(_|$)|shadow",
    re.IGNORECASE,
)
# Names that wrappers give to the averaged copy of a network inside the same state dict.
_COPIES = ("ema_model", "model_ema", "net_ema", "ema_net", "module_ema", "ema_module", "ema")
_AVERAGED_RANK, _UNUSUAL_RANK = 0, 3
_COUNTERS = ("n_averaged", "initted", "inited", "step", "num_updates", "decay")


@dataclass(frozen=True, eq=False)
class Weights:
    """One set of weights from a checkpoint, with the other information in the file.

    Attributes:
        tensors: Tensors of the stored types, by names without wrappers; views of the file if its format allows it.
        record: Record of layerprobe's own checkpoints; {} for other files.
        container: Name of the set in the file, such as "ema" or "state_dict"; "" for a file that holds nothing else.
        containers: Names of all sets of weights in the file, the chosen one first.
        args: Training settings saved beside the weights: numbers, texts, lists and dictionaries.
        foreign: Full names of classes and functions that the file refers to and that were left as data.
        format: File format: "safetensors", "sharded safetensors", "PyTorch zip", "PyTorch legacy", "sharded PyTorch",
            "DCP folder", "EDM pickle" or "pickle".
        files: The files that were read, an index first.
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]
    container: str
    containers: tuple[str, ...]
    args: dict[str, Any]
    foreign: tuple[str, ...]
    format: str
    files: tuple[Path, ...]


_Set = dict[str, LazyTensor]


def read_weights(path: str | Path, *, weights: str | None = None) -> Weights:
    """Reads the weights of a checkpoint without running code from it.

    Args:
        path: Path of a file of `torch.save` (old or new), a safetensors file, or a pickle; of the index of a sharded
            checkpoint; of a folder with one of these; or of a folder of torch.distributed.checkpoint.
        weights: Name of the set, one of `Weights.containers`, or of a part of one, such as "state_dict.net"; averaged
            weights are preferred by default.

    Raises:
        FileNotFoundError: If the file, or a file that it refers to, is missing.
        ValueError: If the file is damaged, holds no weights, or holds several sets, or several averaged ones, with no
            obvious choice; if a folder refers to files outside of it.
    """
    path = Path(path)
    with one_line_errors(path):
        content = file_content(path)
        sets = _weight_sets(content)
        if weights is not None:
            sets |= _part_of_a_set(sets, weights)
        chosen = _chosen(sets, weights)
        return Weights(
            tensors={name: tensor.read() for name, tensor in sets[chosen].items()},
            record=dict(content.record or {}),
            container=chosen,
            containers=(chosen, *(name for name in sets if name != chosen)),
            args=_arguments(content.tree),
            foreign=content.foreign,
            format=content.format,
            files=content.files,
        )


def _weight_sets(content: FileContent) -> dict[str, _Set]:
    """Returns every set of weights in a file by its name, the preferred set first."""
    if content.record:  # layerprobe's own file holds one network, which may have a part called "ema".
        return {"": _cleaned(mapping(content.tree))}
    budget = Budget()
    sets: dict[str, _Set] = {}
    lists: dict[str, Sequence[LazyTensor]] = {}
    for name, value in _candidates(content.tree, "", 0, budget):
        if isinstance(value, dict):
            sets |= _split_average(name, _cleaned(value))
        else:
            lists[name] = value
    if not sets:
        names = ", ".join(printable(str(key)) for key in [*_children(content.tree)][:4])
        raise Refused(
            f"holds no weights{', only ' if names else ''}{names}; "
            "expected named tensors, possibly under ema, model, state_dict, ..."
        )
    networks = [sets[name] for name in sorted(sets, key=_rank)]
    for name, values in lists.items():
        named = next((named for network in networks if (named := _with_names(values, network))), None)
        if named is not None:
            sets[name] = named
    return {name: sets[name] for name in sorted(sets, key=_rank)}


def _chosen(sets: Mapping[str, _Set], weights: str | None) -> str:
    names = [name or "'' (the file itself)" for name in sets]
    if weights is not None:
        if weights not in sets:
            raise Refused(f"has no weights called {weights!r}; it has {', '.join(names)}{did_you_mean(weights, names)}")
        return weights
    first, *others = sets
    rank = _rank(first)[0]
    if others and _rank(others[0])[0] == rank and rank in (_AVERAGED_RANK, _UNUSUAL_RANK):
        raise Refused(f"holds several sets of weights ({', '.join(names[:8])}); pass --weights with one of them")
    return first


def _part_of_a_set(sets: Mapping[str, _Set], name: str) -> dict[str, _Set]:
    """Returns the tensors of a set below a prefix, by the name of the set and the prefix; {} if there are none."""
    for outer in sorted(sets, key=len, reverse=True):
        prefix = name if not outer else name.removeprefix(f"{outer}.")
        if name not in sets and (not outer or prefix != name) and (part := _below(f"{prefix}.", sets[outer])):
            return {name: part}
    return {}


def is_averaged(name: str) -> bool:
    """Returns whether a name of a set, or a prefix in a state dict, stands for averaged weights."""
    parts = name.rstrip(".").split(".")
    return parts[-1] != "online_model" and any(_AVERAGED.search(part) for part in parts)


def _rank(name: str) -> tuple[int, int]:
    """Ranks averaged weights first, then sets with a usual name, then the top level of the file, then others."""
    parts = name.split(".")
    usual = min((CONTAINERS.index(part) for part in parts if part in CONTAINERS), default=len(CONTAINERS))
    if is_averaged(name):
        return _AVERAGED_RANK, usual
    if usual < len(CONTAINERS):
        return 1, usual
    return (_UNUSUAL_RANK if name else 2), 0


def _candidates(value: Any, name: str, depth: int, budget: Budget) -> Iterator[tuple[str, _Set | list[LazyTensor]]]:
    """Yields what may be a set of weights, with its name: named tensors, modules, lists of averaged tensors."""
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
        if isinstance(child, (dict, list, tuple, Inert)) and not NO_WEIGHTS.match(key):
            yield from _candidates(child, f"{name}.{printable(key)}".lstrip("."), depth + 1, budget)


def _children(value: Any) -> dict[str, Any]:
    if isinstance(value, (list, tuple)):
        return {str(i): child for i, child in enumerate(value)}
    entries = mapping(value) or (state(value) if isinstance(value, Inert) else {})
    # Averages are kept by their decay, {0.999: ...}. Integers are the keys of an optimizer's states.
    return {str(key): child for key, child in entries.items() if isinstance(key, (str, float))}


def _module_tensors(module: Inert, prefix: str, budget: Budget) -> Iterator[tuple[str, LazyTensor]]:
    """Yields the entries of the state dict of a module that was pickled as an object."""
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
    """Removes from the names what wrappers of the network add to them."""
    unprintable = next((name for name in tensors if not name.isprintable()), None)
    if unprintable is not None:  # Names appear in messages, and a terminal would run their control codes.
        raise Refused(f"is damaged: it has a tensor called {printable(unprintable)!r}; copy or download it again")
    cleaned: dict[str, str] = {}
    for name in tensors:
        other = cleaned.setdefault(stripped(name), name)
        if other != name:
            raise Refused(f"holds both {name} and {other}; save one of the two networks by itself")
    averaged = cleaned.get("n_averaged") == "n_averaged"  # torch.optim.swa_utils.AveragedModel counts its updates.
    return {short: tensors[name] for short, name in cleaned.items() if not (averaged and short == "n_averaged")}


def stripped(name: str) -> str:
    """Returns a tensor's name without what wrappers of the network add to it."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def _split_average(name: str, tensors: _Set) -> dict[str, _Set]:
    """Splits a state dict into a network and its averaged copy, which a wrapper keeps under a prefix."""
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
            live = {f"{name}.online_model".lstrip("."): _below("online_model.", rest)} if online else {name: rest}
            return {f"{name}.{head}".lstrip("."): _cleaned(average)} | (live if rest else {})
    return {name: tensors}


def _below(prefix: str, tensors: _Set) -> _Set:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _completed(average: _Set, network: _Set) -> _Set | None:
    """Adds the network's buffers, which are not averaged; None if the average belongs to another network."""
    # The LitEma of latent diffusion takes the dots out of names.
    compact = {key.replace(".", ""): key for key in network}
    names = {key: key if key in network else compact.get(key, "") for key in average}
    if "" in names.values():
        return None
    average = {names[key]: value for key, value in average.items()}
    parts = {key.partition(".")[0] for key in average}
    return {key: average.get(key, value) for key, value in network.items() if key.partition(".")[0] in parts}


def _with_names(values: Sequence[LazyTensor], network: _Set) -> _Set | None:
    """Names the averaged parameters in a list after the network's, if their shapes leave no doubt."""
    entries = list(network.items())
    names = [_matching_names(values, entries), _matching_names(values[::-1], entries[::-1])]
    if names[0] is None or names[1] is None or names[0] != names[1][::-1]:
        return None  # The first match differs from the last: some buffers have the shape of a parameter.
    return network | dict(zip(names[0], values, strict=True))


def _matching_names(values: Iterable[LazyTensor], network: Iterable[tuple[str, LazyTensor]]) -> list[str] | None:
    """Returns the names of the first tensors of a network, in order, with the given shapes; None without a match."""
    remaining, names = iter(network), []
    for value in values:
        name = next((name for name, tensor in remaining if tensor.shape == value.shape), None)
        if name is None:
            return None
        names.append(name)
    return names


def _arguments(tree: Any) -> dict[str, Any]:
    """Returns training settings saved beside the weights, and single values such as the step."""
    children = _children(tree) if not isinstance(tree, (list, tuple)) else {}
    args = {key: plain(value) for key, value in children.items() if isinstance(value, (bool, int, float, str))}
    for key in reversed(_ARGUMENTS):
        if isinstance(children.get(key), (dict, Inert)):
            settings = plain(children[key])
            args |= settings if isinstance(settings, dict) else {}
    return args
