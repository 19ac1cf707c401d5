"""What samples and their scores cost, told before them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from layerprobe.analyses.experiments import EXTRACTOR
from layerprobe.analyses.generation import (
    CLASSIFIER_STEPS,
    FEWEST_SAMPLES,
    Extractor,
    all_features,
    classifier_extractor,
    sample_features,
    score_features,
)
from layerprobe.analyses.runs.sample import FEW, PART
from layerprobe.analyses.runs.stages import (
    DECODING,
    ENCODING,
    FEATURES,
    FIGURES,
    SAMPLING,
    SCORES,
    Cost,
    largest_share,
    peak_device_memory,
    peak_memory,
    shared_out,
)
from layerprobe.analyses.runs.timing import (
    Rate,
    as_encoded,
    encoding_seconds,
    first,
    load_seconds,
    passes_of_a_sample,
    picture_seconds,
    rate_of,
    sample_seconds,
    seconds_of,
    squared,
)
from layerprobe.backbones import Backbone
from layerprobe.data import Samples, Splits, decoder
from layerprobe.sampling import SamplingPlan, sample

_TIMED_STEPS = 10  # of the training of an extractor
_BATCH = 512  # samples of a batch of features


def sampling_cost(
    backbone: Backbone,
    plan: SamplingPlan,
    num: int,
    *,
    pictures: bool,
    batch_size: int = 256,
    vae: str | Path | None = None,
    processes: int = 1,
) -> Cost:
    """Returns what it costs to draw samples.

    Args:
        backbone: Model on its device.
        plan: Sampling plan.
        num: Number of samples.
        pictures: Whether they are drawn and kept as float32, as `draw_samples` does; else as `draw_archive` does.
        batch_size: Samples per batch of an archive.
        vae: Folder of the autoencoder that decodes them.
        processes: Number of processes that share the samples, each with a device of its own.
    """
    part = FEW if pictures else PART
    share, shape = largest_share(math.ceil(num / part), processes), backbone.shape
    seconds = {SAMPLING: share * sample_seconds(backbone, plan, num, min(batch_size, part))}
    if vae is not None:
        latents = torch.zeros(16, *backbone.shape)
        decode = decoder(vae, device=backbone.device)
        shape = tuple(decode(latents[:1]).shape[1:])
        rate = rate_of(lambda rows: decode(latents[:rows]), min(num, len(latents)))
        seconds[DECODING] = share * rate.of(num)
    if pictures:
        seconds[FIGURES] = picture_seconds() * max(1, num / 64)
    # Samples lie there twice while their parts are joined. The images of an archive have three channels of a byte.
    twice = 2 * num * (4 * math.prod(shape) if pictures else 3 * math.prod(shape[1:]))
    # Pictures are joined in memory, where they then are twice too; an archive is joined part by part.
    return Cost(seconds, peak_memory() + (twice if pictures else 0), peak_device_memory(), twice)


def rough_sampling_seconds(backbone: Backbone, plan: SamplingPlan, num: int) -> float:
    """Returns at least the seconds of so many samples, by one that is drawn alone."""
    labels = torch.zeros(1, dtype=torch.int64) if backbone.num_classes else None
    one = partial(sample, backbone, range(1), labels=labels, plan=replace(plan, solver="euler", steps=1))
    return num * passes_of_a_sample(plan) * min(seconds_of(one) for _ in range(2))


def scoring_cost(
    generated: Samples,
    splits: Splits,
    *,
    extractor: Extractor | None = None,
    cached: bool = False,
    vae: str | Path | None = None,
    metrics: Sequence[str],
    k: int,
    processes: int = 1,
) -> Cost:
    """Returns what `score_run` will cost.

    Args:
        generated: Generated samples.
        splits: Data to compare them with; images that are not encoded yet if there is an autoencoder.
        extractor: Extractor of the features; the embedded one if None.
        cached: Whether the embedded one has been trained before.
        vae: Folder of the autoencoder.
        metrics: Names of the scores.
        k: Neighbor that the balls of the neighborhoods reach to.
        processes: Number of processes that share the features.
    """
    encoding_s = encoding_seconds(splits, vae)
    splits = as_encoded(splits, generated.shape)
    seconds = {ENCODING: encoding_s} if encoding_s else {}
    if extractor is None:
        extractor, extractor_s = extractor_seconds(splits)
        seconds[EXTRACTOR] = 0.0 if cached else extractor_s
    rate = features_rate(extractor, generated.shape)
    seconds[FEATURES] = sum(
        (rate.of(len(samples)) + len(samples) * load_seconds(samples))
        * largest_share(math.ceil(len(samples) / _BATCH), processes)
        for samples in (generated, splits.test)
    )
    width = sample_features(extractor, first(generated, 2).batch(range(2)).x).shape[1]
    seconds[SCORES] = _comparing_seconds(len(generated), len(splits.test), width, metrics, k)
    return Cost(shared_out(seconds, processes), peak_memory(), peak_device_memory(), 0)


def extractor_seconds(splits: Splits) -> tuple[Extractor, float]:
    """Returns an extractor of hardly any training, and the seconds to train one and to read the test split with it."""
    made: list[Extractor] = []
    # What the first training in a process loads does not count.
    timed_s = min(
        seconds_of(lambda: made.append(classifier_extractor(splits.train, steps=_TIMED_STEPS))) for _ in range(2)
    )
    few = first(splits.test, _BATCH)
    features_s = seconds_of(lambda: all_features(made[0], few)) * len(splits.test) / len(few)
    steps = CLASSIFIER_STEPS if splits.train.num_classes else _TIMED_STEPS
    return made[0], timed_s * steps / _TIMED_STEPS + features_s


def features_rate(extractor: Extractor, shape: tuple[int, ...]) -> Rate:
    """Returns the seconds of the features of samples of a shape (C, *grid)."""
    x = torch.zeros(1, *shape).expand(_BATCH, *shape)
    return rate_of(lambda rows: sample_features(extractor, x[:rows]), len(x))


def _comparing_seconds(num: int, num_reference: int, width: int, metrics: Sequence[str], k: int) -> float:
    """Seconds of the scores of features, both sets of which are compared with themselves and with each other."""
    equal = round(math.sqrt((num**2 + num * num_reference + num_reference**2) / 3))
    few = min(1000, max(equal // 3, FEWEST_SAMPLES))
    k = min(k, few // 2)  # Few samples have no farther neighbors, and farther ones hardly take longer.
    x, y = np.random.default_rng(0).standard_normal((2, 3 * few, width)).astype(np.float32)
    score = partial(score_features, extractor="timed", metrics=metrics, k=k)
    return squared([seconds_of(partial(score, x[:size], y[:size])) for size in (few, 3 * few)], few, equal)
