"""The interface to a class of diffusers: its layers, its arguments, its time, and the image's tokens in its outputs.

Shapes are (C, *grid): (C, H, W) for images, (C, F, H, W) for video, (C, L) for audio. "Image" stands for the noisy
sample, even if it is a video or audio; "text" for its condition of any kind.
"""

from __future__ import annotations

import math
import re
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
class Layout:
    """How a network takes samples and returns its output.

    Attributes:
        enter: Function from samples (B, C, *grid) to the network's input.
        leave: Function from the network's output to (B, C, *grid).
        shape: Function from the network's input to the shape (C, *grid) of one sample.
    """

    enter: Callable[[Tensor], Any]
    leave: Callable[[Any], Tensor]
    shape: Callable[[Any], Shape]


CHANNELS_FIRST = Layout(lambda x: x, lambda x: x, lambda x: tuple(x.shape[1:]))
FRAMES_FIRST = Layout(  # (B, F, C, H, W)
    lambda x: x.transpose(1, 2), lambda x: x.transpose(1, 2), lambda x: tuple(x.transpose(1, 2).shape[1:])
)
CHANNELS_LAST = Layout(  # (B, F, H, W, C)
    lambda x: x.movedim(1, -1), lambda x: x.movedim(-1, 1), lambda x: tuple(x.movedim(-1, 1).shape[1:])
)
LISTED_FRAMES = Layout(  # a list of (C, 1, H, W)
    lambda x: [*x.unsqueeze(2)], lambda x: torch.stack(x).squeeze(2), lambda x: (x[0].shape[0], *x[0].shape[2:])
)
# Names of the noisy sample and of the time among the arguments of `forward`.
SAMPLES, TIMES = ("sample", "hidden_states", "x"), ("timestep", "timesteps", "t")
# Parts of the names of layers inside a block that see the text alone.
_OF_TEXT = ("add_", "context", "txt_", "text_", "encoder", "_t.")


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
        text_first_inside: Whether layers inside the blocks of `first` have the text before the image all the same.
        text_mask: Argument with the mask (B, L) of the text, for classes that put each sample's image directly behind
            its own text, so that it begins at another place in each sample.
        frames: Lists of blocks that treat every frame as a sample of its own: (B F, T, D).
        columns: Lists of blocks that treat every position as a sample of its own: (B T, F, D).
        channels_first: Whether the layers return (B, D, L) instead of (B, T, D).
        interleaved: Whether the lists of `layers` alternate.
        packed: Whether patches are cut outside of the network, which takes and returns (B, T, C * patch).
        layout: How the network takes and returns samples, unless they are packed.
        noisy: Function that returns the number of channels of the noisy sample; None for all of `in_channels`.
        blank: Function that returns the number of channels behind those of the noisy sample that hold a conditioning
            image; they are 0, as the pipeline sets them without one.
        times: Native times of data and of noise on the linear path; (0, 1000) also for integer times; None if unknown.
        negated: Whether the pipeline negates the network's output.
        more_times: Function that returns the names of further arguments that get the time.
        float_time: Whether integer times are passed as floating-point numbers.
        zeros_as_text: Whether the null condition is always zeros, since the pipeline does not encode a single prompt.
        trained: Schedule and prediction of the published training; None if there are several.
        assumes: Function that returns what the call assumes about the condition, one sentence; "" for nothing.
    """

    layers: tuple[str, ...]
    patch: Callable[[Config], Shape]
    size: Callable[[Config], Shape | None] = lambda c: None
    text: Callable[[Config], tuple[int, int, int]] | None = None
    arguments: Callable[[Config, Shape, Text], Mapping[str, Any]] = lambda c, shape, text: {}
    second: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    text_first_inside: bool = False
    text_mask: str = ""
    frames: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    channels_first: bool = False
    interleaved: bool = False
    packed: bool = False
    layout: Layout = CHANNELS_FIRST
    noisy: Callable[[Config], int] | None = None
    blank: Callable[[Config], int] = lambda c: 0
    times: tuple[float, float] | None = (0, 1000)
    negated: bool = False
    more_times: Callable[[Config], tuple[str, ...]] = lambda c: ()
    float_time: bool = False
    zeros_as_text: bool = False
    trained: tuple[str, Prediction] | None = None
    assumes: Callable[[Config], str] = lambda c: ""

    def channels(self, config: Config) -> int:
        """Returns the number of channels of one sample, before patches are cut."""
        channels = config.in_channels if self.noisy is None else self.noisy(config)
        return int(channels) // (math.prod(self.patch(config)) if self.packed else 1)

    @property
    def keeps_grid(self) -> bool:
        """Whether every block has the same tokens of the image; U-Nets change their grid."""
        return "down_blocks.*" not in self.layers

    def tokens(
        self,
        output: Any,
        name: str,
        *,
        shape: Shape,
        grid: Shape,
        num_text: int | None = None,
        text_lengths: Tensor | None = None,
    ) -> Tensor:
        """Extracts the image's tokens (B, T, D) from a layer's output.

        Args:
            output: Output of the layer.
            name: Name of the layer in the module. The output of a layer inside a block, if it is a pair, holds the
                image first, as in the attention of diffusers.
            shape: Shape of one sample.
            grid: Grid of the tokens of one sample; longer sequences include text.
            num_text: Number of text tokens of one sample, to tell the text's layers from the image's; None if unknown.
            text_lengths: Number of text tokens before each image, shape (B,), for a class with a `text_mask`. None if
                all are as long as the longest.

        Raises:
            ValueError: If the output holds no tokens of the image, or heads that are not joined.
        """
        blocks, _, inside = name.partition(".")
        inside = inside.partition(".")[2]
        num_tokens = math.prod(grid)
        if isinstance(output, (tuple, list)) and output:
            second = len(output) > 1 and blocks in self.second and not inside
            output = output[1 if second else 0]
        if self.channels_first and isinstance(output, Tensor):
            output = output.transpose(1, 2)
        if inside and isinstance(output, Tensor):
            self._check_inside(output, name, inside, grid, num_text)
        tokens = as_tokens(output, name)
        if blocks in self.frames:
            tokens = tokens.reshape(-1, shape[1] * tokens.shape[1], tokens.shape[2])
        elif blocks in self.columns:
            count, width = tokens.shape[1:]
            tokens = tokens.reshape(-1, num_tokens // count, count, width).transpose(1, 2).flatten(1, 2)
        elif text_lengths is not None and blocks in self.second:
            places = text_lengths.to(tokens.device)[:, None] + torch.arange(num_tokens, device=tokens.device)
            tokens = tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))
        elif tokens.shape[1] > num_tokens and (blocks in self.second or (inside and self.text_first_inside)):
            tokens = tokens[:, -num_tokens:]
        elif tokens.shape[1] > num_tokens and blocks in self.first:
            tokens = tokens[:, :num_tokens]
        if inside and tokens.shape[1] not in self._possible_counts(shape, num_tokens):
            raise ValueError(
                f"{name} returns {tokens.shape[1]} tokens, which are not those of the sample; name another layer"
            )
        return tokens

    def _check_inside(self, output: Tensor, name: str, inside: str, grid: Shape, num_text: int | None) -> None:
        """Refuses outputs of layers inside a block that are not those of the image, or not (B, T, D)."""
        of_text = any(part in f"{inside}." for part in _OF_TEXT)
        if self.keeps_grid:
            of_text |= num_text == output.shape[1] != math.prod(grid)
        else:
            of_text |= re.search(r"attn2\.(to_)?[kv]$", inside) is not None
        if of_text:
            raise ValueError(f"{name} is a layer of the text, not of the sample; name another layer")
        if name.split(".")[0] in self.frames and re.search("temp|motion", inside):
            raise ValueError(f"{name} has the frames of each place as a sample of its own; name another layer")
        if self.keeps_grid and output.ndim > 3 and tuple(output.shape[2:]) != grid:
            raise ValueError(
                f"{name} returns shape {tuple(output.shape)}, whose heads are not joined; name the projection before "
                "it, such as attn.q"
            )

    def _possible_counts(self, shape: Shape, num_tokens: int) -> set[int]:
        """The numbers of tokens of a layer inside a block: one, for a vector of each sample, or those of a grid."""
        if self.keeps_grid:
            return {1, num_tokens}
        frames, edges = (shape[1], shape[2:]) if self.frames else (1, shape[1:])
        return {1} | {frames * math.prod(-(-edge // 2**i) for edge in edges) for i in range(8)}


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
