"""How samples of a model become what people look at and hear: recordings, moving bodies, clips.

A model sees normalized values on a grid of fixed size. Their rendering is what undoes that, kept with the model: it needs no
data to be looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerprobe.data.samples import Samples, Subset
from layerprobe.data.sequences.audio import AudioDecoder
from layerprobe.data.sequences.items import Decoder, MediaSamples, Normalization, file_bytes
from layerprobe.data.sequences.motion import MotionDecoder
from layerprobe.data.sequences.skeleton import MAX_CLIPS, Skeleton, find_skeleton
from layerprobe.data.sequences.video import VideoDecoder
from layerprobe.files import needed
from layerprobe.noise import RandomStream

Positions = NDArray[np.float64]

QUANTILES = 11  # of the lengths, from the shortest to the longest


@dataclass(frozen=True, eq=False)
class Rendering:
    """What a sample, shape (C, *grid), stands for.

    Attributes:
        modality: "audio", "motion" or "video".
        time_axis: Which axis of (C, *grid) is that of time.
        normalization: What the values were divided by; None where they are pixels in [-1, 1].
        lengths: Where samples are padded, quantiles of their lengths at even steps from 0 to 1: a row for each class,
            or one for all. Empty where every sample fills its grid.
        rate: Steps of time per second, where the data says.
        audio: How sound was made a picture or frames.
        skeleton: The body, where the values are positions of joints.
        root: The joint that the others are relative to, as in `MotionDecoder`, and its axis of the height.
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
        """A sample (C, *grid) in the units of the data and without its padding."""
        real = x.narrow(self.time_axis, 0, length)
        return real if self.normalization is None else self.normalization.invert(real)

    def positions(self, x: Tensor, length: int) -> Positions:
        """Positions of the joints, shape (length, joints, 3), of a motion with a skeleton."""
        return _placed(self.values(x, length), self.root)

    def waveform(self, x: Tensor, length: int) -> Tensor:
        """The recording that a sample of audio stands for, shape (samples,), `audio.rate` of them a second."""
        assert self.audio is not None
        return self.audio.waveform(self.values(x, length))

    def draw_lengths(self, ids: Tensor, labels: Tensor | None, *, seed: int) -> Tensor:
        """Lengths as the data has them, shape (n,), int64; that of a sample depends on seed, id and label only.

        Args:
            ids: Shape (n,).
            labels: Shape (n,), with the number of classes for "no label", which takes the lengths of any class; None
                for no labels at all.
            seed: Of the lengths.
        """
        table, key = torch.tensor(self.lengths, dtype=torch.float64), RandomStream(seed, "length")
        row = (key.uniform(ids, draw=1) * len(table)).long()
        if labels is not None and len(table) > 1:
            row = torch.where(labels < len(table), labels, row)
        place = key.uniform(ids) * (table.shape[1] - 1)
        below = place.long()
        low, high = table[row, below], table[row, below + 1]
        return (low + (place - below) * (high - low)).round().long()

    def mask(self, lengths: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What is no padding in samples (C, *grid) of these lengths, shape (n, *grid), bool."""
        steps = torch.arange(shape[self.time_axis]).view(-1, *[1] * (len(shape) - 1 - self.time_axis))
        return (steps < lengths.view(-1, *[1] * (len(shape) - 1))).expand(len(lengths), *shape[1:])

    def lengths_of(self, mask: Tensor) -> Tensor:
        """The lengths (n,) of samples with this mask (n, *grid)."""
        return mask.movedim(self.time_axis, 1).flatten(2).any(2).sum(1) if mask.ndim > 2 else mask.sum(1)

    def to_dict(self) -> dict[str, Any]:
        """JSON, kept with a model."""
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
        """What `to_dict` gave."""
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
    """How what a model makes of such samples becomes what people look at and hear; None for images and latents."""
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
        skeleton = find_skeleton([_placed(items[int(i)], root) for i in chosen])
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
    every = [lengths] if labels is None else [lengths[labels == label] for label in range(num_classes)]
    steps = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
    # A class that this part lacks has the lengths of all.
    rows = [torch.quantile(own if len(own) else lengths, steps) for own in every]
    return tuple(tuple(row.round().long().tolist()) for row in rows)


def _rate(decoder: Decoder, item: Any) -> float | None:
    """Steps of time per second, where the decoder or an item says."""
    if isinstance(decoder, AudioDecoder):
        return decoder.rate / decoder.hop
    if isinstance(decoder, VideoDecoder) and not isinstance(item, list):
        with needed("av", "video").open(file_bytes(item)) as container:
            rate = container.streams.video[0].average_rate
        return float(rate) / decoder.stride if rate else None
    path = item.get("path") if isinstance(item, dict) else item
    if isinstance(decoder, MotionDecoder) and isinstance(path, str) and path.lower().endswith(".bvh"):
        words = file_bytes(item).read().decode().split()
        seconds = float(words[words.index("Time:") + 1])
        return 1 / (seconds * decoder.stride) if seconds > 0 else None
    return None


def _placed(values: Tensor, root: tuple[int, int] | None) -> Positions:
    """Positions (frames, joints, 3) of values (3 joints, frames); all go where the root goes."""
    positions: Positions = values.T.double().numpy().reshape(values.shape[1], -1, 3).copy()
    if root is not None:
        joint, up = root
        place = positions[:, joint].copy()
        place[:, up] = 0
        positions += place[:, None]
        positions[:, joint] -= place
    return positions
