"""`layerprobe score` from start to finish: which samples, against which data, by which extractor."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from layerprobe.analyses.generation import (
    FEWEST_SAMPLES,
    METRICS,
    Extractor,
    Score,
    all_features,
    embedded_extractor,
    score_features,
)
from layerprobe.analyses.runs.data import encoded, load_splits
from layerprobe.data import ArraySamples, Samples, Splits, load_array, take
from layerprobe.files import write_text
from layerprobe.progress import TaskProgress, named_progress

ARRAYS = (".npz", ".npy")


def load_generated(path: str | Path) -> ArraySamples:
    """Generated samples: a file as in `load_array`, or a folder of `layerprobe sample`.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: As `load_array`.
    """
    path = Path(path)
    if not path.is_dir():
        return load_array(path)
    found = [path / f"samples{suffix}" for suffix in reversed(ARRAYS) if (path / f"samples{suffix}").is_file()]
    if not found:
        raise FileNotFoundError(f"{path} holds no samples.npy; pass a folder made by `layerprobe sample`")
    # The .npy has not been rounded to 256 values.
    return load_array(found[0])


def open_comparison(
    samples: str | Path, data: str, reading: Mapping[str, Any], *, num_test: int | None = None
) -> tuple[ArraySamples, Splits]:
    """Generated samples, and the data to compare them with, not yet encoded.

    Args:
        samples: As in `load_generated`.
        data: A data set, whose training split trains an embedded extractor and whose test split is compared with; or a
            file as in `load_array`, all of which serves for both.
        reading: Options that read a data set.
        num_test: How much of the test split to compare with; None for all.

    Raises:
        ValueError: If something cannot be read or has no effect, shapes differ, or there are too few samples.
    """
    generated = load_generated(samples)
    if Path(data).suffix in ARRAYS:
        surplus = [*reading, *(["num_test"] if num_test is not None else [])]
        if surplus:
            raise ValueError(f"{data} is compared with as it is; leave out --{surplus[0].replace('_', '-')}")
        array = load_array(data)
        splits, shape = Splits(array, array, array), array.shape
    else:
        splits, shape = load_splits(data, reading)
        # Of the validation split nothing is used, so nothing has to be encoded.
        splits = take(splits, num_validation=1, num_test=num_test)
    if generated.modality == "image" and generated.shape[0] == 3 and shape == (1, *generated.shape[1:]):
        generated = generated.gray()
    if generated.shape != shape:
        seen, wanted = ("x".join(map(str, numbers)) for numbers in (generated.shape, shape))
        raise ValueError(f"samples are {seen} but the data is {wanted}; pass data of the samples' shape")
    for n, what in ((len(generated), "samples"), (len(splits.test), "samples to compare with")):
        if n < FEWEST_SAMPLES:
            raise ValueError(f"{n} {what} are too few; pass at least {FEWEST_SAMPLES}")
    return generated, splits


def score_run(
    generated: ArraySamples,
    splits: Splits,
    reading: Mapping[str, Any],
    *,
    extractor: Extractor | None = None,
    metrics: Sequence[str] = METRICS,
    k: int = 5,
    seed: int = 0,
    progress: TaskProgress | None = None,
) -> tuple[tuple[Score, ...], tuple[str, ...]]:
    """Scores and warnings, see `score_features`.

    Args:
        generated: The samples to score.
        splits: The data, as `open_comparison` gives it.
        reading: Options that read a data set; they may name an autoencoder.
        extractor: Of features; an embedded one, trained on the training split and kept in the user's cache, where not given.
        metrics: Some of `METRICS`.
        k: Of the neighborhoods.
        seed: Of the embedded extractor and of the intervals.
        progress: Called with (what is running, steps done, steps in all).
    """
    splits = encoded(splits, reading, progress=progress)
    if extractor is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "layerprobe" / "extractors"
        extractor = embedded_extractor(
            splits.train, cache, seed=seed, progress=named_progress(progress, "training the extractor")
        )
    features, reference = (
        all_features(extractor, samples, progress=named_progress(progress, f"features of {what}"))
        for samples, what in ((generated, "samples"), (splits.test, "data"))
    )
    scores, warnings = score_features(
        features,
        reference,
        extractor=extractor.name,
        metrics=metrics,
        k=k,
        seed=seed,
        progress=named_progress(progress, "scores"),
    )
    return scores, (*range_warnings(generated, splits.test), *warnings)


def range_warnings(generated: ArraySamples, reference: Samples) -> list[str]:
    """Whether samples seem to be scaled otherwise than the data."""
    low, high = generated.value_range
    x = reference.batch(range(min(len(reference), 512))).x
    real_low, real_high = float(x.min()), float(x.max())
    middle, reach = (real_low + real_high) / 2, (real_high - real_low) / 2
    if low < middle - 2 * reach or high > middle + 2 * reach or low > middle - reach / 4 or high < middle + reach / 4:
        return [
            f"samples run from {low:.3g} to {high:.3g} and the data from {real_low:.3g} to {real_high:.3g}; "
            "if they are scaled otherwise, rescale them"
        ]
    return []


def write_scores(folder: str | Path, scores: Sequence[Score], record: Mapping[str, Any]) -> None:
    """Writes `scores.csv`, a row for each score, and the record as `scores.json`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "scores.csv", pd.DataFrame([asdict(score) for score in scores]).to_csv(index=False))
    write_text(folder / "scores.json", json.dumps(record, indent=1))


def describe_scores(scores: Sequence[Score], warnings: Sequence[str]) -> list[str]:
    """Scores as lines of a table."""
    rows = [("score", "value", "95 % interval", "better", "samples", "reference")]
    rows += [
        (
            score.metric,
            f"{score.value:.4g}",
            f"{score.low:.4g} to {score.high:.4g}",
            score.better,
            str(score.num_samples),
            str(score.num_reference),
        )
        for score in scores
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, f"extractor: {scores[0].extractor}", *(f"warning: {warning}" for warning in warnings)]
