"""The number of attention heads, which the shapes of the weights do not tell unless something is as wide as a head."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

from torch import nn

from layerprobe.backbones.base import Backbone


def possible_heads(width: int) -> tuple[int, ...]:
    """Returns the numbers of attention heads that occur with this width: heads 4 to 256 wide, a multiple of 4."""
    return tuple(width // size for size in range(256, 3, -4) if width % size == 0)


def with_heads(backbone: Backbone, num_heads: int) -> Backbone:
    """Returns a network of the same weights, which both share, with another number of heads in every attention.

    It is for comparisons: the configuration of the module, if it has one, keeps the old number.
    """
    memo: dict[int, Any] = {
        id(tensor): tensor for tensor in (*backbone.module.parameters(), *backbone.module.buffers())
    }
    module = deepcopy(backbone.module, memo)
    for part in module.modules():
        if isinstance(part, nn.MultiheadAttention):
            part.head_dim = part.embed_dim // num_heads
        if hasattr(part, "num_heads"):
            vars(part)["num_heads"] = num_heads
    return replace(backbone, module=module, num_heads=num_heads)
