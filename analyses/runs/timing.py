"""Timed pieces of jobs, from which their cost is forecast; each piece runs the job's own code for a moment."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from layerprobe.analyses.figures import sample_grid, save_figure
from layerprobe.backbones import Backbone
from layerprobe.data import Batch, Samples, Splits, Subset, TensorSamples, encode_splits, num_to_encode
from layerprobe.extraction import ExtractionPlan, read_features, write_tensors
from layerprobe.noise import RandomStream
from layerprobe.ranks import alone
from layerprobe.sampling import SamplingPlan, sample
from layerprobe.training import TrainingPlan, held_out_loss, train

LEVEL = 0.3
_TIMED_S = 2.0  # what a batch may take at the most before fewer rows are timed
_REPEATED = 3  # timings, of which the fastest counts
_PICTURES = 4.0  # small pictures that take as long as all figures and the report of a run without any cell
_PICTURES_OF_A_CELL = 0.05  # and those of each layer at each noise level
_STEPS = 6  # of a training; the first one is warmer than the others
_CALLS = {"euler": 1, "heun": 2, "dopri5": 6, "euler-maruyama": 1}  # of the network in a step of a sample


class Rate(NamedTuple):
    """Seconds of a piece that takes rows in batches.

    Attributes:
        once_s: Seconds of each batch, whatever the number of its rows.
        each_s: Seconds of each row.
        batch_size: Number of rows in a batch.
    """

    once_s: float
    each_s: float
    batch_size: int

    def of(self, rows: int) -> float:
        """Returns the seconds of so many rows; 0 for none."""
        return math.ceil(rows / self.batch_size) * self.once_s + rows * self.each_s


def seconds_of(call: Callable[[], object]) -> float:
    """Returns the seconds of a call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def rate_of(call: Callable[[int], object], batch_size: int) -> Rate:
    """Times a call for one row and for a batch, or for as many rows of it as take a bearable time.

    Args:
        call: Function of a number of rows.
        batch_size: Number of rows in a batch of the job.
    """
    call(1)
    one_s = min(seconds_of(partial(call, 1)) for _ in range(_REPEATED))
    rows, all_s = 1, one_s
    # A call that is slow for one row may be hardly slower for many: what they took tells how many more to time.
    while rows < batch_size and (rows == 1 or all_s < _TIMED_S / 2):
        rows = min(batch_size, 2 + round(rows * _TIMED_S / max(all_s, 1e-9)))
        all_s = min(seconds_of(partial(call, rows)) for _ in range(_REPEATED if one_s < _TIMED_S else 1))
    each_s = all_s / rows
    # A part of a batch stands for the whole: a difference that the clock can hardly tell must not be multiplied.
    if rows > 1 and (rows == batch_size or all_s > 1.25 * one_s):
        each_s = min(each_s, max(all_s - one_s, 0.0) / (rows - 1))
    return Rate(all_s - rows * each_s, each_s, batch_size)


def row_seconds(backbone: Backbone, plan: ExtractionPlan, batch_size: int) -> float:
    """Returns the seconds of one row of the extraction, a sample at a noise level, in batches of this size.

    Values do not change the time, so the samples are noise.
    """
    plan = ExtractionPlan(backbone.layers, (LEVEL,), pool_cells=plan.pool_cells, precision=plan.precision)
    generator = torch.Generator().manual_seed(0)
    samples = TensorSamples(torch.randn(2 * batch_size, *backbone.shape, generator=generator))

    def read(rows: int) -> None:
        read_features(backbone, first(samples, rows), plan, batch_size=batch_size)

    batch_s = rate_of(read, batch_size).of(batch_size)
    if batch_s < _TIMED_S / 4:
        # A call also looks at the layers, once for all its batches, by a pass of one row: at most a third of two.
        batches = rate_of(lambda num: read(num * batch_size), 2)
        batch_s = max(batches.each_s, batches.of(2) / 3)
    return batch_s / batch_size


def sample_seconds(backbone: Backbone, plan: SamplingPlan, num: int, batch_size: int = 256) -> float:
    """Returns the seconds of so many samples; dopri5 is taken to keep its first step size."""
    steps = min(plan.steps, 4)
    few = replace(plan, solver="euler", steps=steps)
    labels = torch.arange(batch_size) % backbone.num_classes if backbone.num_classes else None

    def draw(rows: int) -> None:
        sample(backbone, range(rows), labels=None if labels is None else labels[:rows], plan=few, batch_size=batch_size)

    return rate_of(draw, min(batch_size, num)).of(num) * passes_of_a_sample(plan) / steps


def passes_of_a_sample(plan: SamplingPlan) -> int:
    """Returns how often the network is called to draw one sample, once for both passes of guidance."""
    return plan.steps * _CALLS[plan.solver] - (plan.solver == "heun")


def held_out_seconds(backbone: Backbone, samples: Samples) -> float:
    """Returns the seconds of the held-out loss of these samples."""
    return rate_of(lambda rows: held_out_loss(backbone, first(samples, rows)), min(len(samples), 256)).of(len(samples))


