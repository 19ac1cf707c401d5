"""Measurement of the evidence on layer pairs, from the features and the probes of a run.

Quantities that need labels come from the probes and the nearest neighbors of the run, scored on its validation split.
All other quantities come from a few hundred samples of the training and validation splits, two noise draws each, and a
few tokens of each sample: cheap enough to be measured again while a model trains. The test split is not used, so the
choice of a pair does not inflate the accuracies that are reported for it.

Intervals are 95 % intervals by the jackknife over samples (see `layerprobe.analyses.measures.jackknife`). They are
paired if two layers were measured on the same samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from layerprobe.analyses.measures import (
    Estimate,
    Features,
    Floats,
    cka_estimates,
    cknna_estimates,
    effective_rank_estimate,
    lidar_estimate,
    mean_estimate,
    missed_by_sample,
    neighbor_graph,
    ratio_estimate,
    shared_basis,
    spatial_contrast,
    stacked,
)
from layerprobe.analyses.tables.evidence import (
    CKA,
    CKNNA,
    COSINE,
    KNN_GAP,
    LIDAR_GAP,
    NOISE_LIDAR,
    PROBE_GAP,
    RANK_GAP,
    RECOVERABILITY,
    SPATIAL_CONTRAST,
    SPATIAL_GAP,
    PairEvidence,
    Quantity,
)
from layerprobe.analyses.tables.measurements import (
    KNN,
    PROBE,
    RANK,
    Measurement,
    num_neighbors,
)
from layerprobe.analyses.tables.quality import MAX_RANK, MODEL
from layerprobe.extraction import LOSS_INCREASE, VELOCITY_CHANGE, FeatureStore, pair_layers
from layerprobe.ranks import ALONE, Ranks

MAX_SAMPLES = 512  # Gram matrices of all layers fit into memory then
LEAST_SAMPLES = 8
_MAX_TOKENS = 16  # tokens of a sample, where whole grids were kept
_MAX_COLUMNS = 8192  # layers times directions, for the moments of tokens

_NO_DRAWS = "the features have one noise draw; two or more are needed"
_NO_TOKENS = "no tokens were kept"

# Which samples a layer classifies correctly, by metric, layer and noise level: arrays (n,), None where there is none.
SampleScores = Mapping[tuple[str, str, float], Floats | None]


def measure_evidence(
    store: FeatureStore,
    *,
    scores: SampleScores | None = None,
    ablation: pd.DataFrame | None = None,
    ranks: Ranks = ALONE,
) -> PairEvidence:
    """Measures all quantities of the layers, and of all pairs of an earlier and a later layer of the same shape.

    Without scores the quantities that need labels are left out. Noise-LiDAR needs two noise draws; recoverability,
    spatial contrast and cosine need tokens. Where they are missing the values are nan and the notes say why.

    Args:
        store: Features of the model, such as `extract_evidence` makes them.
        scores: Scores of probes and nearest neighbors by sample of the validation split, from `ScoreKeeper`.
        ablation: Rows of the quality table for skipped layers, measured on the validation split.
        ranks: Processes that share the noise levels and all call this function; all get the evidence.

    Raises:
        ValueError: If there are too few samples.
    """
    layers = pair_layers(store.layers)
    levels = store.noise_levels
    students, teachers = _pairs(layers, store.manifest["layer_shapes"])
    table = _Measuring(layers, levels, students, teachers)
    if len(students):
        table.add_geometry(ranks.whole([_at_level(store, layers, level) for level in ranks.mine(levels)]))
    table.add_accuracies(scores or {})
    if ablation is not None:
        table.add_ablation(ablation[ablation["source"] == MODEL])
    return PairEvidence(layers, tuple(levels), students, teachers, table.by_layer, table.by_pair)


def _pairs(layers: Sequence[str], shapes: Mapping[str, Sequence[int]]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Positions of students and teachers of one shape, each student before its teacher."""
    places = [
        (s, t)
        for s, student in enumerate(layers)
        for t, teacher in enumerate(layers)
        if s < t and tuple(shapes[student]) == tuple(shapes[teacher])
    ]
    students, teachers = np.array(places, np.intp).reshape(-1, 2).T
    return students, teachers


