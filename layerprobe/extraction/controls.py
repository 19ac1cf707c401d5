"""Negative controls of every curve: the same network with random weights, and the raw input."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerprobe.backbones import Backbone, wrap

# Wider raw inputs are averaged over neighboring pixels, so that the control stays cheap on large inputs.
RAW_INPUT_WIDTH = 1024


@contextmanager
def random_weights(backbone: Backbone, *, seed: int = 0) -> Iterator[Backbone]:
    """Yields the random-weights control: the same network with the entries of every trained tensor shuffled.

    Shuffling keeps the distribution of each tensor, so the control differs from the model only in what was learned. A
    fresh initialization would turn every adaLN-Zero block into the identity. The tensors are shuffled in place, so
    that the device need not hold the network twice; after the block they are what they were, bit for bit.

    Args:
        backbone: The trained model; it must not be used inside the block.
        seed: Seed of the permutations.
    """
    # If every parameter is frozen, the network was frozen only after training.
    parameters = [*backbone.module.parameters()]
    trained = [parameter for parameter in parameters if parameter.requires_grad] or parameters
    _shuffle(trained, seed)
    try:
        yield replace(backbone, name=f"{backbone.name}, random weights")
    finally:
        _shuffle(trained, seed, back=True)


@torch.no_grad()
def _shuffle(parameters: Sequence[nn.Parameter], seed: int, *, back: bool = False) -> None:
    """Shuffles the entries of each tensor by the permutations of a seed, or back."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
        values = parameter.flatten()
        values = torch.empty_like(values).scatter_(0, order, values) if back else values[order]
        parameter.copy_(values.view_as(parameter))


def raw_input(backbone: Backbone, *, places: bool = False) -> Backbone:
    """Returns the raw-input control: the noisy input as the only layer, under the schedule of the model.

    Args:
        backbone: The model.
        places: Whether to return one token per grid position with the channels as features, for token probes.
            Otherwise the whole input is flattened into one token.
    """
    reader = wrap(
        _RawInput(_Places() if places else _Flatten()),
        layers="input",
        schedule=backbone.schedule,
        prediction="velocity",
        shape=backbone.shape,
        forward=_call_raw_input,
        name="raw input",
    )
    return replace(reader, takes_mask=True)


def raw_pool_cells(shape: tuple[int, ...]) -> int:
    """Returns the largest number of cells per axis with at most `RAW_INPUT_WIDTH` values of (C, *grid); at least 1."""
    channels, *grid = shape
    widths = ((cells, channels * math.prod(min(cells, edge) for edge in grid)) for cells in range(max(grid), 1, -1))
    return next((cells for cells, width in widths if width <= RAW_INPUT_WIDTH), 1)


def _call_raw_input(
    module: nn.Module, x_t: Tensor, native_time: Tensor, condition: Tensor | None, *mask: Tensor
) -> Tensor:
    output: Tensor = module(x_t.masked_fill(~mask[0].unsqueeze(1), 0.0) if mask else x_t, native_time)
    return output


class _RawInput(nn.Module):
    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.input = reader

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.input(x_t)
        return x_t


class _Places(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class _Flatten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        while x[0].numel() > RAW_INPUT_WIDTH and max(x.shape[2:]) > 1:
            grid = [max(1, edge // 2) for edge in x.shape[2:]]
            pool: Any = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(grid)]
            x = pool(x, grid)
        return x.flatten(1)