def step_seconds(backbone: Backbone, samples: Samples, plan: TrainingPlan) -> float:
    """Returns the seconds of a step of a training in one process: the middle one of its first few.

    The trainer itself takes them, in a folder that is deleted. What is aligned is so at full weight from the first
    step on.
    """
    sync = replace(plan.sync, warmup_steps=0, stop_step=None, decay="constant")
    plan = replace(plan, steps=_STEPS + 1, sync=sync, warmup_steps=0, checkpoint_every=10**9)
    ends: list[float] = []

    def watch(step: int, total: int, loss: float) -> None:
        ends.append(time.perf_counter())
        slow = len(ends) > 1 and ends[-1] - ends[0] > _TIMED_S
        if len(ends) == _STEPS or slow:
            raise _Enough

    with alone(), tempfile.TemporaryDirectory() as folder, suppress(_Enough):
        train(backbone, samples, plan, Path(folder) / "timed", progress=watch)
    return float(np.median(np.diff(ends)))


class _Enough(Exception):
    """Enough steps are timed."""


def encoding_seconds(splits: Splits, vae: str | Path | None) -> float:
    """Returns the seconds of encoding the images that are not in the user's cache yet; 0 without an autoencoder."""
    num = 0 if vae is None else num_to_encode(splits, vae)
    if vae is None or not num:
        return 0.0
    few = min(len(samples) for _, samples in splits.items())

    def encode(rows: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            encode_splits(splits.mapped(lambda _, samples: first(samples, rows)), vae, cache=folder)

    # A call encodes as many rows of each of the three splits.
    rate = rate_of(encode, min(few, 16))
    # It opens the autoencoder once, from whose seconds the clock cannot tell less than a fifth.
    return rate.once_s + num / 3 * max(rate.each_s, 0.2 * rate.of(rate.batch_size) / rate.batch_size)


def load_seconds(samples: Samples) -> float:
    """Returns the seconds to load a sample."""
    num = min(64, len(samples))
    return seconds_of(lambda: samples.batch(range(num))) / num


def byte_seconds() -> float:
    """Returns the seconds to write a byte of features or weights."""
    values = np.zeros((64, 2**16), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        write = partial(write_tensors, Path(folder) / "shard.safetensors", {"values": values})
        return seconds_of(write) / values.nbytes


def figure_seconds(cells: int) -> float:
    """Returns the seconds of the figures and the report of a run, in proportion to those of one small picture.

    Args:
        cells: Number of layers times that of noise levels.
    """
    return picture_seconds() * (_PICTURES + _PICTURES_OF_A_CELL * cells)


def picture_seconds() -> float:
    """Returns the seconds of one small picture of 64 samples."""
    images = np.zeros((64, 1, 8, 8), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        draw = partial(sample_grid, images, None, columns=8)
        return min(seconds_of(lambda: save_figure(draw(), Path(folder), "a")) for _ in range(2))


def squared(seconds: Sequence[float], num: int, wanted: int) -> float:
    """Returns the seconds for a number of things of which all pairs are compared.

    Args:
        seconds: Seconds for `num` and for `3 * num` of them.
        num: Number of things.
        wanted: Number of things that are asked for.
    """
    square = max(seconds[1] - 3 * seconds[0], 0.0) / (6 * num**2)
    return max(seconds[0] / num - square * num, 0.0) * wanted + square * wanted**2


def first(samples: Samples, count: int) -> Samples:
    """Returns the first samples, at most so many."""
    return samples if len(samples) <= count else Subset(samples, range(count), name="forecast")


class Latents(Samples):
    """Stand-ins for the latents of images that are not encoded yet: noise around a mean of each class.

    Args:
        images: The images.
        shape: Shape (C, h, w) of a latent.
    """

    def __init__(self, images: Samples, shape: tuple[int, ...]) -> None:
        self._images, self.shape, self.modality = images, shape, images.modality
        self.num_classes, self.class_names = images.num_classes, images.class_names
        self.labels, self.ids, self.columns = images.labels, images.ids, images.columns
        self.reading, self.fingerprint = images.reading, f"{images.fingerprint}/stand-ins"

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int]) -> Batch:
        rows = torch.as_tensor(indices, dtype=torch.long)
        x = RandomStream(0, "latent").normal(self.ids[rows], self.shape)
        if self.labels is None:
            return Batch(x, None, self.ids[rows])
        means = RandomStream(1, "latent").normal(self.labels[rows], self.shape)
        return Batch(x + 0.3 * means, self.labels[rows], self.ids[rows])


def as_encoded(splits: Splits, shape: tuple[int, ...]) -> Splits:
    """Returns the splits, or stand-ins for their latents if they are not yet of the shape that a model takes."""
    return splits if splits.train.shape == shape else splits.mapped(lambda _, samples: Latents(samples, shape))
