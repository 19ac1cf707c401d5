"""Reading what layers compute, without touching the network.

A layer is named as in the module, `blocks.3.attn`, and stands for what it gives out; `blocks.3.attn:input` is what goes
into it, which for a pre-normalized block is the normed and modulated stream.
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
    """A layer's output as tokens, shape (B, T, D): maps (B, C, *grid) are flattened, vectors (B, D) are one token.

    A tuple or list stands for its first element. Three axes always mean (B, T, D): turn the outputs (B, C, L) of a 1-D
    convolution round yourself.

    Raises:
        ValueError: If there is no tensor of two axes or more.
    """
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim < 2:
        seen = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"{name} gives {seen}, which is neither tokens (B, T, D) nor a map (B, C, *grid); name another layer"
        )
    if output.ndim == 2:
        return output.unsqueeze(1)
    return output if output.ndim == 3 else output.flatten(2).transpose(1, 2)


def real_tokens(mask: Tensor, grid: Sequence[int]) -> Tensor:
    """Which tokens hold something real, shape (B, T), bool.

    Args:
        mask: Shape (B, *input grid), bool, as in `Batch`.
        grid: Of the tokens, as many axes; a token is real where any place of its patch is. One token in all is real.
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
    """Records the outputs of layers during one forward pass; every hook is gone afterwards, whatever happened.

        with capture(model, ["blocks.0", "blocks.5"]) as outputs:
            model(x_t, t, y)
        outputs["blocks.5"]  # tokens, shape (B, T, D)

    The tensors are the network's own: where a later layer works in place, clone them in `transform`.

    Args:
        module: The network.
        layers: Names of its submodules, or of their inputs.
        tokens: What of a layer's output (or input) are tokens (B, T, D); gets the raw output and the layer's name.
        transform: Applied to each layer's tokens (B, T, D) at once, so that what is not kept is freed.
        stop_early: Leave the forward pass, and the block, as soon as every layer has run; that a layer would have run
            a second time is not noticed then.

    Raises:
        ValueError: If a layer is not in the module, gives no tensor, did not run, or ran more than once.
    """
    layers = tuple(dict.fromkeys(layers))
    outputs: dict[str, Tensor] = {}
    stop = _AllCaptured()

    def record(name: str, output: Any) -> None:
        if name in outputs:
            raise ValueError(f"{name} ran twice in one forward pass; name a layer that runs once")
        found = tokens(output, name)
        outputs[name] = found if transform is None else transform(found)
        if stop_early and len(outputs) == len(layers):
            raise stop

    handles = []
    try:
        for name in layers:
            handles.append(hook_layer(module, name, record))
        yield outputs
    except _AllCaptured as signal:
        if signal is not stop:  # It belongs to a block around this one.
            raise
    finally:
        # The traceback leads to the frames of the forward pass, and they lead back to it: until the garbage collector
        # comes, which may be hours, the tensors in them would stay.
        stop.__traceback__ = None
        for handle in handles:
            handle.remove()
    missing = [name for name in layers if name not in outputs]
    if missing:
        raise ValueError(f"{missing[0]} did not run in the forward pass; name a layer that does")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every submodule is in the mode it had."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


class _AllCaptured(Exception):
    """Ends a forward pass from which nothing more is wanted."""


def hook_layer(module: nn.Module, name: str, record: Callable[[str, Any], None]) -> RemovableHandle:
    """Has `record(name, output)` called whenever the layer has run, or with its first input before it runs.

    Raises:
        ValueError: If there is no such layer.
    """
    layer = find_layer(module, name)
    if not name.endswith(INPUT):
        return layer.register_forward_hook(lambda _, __, output: record(name, output))

    def record_input(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        record(name, next(iter((*arguments, *named.values())), None))

    return layer.register_forward_pre_hook(record_input, with_kwargs=True)


def find_layer(module: nn.Module, name: str) -> nn.Module:
    """The submodule of this name, with or without `:input`.

    Raises:
        ValueError: If there is none; the message names what there is.
    """
    try:
        return module.get_submodule(name.removesuffix(INPUT))
    except AttributeError:
        raise ValueError(f"{name} is not in {type(module).__name__}, which has {_sketch(module)}") from None


def match_layers(module: nn.Module, patterns: str | Sequence[str]) -> tuple[str, ...]:
    """The names of the submodules that match the pattern or any of the patterns, in the module's order.

    `*` stands for one part of a name: "blocks.*" gives the blocks and not what is inside them, "blocks.*.attn:input"
    what goes into each attention.

    Raises:
        ValueError: If there is no pattern, or one matches nothing.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not patterns:
        raise ValueError(f"no layer is named; name some of {type(module).__name__}, which has {_sketch(module)}")
    names = [name + end for name, _ in module.named_modules() if name for end in (INPUT, "")]
    expressions = [re.compile(re.escape(p).replace(r"\*", r"[^.:]*")) for p in patterns]
    for pattern, expression in zip(patterns, expressions, strict=True):
        if not any(expression.fullmatch(name) for name in names):
            raise ValueError(f"{pattern} is not in {type(module).__name__}, which has {_sketch(module)}")
    return tuple(name for name in names if any(e.fullmatch(name) for e in expressions))


def _sketch(module: nn.Module) -> str:
    """The top of the module's tree, with runs of numbered children in one word."""
    parts = []
    for name, child in module.named_children():
        numbered = [key for key, _ in child.named_children() if key.isdigit()]
        parts.append(f"{name}.{numbered[0]} to {name}.{numbered[-1]}" if len(numbered) > 1 else name)
    return ", ".join(parts) or "no submodules"
