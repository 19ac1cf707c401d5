"""Rendering: conversion of generated samples to recordings, joint positions and video clips.

A model sees normalized values on a grid of fixed size. A rendering undoes the normalization and the padding. It is
saved with the model, so samples can be rendered without the data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerprobe.data.samples import Samples, Subset
from layerprobe.data.sequences.audio import AudioDecoder
from layerprobe.data.sequences.bvh import Floats
from layerprobe.data.sequences.items import Decoder, MediaSamples, Normalization, file_bytes
from layerprobe.data.sequences.motion import MotionDecoder
from layerprobe.data.sequences.skeleton import MAX_CLIPS, Skeleton, find_skeleton
from layerprobe.data.sequences.video import VideoDecoder
from layerprobe.files import import_optional
from layerprobe.noise import RandomStream

QUANTILES = 11  # number of quantiles of the lengths, from the shortest to the longest


@dataclass(frozen=True, eq=False)
class Rendering:
    """The conversion of samples of a model, shape (C, *grid), to audio, motion or video.

    Attributes:
        modality: Modality: "audio", "motion" or "video".
        time_axis: Time axis of (C, *grid).
        normalization: Normalization of the values; None for pixels in [-1, 1].
        lengths: Quantiles of the sample lengths, equally spaced from 0 to 1, one row per class or a single row for all.
            Empty if no sample is padded.
        rate: Number of time steps per second, or None if unknown.
        audio: Decoder that produced the spectrograms or frames of audio samples.
        skeleton: Skeleton of the body, if the values are joint positions.
        root: Root joint, as in `MotionDecoder`, and the up axis; None without a root.
    """

    modality: str
    time_axis: int
    normalization: Normalization | None = None
    lengths: tuple[tuple[int, ...], ...] = ()
    rate: float | None = None
    audio: AudioDecoder | None = None
    skeleton: Skeleton | None = None
    root: tuple[int, int] | None = None

    def values(self, x: Tensor, length: int) -> Tensor:
        """Converts a sample (C, *grid) to the units of the data and removes its padding."""
        real = x.narrow(self.time_axis, 0, length)
        return real if self.normalization is None else self.normalization.invert(real)

    def positions(self, x: Tensor, length: int) -> Floats:
        """Returns the joint positions of a motion sample, shape (length, joints, 3)."""
        return _positions(self.values(x, length), self.root)

    def waveform(self, x: Tensor, length: int) -> Tensor:
        """Returns the waveform of an audio sample, shape (samples,), at the sampling rate `audio.rate`."""
        assert self.audio is not None
        return self.audio.waveform(self.values(x, length))

    def draw_lengths(self, ids: Tensor, labels: Tensor | None, *, seed: int) -> Tensor:
        """Draws lengths from the distribution of the data, shape (n,), int64.

        The length of a sample depends on the seed, its id and its label only.

        Args:
            ids: Sample ids, shape (n,).
            labels: Class labels, shape (n,), where the number of classes stands for the null label and draws from all
                classes; None for unlabeled samples.
            seed: Seed of the lengths.
        """
        table, key = torch.tensor(self.lengths, dtype=torch.float64), RandomStream(seed, "length")
        row = (key.uniform(ids, draw=1) * len(table)).long()
        if labels is not None and len(table) > 1:
            row = torch.where(labels < len(table), labels, row)
        position = key.uniform(ids) * (table.shape[1] - 1)
        below = position.long()
        low, high = table[row, below], table[row, below + 1]
        return (low + (position - below) * (high - low)).round().long()

    def mask(self, lengths: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Returns the mask of samples (C, *grid) of these lengths, shape (n, *grid), bool; False for padding."""
        steps = torch.arange(shape[self.time_axis]).view(-1, *[1] * (len(shape) - 1 - self.time_axis))
        return (steps < lengths.view(-1, *[1] * (len(shape) - 1))).expand(len(lengths), *shape[1:])

    def lengths_of(self, mask: Tensor) -> Tensor:
        """Returns the lengths, shape (n,), of samples with this mask, shape (n, *grid)."""
        return mask.movedim(self.time_axis, 1).flatten(2).any(2).sum(1) if mask.ndim > 2 else mask.sum(1)

    def to_dict(self) -> dict[str, Any]:
        """Converts the rendering to JSON, which is saved with a model."""
        return {
            "modality": self.modality,
            "time_axis": self.time_axis,
            "normalization": None if self.normalization is None else self.normalization.to_dict(),
            "lengths": [list(row) for row in self.lengths],
            "rate": self.rate,
            "audio": None if self.audio is None else asdict(self.audio),
            "skeleton": None if self.skeleton is None else self.skeleton.to_dict(),
            "root": self.root,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Rendering:
        """Creates a rendering from the result of `to_dict`."""
        return cls(
            record["modality"],
            record["time_axis"],
            None if record["normalization"] is None else Normalization.from_dict(record["normalization"]),
            tuple(tuple(row) for row in record["lengths"]),
            record["rate"],
            None if record["audio"] is None else AudioDecoder(**record["audio"]),
            None if record["skeleton"] is None else Skeleton.from_dict(record["skeleton"]),
            None if record.get("root") is None else tuple(record["root"]),
        )


def rendering_of(samples: Samples) -> Rendering | None:
    """Returns the rendering for generated samples of a model of this data; None for images and latents."""
    while isinstance(samples, Subset):
        samples = samples.samples
    if not isinstance(samples, MediaSamples):
        return None
    items, shape, decoder = samples.items, samples.shape, samples.items.decoder
    axis, root, skeleton = decoder.time_axis, None, None
    if isinstance(decoder, MotionDecoder) and shape[0] % 3 == 0:
        if decoder.root is not None and decoder.up_axis is not None:
            root = (decoder.root, decoder.up_axis)
        chosen = np.linspace(0, len(items) - 1, min(len(items), MAX_CLIPS)).round().astype(int)
        skeleton = find_skeleton([_positions(items[int(i)], root) for i in chosen])
    return Rendering(
        decoder.modality,
        axis,
        samples.normalization,
        _quantiles(items.shapes[:, axis], shape[axis], samples.labels, samples.num_classes),
        _rate(decoder, items.undecoded(0)),
        decoder if isinstance(decoder, AudioDecoder) else None,
        skeleton,
        root,
    )


def _quantiles(lengths: Tensor, longest: int, labels: Tensor | None, num_classes: int) -> tuple[tuple[int, ...], ...]:
    if bool((lengths >= longest).all()):
        return ()
    lengths = lengths.clamp(max=longest).double()
    by_class = [lengths] if labels is None else [lengths[labels == label] for label in range(num_classes)]
    fractions = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
    # A class without samples in this part gets the quantiles of all classes.
    rows = [torch.quantile(of_class if len(of_class) else lengths, fractions) for of_class in by_class]
    return tuple(tuple(row.round().long().tolist()) for row in rows)


def _rate(decoder: Decoder, item: Any) -> float | None:
    """Time steps per second according to the decoder or an item, or None if unknown."""
    if isinstance(decoder, AudioDecoder):
        return decoder.rate / decoder.hop
    if isinstance(decoder, VideoDecoder) and not isinstance(item, list):
        with import_optional("av", "video").open(file_bytes(item)) as container:
            rate = container.streams.video[0].average_rate
        return float(rate) / decoder.stride if rate else None
    path = item.get("path") if isinstance(item, dict) else item
    if isinstance(decoder, MotionDecoder) and isinstance(path, str) and path.lower().endswith(".bvh"):
        words = file_bytes(item).read().decode().split()
        frame_s = float(words[words.index("Time:") + 1])
        return 1 / (frame_s * decoder.stride) if frame_s > 0 else None
    return None


def _positions(values: Tensor, root: tuple[int, int] | None) -> Floats:
    """Joint positions (frames, joints, 3) of values (3 joints, frames); with a root, all joints follow its path."""
    positions: Floats = values.T.double().numpy().reshape(values.shape[1], -1, 3).copy()
    if root is not None:
        joint, up = root
        path = positions[:, joint].copy()
        path[:, up] = 0
        positions += path[:, None]
        positions[:, joint] -= path
    return positions