class ScoreKeeper:
    """Keeps the scores by sample of probes and nearest neighbors; the quality table only holds their means.

    Attributes:
        scores: Scores of the model on the validation split by metric, layer and noise level, arrays (n,); None for a
            representation that could not be measured.
        probe_scores: Scores of the probes of the model on the test split by layer and noise level, arrays (n,); runs
            are compared by them.
    """

    def __init__(self) -> None:
        self.scores: dict[tuple[str, str, float], Floats | None] = {}
        self.probe_scores: dict[tuple[str, float], Floats] = {}

    def listen(self, source: str, layer: str, noise_level: float, measurements: Sequence[Measurement]) -> None:
        """Keeps the scores of a representation; the `listener` of `measure`."""
        if source != MODEL:
            return
        for m in measurements:
            if m.metric in (PROBE, KNN) and m.split == "validation":
                self.scores[m.metric, layer, noise_level] = m.scores
            if m.metric == PROBE and m.split == "test" and m.scores is not None:
                self.probe_scores[layer, noise_level] = m.scores


class _Measuring:
    """The quantities so far."""

    def __init__(
        self,
        layers: Sequence[str],
        levels: Sequence[float],
        students: NDArray[np.intp],
        teachers: NDArray[np.intp],
    ) -> None:
        self.layers, self.levels, self.students, self.teachers = tuple(layers), tuple(levels), students, teachers
        self.by_layer: dict[str, Quantity] = {}
        self.by_pair: dict[str, Quantity] = {}

    def add_geometry(self, by_level: Sequence[_Level]) -> None:
        """The quantities that need no labels."""
        notes = [level.notes for level in by_level]
        for quantity, gap, absent in (
            (NOISE_LIDAR, LIDAR_GAP, _NO_DRAWS),
            (RANK, RANK_GAP, ""),
            (SPATIAL_CONTRAST, SPATIAL_GAP, _NO_TOKENS),
        ):
            estimate = _over_levels(by_level, "by_layer", quantity)
            if estimate is None:
                self.by_layer[quantity] = Quantity.missing(len(self.levels), len(self.layers), absent)
                self.by_pair[gap] = Quantity.missing(len(self.levels), len(self.students), absent)
            else:
                self.by_layer[quantity] = Quantity.from_estimate(estimate, notes)
                self._add_gap(gap, estimate if quantity == SPATIAL_CONTRAST else estimate.log(), notes)
        for quantity in (CKA, CKNNA, COSINE, RECOVERABILITY):
            estimate = _over_levels(by_level, "by_pair", quantity)
            if estimate is None:
                self.by_pair[quantity] = Quantity.missing(len(self.levels), len(self.students), _NO_TOKENS)
            else:
                of_pairs = estimate[:, self.students, self.teachers]
                self.by_pair[quantity] = Quantity.from_estimate(of_pairs, self._pair_notes(notes))

    def add_accuracies(self, scores: SampleScores) -> None:
        """The quantities that need labels."""
        for metric, gap in ((PROBE, PROBE_GAP), (KNN, KNN_GAP)):
            by_sample = [[scores.get((metric, layer, level)) for layer in self.layers] for level in self.levels]
            lengths = {len(x) for level in by_sample for x in level if x is not None}
            if not lengths:
                continue
            (n,) = lengths
            notes = [["" if x is not None else f"there is no {metric}" for x in level] for level in by_sample]
            estimate = mean_estimate(
                np.array([[np.full(n, np.nan) if x is None else x for x in level] for level in by_sample], np.float64)
            )
            half = estimate.half_width
            self.by_layer[metric] = Quantity.from_ends(
                estimate.value, estimate.value - half, estimate.value + half, notes
            )
            self._add_gap(gap, estimate, notes)

    def add_ablation(self, rows: pd.DataFrame) -> None:
        """What skipping a layer changes, from rows of the quality table."""
        for metric in (VELOCITY_CHANGE, LOSS_INCREASE):
            of_metric = rows[(rows["metric"] == metric) & (rows["split"] == "validation")]
            records: list[Any] = list(of_metric.itertuples())
            by_place = {(row.layer, row.noise_level): row for row in records}
            by_level = [[by_place.get((layer, level)) for layer in self.layers] for level in self.levels]
            value, low, high = (
                np.array(
                    [[np.nan if row is None else getattr(row, end) for row in level] for level in by_level], np.float64
                )
                for end in ("value", "low", "high")
            )
            notes = [[f"there is no {metric}" if row is None else str(row.note) for row in level] for level in by_level]
            self.by_layer[metric] = Quantity.from_ends(value, low, high, notes)

    def _add_gap(self, name: str, estimate: Estimate, notes: Sequence[Sequence[str]]) -> None:
        """Teacher minus student, from estimates (V, L) of the same samples."""
        gap = estimate[:, self.teachers] - estimate[:, self.students]
        self.by_pair[name] = Quantity.from_estimate(gap, self._pair_notes(notes))

    def _pair_notes(self, notes: Sequence[Sequence[str]]) -> list[list[str]]:
        """For each pair the note of the first of its layers that has one."""
        named = [[note and f"{name}: {note}" for name, note in zip(self.layers, row, strict=True)] for row in notes]
        return [[row[s] or row[t] for s, t in zip(self.students, self.teachers, strict=True)] for row in named]


