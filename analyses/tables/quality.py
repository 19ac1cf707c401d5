"""The quality table: one tidy row per source, layer, noise level, metric and split.

Probes and nearest neighbors are fitted on the training split. The validation split chooses penalties and layers; the
test split is only scored. Accuracies are fractions in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from layerprobe.analyses.measures import (
    Floats,
    TokenMoments,
    as_tensor,
    cka_matrix,
    in_parallel,
    recoverability,
    shared_basis,
)
from layerprobe.analyses.tables.csv_files import read_table
from layerprobe.analyses.tables.kept import KeptMeasurements
from layerprobe.analyses.tables.measurements import (
    CPU,
    RANK,
    Analysis,
    Measurement,
    Representation,
    column_probes,
    frame_probes,
    neighbors,
    num_workers,
    probes,
    spatial,
    spectra,
)
from layerprobe.analyses.tables.similarity import (
    SIMILARITY_COLUMNS,
    ValidationSplit,
    representations,
    similarities,
    similarity_table,
)
from layerprobe.data import check_probed
from layerprobe.extraction import SPLITS, FeatureStore
from layerprobe.progress import StepCounter, StepProgress
from layerprobe.ranks import ALONE, Ranks

# The analyses of a run, in the order of their rows.
ANALYSES: tuple[Analysis, ...] = (probes, column_probes, frame_probes, neighbors, spectra, spatial)
MODEL = "model"
RANDOM_WEIGHTS = "random weights"
RAW_INPUT = "raw input"
QUALITY_COLUMNS = (
    "source",
    "layer",
    "layer_index",
    "noise_level",
    "metric",
    "split",
    "value",
    "low",
    "high",
    "note",
)
RECOVERABILITY_COLUMNS = ("noise_level", "student", "teacher", "gap", "validation_gap", "increment", "note")
MAX_RANK = 128  # directions kept of wide tokens, so that the moments of many layers fit into memory


def measure(
    stores: Mapping[str, FeatureStore],
    *,
    analyses: Sequence[Analysis] = ANALYSES,
    seed: int = 0,
    device: torch.device = CPU,
    ranks: Ranks = ALONE,
    kept: KeptMeasurements | None = None,
    listener: Callable[[str, str, float, Sequence[Measurement]], None] | None = None,
    progress: StepProgress | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs the analyses on every layer and noise level of every store, several at a time.

    With several noise draws each draw is analyzed alone and the results are averaged: accuracies by sample, ranks and
    similarities as numbers. Stores without labels get no accuracies. Memory holds one representation per thread of
    torch, on a GPU one in all, and the nearest neighbors of all representations.

    Args:
        stores: One store per source: "model", and the controls "random weights" and "raw input".
        analyses: Functions of one `Representation`, such as `ANALYSES`.
        seed: Seed of the bootstrap.
        device: Device of the measures, with float64; probes with few samples are fitted on the CPU in any case.
        ranks: Processes that share the representations and all call this function; all get both tables, which are the
            same for any number of them.
        kept: Where finished measurements of these stores by these analyses are kept, and taken from.
        listener: Called with source, layer, noise level and measurements of every representation, on every process.
        progress: Called with (steps done, steps in total).

    Returns:
        The quality table and the similarity table. In the quality table `low` and `high` are the ends of the 95 %
        bootstrap interval over the scored samples, nan for a value that is not a mean over samples; a missing
        value is nan and its note says why. The similarity table has debiased linear CKA, mutual nearest neighbors and
        CKNNA on the validation split, between all layers and noise levels of the source "model", in both orders and
        with themselves.

    Raises:
        ValueError: If a store lacks samples in a split that is needed, or its labels do not allow a probe.
    """
    for source, store in stores.items():
        _check(source, store)
    keys = [
        (source, layer, level)
        for source, store in stores.items()
        for layer in store.layers
        for level in store.noise_levels
    ]
    mine = ranks.mine(range(len(keys)))
    total = len(mine) + (stores[MODEL].draws if MODEL in stores else 0)
    step = StepCounter(progress, total)

    def measured(index: int) -> list[Measurement]:
        ranks.check()
        measurements = None if kept is None else kept.read(index)
        if measurements is None:
            source, layer, level = keys[index]
            representation = Representation(stores[source], layer, level, device=device)
            measurements = [measurement for analysis in analyses for measurement in analysis(representation)]
            if kept is not None:
                kept.write(index, measurements)
        step()
        return measurements

    measurements = ranks.whole(in_parallel(measured, mine, workers=num_workers(device)))
    if listener:
        for key, of_key in zip(keys, measurements, strict=True):
            listener(*key, of_key)
    quality = _quality_table(keys, measurements, stores, seed)
    if MODEL not in stores:
        return quality, pd.DataFrame(columns=list(SIMILARITY_COLUMNS))
    values, reasons = similarities(stores[MODEL], step, device=device, ranks=ranks)
    for (layer, level), reason in reasons.items():
        row = (quality["source"] == MODEL) & (quality["layer"] == layer) & (quality["noise_level"] == level)
        row &= (quality["metric"] == RANK) & (quality["note"] != reason)
        quality.loc[row, "note"] += f"; no CKA: {reason}"
    return quality, similarity_table(stores[MODEL], values)


