"""Capturing the outputs and inputs of layers with forward hooks, without changing the network.

A layer is named as in the module. `blocks.3.attn` stands for the output of the layer, `blocks.3.attn:input` for its
input. Inside a pre-normalized block, the input of the attention is the normalized and modulated residual stream.
`blocks.3.attn.q` and other parts of a block have the same names in all networks, see `layerprobe.parts`.

A copy or a pickle of a hooked network has no hooks, see `Hook`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from layerprobe.parts import Part, find_part, part_names

INPUT = ":input"


def as_tokens(output: Any, name: str) -> Tensor:
    """Converts a layer's output to tokens, shape (B, T, D).

    Feature maps (B, C, *grid) are flattened, vectors (B, D) become one token, and of a tuple or list the first element
    is used, if no other one could be tokens too. Three axes are always read as (B, T, D); outputs (B, C, L) of a 1-D
    convolution must be transposed first.

    Args:
        output: Output of the layer.
        name: Name of the layer, for the error message.

    Raises:
        ValueError: If the output is not a tensor with at least two axes, is a nested tensor, or is a tuple in which
            several tensors have three axes or more, as in layers that return image and text.
    """
    if isinstance(output, (tuple, list)) and output:
        streams = [tuple(part.shape) for part in output if isinstance(part, Tensor) and part.ndim > 2]
        if len(streams) > 1:
            raise ValueError(
                f"{name} returns {len(streams)} tensors of shapes {' and '.join(map(str, streams))}, and which one is "
                "the sample's is unknown; pass the tokens of the sample, such as tokens=lambda output, name: output[1]"
            )
        output = output[0]
    if not isinstance(output, Tensor) or output.is_nested or output.ndim < 2:
        kind = type(output).__name__
        if isinstance(output, Tensor):
            kind = "a nested tensor" if output.is_nested else f"shape {tuple(output.shape)}"
        raise ValueError(
            f"{name} returns {kind}, which is neither tokens (B, T, D) nor a map (B, C, *grid); name another layer"
        )
    if output.ndim == 2:
        return output.unsqueeze(1)
    return output if output.ndim == 3 else output.flatten(2).transpose(1, 2)


def real_tokens(mask: Tensor, grid: Sequence[int]) -> Tensor:
    """Returns which tokens are not padding, shape (B, T), bool.

    A token is real if any position of its patch is real.

    Args:
        mask: Positions of the input that are not padding, shape (B, *input grid), bool, as in `Batch`.
        grid: Grid of the tokens, with as many axes as the input grid; a grid of one token covers the whole sample.
    """
    pool: Any = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}[len(grid)]
    pooled: Tensor = pool(mask.unsqueeze(1).float(), list(grid))
    return pooled.flatten(1) > 0


@contextmanager
def capture(
    module: nn.Module,
    layers: Sequence[str],
    *,
    tokens: Callable[[Any, str], Tensor] = as_tokens,
    transform: Callable[[Tensor], Tensor] | None = None,
    stop_early: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """Records the outputs of layers during one forward pass and always removes its hooks afterwards.

        with capture(model, ["blocks.0", "blocks.5"]) as outputs:
            model(x_t, t, y)
        outputs["blocks.5"]  # tokens, shape (B, T, D)

    The recorded tensors are not copies: if a later layer works in place, clone them in `transform`. Otherwise the end
    of the block raises an error, except in inference mode, where PyTorch does not count changes.

    Args:
        module: The network.
        layers: Names of submodules, or of their inputs.
        tokens: Function that converts the raw output (or input) of a layer, and the layer's name, to tokens (B, T, D).
        transform: Function applied to the tokens (B, T, D) of a layer as soon as it has run, to keep memory small.
        stop_early: Whether to end the forward pass and the block as soon as every layer has run. A second run of a
            layer in the same pass is then not detected.

    Raises:
        ValueError: If a layer is missing in the module, returns no tensor, did not run, ran more than once, or a
            recorded tensor was changed in place.
    """
    layers = tuple(dict.fromkeys(layers))
    outputs: dict[str, Tensor] = {}
    versions: dict[str, int | None] = {}
    stop = _AllCaptured()

    def record(name: str, output: Any) -> None:
        if name in outputs:
            raise ValueError(f"{name} ran twice in one forward pass; name a layer that runs once")
        layer_tokens = tokens(output, name)
        outputs[name] = layer_tokens if transform is None else transform(layer_tokens)
        versions[name] = version_of(outputs[name])
        if stop_early and len(outputs) == len(layers):
            raise stop

    handles = []
    try:
        for name in layers:
            handles.append(hook_layer(module, name, record))
        yield outputs
    except _AllCaptured as signal:
        if signal is not stop:  # It belongs to an enclosing `capture` block.
            raise
    finally:
        # The traceback and the frames of the forward pass refer to each other. Without this line the tensors in these
        # frames would stay in memory until the garbage collector runs.
        stop.__traceback__ = None
        for handle in handles:
            handle.remove()
    missing = [name for name in layers if name not in outputs]
    if missing:
        raise ValueError(f"{', '.join(missing[:4])} did not run in the forward pass; name a layer that does")
    for name, version in versions.items():
        if name in outputs and version_of(outputs[name]) != version:
            raise changed_in_place(name)


def version_of(tensor: Tensor) -> int | None:
    """Returns how often the tensor was changed in place; None in inference mode, where this is not counted."""
    return None if tensor.is_inference() else tensor._version


def changed_in_place(name: str) -> ValueError:
    """Returns the error for a recorded tensor that is no longer what the layer returned."""
    return ValueError(
        f"the output of {name} was changed in place after the layer ran, so it is no longer the layer's; "
        "clone it, such as tokens=lambda output, name: output.clone()"
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switches to evaluation mode inside the block and restores the mode of every submodule afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


class _AllCaptured(Exception):
    """Ends a forward pass as soon as every layer is recorded."""


class Hook:
    """A hook that copies and pickles of its module do not get.

    Hooks are attributes of a module, so that `copy.deepcopy`, and with it an averaged copy, or `torch.save` would take
    along the hook and everything that it holds.

    Args:
        module: The hooked module.
        handle: Handle that PyTorch returned for the hook.
    """

    def __init__(self, module: nn.Module, handle: RemovableHandle) -> None:
        self._module, self._handle = module, handle
        # Copying and pickling ask the instance first, before its class.
        state = module.__dict__.setdefault("__getstate__", _StateWithoutHooks(module))
        state.hooks.add(handle.id)

    def remove(self) -> None:
        """Removes the hook."""
        self._handle.remove()
        state = self._module.__dict__["__getstate__"]
        state.hooks.discard(self._handle.id)
        if not state.hooks:
            del self._module.__dict__["__getstate__"]


class _StateWithoutHooks:
    """The `__getstate__` of a module while it has a `Hook`."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.hooks = module, set[int]()

    def __call__(self) -> Any:
        own: Any = type(self.module)
        state = own.__getstate__(self.module)
        if not isinstance(state, dict):
            return state
        without = {key: value for key, value in state.items() if key != "__getstate__"}
        for key in without:
            if key.startswith(("_forward_hooks", "_forward_pre_hooks")):
                without[key] = type(without[key])((k, v) for k, v in without[key].items() if k not in self.hooks)
        return without


