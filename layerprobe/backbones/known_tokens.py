"""The tokens of the sample in the layers of networks that are known by their class, also inside a wrapper."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from layerprobe.backbones.diffusers.class_table import CLASSES
from layerprobe.backbones.diffusers.diffusers_class import SAMPLES
from layerprobe.backbones.mdm import MDM, frame_tokens
from layerprobe.capture import INPUT, as_tokens, find_layer, match_layers


@dataclass(frozen=True, eq=False)
class KnownLayer:
    """A layer of a network whose outputs are known.

    Attributes:
        network: The network of the known class; the module itself, or a part of it.
        class_name: Name of the class, as in the table of diffusers classes or "MDM".
        name: Name of the layer in the network.
    """

    network: nn.Module
    class_name: str
    name: str

    def tokens(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Extracts the tokens of the sample (B, T, D) from the layer's output.

        Args:
            output: Output of the layer.
            args: Positional arguments of the network's forward pass.
            kwargs: Keyword arguments of the network's forward pass.

        Raises:
            ValueError: If the layer does not return one token for each patch of the sample, or the arguments are not
                those of the class.
        """
        if self.class_name == MDM.__name__:
            return frame_tokens(output, self.name)
        family, arguments = CLASSES[self.class_name], self._arguments(args, kwargs)
        sample = arguments[next(name for name in SAMPLES if name in arguments)]
        if family.packed:  # cut into tokens already
            shape, grid = tuple(sample.shape[1:]), tuple(sample.shape[1:2])
        else:
            shape = family.layout.shape(sample)
            grid = tuple(e // p for e, p in zip(shape[1:], family.patch(self.network.config), strict=True))
        num_tokens, text = math.prod(grid), arguments.get("encoder_hidden_states")
        if self._is_text(output, text):
            tokens = as_tokens(output, self.name)
        else:
            lengths = arguments[family.text_mask].sum(1).long() if family.text_mask else None
            tokens = family.tokens(output, self.name, shape=shape, grid=grid, text_lengths=lengths)
        if family.keeps_grid and tokens.shape[1] != num_tokens:
            raise ValueError(
                f"{self.name} of {self.class_name} returns {tokens.shape[1]} tokens, but the sample has {num_tokens}; "
                "name one of its blocks, or pass the tokens of the sample as tokens=lambda output, name: ..."
            )
        return tokens

    def _is_text(self, output: Any, text: Any) -> bool:
        """Whether a layer inside a block returns the text alone, which looks like a longer sequence with the sample."""
        inner = self.name.count(".") > 1
        if not (inner and isinstance(output, Tensor) and isinstance(text, Tensor)):
            return False
        return output.ndim == text.ndim == 3 and output.shape[1] == text.shape[1]

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        forward = _known_class(self.network).forward  # type: ignore[union-attr]
        try:
            return inspect.signature(forward).bind(self.network, *args, **kwargs).arguments
        except TypeError as error:
            raise ValueError(
                f"the network was not called with the arguments of {self.class_name} ({error}); call it, or a wrapper "
                "that takes its arguments"
            ) from error


def known_layer(module: nn.Module, name: str) -> KnownLayer | None:
    """Returns a layer as part of the network of a known class that contains it; None if there is no such network.

    Args:
        module: A network, or a wrapper around one.
        name: Name of the layer in the module, also `NAME:input`.

    Raises:
        ValueError: If the layer is missing in the module.
    """
    layer, suffix = find_layer(module, name), INPUT if name.endswith(INPUT) else ""
    # Wrappers may pass on names of what they wrap, so the names do not tell which network contains the layer.
    for network in module.modules():
        if (known := _known_class(network)) is not None:
            inner = next((inner for inner, part in network.named_modules() if part is layer and inner), None)
            if inner is not None:
                return KnownLayer(network, known.__name__, inner + suffix)
    return None


def known_blocks(module: nn.Module) -> tuple[str, ...]:
    """Returns the names in the module of all blocks of the network of a known class that it is or contains.

    They are in the order of the class's table; () without such a network, or if it is of a class that is in no table.

    Args:
        module: A network, or a wrapper around one.
    """
    for prefix, network in module.named_modules():
        known = _known_class(network)
        if known is not None and known.__name__ in CLASSES:
            names = (name for pattern in CLASSES[known.__name__].layers for name in match_layers(network, pattern))
            return tuple(f"{prefix}.{name}".removeprefix(".") for name in names)
    return ()


def _known_class(network: nn.Module) -> type | None:
    """Returns the known class of a network; `fully_shard` makes a class of its own out of it."""
    for kind in type(network).__mro__:
        in_table = kind.__name__ in CLASSES and kind.__module__.startswith("diffusers.")
        if in_table or kind is MDM:
            return kind
    return None
