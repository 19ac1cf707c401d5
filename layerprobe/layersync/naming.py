"""Layer pairs as users write them: names, numbers of blocks, and the pick of a run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from layerprobe.backbones import known_blocks
from layerprobe.capture import INPUT
from layerprobe.layersync.options import WEIGHT
from layerprobe.layersync.pair import LayerPair
from layerprobe.records import parse, read_record

Layer = str | int
"""A layer: its name in the module, or the number of a block, counted from 0."""


def as_pairs(
    pairs: Iterable[LayerPair | tuple[Layer, Layer]] | Layer, teacher: Layer | None, module: nn.Module
) -> tuple[LayerPair, ...]:
    """Returns layer pairs, with names for the numbers of blocks.

    Args:
        pairs: Pairs as (student, teacher) or `LayerPair`; with a teacher, the student.
        teacher: Teacher of the only pair, or None.
        module: The network.

    Raises:
        ValueError: If something is no pair of layers, or a number is not that of one block.
    """
    if teacher is not None:
        return (_as_pair((pairs, teacher), module),)
    if isinstance(pairs, str | int):
        raise ValueError(f"{pairs!r} is a student without a teacher; pass LayerSync(model, {pairs!r}, teacher)")
    return tuple(_as_pair(pair, module) for pair in pairs)


def _as_pair(pair: Any, module: nn.Module) -> LayerPair:
    if isinstance(pair, LayerPair):
        return pair
    if isinstance(pair, str | int) or len(pair) != 2 or not all(map(_is_layer, pair)):
        seen = repr(pair) if isinstance(pair, str | int) else " and ".join(type(layer).__name__ for layer in pair)
        raise ValueError(
            f"{seen} is not a (student, teacher) pair; pass a list of pairs of layers, or LayerSync(model, student, "
            "teacher) for one"
        )
    return LayerPair(*(layer if isinstance(layer, str) else block_name(module, layer) for layer in pair))


def block_name(module: nn.Module, number: int) -> str:
    """Returns the name of a block: 7 is `blocks.7` in SiT and Wan, `transformer_blocks.7` in SD3 and PixArt.

    Args:
        module: A network with one list of blocks, or a wrapper around one.
        number: Number of the block as in the module, counted from 0; papers count depths from 1.

    Raises:
        ValueError: If there is no such block, or the module has no list of blocks, or several.
    """
    lists = _block_lists(module)
    if not lists:
        raise ValueError(f"{type(module).__name__} has no list of blocks in which {number} could be; pass names")
    if len(lists) > 1:
        shown = ", ".join(_span(prefix, count) for prefix, count in list(lists.items())[:6])
        raise ValueError(f"{type(module).__name__} has several lists of blocks ({shown}); pass names for {number}")
    ((prefix, count),) = lists.items()
    if not 0 <= number < count:
        raise ValueError(
            f"there is no block {number} in {type(module).__name__}, which has {_span(prefix, count)}; pass a number "
            f"from 0 to {count - 1}"
        )
    return f"{prefix}.{number}"


@dataclass(frozen=True)
class Picked:
    """What a run says about an alignment.

    Attributes:
        pair: The pick, with the names of its layers in the module.
        weight: Weight of the alignment to start with.
    """

    pair: LayerPair
    weight: float


def picked_in(module: nn.Module, run: Any) -> Picked:
    """Returns the pick of a run, with the names of its layers in the module.

    Args:
        module: The network of the run, or a wrapper around it, as peft's and trainers' are.
        run: Folder of a run, or its `selection.json`; or an object with `pick`, `weight` and `basis.layers`, such as a
            `Selection`, or one that has it as `selection`, such as `layerprobe.Run`.

    Raises:
        FileNotFoundError: If the folder holds no selection.
        ValueError: If the run has no admissible pair, it is something else, or the module lacks a measured layer.
    """
    pair, weight, layers = _selected(run)
    if pair is None:
        name = run if isinstance(run, str | Path) else getattr(run, "path", "the selection")
        raise ValueError(
            f"{name} has no admissible pair, for which `layerprobe select` gives the reason; pass a pair by name to "
            "align one all the same"
        )
    student, teacher, *every = _named(module, (pair.student, pair.teacher, *layers))
    if beyond := _beyond(module, every):
        warnings.warn(
            f"{type(module).__name__} also has {beyond}, which the run did not measure; is it the network of the run?",
            stacklevel=3,
        )
    return Picked(LayerPair(student, teacher), weight)


def _selected(run: Any) -> tuple[LayerPair | None, float, tuple[str, ...]]:
    """Pick, weight and all layers of a run."""
    if isinstance(run, str | Path):
        place = Path(run) if Path(run).suffix == ".json" else Path(run) / "selection.json"
        if not place.is_file():
            raise FileNotFoundError(f"{place} does not exist; pass a folder that `layerprobe probe` has made")
        return read_record(place, _record, remedy="repeat `layerprobe probe`, or delete it to pick again")
    selection = getattr(run, "selection", run)
    if not all(hasattr(selection, part) for part in ("pick", "weight", "basis")):
        raise ValueError(
            f"a {type(run).__name__} holds no pick; pass the folder of a run, a layerprobe.Run or its selection"
        )
    return selection.pick, selection.weight, tuple(selection.basis.layers)


def _named(module: nn.Module, layers: Sequence[str]) -> list[str]:
    """The names in the module of layers that a run names as in its network, which may be inside a wrapper."""
    names = [name for name, _ in module.named_modules()]
    first = layers[0].removesuffix(INPUT)
    prefixes = [""] if first in names else [name.removesuffix(first) for name in names if name.endswith(f".{first}")]
    if len(prefixes) > 1:
        shown = ", ".join(f"{prefix}{first}" for prefix in prefixes[:4])
        raise ValueError(f"{type(module).__name__} has {first} several times ({shown}); pass the network of the run")
    prefix = prefixes[0] if prefixes else ""
    absent = {layer.removesuffix(INPUT) for layer in layers} - {name.removeprefix(prefix) for name in names}
    if absent:
        raise ValueError(
            f"{type(module).__name__} has no {min(absent)}, which the run measured; pass the network of the run, or a "
            "wrapper around it"
        )
    return [prefix + layer for layer in layers]


def _beyond(module: nn.Module, layers: Sequence[str]) -> str:
    """The first block behind the measured ones, if these are the first blocks of a longer list; "" if not."""
    prefix = layers[0].rpartition(".")[0]
    following = f"{prefix}.{len(layers)}"
    are_first = [*layers] == [f"{prefix}.{number}" for number in range(len(layers))]
    return following if are_first and following in {name for name, _ in module.named_modules()} else ""


def _is_layer(layer: Any) -> bool:
    return isinstance(layer, str | int) and not isinstance(layer, bool)


def _block_lists(module: nn.Module) -> dict[str, int]:
    """Lists of blocks by name with their lengths: those of a known class, else all that lie in no other list."""
    if known := known_blocks(module):
        prefixes = [name.rpartition(".")[0] for name in known]
        return {prefix: prefixes.count(prefix) for prefix in dict.fromkeys(prefixes)}
    lists: dict[str, int] = {}
    for name, part in module.named_modules():
        is_inside = any(name.startswith(f"{other}.") for other in lists)
        if isinstance(part, nn.ModuleList | nn.Sequential) and name and not is_inside and _holds_blocks(part):
            lists[name] = len(part)
    return lists


def _holds_blocks(parts: nn.ModuleList | nn.Sequential) -> bool:
    """Whether all parts, two or more, are made of parts themselves, unlike those of an MLP."""
    return len(parts) > 1 and all(any(True for _ in part.children()) for part in parts)


def _span(prefix: str, count: int) -> str:
    return f"{prefix}.0 to {prefix}.{count - 1}"


def _record(value: Any) -> tuple[LayerPair | None, float, tuple[str, ...]]:
    pick, weight = value["pick"], float(parse(float, value.get("weight", WEIGHT), "weight"))
    layers: tuple[str, ...] = parse(tuple[str, ...], value["basis"]["layers"], "basis.layers")
    if pick is None:
        return None, weight, layers
    names: Mapping[str, str] = parse(Mapping[str, str], pick, "pick")
    return LayerPair(names["student"], names["teacher"]), weight, layers