def hook_layer(module: nn.Module, name: str, record: Callable[[str, Any], None]) -> Hook:
    """Adds a hook that calls `record(name, output)` after each run of the layer.

    For a name that ends in `:input`, `record(name, first input)` is called before each run.

    Raises:
        ValueError: If the layer is missing in the module.
    """
    part = _find(module, name)
    layer, take = module.get_submodule(part.layer), part.take

    def record_output(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        record(name, output if take is None else take(layer, args, kwargs, output))

    def record_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record(name, next(iter((*args, *kwargs.values())), None))

    if name.endswith(INPUT):
        return Hook(layer, layer.register_forward_pre_hook(record_input, with_kwargs=True))
    return Hook(layer, layer.register_forward_hook(record_output, with_kwargs=True))


def find_layer(module: nn.Module, name: str) -> nn.Module:
    """Returns the submodule with this name; an ending `:input` is ignored.

    Raises:
        ValueError: If the module does not contain it; the message lists what it contains and names a similar layer. If
            the name is of a part of a layer's output, such as the queries of a joint projection.
    """
    part = _find(module, name)
    if part.take is not None:
        raise ValueError(
            f"{name} is a part of what {part.layer} computes, not a layer of its own; it can be read, but not aligned "
            "or skipped: name the layer"
        )
    return module.get_submodule(part.layer)


def is_slice(module: nn.Module, name: str) -> bool:
    """Whether a name is of a part of a layer's output.

    Raises:
        ValueError: If the module does not contain it.
    """
    return _find(module, name).take is not None


def _find(module: nn.Module, name: str) -> Part:
    part = find_part(module, name.removesuffix(INPUT))
    if part is None:
        similar = _similar_name(module, name.removesuffix(INPUT))
        hint = f"; did you mean {similar}?" if similar else ""
        raise ValueError(f"{name} is not in {type(module).__name__}, which has {_sketch(module)}{hint}")
    return part


def match_layers(module: nn.Module, patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the names of the submodules that match any of the patterns, in the order of the module.

    `*` stands for one part of a name: "blocks.*" matches the blocks but no layers inside them, "blocks.*.attn:input"
    matches the input of each attention layer, "blocks.*.attn.q" its queries. Lists of modules never run themselves and
    do not match.

    Raises:
        ValueError: If no pattern is given, or a pattern matches nothing or is the name of a list.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not patterns:
        raise ValueError(f"no layer is named; name some of {type(module).__name__}, which has {_sketch(module)}")
    lists = {name for name, part in module.named_modules() if isinstance(part, (nn.ModuleList, nn.ModuleDict))}
    computed_by = {name: name for name, _ in module.named_modules() if name and name not in lists}
    own = list(computed_by)
    # A `*` at the end stands for submodules alone, so that no layer is matched under two names.
    if any("*" not in _last(pattern) for pattern in patterns):
        computed_by = part_names(module) | computed_by
    names = sorted(computed_by, key=lambda name: own.index(computed_by[name]))
    names = [name + suffix for name in names for suffix in (INPUT, "")]
    matched: set[str] = set()
    for pattern in patterns:
        if pattern in lists:
            raise ValueError(f"{pattern} is a list of modules, which never runs itself; name its parts, {pattern}.*")
        expression = re.compile(re.escape(pattern).replace(r"\*", r"[^.:]*"))
        found = {name for name in names if expression.fullmatch(name)}
        if "*" in _last(pattern):
            found = {name for name in found if name.removesuffix(INPUT) in own}
        if not found:
            find_part(module, pattern)  # which may know why
            hint = f"; did you mean {similar}?" if (similar := _similar_name(module, pattern)) else ""
            raise ValueError(f"{pattern} is not in {type(module).__name__}, which has {_sketch(module)}{hint}")
        matched |= found
    return tuple(name for name in names if name in matched)


def _last(pattern: str) -> str:
    return pattern.rpartition(".")[2]


def _similar_name(module: nn.Module, name: str) -> str | None:
    """Returns the name with which a wrapper begins or ends otherwise, or a similarly spelled one with its numbers."""
    names: list[str] = [other for other, _ in module.named_modules() if other]
    wrapped = [other for other in names if other.endswith(f".{name}") or name.endswith(f".{other}")]
    if wrapped:
        return sorted(wrapped, key=len)[0]
    if "*" in name:
        names += dict.fromkeys(re.sub(r"\b\d+\b", "*", other) for other in names)
    numbers = re.findall(r"\d+|\*", name)
    close = get_close_matches(name, [other for other in names if re.findall(r"\d+|\*", other) == numbers], n=1)
    return close[0] if close else None


def _sketch(module: nn.Module) -> str:
    """Lists the children of the module, with numbered grandchildren shortened to a range."""
    parts = []
    for name, child in module.named_children():
        numbered = [key for key, _ in child.named_children() if key.isdigit()]
        parts.append(f"{name}.{numbered[0]} to {name}.{numbered[-1]}" if len(numbered) > 1 else name)
    return ", ".join(parts) or "no submodules"