# ------------------------------------------------------------------------------------------- quantities without labels


@dataclass(frozen=True, eq=False)
class _Level:
    """All layers at one noise level; nan where there is no answer.

    Attributes:
        notes: Why a layer has no answer, L strings, each "" where it has one.
        by_layer: Estimates (L,): noise-LiDAR, effective rank and, where there are tokens, spatial contrast.
        by_pair: Estimates (L, L), [student, teacher].
    """

    notes: tuple[str, ...]
    by_layer: Mapping[str, Estimate]
    by_pair: Mapping[str, Estimate]


def _over_levels(by_level: Sequence[_Level], kind: str, name: str) -> Estimate | None:
    parts = [getattr(level, kind).get(name) for level in by_level]
    return None if parts[0] is None else stacked(parts)


def _at_level(store: FeatureStore, layers: Sequence[str], level: float) -> _Level:
    """All layers at one noise level."""
    rows = _chosen_rows(store)
    features = [_draws(store, layer, level)[rows] for layer in layers]
    reasons = tuple(_unusable(x) for x in features)
    positions = [i for i, reason in enumerate(reasons) if not reason]
    usable = [features[i] for i in positions]
    num = len(layers)
    by_layer, by_pair = {}, {}
    # Of all directions: within those that the layers share, a wide layer's rank would end at their number.
    by_layer[RANK] = _scattered([effective_rank_estimate(x[:, 0]) for x in usable], positions, num, len(rows))
    if store.draws > 1:
        lidars = [lidar_estimate(x) for x in _narrowed(usable)]
        by_layer[NOISE_LIDAR] = _scattered(lidars, positions, num, len(rows))
    by_pair[CKA] = _averaged([cka_estimates([x[:, d] for x in usable]) for d in range(store.draws)], positions, num)
    k = num_neighbors(len(rows) - 1)
    graphs = [[neighbor_graph(x[:, d], k=k) for x in usable] for d in range(store.draws)]
    by_pair[CKNNA] = _averaged([cknna_estimates(of_draw) for of_draw in graphs], positions, num)
    if len(store.token_rows):
        of_tokens = _of_tokens(store, layers, positions, level)
        by_layer[SPATIAL_CONTRAST] = of_tokens.pop(SPATIAL_CONTRAST)
        by_pair |= of_tokens
    return _Level(reasons, by_layer, by_pair)


def _chosen_rows(store: FeatureStore) -> NDArray[np.intp]:
    """Samples of the validation split, then of the training split, at most `MAX_SAMPLES`."""
    rows = np.concatenate([np.flatnonzero(store.splits == split) for split in ("validation", "train")])[:MAX_SAMPLES]
    if len(rows) < LEAST_SAMPLES:
        raise ValueError(
            f"{len(rows)} samples in the training and validation splits are too few; extract {LEAST_SAMPLES} or more"
        )
    return rows


def _draws(store: FeatureStore, layer: str, level: float) -> Features:
    """Features under every noise draw, shape (n, draws, D)."""
    return np.stack([store.features(layer, level, draw=draw) for draw in range(store.draws)], axis=1)


def _unusable(x: Features) -> str:
    if not np.isfinite(x).all():
        return "the features hold nan or inf"
    return "the features are the same for all samples" if (x == x[:1]).all(axis=(0, 2)).any() else ""


def _narrowed(features: Sequence[Features]) -> list[Features]:
    """Projects wide layers onto the directions of largest variance: LiDAR has too few draws for all directions."""
    widths: dict[int, list[Features]] = {}
    for x in features:
        widths.setdefault(x.shape[2], []).append(x)
    bases = {width: shared_basis(of_width, rank=MAX_RANK) for width, of_width in widths.items() if width > MAX_RANK}
    return [x @ bases[x.shape[2]] if x.shape[2] in bases else x for x in features]


