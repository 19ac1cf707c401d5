"""The interface to a class of diffusers: its layers, its arguments, its time, and the image's tokens in its outputs.

Shapes are (C, *grid): (C, H, W) for images, (C, F, H, W) for video, (C, L) for audio. "Image" stands for the noisy
sample, even if it is a video or audio; "text" for its condition of any kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerprobe.capture import as_tokens
from layerprobe.noise import Prediction

Config = Any
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Text:
    """The null condition of one sample.

    Attributes:
        tokens: Text tokens, shape (1, L, D).
        mask: Mask, shape (1, L), bool, True for tokens that are not padding.
        pooled: Pooled text, shape (1, P); P may be 0.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    @classmethod
    def zeros(cls, length: int, width: int, pooled: int) -> Text:
        """Returns zeros, for use without a text encoder."""
        return cls(torch.zeros(1, length, width), torch.ones(1, length, dtype=torch.bool), torch.zeros(1, pooled))


@dataclass(frozen=True)
class DiffusersClass:
    """The interface to one class, or to several classes that are called in the same way.

    Attributes:
        layers: Patterns of the blocks to probe, in the order in which they run.
        patch: Function that returns the edges of one token in input units along each grid axis; for U-Nets, the
            numbers that must divide the grid.
        size: Function that returns the shape of one sample, or None if the configuration does not contain it.
        text: Function that returns the number of tokens, the width and the pooled width of the condition.
        arguments: Function that returns the arguments of `forward` besides sample and time. Tensors have one row,
            which is repeated for the batch; functions are called with x_t, shape (B, C, *grid); dictionaries may be
            nested.
        second: Lists of blocks whose outputs hold the image second, in a pair or along the sequence.
        first: Lists of blocks whose outputs hold the image first and then the text along the sequence.
        text_mask: Argument with the mask (B, L) of the text, for classes that put each sample's image directly behind
            its own text, so that it begins at another place in each sample.
        frames: Lists of blocks that treat every frame as a sample of its own: (B F, T, D).
        columns: Lists of blocks that treat every position as a sample of its own: (B T, F, D).
        channels_first: Whether the layers return (B, D, L) instead of (B, T, D).
        interleaved: Whether the lists of `layers` alternate.
        packed: Whether patches are cut outside of the network, which takes and returns (B, T, C * patch).
        frames_before_channels: Whether the network takes and returns (B, F, C, H, W).
        times: Native times of data and of noise on the linear path; (0, 1000) also for integer times; None if unknown.
        float_time: Whether integer times are passed as floating-point numbers.
        zeros_as_text: Whether the null condition is always zeros, since the pipeline does not encode a single prompt.
        trained: Schedule and prediction of the published training; None if there are several.
    """

    layers: tuple[str, ...]
    patch: Callable[[Config], Shape]
    size: Callable[[Config], Shape | None] = lambda c: None
    text: Callable[[Config], tuple[int, int, int]] | None = None
    arguments: Callable[[Config, Shape, Text], Mapping[str, Any]] = lambda c, shape, text: {}
    second: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    text_mask: str = ""
    frames: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    channels_first: bool = False
    interleaved: bool = False
    packed: bool = False
    frames_before_channels: bool = False
    times: tuple[float, float] | None = (0, 1000)
    float_time: bool = False
    zeros_as_text: bool = False
    trained: tuple[str, Prediction] | None = None

    def channels(self, config: Config) -> int:
        """Returns the number of channels of one sample, before patches are cut."""
        return int(config.in_channels) // (math.prod(self.patch(config)) if self.packed else 1)

    @property
    def keeps_grid(self) -> bool:
        """Whether every block has the same tokens of the image; U-Nets change their grid."""
        return "down_blocks.*" not in self.layers

    def tokens(
        self, output: Any, name: str, *, shape: Shape, num_tokens: int, text_lengths: Tensor | None = None
    ) -> Tensor:
        """Extracts the image's tokens (B, T, D) from a layer's output.

        Args:
            output: Output of the layer.
            name: Name of the layer in the module. The output of a layer inside a block, if it is a pair, holds the
                image first, as in the attention of diffusers.
            shape: Shape of one sample.
            num_tokens: Number of tokens of one sample; longer sequences include text.
            text_lengths: Number of text tokens before each image, shape (B,), for a class with a `text_mask`. None if
                all are as long as the longest.
        """
        block, _, _ = name.rpartition(".")
        if isinstance(output, (tuple, list)) and output:
            output = output[1 if len(output) > 1 and block in self.second else 0]
        if self.channels_first and isinstance(output, Tensor):
            output = output.transpose(1, 2)
        tokens = as_tokens(output, name)
        blocks = name.split(".")[0]
        if blocks in self.frames:
            return tokens.reshape(-1, shape[1] * tokens.shape[1], tokens.shape[2])
        if blocks in self.columns:
            count, width = tokens.shape[1:]
            return tokens.reshape(-1, num_tokens // count, count, width).transpose(1, 2).flatten(1, 2)
        if text_lengths is not None and blocks in self.second:
            places = text_lengths.to(tokens.device)[:, None] + torch.arange(num_tokens, device=tokens.device)
            return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))
        if tokens.shape[1] > num_tokens and blocks in self.second:
            return tokens[:, -num_tokens:]
        if tokens.shape[1] > num_tokens and blocks in self.first:
            return tokens[:, :num_tokens]
        return tokens


def to_patches(x: Tensor, patch: Shape) -> Tensor:
    """Cuts (B, C, *grid) into row-major patches (B, T, C * patch), each with the channel as its slowest axis."""
    grid = [edge // p for edge, p in zip(x.shape[2:], patch, strict=True)]
    split = x.reshape(*x.shape[:2], *[n for pair in zip(grid, patch, strict=True) for n in pair])
    axes = range(len(patch))
    order = (0, *[2 + 2 * a for a in axes], 1, *[3 + 2 * a for a in axes])
    return split.permute(order).reshape(len(x), math.prod(grid), -1)


def from_patches(tokens: Tensor, patch: Shape, edges: Shape) -> Tensor:
    """Inverts `to_patches` for a grid with these edges."""
    grid = [edge // p for edge, p in zip(edges, patch, strict=True)]
    d = len(patch)
    split = tokens.reshape(len(tokens), *grid, -1, *patch)
    order = (0, d + 1, *[axis for a in range(d) for axis in (1 + a, d + 2 + a)])
    return split.permute(order).reshape(len(tokens), -1, *edges)
