"""The analyses: functions that measure one representation and return rows of the quality table.

Each takes a `Representation` and returns `Measurement`s. A new analysis is such a function in any file: pass it to
`measure`, or to the command line as `--analysis file.py:function`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerprobe.analyses.measures import (
    DenseProbeResult,
    Features,
    Floats,
    ProbeResult,
    dense_probe,
    knn_accuracy,
    lidar,
    linear_probe,
    spatial_structure,
    spectrum,
    unusable,
)
from layerprobe.data import MISSING, known_labels
from layerprobe.extraction import SPLITS, FeatureStore

PROBE, KNN, RANK = "probe accuracy", "knn accuracy", "effective rank"
CPU: torch.device = torch.device("cpu")
_PROBE_OF = f"{PROBE} of "
NUM_NEIGHBORS = 10
# How a note says that an accuracy may be too low; cautions count them.
UNFINISHED, LAST_PENALTY = "did not converge", "took the last C of the search"


def headlines(metrics: Iterable[str]) -> list[str]:
    """Returns the metrics to show first: probes of every label column, nearest neighbors and effective rank."""
    names = list(dict.fromkeys(metrics))
    return [name for name in (PROBE, *filter(probed_column, names), KNN, RANK) if name in names]


def num_neighbors(num_others: int) -> int:
    """Returns the number of nearest neighbors among so many samples: 10, but at most half of them.

    If all are neighbors, every vote is that of the commonest class, and every two layers agree.
    """
    return max(1, min(NUM_NEIGHBORS, num_others // 2))


def num_workers(device: torch.device) -> int | None:
    """Number of representations to measure at a time: one on a GPU, on the CPU one per thread (None)."""
    return None if device.type == "cpu" else 1


def probe_of(column: str) -> str:
    """Returns the name of the metric for the probe of a further label column."""
    return _PROBE_OF + column


def probed_column(metric: str) -> str:
    """Returns the further label column that a metric probes; "" for any other metric."""
    return metric.removeprefix(_PROBE_OF) if metric.startswith(_PROBE_OF) else ""


@dataclass(frozen=True)
class Representation:
    """Features of one layer at one noise level, read from disk when they are first used.

    Attributes:
        store: Feature store that contains them.
        layer: Name of the layer.
        noise_level: Noise level, in [0, 1].
        device: Device that it is measured on.
    """

    store: FeatureStore
    layer: str
    noise_level: float
    device: torch.device = CPU

    @cached_property
    def draws(self) -> list[Features]:
        """Features of every noise draw, each of shape (n, D)."""
        return [self.store.features(self.layer, self.noise_level, draw=d) for d in range(self.store.draws)]

    @cached_property
    def tensors(self) -> list[Tensor]:
        """The same on the device; on the CPU in the same memory."""
        return [torch.from_numpy(x).to(self.device) for x in self.draws]

    @cached_property
    def reason(self) -> str:
        """Reason why the representation cannot be measured, or ""."""
        train = self.store.splits == "train"
        return next((why for x in self.draws if (why := unusable(x) or unusable(x[train]))), "")

    def part(self, x: NDArray[Any], split: str) -> NDArray[Any]:
        """Returns the rows of an array (n, ...) that belong to a split."""
        rows: NDArray[Any] = x[self.store.splits == split]
        return rows

    def rows(self, x: Tensor, split: str, kept: NDArray[np.bool_] | None = None) -> Tensor:
        """Returns the rows of a tensor (n, ...) that belong to a split and, if there is a mask (n,), are kept."""
        chosen = self.store.splits == split
        return x[torch.from_numpy(np.flatnonzero(chosen if kept is None else chosen & kept)).to(x.device)]


@dataclass(frozen=True, eq=False)
class Measurement:
    """One number of a representation, to be one row of the quality table.

    Attributes:
        metric: Name of the metric.
        split: Split that it was measured on.
        value: Value; nan if it is missing, and `note` says why.
        note: How it was measured.
        scores: Scores by sample whose mean is the value, shape (n,), for a bootstrap interval; None for other
            values.
    """

    metric: str
    split: str
    value: float
    note: str
    scores: Floats | None = None


Analysis = Callable[[Representation], Sequence[Measurement]]


def probes(representation: Representation) -> list[Measurement]:
    """Measures accuracy, balanced accuracy and calibration error of linear probes, if there are labels."""
    labels = representation.store.labels
    if labels is None:
        return []
    metrics = (PROBE, "balanced probe accuracy", "probe calibration error")
    if representation.reason:
        return [
            Measurement(metric, split, np.nan, representation.reason)
            for split in ("validation", "test")
            for metric in metrics
        ]
    results, note = _probed(representation, labels)
    measurements = []
    for split, correct, scores in (
        ("validation", [r.validation_correct for r in results], [r.validation for r in results]),
        ("test", [r.test_correct for r in results], [r.test for r in results]),
    ):
        measurements += [
            _mean_of(PROBE, split, correct, note),
            Measurement(metrics[1], split, float(np.mean([s.balanced_accuracy for s in scores])), note),
            Measurement(metrics[2], split, float(np.mean([s.calibration_error for s in scores])), note),
        ]
    return measurements


def column_probes(representation: Representation) -> list[Measurement]:
    """Measures the accuracy of a linear probe of every further label column.

    Samples without a label, or of a class that is missing in the training split, are left out; the note counts them.
    """
    measurements: list[Measurement] = []
    for name, labels in representation.store.columns.items():
        if labels.ndim > 1:
            continue
        if representation.reason:
            measurements += [
                Measurement(probe_of(name), s, np.nan, representation.reason) for s in ("validation", "test")
            ]
            continue
        usable = known_labels(labels, representation.part(labels, "train"))
        results, note = _probed(representation, labels, usable)
        for split in ("validation", "test"):
            correct = [r.validation_correct if split == "validation" else r.test_correct for r in results]
            counts = _left_out(representation.part(labels, split), representation.part(usable, split))
            measurements.append(_mean_of(probe_of(name), split, correct, f"{note}{counts}"))
    return measurements


def frame_probes(representation: Representation) -> list[Measurement]:
    """Measures the accuracy of a linear probe of every column that labels frames, on the kept tokens.

    Tokens are averaged over the other axes of their grid. The accuracy of a sample is the share of its labeled frames
    that are classified correctly.
    """
    measurements = []
    for name, labels in representation.store.columns.items():
        if labels.ndim > 1:
            measurements += _frame_probe(representation, name, labels)
    return measurements


def _frame_probe(representation: Representation, name: str, labels: NDArray[np.int64]) -> list[Measurement]:
    store, layer, level = representation.store, representation.layer, representation.noise_level
    grid = store.grid(layer) if len(store.token_rows) else None
    if grid is None or representation.reason:
        missing = "its tokens are on no grid" if len(store.token_rows) else "no tokens were kept; pass --token-samples"
        reason = representation.reason or missing
        return [Measurement(probe_of(name), split, np.nan, reason) for split in ("validation", "test")]
    kept = {split: labels[store.token_rows][store.token_splits == split] for split in SPLITS}
    known = {split: np.where(known_labels(y, kept["train"]), y, MISSING) for split, y in kept.items()}
    axis = store.manifest["columns"][name]["axis"]
    results = [
        dense_probe(
            {
                split: _repeat_last_frame(
                    _mean_along(store.tokens(layer, level, draw=draw, split=split), grid, axis), kept[split]
                )
                for split in SPLITS
            },
            known,
            grid[axis : axis + 1],
            ignore=MISSING,
        )
        for draw in range(store.draws)
    ]
    fits = _fit_note(results)
    measurements = []
    for split in ("validation", "test"):
        scores = [r.validation if split == "validation" else r.test for r in results]
        right = [s.confusions.trace(axis1=1, axis2=2) / np.maximum(s.confusions.sum((1, 2)), 1) for s in scores]
        some = (known[split] != MISSING).any(axis=1)
        note = f"{fits}; share of frames, mean over {some.sum()} samples, mean IoU {scores[0].mean_iou:.2f}"
        counts = _left_out(kept[split].ravel(), (known[split] != MISSING).ravel())
        measurements.append(_mean_of(probe_of(name), split, [each[some] for each in right], f"{note}{counts}"))
    return measurements


def _mean_along(tokens: Features, grid: tuple[int, ...], axis: int) -> Features:
    """Tokens (n, T, D) averaged over all axes of their grid but one, shape (n, grid[axis], D)."""
    others = tuple(1 + a for a in range(len(grid)) if a != axis)
    mean: Features = tokens.reshape(len(tokens), *grid, -1).mean(axis=others)
    return mean


def _repeat_last_frame(tokens: Features, labels: NDArray[np.int64]) -> Features:
    """Tokens (n, T, D) in which those after the last labeled frame repeat it.

    The logits are interpolated between frames, and padding may follow the last one. Labels have shape (n, frames).
    """
    frames, cells = labels.shape[1], tokens.shape[1]
    last = frames - 1 - (labels[:, ::-1] != MISSING).argmax(axis=1)
    where = np.minimum(np.arange(cells), (last * cells // frames)[:, None])
    repeated: Features = np.take_along_axis(tokens, where[..., None], axis=1)
    return repeated


def _probed(
    representation: Representation, labels: NDArray[np.int64], rows: NDArray[np.bool_] | None = None
) -> tuple[list[ProbeResult], str]:
    """Fits a linear probe for every noise draw, and describes the fits.

    Args:
        representation: Representation to probe.
        labels: Labels, shape (n,).
        rows: Mask of the samples to use, shape (n,); all if None.
    """
    kept = np.ones(len(labels), np.bool_) if rows is None else rows
    train_y, validation_y, test_y = (labels[kept & (representation.store.splits == split)] for split in SPLITS)
    results = []
    for x in representation.tensors:
        train, validation, test = (representation.rows(x, split, kept) for split in SPLITS)
        results.append(linear_probe(train, train_y, validation, validation_y, test, test_y))
    return results, _fit_note(results)


def _fit_note(results: Sequence[ProbeResult | DenseProbeResult]) -> str:
    """The penalties and the certificate of fits, and how many of them may be too bad."""
    penalties = ", ".join(f"{c:g}" for c in sorted({r.inverse_penalty for r in results}))
    note = f"C={penalties}, gradient norm {max(r.gradient_norm for r in results):.0e}"
    counts = {UNFINISHED: sum(not r.converged for r in results), LAST_PENALTY: sum(r.search_end != "" for r in results)}
    return note + "".join(f"; {count} of {len(results)} fits {sign}" for sign, count in counts.items() if count)


def _left_out(labels: NDArray[np.int64], known: NDArray[np.bool_]) -> str:
    missing = int((labels == MISSING).sum())
    unseen = len(known) - int(known.sum()) - missing
    reasons = [f"{missing} without a label"] * bool(missing)
    reasons += [f"{unseen} of a class that is missing in the training split"] * bool(unseen)
    return f"; left out of {len(known)}: {', '.join(reasons)}" if reasons else ""


def neighbors(representation: Representation) -> list[Measurement]:
    """Measures the accuracy of nearest neighbors, if there are labels."""
    labels = representation.store.labels
    if labels is None:
        return []
    if representation.reason:
        return [Measurement(KNN, split, np.nan, representation.reason) for split in ("validation", "test")]
    part, rows, bank_y = representation.part, representation.rows, representation.part(labels, "train")
    k = num_neighbors(len(bank_y))
    measurements = []
    for split in ("validation", "test"):
        query_y = part(labels, split)
        correct = [
            knn_accuracy(rows(x, "train"), bank_y, rows(x, split), query_y, k=k).correct for x in representation.tensors
        ]
        measurements.append(_mean_of(KNN, split, correct, f"k={k}, cosine"))
    return measurements


def spectra(representation: Representation) -> list[Measurement]:
    """Measures ranks, power law and anisotropy on the training split; LiDAR too if there are several noise draws."""
    if representation.reason:
        return [Measurement(RANK, "train", np.nan, representation.reason)]
    parts = [representation.rows(x, "train") for x in representation.tensors]
    spectra_by_draw = [spectrum(x) for x in parts]
    most = f"at most {min(parts[0].shape[0] - 1, parts[0].shape[1])}"
    laws = [s.power_law for s in spectra_by_draw]
    ranks = f"ranks {laws[0].first_rank} to {laws[0].last_rank}, R^2 {np.mean([law.r_squared for law in laws]):.2f}"
    numbers: dict[str, tuple[Any, str]] = {
        RANK: (np.mean([s.effective_rank for s in spectra_by_draw]), most),
        "RankMe": (np.mean([s.rank_me for s in spectra_by_draw]), "not centered"),
        "participation ratio": (np.mean([s.participation_ratio for s in spectra_by_draw]), most),
        "spectrum exponent": (np.mean([law.exponent for law in laws]), ranks),
        "anisotropy": (np.mean([s.anisotropy for s in spectra_by_draw]), "not centered"),
    }
    if len(parts) > 1:
        ranked = lidar(np.stack([x.numpy(force=True) for x in parts], axis=1))
        has_few = parts[0].shape[0] * (len(parts) - 1) <= parts[0].shape[1]
        few = f"; depends on its ridge: too few draws for {parts[0].shape[1]} directions" if has_few else ""
        numbers["LiDAR"] = (ranked.rank, ranked.reason or f"{len(parts)} noise draws{few}")
    return [Measurement(metric, "train", float(value), note) for metric, (value, note) in numbers.items()]


def spatial(representation: Representation) -> list[Measurement]:
    """Measures the spatial structure of the kept tokens of the test split, unless some are padding."""
    store, layer = representation.store, representation.layer
    grid = store.grid(layer) if len(store.token_rows) and not store.tokens_padded else None
    if grid is None or int(np.prod(grid)) == 1:
        return []
    tokens = [store.tokens(layer, representation.noise_level, draw=d, split="test") for d in range(store.draws)]
    structures = [spatial_structure(x, grid, center=True) for x in tokens]
    reason = next((s.reason for s in structures if s.reason), "")
    note = reason or f"centered, distant from {structures[0].far_distance} cells, {len(tokens[0])} samples"
    scores = {
        "local contrast (LDS)": [s.lds for s in structures],
        "spatial contrast (RMSC)": [s.rmsc for s in structures],
    }
    return [_mean_of(metric, "test", values, note) for metric, values in scores.items()]


def _mean_of(metric: str, split: str, scores: Sequence[NDArray[Any]], note: str) -> Measurement:
    """The mean of scores by sample, averaged over noise draws first."""
    mean = np.mean(np.asarray(scores, np.float64), axis=0)
    finite = bool(np.isfinite(mean).all()) and len(mean) > 0
    return Measurement(metric, split, float(mean.mean()) if finite else np.nan, note, mean if finite else None)
