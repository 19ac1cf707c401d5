"""The trial of a network that others wrote: a few calls before anything else, and what they tell.

The network stays as it was: its buffers, its attributes and torch's random numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.backbones.base import TRIAL_LEVELS, Backbone, checked_pass
from layerprobe.backbones.network_call import OTHER_CALL, Lookup, call_module, has_variance, lookups
from layerprobe.capture import evaluating

# Names of arguments that tell what they are.
_TIMES = ("t", "ts", "time", "times", "timestep", "timesteps", "sigma", "sigmas", "noise_level", "noise_levels")
_LABELS = ("y", "label", "labels", "class_label", "class_labels", "classes")
# Parts of its size by which an output may change: between equal calls, where accelerators add up in any order, and
# between a sample in a batch and alone, which other kernels compute, in half precision inside some networks.
_EQUAL, _ALONE = 1e-4, 0.02
_PREDICTION = "prediction"


@torch.no_grad()
def tried(backbone: Backbone) -> Backbone:
    """Calls a network as layerprobe will, and returns its backbone with what was found among the assumptions.

    Two samples at two noise levels are called first, then the first of them by itself, twice.

    Args:
        backbone: Backbone of a user's network, with its weights.

    Raises:
        ValueError: As for `checked_pass`; if a tensor has no values; if the network takes its arguments in another
            order, changes its input, or returns values that are not finite.
    """
    module, usual = backbone.module, backbone.forward is call_module
    _check_values(module)
    found = _arguments(module, with_label=backbone.num_classes > 0) if usual else []
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(len(TRIAL_LEVELS), *backbone.shape, generator=generator).to(backbone.device)
    raw: list[Any] = []
    with _unchanged(module) as buffers, evaluating(module):
        with _raw_outputs(module, raw), lookups(module) as used:
            both = _outputs(backbone, x_t)
        alone, again = _outputs(backbone, x_t[:1]), _outputs(backbone, x_t[:1])
        changed = [name for name, buffer in module.named_buffers() if not torch.equal(buffer, buffers[name])]
    if usual and has_variance(raw[-1], x_t):
        found.append(
            f"the first {len(x_t[0])} of {raw[-1].shape[1]} output channels are the prediction, the others a learned "
            f"variance; otherwise {OTHER_CALL}"
        )
    found += _null_label(backbone, used.values()) if backbone.num_classes else []
    found += _repeatable(both, alone, again, changed)
    found += _distinct(both) + _channels_last(backbone, both)
    return replace(backbone, assumptions=(*backbone.assumptions, *found))


def _outputs(backbone: Backbone, x_t: Tensor) -> dict[str, Tensor]:
    """Returns the tokens by layer and the prediction, of one call."""
    before = x_t.clone()
    tokens, prediction = checked_pass(backbone, x_t)
    if not torch.equal(before, x_t):
        raise ValueError(
            f"{backbone.name} changes its input x in place, which is needed after the call; "
            "begin its forward with x = x.clone()"
        )
    finite = prediction.isfinite().flatten(1).all(1).tolist()
    if not all(finite):
        level = TRIAL_LEVELS[finite.index(False)]
        time = float(backbone.schedule.native_time(torch.tensor(level)))
        raise ValueError(
            f"{backbone.name} returns values that are not finite at noise level {level:g}, its time {time:.4g}; "
            "check --schedule, the weights and the network"
        )
    return {**tokens, _PREDICTION: prediction}


def _check_values(module: nn.Module) -> None:
    tensors = (*module.named_parameters(), *module.named_buffers())
    empty = next((name for name, tensor in tensors if tensor.is_meta), None)
    if empty is not None:
        raise ValueError(
            f"{empty} of {type(module).__name__} has no values: it was made on the meta device and is not in the "
            "file; make the network without torch.device('meta')"
        )


def _arguments(module: nn.Module, *, with_label: bool) -> list[str]:
    """Compares the names of the arguments with the order in which they are passed."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    passed = 2 + with_label
    swapped = names[:1] and names[0] in _TIMES and not (names[1:2] and names[1] in _TIMES)
    if swapped or (names[1:2] and names[1] in _LABELS and any(name in _TIMES for name in names)):
        order = ", ".join(names)
        raise ValueError(
            f"{type(module).__name__}.forward({order}) would get x, time{', label' * with_label} in this order; "
            f"{OTHER_CALL}, such as lambda module, x, time, label: module({_in_order(names, with_label)})"
        )
    found = []
    if names[passed - 1 :]:
        what = ("noisy samples", "time", "label")[:passed]
        pairs = ", ".join(f"{name} = {meaning}" for name, meaning in zip(names, what, strict=False))
        found.append(f"its forward gets {pairs}; otherwise {OTHER_CALL}")
    left = names[passed:]
    if left:
        label = "pass --num-classes for a label, or " * (not with_label)
        found.append(f"its forward does not get {', '.join(left)}; {label}{OTHER_CALL}")
    return found