def encoder_rows(store: FeatureStore, features: NDArray[Any], name: str, *, device: torch.device = CPU) -> pd.DataFrame:
    """Measures the debiased CKA of every representation with an external encoder, as rows of the quality table.

    Args:
        store: Features of the model.
        features: Features of the validation split's samples by the encoder, in the store's order, shape (n, D).
        name: Name of the encoder.
        device: Device of the comparison.
    """
    keys = representations(store)
    other = [as_tensor(features).to(device)]
    draws = [cka_matrix(ValidationSplit(store, draw, device), other) for draw in range(store.draws)]
    values = np.mean([result.values[:, 0] for result in draws], axis=0)
    reasons = [reason or draws[0].other_reasons[0] for reason in draws[0].reasons]
    rows = [
        (
            MODEL,
            layer,
            store.layers.index(layer),
            level,
            f"CKA with {name}",
            "validation",
            value,
            np.nan,
            np.nan,
            reason,
        )
        for (layer, level), value, reason in zip(keys, values, reasons, strict=True)
    ]
    return pd.DataFrame(rows, columns=list(QUALITY_COLUMNS))


def recoverability_table(store: FeatureStore, *, device: torch.device = CPU, ranks: Ranks = ALONE) -> pd.DataFrame:
    """Measures the recoverability gap of all pairs: the share of the increment that a ridge regression misses.

    The increment is the teacher's token minus the student's. Only layers of the most common shape are compared, by
    their kept tokens. Tokens wider than 128 are projected onto the
    directions in which the layers vary most.

    Args:
        store: Features and tokens of the model.
        device: Device that collects the moments of the tokens.
        ranks: Processes that share the noise levels and all call this function; all get the table.

    Returns:
        One row per noise level, student and later teacher: `gap` on the test split, `validation_gap` on the validation
        split, `increment` (its variance over that of the teacher) and `note` (the reason for a missing value). No rows
        if tokens may be padding.
    """
    if store.tokens_padded:
        return pd.DataFrame(columns=list(RECOVERABILITY_COLUMNS))
    shapes = {layer: store.tokens(layer, store.noise_levels[0], split="train").shape[1:] for layer in store.layers}
    commonest = max(shapes.values(), key=list(shapes.values()).count)
    layers = [layer for layer, shape in shapes.items() if shape == commonest]
    levels = store.noise_levels if len(layers) > 1 else ()
    rows = ranks.whole([_recoverability_rows(store, layers, level, device) for level in ranks.mine(levels)])
    return pd.DataFrame([*chain.from_iterable(rows)], columns=list(RECOVERABILITY_COLUMNS))


def _recoverability_rows(
    store: FeatureStore, layers: Sequence[str], level: float, device: torch.device
) -> list[tuple[Any, ...]]:
    result = recoverability(_token_moments(store, layers, level, device))
    return [
        (level, layers[s], layers[t], result.gap[s, t], result.validation_gap[s, t], result.increment[s, t], reason)
        for s, reasons in enumerate(result.reasons)
        for t, reason in enumerate(reasons)
        if t > s
    ]


