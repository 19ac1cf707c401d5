"""Finds a network among the parts of a state dict: under a prefix of any number of parts, beside other networks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from layerprobe.checkpoints.weight_sets import is_averaged

_MOST_PARTS = 8  # of a prefix; bounds the work on hostile names


@dataclass(frozen=True, eq=False)
class FoundNetwork:
    """The tensors of one network in a state dict.

    Attributes:
        tensors: Tensors by their names below the prefix.
        prefix: Prefix of their names in the state dict, such as "model.diffusion_model."; "" for none.
        left_out: Numbers of the other tensors, by what their names begin with.
    """

    tensors: Mapping[str, Tensor]
    prefix: str
    left_out: Mapping[str, int]


def find_network(
    tensors: Mapping[str, Tensor], fits: Callable[[Mapping[str, Tensor]], bool], *, container: str
) -> FoundNetwork | None:
    """Returns the part of a state dict that fits, the averaged one if a live network fits too; None if nothing does.

    Args:
        tensors: State dict.
        fits: Function that tests whether tensors, by their names without the prefix, are those of the network.
        container: Name of the state dict in its file, for the error.

    Raises:
        ValueError: If several networks fit and none of them, or more than one, is averaged.
    """
    if fits(tensors):
        return FoundNetwork(tensors, "", {})
    fitting = {prefix: part for prefix, part in _parts(tensors).items() if fits(part)}
    if not fitting:
        return None
    averaged = [prefix for prefix in fitting if is_averaged(prefix)]
    chosen = averaged or list(fitting)
    if len(chosen) > 1:
        names = ", ".join(f"{container}.{prefix}".strip(".") for prefix in sorted(chosen)[:6])
        raise ValueError(f"holds several networks that fit; pass --weights with one of {names}")
    (prefix,) = chosen
    return FoundNetwork(fitting[prefix], prefix, _left_out(tensors, prefix))


def closest_part(tensors: Mapping[str, Tensor], expected: set[str]) -> Mapping[str, Tensor]:
    """Returns the part of a state dict that shares the most names with a network, for an error that tells the rest."""
    parts = {"": tensors} | _parts(tensors)
    return max(parts.values(), key=lambda part: len(expected & part.keys()))


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors below every prefix, shorter prefixes first."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        at = name.find(".")
        for _ in range(_MOST_PARTS):
            if at < 0:
                break
            parts.setdefault(name[: at + 1], {})[name[at + 1 :]] = tensor
            at = name.find(".", at + 1)
    return dict(sorted(parts.items(), key=lambda item: item[0].count(".")))


def _left_out(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, int]:
    """Counts the tensors outside of a prefix by the first part of their names that differs from it."""
    wanted = prefix.split(".")
    counts: Counter[str] = Counter()
    for name in tensors:
        if not name.startswith(prefix):
            parts = name.split(".")
            differing = next(i for i, (a, b) in enumerate(zip(parts, wanted, strict=False)) if a != b)
            counts[".".join([*parts[: differing + 1], *["*"] * (len(parts) > differing + 1)])] += 1
    return dict(counts)
