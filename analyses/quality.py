"""Feature stores in, two tidy tables out: what each layer knows, and how similar the layers are.

Probes and neighbours learn on the split "fit"; "choose" chooses penalties and layers; "report" is only scored.
Accuracies are fractions in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from layerprobe.analyses.arrays import Features, Floats, unusable
from layerprobe.analyses.knn import knn_accuracy
from layerprobe.analyses.linear_probe import INVERSE_PENALTIES, ProbeResult, linear_probe
from layerprobe.analyses.similarity import cka_matrix
from layerprobe.analyses.spectrum import effective_rank
from layerprobe.features import FeatureStore
from layerprobe.files import write_text

MODEL, RANDOM_WEIGHTS, RAW_INPUT = "model", "random weights", "raw input"
PROBE, KNN, RANK = "probe accuracy", "knn accuracy", "effective rank"
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
SIMILARITY_COLUMNS = ("layer_a", "noise_level_a", "layer_b", "noise_level_b", "cka")

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class _Measurement:
    metric: str
    split: str
    value: float
    note: str
    correct: Floats | None = None  # per sample, averaged over draws


def measure(
    stores: Mapping[str, FeatureStore],
    *,
    seed: int = 0,
    inverse_penalties: Sequence[float] = INVERSE_PENALTIES,
    k: int = 10,
    progress: Progress | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs the analyses on every layer and noise level of every store.

    With several noise draws every draw is analysed alone and the results are averaged: accuracies per sample, the
    effective rank and CKA as numbers. Stores without labels get effective rank and similarity only.

    Args:
        stores: One store per source: "model", and the controls "random weights" and "raw input".
        seed: Of the bootstrap.
        inverse_penalties: Values of C that linear probes choose from.
        k: Neighbours; fewer if the fit split is smaller.
        progress: Called with (steps done, steps in all).

    Returns:
        The quality table, one row per source, layer, noise level, metric and split; `low` and `high` are the 95 %
        bootstrap interval over the samples that were scored, nan for the effective rank. A value that does not exist
        is nan and its note says why. The similarity table: debiased linear CKA on the choose split between all layers
        and noise levels of the source "model", in both orders and with themselves.

    Raises:
        ValueError: If a store lacks samples in a split that is needed, or its labels do not allow a probe.
    """
    for source, store in stores.items():
        _check(source, store)
    wanted = [
        (source, layer, level)
        for source, store in stores.items()
        for layer in store.layers
        for level in store.noise_levels
    ]
    draws_compared = stores[MODEL].draws if MODEL in stores else 0
    total = len(wanted) + draws_compared
    found = []
    for done, (source, layer, level) in enumerate(wanted, 1):
        found.append(_measurements(stores[source], layer, level, inverse_penalties, k))
        if progress:
            progress(done, total)
    quality = _quality_table(wanted, found, stores, seed)
    if not draws_compared:
        return quality, pd.DataFrame(columns=list(SIMILARITY_COLUMNS))
    values, reasons = _similarities(
        stores[MODEL], lambda draw: progress(len(wanted) + draw, total) if progress else None
    )
    for (layer, level), reason in reasons.items():
        row = (quality["source"] == MODEL) & (quality["layer"] == layer) & (quality["noise_level"] == level)
        row &= (quality["metric"] == RANK) & (quality["note"] != reason)
        quality.loc[row, "note"] += f"; no CKA: {reason}"
    return quality, _similarity_table(stores[MODEL], values)


