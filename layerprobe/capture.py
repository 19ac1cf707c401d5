"""Capturing the outputs and inputs of layers with forward hooks, without changing the network.

A layer is named as in the module. `blocks.3.attn` stands for the output of the layer, `blocks.3.attn:input` for its
input. Inside a pre-normalized block, the input of the attention is the normalized and modulated residual stream.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

INPUT = ":input"


def as_tokens(output: Any, name: str) -> Tensor:
    """Converts a layer's output to tokens, shape (B, T, D).

    Feature maps (B, C, *grid) are flattened, vectors (B, D) become one token, and of a tuple or list the first element
    is used. Three axes are always read as (B, T, D); outputs (B, C, L) of a 1-D convolution must be transposed first.

    Args:
        output: Output of the layer.
        name: Name of the layer, for the error message.

    Raises:
        ValueError: If the output is not a tensor with at least two axes.
    """
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim < 2:
        kind = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
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

    The recorded tensors are not copies: if a later layer works in place, clone them in `transform`.

    Args:
        module: The network.
        layers: Names of submodules, or of their inputs.
        tokens: Function that converts the raw output (or input) of a layer, and the layer's name, to tokens (B, T, D).
        transform: Function applied to the tokens (B, T, D) of a layer as soon as it has run, to keep memory small.
        stop_early: Whether to end the forward pass and the block as soon as every layer has run. A second run of a
            layer in the same pass is then not detected.

    Raises:
        ValueError: If a layer is missing in the module, returns no tensor, did not run, or ran more than once.
    """
    layers = tuple(dict.fromkeys(layers))
    outputs: dict[str, Tensor] = {}
    stop = _AllCaptured()

    def record(name: str, output: Any) -> None:
        if name in outputs:
            raise ValueError(f"{name} ran twice in one forward pass; name a layer that runs once")
        layer_tokens = tokens(output, name)
        outputs[name] = layer_tokens if transform is None else transform(layer_tokens)
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


def hook_layer(module: nn.Module, name: str, record: Callable[[str, Any], None]) -> RemovableHandle:
    """Adds a hook that calls `record(name, output)` after each run of the layer.

    For a name that ends in `:input`, `record(name, first input)` is called before each run.

    Raises:
        ValueError: If the layer is missing in the module.
    """
    layer = find_layer(module, name)
    if not name.endswith(INPUT):
        return layer.register_forward_hook(lambda _, __, output: record(name, output))

    def record_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record(name, next(iter((*args, *kwargs.values())), None))

    return layer.register_forward_pre_hook(record_input, with_kwargs=True)


def find_layer(module: nn.Module, name: str) -> nn.Module:
    """Returns the submodule with this name; an ending `:input` is ignored.

    Raises:
        ValueError: If the module does not contain it; the message lists what it contains.
    """
    try:
        return module.get_submodule(name.removesuffix(INPUT))
    except AttributeError:
        raise ValueError(f"{name} is not in {type(module).__name__}, which has {_sketch(module)}") from None


def match_layers(module: nn.Module, patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the names of the submodules that match any of the patterns, in the order of the module.

    `*` stands for one part of a name: "blocks.*" matches the blocks but no layers inside them, "blocks.*.attn:input"
    matches the input of each attention layer. Lists of modules never run
    themselves and do not match.

    Raises:
        ValueError: If no pattern is given, or a pattern matches nothing or is the name of a list.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not patterns:
        raise ValueError(f"no layer is named; name some of {type(module).__name__}, which has {_sketch(module)}")
    lists = {name for name, part in module.named_modules() if isinstance(part, (nn.ModuleList, nn.ModuleDict))}
    names = [name + suffix for name, _ in module.named_modules() if name for suffix in (INPUT, "")]
    names = [name for name in names if name.removesuffix(INPUT) not in lists]
    expressions = [re.compile(re.escape(p).replace(r"\*", r"[^.:]*")) for p in patterns]
    for pattern, expression in zip(patterns, expressions, strict=True):
        if pattern in lists:
            raise ValueError(f"{pattern} is a list of modules, which never runs itself; name its parts, {pattern}.*")
        if not any(expression.fullmatch(name) for name in names):
            raise ValueError(f"{pattern} is not in {type(module).__name__}, which has {_sketch(module)}")
    return tuple(name for name in names if any(e.fullmatch(name) for e in expressions))


def _sketch(module: nn.Module) -> str:
    """Lists the children of the module, with numbered grandchildren shortened to a range."""
    parts = []
    for name, child in module.named_children():
        numbered = [key for key, _ in child.named_children() if key.isdigit()]
        parts.append(f"{name}.{numbered[0]} to {name}.{numbered[-1]}" if len(numbered) > 1 else name)
    return ", ".join(parts) or "no submodules"
