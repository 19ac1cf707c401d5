"""Which tokens of a layer's output are aligned: those of the sample, one row for each sample of the batch.

Networks of a known class are read by `known_layer`. Of all others, only what can be read in one way is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from layerprobe.backbones import known_layer
from layerprobe.capture import as_tokens, find_layer
from layerprobe.layersync.recorder import Call, Pass


class TokenReader:
    """Reads the tokens of the layers of one network.

    Args:
        module: The network.
        layers: Names of the layers.
        tokens: The caller's function from a layer's output and name to its tokens, which `PassRecorder` applies.
    """

    def __init__(
        self, module: nn.Module, layers: Iterable[str], tokens: Callable[[Any, str], Tensor] | None = None
    ) -> None:
        self._module, self._told = module, tokens is not None
        self._known = {} if self._told else {name: known_layer(module, name) for name in layers}

    @property
    def networks(self) -> list[nn.Module]:
        """The networks of known classes that contain the layers."""
        return list({id(known.network): known.network for known in self._known.values() if known}.values())

    def read(self, recorded: Pass) -> dict[str, Tensor]:
        """Returns the tokens (B, T, D) of each layer, in the order in which the layers ran.

        Raises:
            ValueError: If an output can be read in several ways or in none.
        """
        tokens = {name: self._tokens(name, output, recorded) for name, output in recorded.outputs.items()}
        return {name: value.detach() if name in recorded.detached else value for name, value in tokens.items()}

    def _tokens(self, name: str, output: Any, recorded: Pass) -> Tensor:
        if self._told:
            return _checked_shape(output, name)
        call = recorded.calls.get(id(self._module), ((), {}))
        known = self._known[name]
        if known is not None:
            return known.tokens(output, *recorded.calls.get(id(known.network), call))
        return _tokens_of_unknown(name, output, find_layer(self._module, name), call)


def _checked_shape(tokens: Any, name: str) -> Tensor:
    if isinstance(tokens, Tensor) and tokens.ndim == 3:
        return tokens
    seen = f"shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
    raise ValueError(f"the function tokens returns {seen} for {name}; return a tensor (B, T, D)")


def _tokens_of_unknown(name: str, output: Any, layer: nn.Module, call: Call) -> Tensor:
    inputs = [*_tensors(call)]
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    tokens = as_tokens(output, name)
    shape = tuple(first.shape)
    if len(shape) > 3 and not _is_map(shape, inputs, layer):
        raise ValueError(
            f"{name} returns shape {shape}, which is not known to be a map (B, C, *grid) of the input; pass the tokens "
            "(B, T, D), such as tokens=lambda output, name: output.flatten(1, -2) if the channels come last"
        )
    if len(shape) == 3 and _convolves(layer, shape[1]):
        raise ValueError(
            f"{name} returns shape {shape}, which may be (B, C, L) of its convolutions; pass the tokens (B, T, D), "
            "such as tokens=lambda output, name: output.transpose(1, 2)"
        )
    batch_sizes = {len(value) for value in inputs if value.ndim}
    if batch_sizes and len(tokens) not in batch_sizes:
        size = next(len(value) for value in inputs if value.ndim)
        raise ValueError(
            f"{name} returns {len(tokens)} rows of tokens for a batch of {size}; pass the tokens (B, T, D), such as "
            "tokens=lambda output, name: output.transpose(0, 1) if the sequence comes first"
        )
    lengths = [value.shape[1] for value in inputs if value.ndim == 3 and len(value) == len(tokens)]
    for a, b in itertools.combinations(lengths, 2):
        if a + b == tokens.shape[1]:
            raise ValueError(
                f"{name} returns {a + b} tokens, those of two inputs of {a} and {b} in one sequence; pass the tokens "
                f"of the sample, such as tokens=lambda output, name: output[:, -{a}:]"
            )
    return tokens


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _is_map(shape: tuple[int, ...], inputs: list[Tensor], layer: nn.Module) -> bool:
    """Whether an output is a map (B, C, *grid), and not tokens in groups or a map with its channels last.

    The grid of a map has the proportions of the input's grid. If the axes (B, *grid, C) would have them too, or the
    input has no grid, a convolution in the layer decides, since convolutions of PyTorch take the channels first.
    """
    grids = [tuple(value.shape[2:]) for value in inputs if value.ndim == len(shape)]
    as_map = any(_in_proportion(shape[2:], grid) for grid in grids)
    channels_last = any(_in_proportion(shape[1:-1], grid) for grid in grids)
    if grids and as_map != channels_last:
        return as_map
    return (as_map or not grids) and any(isinstance(part, _ConvNd) for part in layer.modules())


def _convolves(layer: nn.Module, channels: int) -> bool:
    """Whether a 1-D convolution in the layer takes or returns so many channels."""
    convolutions = [part for part in layer.modules() if isinstance(part, nn.Conv1d)]
    return any(channels in (part.in_channels, part.out_channels) for part in convolutions)


def _in_proportion(edges: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    """Whether one stride leads from the grid to these edges, up to one position that a convolution may lose or add.

    Frames, the first of three axes, may have a stride of their own.
    """
    pairs = [*zip(edges, grid, strict=True)][-2:]
    low = max(edge / (place + 1) for place, edge in pairs)
    high = min(edge / (place - 1) if place > 1 else float("inf") for place, edge in pairs)
    return low <= high