def bootstrap_interval(
    correct: NDArray[Any], *, seed: int, resamples: int = 1000, confidence: float = 0.95
) -> tuple[Floats, Floats]:
    """Percentile bootstrap interval of the mean over samples.

    It covers which samples were scored, not which samples the probe was fitted on. All rows see the same resamples,
    so rows of the same samples can be compared.

    Args:
        correct: Scores, shape (..., n).
        seed: Of the resamples; together with n it decides them.
        resamples: Their number.
        confidence: Of the interval.

    Returns:
        Low and high, each of shape (...).
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


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """Writes a table as CSV, whole or not at all; numbers keep all digits, nan is empty."""
    write_text(Path(path), table.to_csv(index=False))


def read_quality(path: str | Path) -> pd.DataFrame:
    """The quality table in a CSV file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If columns are missing.
    """
    return _read(path, QUALITY_COLUMNS, numbers=("layer_index", "noise_level", "value", "low", "high"))


def read_similarity(path: str | Path) -> pd.DataFrame:
    """The similarity table in a CSV file; raises as `read_quality` does."""
    return _read(path, SIMILARITY_COLUMNS, numbers=("noise_level_a", "noise_level_b", "cka"))


def _check(source: str, store: FeatureStore) -> None:
    for split in ("fit", "choose", "report"):
        if not (store.splits == split).any():
            raise ValueError(f"the store of {source!r} has no samples in the split {split!r}; extract all three splits")
    labels = store.labels
    if labels is not None and len(np.unique(labels[store.splits == "fit"])) < 2:
        raise ValueError(f"the fit split of {source!r} has one class only; a probe needs two or more")


def _measurements(
    store: FeatureStore, layer: str, level: float, inverse_penalties: Sequence[float], k: int
) -> list[_Measurement]:
    draws = [store.features(layer, level, draw=draw) for draw in range(store.draws)]
    fit = store.splits == "fit"
    reason = next((why for x in draws if (why := unusable(x) or unusable(x[fit]))), "")
    scored = ("choose", "report") if store.labels is not None else ()
    if reason:
        missing = [(PROBE, split) for split in scored] + [(KNN, split) for split in scored] + [(RANK, "fit")]
        return [_Measurement(metric, split, np.nan, reason) for metric, split in missing]
    found = [_ranks(draws, store)]
    if store.labels is not None:
        found = (
            _probes(draws, store.labels, store.splits, inverse_penalties)
            + _neighbours(draws, store.labels, store.splits, k)
            + found
        )
    return found


def _probes(
    draws: Sequence[Features], labels: NDArray[Any], splits: NDArray[Any], inverse_penalties: Sequence[float]
) -> list[_Measurement]:
    parts = [splits == split for split in ("fit", "choose", "report")]
    results = [
        linear_probe(*(array[part] for part in parts for array in (x, labels)), inverse_penalties=inverse_penalties)
        for x in draws
    ]
    note = _probe_note(results)
    correct = {
        "choose": np.mean([r.choose_correct for r in results], axis=0),
        "report": np.mean([r.report_correct for r in results], axis=0),
    }
    return [_Measurement(PROBE, split, float(c.mean()), note, c) for split, c in correct.items()]


def _probe_note(results: Sequence[ProbeResult]) -> str:
    penalties = ", ".join(f"{c:g}" for c in sorted({r.inverse_penalty for r in results}))
    note = f"C={penalties}, gradient norm {max(r.gradient_norm for r in results):.0e}"
    failed = sum(not r.converged for r in results)
    return f"{note}; {failed} of {len(results)} fits did not converge" if failed else note


def _neighbours(draws: Sequence[Features], labels: NDArray[Any], splits: NDArray[Any], k: int) -> list[_Measurement]:
    bank = splits == "fit"
    k = min(k, int(bank.sum()))
    found = []
    for split in ("choose", "report"):
        query = splits == split
        results = [knn_accuracy(x[bank], labels[bank], x[query], labels[query], k=k) for x in draws]
        correct = np.mean([r.correct for r in results], axis=0)
        found.append(_Measurement(KNN, split, float(correct.mean()), f"k={k}, cosine", correct))
    return found


def _ranks(draws: Sequence[Features], store: FeatureStore) -> _Measurement:
    fit = store.splits == "fit"
    parts = [x[fit] for x in draws]
    n, width = parts[0].shape
    return _Measurement(RANK, "fit", float(np.mean([effective_rank(x) for x in parts])), f"at most {min(n - 1, width)}")


def _quality_table(
    wanted: Sequence[tuple[str, str, float]],
    found: Sequence[Sequence[_Measurement]],
    stores: Mapping[str, FeatureStore],
    seed: int,
) -> pd.DataFrame:
    rows, scores = [], []
    for (source, layer, level), measurements in zip(wanted, found, strict=True):
        index = -1 if source == RAW_INPUT else stores[source].layers.index(layer)
        for m in measurements:
            rows.append((source, layer, index, level, m.metric, m.split, m.value, np.nan, np.nan, m.note))
            scores.append(m.correct)
    table = pd.DataFrame(rows, columns=list(QUALITY_COLUMNS))
    # Scores of as many samples are resampled together: one pass over the resamples serves them all.
    for n in {len(c) for c in scores if c is not None}:
        where = [i for i, c in enumerate(scores) if c is not None and len(c) == n]
        low, high = bootstrap_interval(np.stack([c for c in scores if c is not None and len(c) == n]), seed=seed)
        table.loc[where, "low"], table.loc[where, "high"] = low, high
    return table


class _ChooseSplit(Sequence[Any]):
    """The representations of the choose split, read from disk as they are taken: memory stays at one of them."""

    def __init__(self, store: FeatureStore, draw: int) -> None:
        self.store, self.draw = store, draw
        self.keys = _representations(store)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, m: Any) -> Any:
        return self.store.features(*self.keys[m], draw=self.draw, split="choose")


def _representations(store: FeatureStore) -> list[tuple[str, float]]:
    return [(layer, level) for layer in store.layers for level in store.noise_levels]


def _similarities(store: FeatureStore, step: Callable[[int], None]) -> tuple[Floats, dict[tuple[str, float], str]]:
    """CKA of all representations, averaged over draws, and why some have none."""
    keys = _representations(store)
    total = np.zeros((len(keys), len(keys)))
    reasons: dict[tuple[str, float], str] = {}
    for draw in range(store.draws):
        result = cka_matrix(_ChooseSplit(store, draw))
        total += result.values
        reasons |= {key: reason for key, reason in zip(keys, result.reasons, strict=True) if reason}
        step(draw + 1)
    return total / store.draws, reasons


def _similarity_table(store: FeatureStore, values: Floats) -> pd.DataFrame:
    keys = _representations(store)
    rows = [(*a, *b, values[i, j]) for i, a in enumerate(keys) for j, b in enumerate(keys)]
    return pd.DataFrame(rows, columns=list(SIMILARITY_COLUMNS))


def _read(path: str | Path, columns: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    # Everything as text first: a layer may be called "null", and the quick float parser loses the last digit.
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]}; it is no such table, run `layerprobe analyze` again")
    for column in numbers:
        table[column] = np.array([float(text or "nan") for text in table[column]])
    return table.astype({"layer_index": np.int64}) if "layer_index" in numbers else table
