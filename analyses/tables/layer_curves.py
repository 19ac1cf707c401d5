"""Layer quality during a training: what is measured at one step, and what has changed since the steps before.

Every step is measured on the same samples under the same noise, so a curve shows the training and not the draw. The
quality of a layer is the accuracy of a linear probe, or noise-LiDAR without labels. The probe has one fixed penalty and
is scored on samples that it was not fitted on; `layerprobe probe` chooses the penalty and reads more samples, so its
accuracies are higher.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from layerprobe.analyses.measures import (
    Estimate,
    Features,
    Floats,
    effective_rank,
    lidar_estimate,
    linear_cka,
    linear_probe,
    mean_estimate,
    stacked,
    unusable,
)
from layerprobe.analyses.tables.evidence import CKA, COSINE, NOISE_LIDAR
from layerprobe.analyses.tables.evidence_measures import _cosine, _draws, _narrowed, _scattered, _tokens
from layerprobe.analyses.tables.measurements import PROBE, RANK
from layerprobe.extraction import FeatureStore

START_CKA = "CKA with the start"
CURVE_COLUMNS = ("step", "layer", "noise_level", "metric", "value", "low", "high")
INVERSE_PENALTY = 1.0  # of the probe; a penalty chosen on the scored samples would flatter every layer
CAUGHT_UP = 0.95  # cosine and CKA from which on the student is taken to be like its teacher
DRIFTED = 0.5  # CKA with the start below which a layer is another representation
COLLAPSED = 0.25  # share of its highest effective rank, as in `LayerSync.statistics`

LayerNames = tuple[str, str]


@dataclass(frozen=True, eq=False)
class StepQuality:
    """All layers at one step of a training; V noise levels, L layers, P pairs; nan where there is no answer.

    Attributes:
        layers: Names of the layers, in running order.
        noise_levels: Noise levels, ascending.
        pairs: Student and teacher of each pair.
        metric: What `quality` is: "probe accuracy", or "noise-LiDAR" without labels.
        quality: Quality of each layer, shape (V, L).
        rank: Effective rank, shape (V, L).
        start_cka: Debiased CKA of each layer with itself at the start, shape (V, L).
        cosine: Mean cosine between the tokens of student and teacher, shape (V, P); nan if their widths differ.
        cka: Debiased CKA of student and teacher, shape (V, P).
    """

    layers: tuple[str, ...]
    noise_levels: tuple[float, ...]
    pairs: tuple[LayerNames, ...]
    metric: str
    quality: Estimate
    rank: Floats
    start_cka: Floats
    cosine: Floats
    cka: Floats

    def rows(self, step: int) -> list[dict[str, Any]]:
        """Returns the numbers as rows of a table with `CURVE_COLUMNS`; the layer of a pair is "STUDENT <- TEACHER".

        Args:
            step: Step of the training.
        """
        pairs = tuple(f"{student} <- {teacher}" for student, teacher in self.pairs)
        half = self.quality.half_width
        rows = []
        for v, level in enumerate(self.noise_levels):
            for i, layer in enumerate(self.layers):
                value = self.quality.value[v, i]
                rows.append((step, layer, level, self.metric, value, value - half[v, i], value + half[v, i]))
                rows.append((step, layer, level, RANK, self.rank[v, i], np.nan, np.nan))
                rows.append((step, layer, level, START_CKA, self.start_cka[v, i], np.nan, np.nan))
            for i, pair in enumerate(pairs):
                rows.append((step, pair, level, COSINE, self.cosine[v, i], np.nan, np.nan))
                rows.append((step, pair, level, CKA, self.cka[v, i], np.nan, np.nan))
        return [dict(zip(CURVE_COLUMNS, row, strict=True)) for row in rows]


@dataclass(frozen=True)
class CurveFinding:
    """Something that a step shows and the steps before did not.

    Attributes:
        step: Step of the training.
        code: "richest", "richest moved", "caught up", "drifted" or "collapsed".
        layers: The richest layer; the one before and the one now; student and teacher; or the layers concerned.
        numbers: The numbers that it rests on, means over the noise levels.
    """

    step: int
    code: str
    layers: tuple[str, ...]
    numbers: Mapping[str, float]

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> CurveFinding:
        """Returns the finding of a record that `dataclasses.asdict` has made."""
        return cls(record["step"], record["code"], tuple(record["layers"]), record["numbers"])


def measure_step(
    store: FeatureStore, start: FeatureStore, pairs: Iterable[LayerNames] = (), tokens: FeatureStore | None = None
) -> StepQuality:
    """Measures all layers at one step of a training.

    Args:
        store: Features at this step, of training and validation samples. Layers are probed if the training samples have
            labels of several classes; otherwise the store needs two noise draws.
        start: Features of the same layers, samples and noise to compare with, at the start of the training.
        pairs: Layers that are aligned, as (student, teacher).
        tokens: Tokens of these layers from `extract_tokens`; those of `store` if None.

    Raises:
        ValueError: If `start` has other samples or noise, or lacks a layer.
    """
    differs = any(store.manifest["plan"][key] != start.manifest["plan"][key] for key in ("noise_levels", "seed"))
    if differs or store.manifest["data"] != start.manifest["data"]:
        raise ValueError(f"{start.folder} has the features of other samples or noise; measure into another folder")
    if missing := [layer for layer in store.layers if layer not in start.layers]:
        raise ValueError(f"{missing[0]} is not a layer of the model to compare with; pass one that has the same layers")
    pairs, levels, layers = tuple(pairs), store.noise_levels, store.layers
    return StepQuality(
        layers=layers,
        noise_levels=levels,
        pairs=pairs,
        metric=PROBE if is_probed(store) else NOISE_LIDAR,
        quality=stacked([_qualities(store, level) for level in levels]),
        rank=_table(levels, layers, lambda level, layer: _rank(store[layer, level])),
        start_cka=_table(levels, layers, lambda level, layer: _cka(store[layer, level], start[layer, level])),
        cosine=_table(levels, pairs, lambda level, pair: mean_cosine(tokens or store, pair, level)),
        cka=_table(levels, pairs, lambda level, pair: _cka(store[pair[0], level], store[pair[1], level])),
    )


def mean_cosine(tokens: FeatureStore, pair: LayerNames, level: float) -> float:
    """Returns the mean cosine between the kept tokens of two layers; nan if their shapes differ.

    Args:
        tokens: Features from `extract_tokens`.
        pair: Names of student and teacher.
        level: Noise level.
    """
    student, teacher = (_tokens(tokens, layer, level, "validation") for layer in pair)
    return float(_cosine(student, teacher).mean()) if student.shape == teacher.shape else np.nan


def is_probed(store: FeatureStore) -> bool:
    """Whether there are labels of several classes to fit a probe on."""
    return store.labels is not None and len(np.unique(store.labels[store.splits == "train"])) > 1


def curve_findings(
    step: int, now: StepQuality, table: pd.DataFrame, earlier: Sequence[CurveFinding]
) -> list[CurveFinding]:
    """Finds what a step shows and the steps before did not.

    The richest layer moves only to a layer that leads beyond the 95 % interval of the difference, which is paired by
    sample. Everything else is found once for each layer or pair.

    Args:
        step: The step.
        now: What was measured at it.
        table: Rows of the steps before, with `CURVE_COLUMNS`.
        earlier: Findings of the steps before.
    """
    found = [*_richest(step, now, earlier)]
    cosine, cka = now.cosine.mean(0), now.cka.mean(0)
    for i, pair in enumerate(now.pairs):
        gap_before = _lowest(table, pair) < CAUGHT_UP  # Fresh blocks may be identities, alike from the start.
        if gap_before and _is_new("caught up", pair, earlier) and min(cosine[i], cka[i]) >= CAUGHT_UP:
            numbers = {"cosine": float(cosine[i]), "cka": float(cka[i])}
            found.append(CurveFinding(step, "caught up", pair, numbers))
    start_cka, rank = now.start_cka.mean(0), now.rank.mean(0)
    highest = table[table["metric"] == RANK].groupby(["step", "layer"])["value"].mean().groupby("layer").max()
    drifted = {layer: cka for layer, cka in zip(now.layers, start_cka.tolist(), strict=True) if cka < DRIFTED}
    shares = {name: value / highest.get(name, np.nan) for name, value in zip(now.layers, rank.tolist(), strict=True)}
    for code, values in (("drifted", drifted), ("collapsed", {k: v for k, v in shares.items() if v < COLLAPSED})):
        new = [layer for layer in values if not any(f.code == code and layer in f.layers for f in earlier)]
        if new:
            found.append(CurveFinding(step, code, tuple(new), {"lowest": min(values[layer] for layer in new)}))
    return found


def _richest(step: int, now: StepQuality, earlier: Sequence[CurveFinding]) -> list[CurveFinding]:
    mean = now.quality.mean()
    if not np.isfinite(mean.value).any():
        return []
    best = int(np.nanargmax(mean.value))
    held = next((f.layers[-1] for f in reversed(earlier) if f.code.startswith("richest")), None)
    if held not in now.layers:
        numbers = {"value": float(mean.value[best]), "half_width": float(mean.half_width[best])}
        return [CurveFinding(step, "richest", (now.layers[best],), numbers)]
    lead = mean[best] - mean[now.layers.index(held)]
    if not float(lead.value) > float(lead.half_width):
        return []
    numbers = {"lead": float(lead.value), "half_width": float(lead.half_width)}
    return [CurveFinding(step, "richest moved", (held, now.layers[best]), numbers)]


def _lowest(table: pd.DataFrame, pair: LayerNames) -> float:
    """The lowest cosine or CKA of a pair at the steps before, as means over levels."""
    rows = table[table["layer"] == " <- ".join(pair)]
    return float(rows.groupby(["step", "metric"])["value"].mean().min())


def _is_new(code: str, layers: LayerNames, earlier: Sequence[CurveFinding]) -> bool:
    return not any(finding.code == code and finding.layers == layers for finding in earlier)


def _qualities(store: FeatureStore, level: float) -> Estimate:
    """Probe accuracies or noise-LiDAR of all layers at one level, shape (L,)."""
    draws = [_draws(store, layer, level) for layer in store.layers]
    positions = [i for i, x in enumerate(draws) if not unusable(x[:, 0])]
    usable = [draws[i] for i in positions]
    if not is_probed(store):
        return _scattered([lidar_estimate(x) for x in _narrowed(usable)], positions, len(draws), len(store.ids))
    num_scored = int((store.splits == "validation").sum())
    return _scattered([_accuracy(store, x[:, 0]) for x in usable], positions, len(draws), num_scored)


def _accuracy(store: FeatureStore, x: Features) -> Estimate:
    """The accuracy of a probe with one penalty on the validation half."""
    assert store.labels is not None
    parts = [(x[rows], store.labels[rows]) for rows in (store.splits == "train", store.splits == "validation")]
    (train_x, train_y), (held_out_x, held_out_y) = parts
    result = linear_probe(
        train_x, train_y, held_out_x, held_out_y, held_out_x, held_out_y, inverse_penalties=(INVERSE_PENALTY,)
    )
    return mean_estimate(result.validation_correct.astype(np.float64))


def _rank(x: Features) -> float:
    return np.nan if unusable(x) else effective_rank(x)


def _cka(x: Features, y: Features) -> float:
    return np.nan if unusable(x) or unusable(y) else linear_cka(x, y)


def _table(levels: Sequence[float], names: Sequence[Any], value: Any) -> Floats:
    return np.array([[value(level, name) for name in names] for level in levels], np.float64).reshape(len(levels), -1)