def _scattered(parts: Sequence[Estimate], positions: Sequence[int], num: int, n: int) -> Estimate:
    """Estimates of the layers that have one, and nan for the others: shape (L,)."""
    value, influence = np.full(num, np.nan), np.full((num, n), np.nan)
    for i, part in zip(positions, parts, strict=True):
        value[i], influence[i] = part.value, part.influence
    return Estimate(value, influence)


def _averaged(draws: Sequence[Estimate], positions: Sequence[int], num: int) -> Estimate:
    """Estimates of pairs of usable layers averaged over noise draws, and nan for the others: shape (L, L)."""
    mean = stacked(draws).mean(0)
    value, influence = np.full((num, num), np.nan), np.full((num, num, mean.influence.shape[-1]), np.nan)
    where = np.ix_(positions, positions)
    value[where], influence[where] = mean.value, mean.influence
    return Estimate(value, influence)


def _of_tokens(
    store: FeatureStore, layers: Sequence[str], positions: Sequence[int], level: float
) -> dict[str, Estimate]:
    """Spatial contrast (L,), cosine and recoverability gap (L, L), of the tokens of the validation split.

    The ridge regressions are fitted on three quarters of the training split; the rest of it chooses their penalties.
    """
    num = len(layers)
    parts = {
        split: {i: _tokens(store, layers[i], level, split) for i in positions} for split in ("train", "validation")
    }
    validation = parts["validation"]
    n = len(next(iter(validation.values())))
    contrast = [mean_estimate(_contrast(validation[i])) for i in positions]
    cosine, gap = (Estimate(np.full((num, num), np.nan), np.full((num, num, n), np.nan)) for _ in range(2))
    for group in _groups(validation):
        for s in group:
            for t in group:
                if s < t:
                    estimate = mean_estimate(_cosine(validation[s], validation[t]))
                    cosine.value[s, t], cosine.influence[s, t] = estimate.value, estimate.influence
        where = np.ix_(group, group)
        shares = _gaps(
            [layers[i] for i in group], [[parts[split][i] for i in group] for split in ("train", "validation")]
        )
        gap.value[where], gap.influence[where] = shares.value, shares.influence
    return {SPATIAL_CONTRAST: _scattered(contrast, positions, num, n), COSINE: cosine, RECOVERABILITY: gap}


def _tokens(store: FeatureStore, layer: str, level: float, split: str) -> Features:
    """Some tokens of each sample under every draw, shape (n, draws, T, D)."""
    kept = [store.tokens(layer, level, draw=draw, split=split)[: MAX_SAMPLES // 2] for draw in range(store.draws)]
    step = -(-kept[0].shape[1] // _MAX_TOKENS)
    return np.stack([x[:, ::step] for x in kept], axis=1)


def _groups(tokens: Mapping[int, Features]) -> list[list[int]]:
    """Layers of equal shape, two or more of them."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for i, x in tokens.items():
        shapes.setdefault(x.shape, []).append(i)
    return [group for group in shapes.values() if len(group) > 1]


def _contrast(tokens: Features) -> Floats:
    """RMSC of each sample, averaged over draws, shape (n,)."""
    contrast: Floats = np.mean([spatial_contrast(tokens[:, draw]) for draw in range(tokens.shape[1])], axis=0)
    return contrast


def _cosine(student: Features, teacher: Features) -> Floats:
    """Mean over a sample's tokens and draws of the cosine over channels, shape (n,)."""
    lengths = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
    cosines = (student * teacher).sum(-1) / np.maximum(lengths, 1e-12)
    mean: Floats = cosines.mean((1, 2), dtype=np.float64)
    return mean


def _gaps(layers: Sequence[str], tokens: Sequence[Sequence[Features]]) -> Estimate:
    """Recoverability gap of all pairs of layers, from their tokens of the training and the validation split."""
    train, validation = ([x.reshape(len(x), -1, x.shape[-1]) for x in part] for part in tokens)
    if train[0].shape[2] > MAX_RANK:
        basis = shared_basis(train, rank=min(MAX_RANK, _MAX_COLUMNS // len(layers)))
        train, validation = ([x @ basis for x in part] for part in (train, validation))
    num_fitted = 3 * len(train[0]) // 4
    missed, increment = missed_by_sample(
        layers,
        {
            "train": [x[:num_fitted] for x in train],
            "validation": [x[num_fitted:] for x in train],
            "test": validation,
        },
    )
    return ratio_estimate(missed, increment)
