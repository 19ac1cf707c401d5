"""The job of `layerprobe score`: reading samples and data, extracting features, scores."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from layerprobe.analyses.experiments import EXTRACTOR
from layerprobe.analyses.generation import (
    FEWEST_SAMPLES,
    METRICS,
    Extractor,
    Score,
    all_features,
    cached_extractor,
    embedded_extractor,
    score_features,
)
from layerprobe.analyses.runs.costing_samples import extractor_seconds, features_rate, scoring_cost
from layerprobe.analyses.runs.stages import ENCODING, FEATURES, SCORES, Cost, StageClock
from layerprobe.analyses.runs.timing import as_encoded, encoding_seconds
from layerprobe.analyses.tables import write_table
from layerprobe.data import ArraySamples, DataSource, Samples, Splits, load_array, take
from layerprobe.files import holding
from layerprobe.options import flags, to_record
from layerprobe.progress import TaskProgress, named_progress
from layerprobe.ranks import processes
from layerprobe.records import check_same, write_record

ARRAYS = (".npz", ".npy")


def load_generated(path: str | Path) -> ArraySamples:
    """Reads generated samples.

    Args:
        path: File as in `load_array`, or folder of `layerprobe sample`.

    Raises:
        FileNotFoundError: If the file does not exist, or the folder contains no samples.
        ValueError: As `load_array`.
    """
    path = Path(path)
    if not path.is_dir():
        return load_array(path)
    # The .npy comes first: its values are not rounded to 256 levels.
    files = [path / f"samples{suffix}" for suffix in reversed(ARRAYS) if (path / f"samples{suffix}").is_file()]
    if not files:
        raise FileNotFoundError(f"{path} contains no samples.npy; pass a folder made by `layerprobe sample`")
    return load_array(files[0])


def open_comparison(
    samples: str | Path, data: DataSource, *, num_test: int | None = None
) -> tuple[ArraySamples, Splits]:
    """Reads generated samples, and the data to compare them with, which is not encoded yet.

    Args:
        samples: Generated samples, see `load_generated`.
        data: Data set, whose training split trains an embedded extractor and whose test split is the reference; or a
            file as in `load_array`, all of which serves for both.
        num_test: Number of reference samples; None for the whole test split.

    Raises:
        ValueError: If a file cannot be read, an option has no effect, shapes differ, or there are too few samples.
    """
    generated = load_generated(samples)
    if Path(data.source).suffix in ARRAYS:
        unused = [name for name in to_record(data) if name != "source"] + ["num_test"] * (num_test is not None)
        if unused:
            raise ValueError(f"{data.source} is used as it is; leave out {flags(DataSource, unused)[0]}")
        array = load_array(data.source)
        splits, shape = Splits(array, array, array), array.shape
    else:
        splits = data.load()
        shape = data.model_shape(splits)
        # The validation split is not used, so it need not be encoded.
        splits = take(splits, num_validation=1, num_test=num_test)
    if generated.modality == "image" and generated.shape[0] == 3 and shape == (1, *generated.shape[1:]):
        generated = generated.gray()
    if generated.shape != shape:
        actual, expected = ("x".join(map(str, numbers)) for numbers in (generated.shape, shape))
        raise ValueError(f"samples are {actual} but the data is {expected}; pass data of the samples' shape")
    for n, what in ((len(generated), "samples"), (len(splits.test), "samples to compare with")):
        if n < FEWEST_SAMPLES:
            raise ValueError(f"{n} {what} are too few; pass at least {FEWEST_SAMPLES}")
    return generated, splits


def score_run(
    generated: ArraySamples,
    splits: Splits,
    data: DataSource,
    *,
    extractor: Extractor | None = None,
    metrics: Sequence[str] = METRICS,
    k: int = 5,
    seed: int = 0,
    clock: StageClock | None = None,
    progress: TaskProgress | None = None,
) -> tuple[tuple[Score, ...], tuple[str, ...]]:
    """Computes scores and warnings, see `score_features`. The processes of torchrun or srun share the features.

    Args:
        generated: Generated samples.
        splits: Data to compare them with, see `open_comparison`.
        data: Source of the data, which may name an autoencoder.
        extractor: Extractor of the features; by default one that is trained on the training split and cached in the
            user's cache folder.
        metrics: Names of the scores, some of `METRICS`.
        k: Neighbor that the balls of the neighborhoods reach to.
        seed: Seed of the embedded extractor and of the intervals.
        clock: Clock of the stages.
        progress: Called with (task name, steps done, steps in total).
    """
    begin = clock.begin if clock else lambda stage: None
    if data.vae is not None:
        begin(ENCODING)
    splits = data.encode(splits, progress=named_progress(progress, "encoding images"))
    with processes() as ranks:
        used = extractor
        if used is None:
            begin(EXTRACTOR)
            cache = _extractors()
            training = named_progress(progress, "training the extractor")
            used = ranks.first_alone(lambda: embedded_extractor(splits.train, cache, seed=seed, progress=training))
        begin(FEATURES)
        features, reference = (
            all_features(used, samples, ranks=ranks, progress=named_progress(progress, f"features of {what}"))
            for samples, what in ((generated, "samples"), (splits.test, "data"))
        )

        def scored() -> tuple[tuple[Score, ...], tuple[str, ...]]:
            return score_features(
                features,
                reference,
                extractor=used.name,
                metrics=metrics,
                k=k,
                seed=seed,
                progress=named_progress(progress, "scores"),
            )

        begin(SCORES)
        scores, warnings = ranks.once(scored)
    return scores, (*range_warnings(generated, splits.test), *warnings)


def score_cost(
    generated: ArraySamples,
    splits: Splits,
    data: DataSource,
    *,
    extractor: Extractor | None = None,
    seed: int = 0,
    **options: Any,
) -> Cost:
    """Returns what `score_run` will cost with the same arguments, and options of `scoring_cost`."""
    # Of images that are not encoded yet, the name in the cache is not known.
    named = extractor is None and data.vae is None
    cached = named and cached_extractor(splits.train, _extractors(), seed=seed).is_file()
    return scoring_cost(generated, splits, extractor=extractor, cached=cached, vae=data.vae, **options)


def rough_score_seconds(
    generated: ArraySamples, splits: Splits, data: DataSource, *, extractor: Extractor | None = None
) -> float:
    """Returns about the seconds of reading and encoding the data, and of training the extractor if there is none."""
    encoding_s = encoding_seconds(splits, data.vae)
    encoded = as_encoded(splits, generated.shape)
    if extractor is None:
        return encoding_s + extractor_seconds(encoded)[1]
    rate = features_rate(extractor, generated.shape)
    return encoding_s + rate.of(len(generated) + len(encoded.test))


def _extractors() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "layerprobe" / "extractors"


def range_warnings(generated: ArraySamples, reference: Samples) -> list[str]:
    """Returns a warning if the samples seem to be scaled differently from the data."""
    low, high = generated.value_range
    x = reference.batch(range(min(len(reference), 512))).x
    real_low, real_high = float(x.min()), float(x.max())
    middle, reach = (real_low + real_high) / 2, (real_high - real_low) / 2
    if low < middle - 2 * reach or high > middle + 2 * reach or low > middle - reach / 4 or high < middle + reach / 4:
        return [
            f"samples range from {low:.3g} to {high:.3g} and the data from {real_low:.3g} to {real_high:.3g}; "
            "if they are scaled differently, rescale them"
        ]
    return []


def check_scores(folder: str | Path, record: Mapping[str, Any]) -> None:
    """Checks that a folder has no scores of other samples, data or settings, which `write_scores` would replace.

    Args:
        folder: Folder of the scores.
        record: What is scored, and how.

    Raises:
        ValueError: If it has.
    """
    check_same(Path(folder) / "scores.json", record, what="scores")


def score_clock(folder: str | Path) -> StageClock:
    """Returns a clock whose times replace those of earlier scores in the folder: nothing of them is kept."""
    clock = StageClock(folder)
    clock.begin_anew((ENCODING, EXTRACTOR, FEATURES, SCORES))
    return clock


@holding("folder")
def write_scores(
    folder: str | Path, scores: Sequence[Score], record: Mapping[str, Any], *, clock: StageClock | None = None
) -> None:
    """Writes `scores.csv`, with a row for each score, the record as `scores.json`, and the times of the clock."""
    folder = Path(folder)
    write_table(pd.DataFrame([asdict(score) for score in scores]), folder / "scores.csv")
    write_record(folder / "scores.json", record)
    if clock:
        clock.writes = True
        clock.end()


def describe_scores(scores: Sequence[Score], warnings: Sequence[str]) -> list[str]:
    """Returns the scores as lines of a table, followed by extractor and warnings."""
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