def _in_order(names: list[str], with_label: bool) -> str:
    """Returns the arguments of a call by keyword, from what their names tell."""
    x = next((name for name in names if name not in (*_TIMES, *_LABELS)), "")
    values = {name: "time" if name in _TIMES else "label" if name in _LABELS else "x" for name in names}
    known = {name: value for name, value in values.items() if name == x or value != "x"}
    return ", ".join(f"{name}={value}" for name, value in known.items() if with_label or value != "label")


def _null_label(backbone: Backbone, used: Iterable[Lookup]) -> list[str]:
    """Tells which row of which table the null label is."""
    null = backbone.num_classes
    for table in used:
        if not table.indices.is_floating_point() and bool((table.indices == null).all()):
            last = f"the last of the {table.rows} rows of {table.name}"
            if table.rows == null + 1:
                return [f"the null label is {null}, {last}; otherwise pass --num-classes, or {OTHER_CALL}"]
            return [
                f"the null label is {null}, but {table.name} has {table.rows} rows; pass --num-classes "
                f"{table.rows - 1} if its last row is the null label, or {OTHER_CALL}"
            ]
    return [f"the null label is {null}, the number of classes; otherwise {OTHER_CALL}"]


def _repeatable(
    both: Mapping[str, Tensor], alone: Mapping[str, Tensor], again: Mapping[str, Tensor], changed: list[str]
) -> list[str]:
    """Tells whether outputs depend on chance, on earlier calls, or on the other samples of a batch."""
    name, change = _largest_change(alone, again)
    if change > _EQUAL:
        cause = f"its buffer {changed[0]} changes" if changed else "it draws random numbers or keeps a state"
        return [f"{name} differs by {change:.0%} between two equal calls: {cause}; make its forward repeatable"]
    name, change = _largest_change(alone, {key: output[:1] for key, output in both.items()})
    if change > _ALONE:
        return [
            f"{name} of a sample differs by {change:.0%} alone and in a batch of two: the network mixes samples; "
            "check its axes (batch_first), and its normalization"
        ]
    return []


def _largest_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> tuple[str, float]:
    """Returns the output that changes most, and by which part of its size."""
    changes = {
        name: float((output - after[name]).norm() / output.norm().clamp(min=1e-12)) for name, output in before.items()
    }
    name = max(changes, key=lambda key: changes[key])
    return ("the " * (name == _PREDICTION) + name), changes[name]


def _distinct(outputs: Mapping[str, Tensor]) -> list[str]:
    layers = [(name, tokens) for name, tokens in outputs.items() if name != _PREDICTION]
    equal = [f"{a} and {b}" for (a, x), (b, y) in pairwise(layers) if torch.equal(x, y)]
    if not equal:
        return []
    return [f"{', '.join(equal[:3])} return the same: their numbers are equal; leave one out of --layers"]


def _channels_last(backbone: Backbone, outputs: Mapping[str, Tensor]) -> list[str]:
    """Tells of layers of a sequence that seem to return (B, C, frames)."""
    if len(backbone.shape) != 2:
        return []
    frames = backbone.shape[1]
    layers = [(name, tuple(x.shape[1:])) for name, x in outputs.items() if name != _PREDICTION]
    odd = [(name, shape) for name, shape in layers if shape[1] == frames != shape[0]]
    if not odd:
        return []
    name, (num, width) = odd[0]
    return [
        f"{name} is read as {num} tokens of width {width}, and samples have {frames} frames; if it returns channels "
        "first, as Conv1d, pass wrap(..., tokens=lambda output, name: output.transpose(1, 2))"
    ]


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Restores buffers, attributes and torch's random numbers after the block; yields the buffers as they were."""
    attributes = [(part, dict(vars(part)), dict(part._buffers)) for part in module.modules()]
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    devices = {p.device for p in module.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices):
        try:
            yield buffers
        finally:
            for part, before, own_buffers in attributes:
                vars(part).clear()
                vars(part).update(before)
                part._buffers.clear()
                part._buffers.update(own_buffers)
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])


@contextmanager
def _raw_outputs(module: nn.Module, raw: list[Any]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, __, output: raw.append(output))
    try:
        yield
    finally:
        handle.remove()
