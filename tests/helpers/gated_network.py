"""A network whose layers know what their matrices let through, and samples whose class is in known channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layerprobe.backbones import Backbone, wrap
from layerprobe.data import Splits, Subset, TensorSamples

CLASS, REST = (0, 1, 2), (3, 4, 5, 6, 7)


class Linear(nn.Module):
    """One token of eight channels, those that are let through."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(8))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.matrix)[:, None]


class Gated(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Linear() for _ in range(depth))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t + sum(0 * block(x_t).sum() for block in self.blocks)


def gated(*channels: Sequence[int]) -> Backbone:
    """A network of one block for each list of channels; channels that are listed first are the strongest."""
    module = Gated(len(channels))
    backbone = wrap(module, layers="blocks.*", schedule="flow", prediction="velocity", shape=(1, 2, 4))
    let_through(backbone, *channels)
    return backbone


def let_through(backbone: Backbone, *channels: Sequence[int]) -> None:
    """Lets each block see these channels alone."""
    for name, kept in zip(backbone.layers, channels, strict=True):
        matrix = torch.zeros(8, 8)
        matrix[kept, kept] = 1.0
        backbone.module.get_submodule(name).matrix.data = matrix


def classes(n: int = 120, *, labeled: bool = True) -> Splits:
    """Three classes, each a channel of its own; the other channels are chance."""
    labels = torch.arange(n) % 3
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(0)) / 2
    x[:, :3] = 0.1 * x[:, :3] + torch.eye(3)[labels]
    samples = TensorSamples(x.view(n, 1, 2, 4), labels if labeled else None)
    half = n // 2
    parts = {"train": range(half), "validation": range(half, n - 6), "test": range(n - 6, n)}
    return Splits(*(Subset(samples, rows, name=name) for name, rows in parts.items()))