def _token_moments(store: FeatureStore, layers: Sequence[str], level: float, device: torch.device) -> TokenMoments:
    def tokens(split: str, draw: int) -> list[NDArray[np.float32]]:
        return [store.tokens(layer, level, draw=draw, split=split) for layer in layers]

    first = tokens("train", 0)
    is_wide = first[0].shape[2] > MAX_RANK
    basis = shared_basis((torch.from_numpy(x).to(device) for x in first), rank=MAX_RANK) if is_wide else None
    moments = TokenMoments(layers, basis=basis, device=device)
    for split in SPLITS:
        for draw in range(store.draws):
            moments.update(split, tokens(split, draw))
    return moments


def bootstrap_interval(
    correct: NDArray[Any], *, seed: int, resamples: int = 1000, confidence: float = 0.95
) -> tuple[Floats, Floats]:
    """Computes the percentile bootstrap interval of the mean over samples.

    It covers the choice of the scored samples, not that of the samples that the probe was fitted on. All rows use the
    same resamples, so rows of the same samples can be compared.

    Args:
        correct: Scores, shape (..., n).
        seed: Seed of the resamples, which depend on it and on n.
        resamples: Number of resamples.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        Lower and upper ends, each of shape (...).
    """
    rows = np.asarray(correct, np.float64).reshape(-1, correct.shape[-1])
    n = rows.shape[1]
    generator = np.random.default_rng([seed, n])
    means = np.empty((resamples, len(rows)))
    for b in range(resamples):
        means[b] = rows @ np.bincount(generator.integers(0, n, n), minlength=n) / n
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return low.reshape(correct.shape[:-1]), high.reshape(correct.shape[:-1])


def read_quality(path: str | Path, *, remedy: str = "run `layerprobe analyze` again") -> pd.DataFrame:
    """Reads the quality table from a CSV file.

    Args:
        path: Path of the file.
        remedy: What to do about a damaged table.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If columns are missing.
    """
    return read_table(path, QUALITY_COLUMNS, ("layer_index", "noise_level", "value", "low", "high"), remedy=remedy)


def _check(source: str, store: FeatureStore) -> None:
    for split in ("train", "validation", "test"):
        if not (store.splits == split).any():
            raise ValueError(f"the store of {source!r} has no samples in the split {split!r}; extract all three splits")
    labels = store.labels
    if labels is not None and len(np.unique(labels[store.splits == "train"])) < 2:
        raise ValueError(f"the training split of {source!r} has one class only; a probe needs two or more")
    for name, column in store.columns.items():
        # Labels of frames are probed on the kept tokens.
        rows, splits = (slice(None), store.splits) if column.ndim == 1 else (store.token_rows, store.token_splits)
        if len(splits):
            check_probed(name, {split: column[rows][splits == split] for split in SPLITS})


def _quality_table(
    keys: Sequence[tuple[str, str, float]],
    measured: Sequence[Sequence[Measurement]],
    stores: Mapping[str, FeatureStore],
    seed: int,
) -> pd.DataFrame:
    rows, scores = [], []
    for (source, layer, level), measurements in zip(keys, measured, strict=True):
        index = -1 if source == RAW_INPUT else stores[source].layers.index(layer)
        for m in measurements:
            rows.append((source, layer, index, level, m.metric, m.split, m.value, np.nan, np.nan, m.note))
            scores.append(m.scores)
    table = pd.DataFrame(rows, columns=list(QUALITY_COLUMNS))
    # Scores of equally many samples share the resamples, so one pass serves them all.
    for n in {len(c) for c in scores if c is not None}:
        where = [i for i, c in enumerate(scores) if c is not None and len(c) == n]
        low, high = bootstrap_interval(np.stack([c for c in scores if c is not None and len(c) == n]), seed=seed)
        table.loc[where, "low"], table.loc[where, "high"] = low, high
    return table
