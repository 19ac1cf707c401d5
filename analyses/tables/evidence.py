"""The evidence table: all that is known of a layer pair before anything is trained, each number with its interval.

Of a run's features `pair_evidence` makes one tidy table, one row per pair, criterion and noise level, and one more for
the mean over noise levels (noise level nan). Selection, calibration and confirmation read nothing else.

What needs labels comes from the probes of the run, on its validation split. What needs none comes from a few hundred
samples of the training and validation splits, two noise draws each, and a few tokens of each: cheap enough to be looked at again
while a model trains. The test split takes no part, so what is reported of a pick is not inflated by the picking.

Intervals are of 95 %, by the jackknife over samples (see `influence`), paired where two layers saw the same samples.

A gap is teacher minus student. Depths are positions among the layers, 0 the first, 1 the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
from layerprobe.analyses.tables.measurements import (
    KNN,
    NUM_NEIGHBORS,
    PROBE,
    RANK,
    Analysis,
    Measurement,
    Representation,
)
from layerprobe.analyses.tables.quality import MAX_RANK, MODEL
from layerprobe.extraction import LOSS_INCREASE, VELOCITY_CHANGE, FeatureStore, pair_layers
from layerprobe.files import write_text

TEACHER_PROBE, PROBE_GAP, KNN_GAP = "teacher probe accuracy", "probe accuracy gap", "knn accuracy gap"
TEACHER_LIDAR, LIDAR_GAP, RANK_GAP = "teacher noise-LiDAR", "noise-LiDAR gap", "effective rank gap"
CKA, CKNNA, COSINE = "CKA", "CKNNA", "cosine"
RECOVERABILITY, SPATIAL_GAP = "recoverability gap", "spatial structure gap"
STUDENT_CONTRIBUTION, TEACHER_CONTRIBUTION = "student contribution", "teacher contribution"
STUDENT_NEED, TEACHER_NEED = "student loss increase", "teacher loss increase"
STUDENT_DEPTH, TEACHER_DEPTH, DISTANCE = "student depth", "teacher depth", "distance"
CRITERIA = (
    TEACHER_PROBE,
    PROBE_GAP,
    KNN_GAP,
    TEACHER_LIDAR,
    LIDAR_GAP,
    RANK_GAP,
    CKA,
    CKNNA,
    COSINE,
    RECOVERABILITY,
    SPATIAL_GAP,
    STUDENT_CONTRIBUTION,
    TEACHER_CONTRIBUTION,
    STUDENT_NEED,
    TEACHER_NEED,
    STUDENT_DEPTH,
    TEACHER_DEPTH,
    DISTANCE,
)
NEED_LABELS = (TEACHER_PROBE, PROBE_GAP, KNN_GAP)
EVIDENCE_COLUMNS = ("student", "teacher", "criterion", "noise_level", "value", "low", "high", "needs_labels", "note")
MAX_SAMPLES = 512  # Gram matrices of all layers fit into memory then
LEAST_SAMPLES = 8
_MAX_TOKENS = 16  # of a sample, where whole grids were kept
_MAX_COLUMNS = 8192  # layers times directions, of the moments of tokens

# Which samples a layer gets right, by metric, layer and noise level: arrays (n,).
Scores = Mapping[tuple[str, str, float], Floats]


def pair_evidence(
    store: FeatureStore, *, scores: Scores | None = None, quality: pd.DataFrame | None = None
) -> pd.DataFrame:
    """All criteria for all pairs of an earlier and a later layer of one shape.

    Without labels the criteria that need them are not in the table. What else the store or the tables do not have is
    nan, and the note says why: noise-LiDAR needs two noise draws; recoverability, spatial structure and cosine need
    tokens; contributions need the table.

    Args:
        store: Features of the model, such as `extract_evidence` makes them.
        scores: By sample of the validation split, from `ScoreKeeper`: the intervals of accuracy gaps are paired then.
        quality: The quality table, for the contributions and, without `scores`, the accuracies.

    Returns:
        A table with the columns `EVIDENCE_COLUMNS`, empty where no two layers have one shape. A criterion that is the
        same at all noise levels has one row.

    Raises:
        ValueError: If there are too few samples.
    """
    layers = pair_layers(store.layers)
    pairs = _Pairs(layers, store.noise_levels, _alike(layers, store.manifest["layer_shapes"]))
    if not len(pairs.students):
        return pd.DataFrame(columns=list(EVIDENCE_COLUMNS))
    found = [_looked_at(store, layers, level) for level in store.noise_levels]
    tables = [pairs.depths(), *_geometry(pairs, found)]
    known = pd.DataFrame(columns=["source", "metric"]) if quality is None else quality[quality["source"] == MODEL]
    tables += _accuracies(pairs, scores or {}, known)
    tables += _contributions(pairs, known)
    return pd.concat(tables, ignore_index=True)


def table_evidence(
    quality: pd.DataFrame,
    similarity: pd.DataFrame,
    layers: Sequence[str],
    *,
    metric: str,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> pd.DataFrame:
    """What the quality and the similarity table alone tell: less than `pair_evidence`, with wider intervals or none.

    Args:
        quality: As `measure` returns it.
        similarity: As `measure` returns it.
        layers: Names in execution order.
        metric: "probe accuracy" or "effective rank"; it must be there for all layers.
        shapes: (tokens, width) of each layer; all equal if not given.

    Raises:
        ValueError: If a layer or a noise level is missing in a table.
    """
    split = {PROBE: "validation", RANK: "train"}[metric]
    model = quality[quality["source"] == MODEL]
    rows = model[(model["metric"] == metric) & (model["split"] == split)]
    if rows.empty:
        cure = "select without labels" if metric == PROBE else "run the analyses on the model"
        raise ValueError(f"the quality table has no {metric} of the model on the split {split!r}; {cure}")
    levels = sorted(float(level) for level in rows["noise_level"].unique())
    known = set(zip(rows["layer"], rows["noise_level"], strict=True))
    absent = [(layer, level) for layer in layers for level in levels if (layer, level) not in known]
    if absent:
        seen = f"no {metric} of {absent[0][0]} at noise level {absent[0][1]}"
        raise ValueError(f"the quality table has {seen}; measure all layers alike")
    pairs = _Pairs(layers, levels, _alike(layers, shapes or dict.fromkeys(layers, ())))
    if not len(pairs.students):
        return pd.DataFrame(columns=list(EVIDENCE_COLUMNS))
    (rank, *_), notes = _of_table(pairs, model, RANK, "train")
    with np.errstate(invalid="ignore"):
        gap = np.log(rank[:, pairs.teachers]) - np.log(rank[:, pairs.students])
    numbers = [pairs.plain(RANK_GAP, gap, [pairs.joined(level) for level in notes])]
    numbers += [
        pairs.plain(
            criterion, _of_similarity(pairs, similarity, criterion.lower()), [[""] * gap.shape[1]] * len(levels)
        )
        for criterion in (CKA, CKNNA)
    ]
    tables = [pairs.depths(), *map(pairs.rows, numbers), *_accuracies(pairs, {}, model), *_contributions(pairs, model)]
    return pd.concat(tables, ignore_index=True)


def _of_similarity(pairs: _Pairs, similarity: pd.DataFrame, column: str) -> Floats:
    """A column of the similarity table at equal noise levels, shape (V, P)."""
    equal = similarity[similarity["noise_level_a"] == similarity["noise_level_b"]]
    keys = zip(equal["layer_a"], equal["layer_b"], equal["noise_level_a"], strict=True)
    known = dict(zip(keys, equal[column], strict=True))
    names = [(pairs.layers[s], pairs.layers[t]) for s, t in zip(pairs.students, pairs.teachers, strict=True)]
    absent = [(a, b, level) for level in pairs.levels for a, b in names if (a, b, level) not in known]
    if absent:
        a, b, level = absent[0]
        seen = f"no {column.upper()} between {a} and {b} at noise level {level}"
        raise ValueError(f"the similarity table has {seen}; measure both tables in one run")
    return np.array([[known[a, b, level] for a, b in names] for level in pairs.levels], np.float64)


class ScoreKeeper:
    """Keeps what the probes and neighbors of a store get right by sample, which the quality table only averages.

    Attributes:
        scores: By metric, layer and noise level, on the validation split, arrays (n,).
    """

    def __init__(self, store: FeatureStore) -> None:
        self.scores: dict[tuple[str, str, float], Floats] = {}
        self._folder = store.folder

    def listening(self, analysis: Analysis) -> Analysis:
        """The analysis, its results overheard."""

        def overheard(representation: Representation) -> Sequence[Measurement]:
            found = analysis(representation)
            if representation.store.folder == self._folder:
                self.scores |= {
                    (m.metric, representation.layer, representation.noise_level): m.scores
                    for m in found
                    if m.metric in (PROBE, KNN) and m.split == "validation" and m.scores is not None
                }
            return found

        return overheard


def write_evidence(evidence: pd.DataFrame, path: str | Path) -> None:
    """Writes the table as CSV, whole or not at all, with six digits; nan is empty."""
    write_text(Path(path), evidence.to_csv(index=False, float_format="%.6g"))


def read_evidence(path: str | Path) -> pd.DataFrame:
    """The evidence table in a CSV file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If columns are missing.
    """
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    missing = [column for column in EVIDENCE_COLUMNS if column not in table.columns]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]}; it is no evidence table, run `layerprobe analyze` again")
    for column in ("noise_level", "value", "low", "high"):
        table[column] = np.array([float(text or "nan") for text in table[column]])
    return table.assign(needs_labels=table["needs_labels"] == "True")


# ---------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True, eq=False)
class _Numbers:
    """A criterion of all pairs: by noise level (V, P) and averaged over them (P,)."""

    criterion: str
    value: Floats
    low: Floats
    high: Floats
    mean: tuple[Floats, Floats, Floats]
    notes: Sequence[Sequence[str]]  # V of P


class _Pairs:
    """All pairs of an earlier and a later layer of one shape."""

    def __init__(self, layers: Sequence[str], levels: Sequence[float], alike: Sequence[Sequence[str]]) -> None:
        self.layers, self.levels = tuple(layers), tuple(levels)
        group = {layer: i for i, names in enumerate(alike) for layer in names}
        places = [
            (s, t)
            for s, student in enumerate(layers)
            for t, teacher in enumerate(layers)
            if s < t and group[student] == group[teacher]
        ]
        self.students, self.teachers = np.array(places, np.intp).reshape(-1, 2).T

    def gap(self, layers: Estimate) -> Estimate:
        """Teacher minus student, from estimates (V, L)."""
        return layers[:, self.teachers] - layers[:, self.students]

    def both(self, values: Floats) -> Floats:
        """Of an array (V, L, L), the entries [student, teacher]."""
        chosen: Floats = values[:, self.students, self.teachers]
        return chosen

    def numbers(self, criterion: str, estimate: Estimate, notes: Sequence[Sequence[str]]) -> _Numbers:
        """From estimates (V, P) of the same samples and the reasons of the layers, V of L, where there are none."""
        mean = estimate.mean(0)
        ends = _ends(estimate.value, estimate.half_width), _ends(mean.value, mean.half_width)
        return _Numbers(criterion, *ends[0], ends[1], [self.joined(level) for level in notes])

    def plain(self, criterion: str, value: Floats, notes: Sequence[Sequence[str]]) -> _Numbers:
        """From numbers (V, P) without intervals."""
        unknown = np.full_like(value, np.nan)
        return _Numbers(criterion, value, unknown, unknown, (value.mean(0), unknown[0], unknown[0]), notes)

    def absent(self, criterion: str, reason: str) -> _Numbers:
        """A criterion that no pair has."""
        nothing = np.full((len(self.levels), len(self.students)), np.nan)
        return self.plain(criterion, nothing, [[reason] * len(self.students)] * len(self.levels))

    def by_layer(
        self, criterion: str, low_high: tuple[Floats, Floats, Floats], places: NDArray[np.intp], notes: Any
    ) -> _Numbers:
        """A number of the student or of the teacher, from arrays (V, L) of values, lower and upper ends."""
        value, low, high = (array[:, places] for array in low_high)
        chosen = [[level[i] and f"{self.layers[i]}: {level[i]}" for i in places] for level in notes]
        return _Numbers(criterion, value, low, high, (value.mean(0), low.mean(0), high.mean(0)), chosen)

    def joined(self, notes: Sequence[str]) -> list[str]:
        """Of each pair the note of the first of its layers that has one."""
        said = [note and f"{layer}: {note}" for layer, note in zip(self.layers, notes, strict=True)]
        return [said[s] or said[t] for s, t in zip(self.students, self.teachers, strict=True)]

    def rows(self, numbers: _Numbers) -> pd.DataFrame:
        """As rows of the table: all pairs level by level, then the means."""
        said = [
            [
                f"at noise level {level:g}, {note or _NO_ANSWER}" if np.isnan(v) else ""
                for note, v in zip(notes, value, strict=True)
            ]
            for level, notes, value in zip(self.levels, numbers.notes, numbers.value, strict=True)
        ]
        first = [next(filter(None, notes), "") for notes in zip(*said, strict=True)]
        parts = [
            self._part(numbers.criterion, level, value, low, high, notes)
            for level, value, low, high, notes in zip(
                self.levels, numbers.value, numbers.low, numbers.high, numbers.notes, strict=True
            )
        ]
        return pd.concat([*parts, self._part(numbers.criterion, np.nan, *numbers.mean, first)], ignore_index=True)

    def depths(self) -> pd.DataFrame:
        """Where the layers of each pair stand; known without error."""
        last = max(len(self.layers) - 1, 1)
        student, teacher = self.students / last, self.teachers / last
        none = [""] * len(student)
        known = ((STUDENT_DEPTH, student), (TEACHER_DEPTH, teacher), (DISTANCE, teacher - student))
        return pd.concat([self._part(name, np.nan, x, x, x, none) for name, x in known], ignore_index=True)

    def _part(
        self, criterion: str, level: float, value: Floats, low: Floats, high: Floats, notes: Sequence[str]
    ) -> pd.DataFrame:
        names = np.array(self.layers, dtype=object)
        columns = {
            "student": names[self.students],
            "teacher": names[self.teachers],
            "criterion": criterion,
            "noise_level": level,
            "value": value,
            "low": low,
            "high": high,
            "needs_labels": criterion in NEED_LABELS,
            "note": [(note or _NO_ANSWER) if np.isnan(v) else "" for note, v in zip(notes, value, strict=True)],
        }
        return pd.DataFrame(columns, columns=list(EVIDENCE_COLUMNS))


def _ends(value: Floats, half: Floats) -> tuple[Floats, Floats, Floats]:
    return value, value - half, value + half


def _alike(layers: Sequence[str], shapes: Mapping[str, Sequence[int]]) -> list[list[str]]:
    """The layers by shape."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for layer in layers:
        groups.setdefault(tuple(shapes[layer]), []).append(layer)
    return list(groups.values())


# --------------------------------------------------------------------------------------------- what needs no labels


@dataclass(frozen=True, eq=False)
class _Level:
    """All layers at one noise level; nan where there is no answer.

    Attributes:
        reasons: Why a layer has none, L strings, each "" where it has.
        by_layer: Estimates (L,): noise-LiDAR, effective rank and, where there are tokens, spatial contrast.
        by_pair: Estimates (L, L), [student, teacher].
    """

    reasons: tuple[str, ...]
    by_layer: Mapping[str, Estimate]
    by_pair: Mapping[str, Estimate]


def _geometry(pairs: _Pairs, found: Sequence[_Level]) -> list[pd.DataFrame]:
    """The criteria that need no labels."""
    reasons = [level.reasons for level in found]
    richness = {name: _over_levels(found, "by_layer", name) for name in ("lidar", "rank", "contrast")}
    lidar, rank, contrast = richness["lidar"], richness["rank"], richness["contrast"]
    numbers = []
    if lidar is None:
        numbers += [pairs.absent(name, _NO_DRAWS) for name in (TEACHER_LIDAR, LIDAR_GAP)]
    else:
        numbers.append(pairs.numbers(TEACHER_LIDAR, lidar[:, pairs.teachers], reasons))
        numbers.append(pairs.numbers(LIDAR_GAP, pairs.gap(lidar.log()), reasons))
    assert rank is not None
    numbers.append(pairs.numbers(RANK_GAP, pairs.gap(rank.log()), reasons))
    for criterion in (CKA, CKNNA, COSINE, RECOVERABILITY):
        both = _over_levels(found, "by_pair", criterion)
        if both is None:
            numbers.append(pairs.absent(criterion, _NO_TOKENS))
            continue
        chosen = both[:, pairs.students, pairs.teachers]
        numbers.append(pairs.numbers(criterion, chosen, reasons))
    if contrast is None:
        numbers.append(pairs.absent(SPATIAL_GAP, _NO_TOKENS))
    else:
        numbers.append(pairs.numbers(SPATIAL_GAP, pairs.gap(contrast), reasons))
    return [pairs.rows(of) for of in numbers]


_NO_DRAWS = "the features have one noise draw; two or more are needed"
_NO_TOKENS = "no tokens were kept"
_NO_ANSWER = "there is no estimate: the two differ by a constant, or the samples are too few"


def _over_levels(found: Sequence[_Level], kind: str, name: str) -> Estimate | None:
    parts = [getattr(level, kind).get(name) for level in found]
    return None if parts[0] is None else stacked(parts)


def _looked_at(store: FeatureStore, layers: Sequence[str], level: float) -> _Level:
    """All layers at one noise level."""
    rows = _chosen_rows(store)
    features = [_draws(store, layer, level)[rows] for layer in layers]
    reasons = tuple(_unusable(x) for x in features)
    alive = [i for i, reason in enumerate(reasons) if not reason]
    usable = [features[i] for i in alive]
    num = len(layers)
    by_layer, by_pair = {}, {}
    small = _narrowed(usable)
    by_layer["rank"] = _scattered([effective_rank_estimate(x[:, 0]) for x in small], alive, num, len(rows))
    if store.draws > 1:
        by_layer["lidar"] = _scattered([lidar_estimate(x) for x in small], alive, num, len(rows))
    by_pair[CKA] = _averaged([cka_estimates([x[:, d] for x in usable]) for d in range(store.draws)], alive, num)
    k = min(NUM_NEIGHBORS, len(rows) - 1)
    graphs = [[neighbor_graph(x[:, d], k=k) for x in usable] for d in range(store.draws)]
    by_pair[CKNNA] = _averaged([cknna_estimates(of_draw) for of_draw in graphs], alive, num)
    if len(store.token_rows):
        of_tokens = _looked_at_tokens(store, layers, alive, level)
        by_layer["contrast"] = of_tokens.pop("contrast")
        by_pair |= of_tokens
    return _Level(reasons, by_layer, by_pair)


def _chosen_rows(store: FeatureStore) -> NDArray[np.intp]:
    """Samples of the validation split, then of the training split, at most `MAX_SAMPLES`."""
    rows = np.concatenate([np.flatnonzero(store.splits == split) for split in ("validation", "train")])[:MAX_SAMPLES]
    if len(rows) < LEAST_SAMPLES:
        raise ValueError(
            f"{len(rows)} samples in the training and validation splits say nothing; extract {LEAST_SAMPLES} or more"
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
    """The directions in which the layers vary most, where they are wide: few samples say nothing of a thousand."""
    widths: dict[int, list[Features]] = {}
    for x in features:
        widths.setdefault(x.shape[2], []).append(x)
    bases = {width: shared_basis(of_width, rank=MAX_RANK) for width, of_width in widths.items() if width > MAX_RANK}
    return [x @ bases[x.shape[2]] if x.shape[2] in bases else x for x in features]


def _scattered(parts: Sequence[Estimate], alive: Sequence[int], num: int, n: int) -> Estimate:
    """Estimates of the layers that have one, and nan for the others: shape (L,)."""
    value, influence = np.full(num, np.nan), np.full((num, n), np.nan)
    for i, part in zip(alive, parts, strict=True):
        value[i], influence[i] = part.value, part.influence
    return Estimate(value, influence)


def _averaged(draws: Sequence[Estimate], alive: Sequence[int], num: int) -> Estimate:
    """Estimates of pairs of usable layers averaged over noise draws, and nan for the others: shape (L, L)."""
    mean = stacked(draws).mean(0)
    value, influence = np.full((num, num), np.nan), np.full((num, num, mean.influence.shape[-1]), np.nan)
    where = np.ix_(alive, alive)
    value[where], influence[where] = mean.value, mean.influence
    return Estimate(value, influence)


def _looked_at_tokens(
    store: FeatureStore, layers: Sequence[str], alive: Sequence[int], level: float
) -> dict[str, Estimate]:
    """Spatial contrast (L,), cosine and recoverability gap (L, L), of the tokens of the validation split.

    The ridge regressions are fitted on three quarters of the training split; the rest of it chooses their penalties.
    """
    num = len(layers)
    parts = {split: {i: _tokens(store, layers[i], level, split) for i in alive} for split in ("train", "validation")}
    judged = parts["validation"]
    n = len(next(iter(judged.values())))
    contrast = [mean_estimate(_contrast(judged[i])) for i in alive]
    cosine, gap = (Estimate(np.full((num, num), np.nan), np.full((num, num, n), np.nan)) for _ in range(2))
    for group in _groups(judged):
        for s in group:
            for t in group:
                found = mean_estimate(_cosine(judged[s], judged[t])) if s < t else None
                if found is not None:
                    cosine.value[s, t], cosine.influence[s, t] = found.value, found.influence
        where = np.ix_(group, group)
        shares = _gaps(
            [layers[i] for i in group], [[parts[split][i] for i in group] for split in ("train", "validation")]
        )
        gap.value[where], gap.influence[where] = shares.value, shares.influence
    return {"contrast": _scattered(contrast, alive, num, n), COSINE: cosine, RECOVERABILITY: gap}


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
    """Recoverability gap of all pairs of layers, from the tokens of the fit and of the validation split."""
    fit, choose = ([x.reshape(len(x), -1, x.shape[-1]) for x in part] for part in tokens)
    if fit[0].shape[2] > MAX_RANK:
        basis = shared_basis(fit, rank=min(MAX_RANK, _MAX_COLUMNS // len(layers)))
        fit, choose = ([x @ basis for x in part] for part in (fit, choose))
    most = 3 * len(fit[0]) // 4
    missed, increment = missed_by_sample(
        layers, {"train": [x[:most] for x in fit], "validation": [x[most:] for x in fit], "test": choose}
    )
    return ratio_estimate(missed, increment)


# ------------------------------------------------------------------------------------------------ what tables tell


def _accuracies(pairs: _Pairs, scores: Scores, quality: pd.DataFrame) -> list[pd.DataFrame]:
    """The criteria that need labels: paired where the scores are known by sample, else from the quality table."""
    wanted = [(metric, layer, level) for metric in (PROBE, KNN) for level in pairs.levels for layer in pairs.layers]
    nothing = [[""] * len(pairs.layers)] * len(pairs.levels)
    numbers = []
    for metric, gap in ((PROBE, PROBE_GAP), (KNN, KNN_GAP)) if scores or {PROBE, KNN} & set(quality["metric"]) else ():
        if all(key in scores for key in wanted if key[0] == metric):
            of = np.array([[scores[metric, layer, level] for layer in pairs.layers] for level in pairs.levels])
            estimate = mean_estimate(of)
            ends, notes = _ends(estimate.value, estimate.half_width), nothing
            numbers.append(pairs.numbers(gap, pairs.gap(estimate), notes))
        else:
            ends, notes = _of_table(pairs, quality, metric, "validation")
            numbers.append(_unpaired_gap(pairs, gap, ends, notes))
        if metric == PROBE:
            numbers.insert(0, pairs.by_layer(TEACHER_PROBE, ends, pairs.teachers, notes))
    return [pairs.rows(of) for of in numbers]


def _contributions(pairs: _Pairs, quality: pd.DataFrame) -> list[pd.DataFrame]:
    numbers = []
    for metric, student, teacher in (
        (VELOCITY_CHANGE, STUDENT_CONTRIBUTION, TEACHER_CONTRIBUTION),
        (LOSS_INCREASE, STUDENT_NEED, TEACHER_NEED),
    ):
        ends, notes = _of_table(pairs, quality, metric, "validation")
        numbers.append(pairs.by_layer(student, ends, pairs.students, notes))
        numbers.append(pairs.by_layer(teacher, ends, pairs.teachers, notes))
    return [pairs.rows(of) for of in numbers]


def _of_table(
    pairs: _Pairs, quality: pd.DataFrame, metric: str, split: str
) -> tuple[tuple[Floats, Floats, Floats], list[list[str]]]:
    """Value, lower and upper end of a metric, (V, L), and why there are none."""
    rows = quality[quality["metric"] == metric]
    rows = rows[rows["split"] == split] if len(rows) else rows
    records: list[Any] = list(rows.itertuples())
    known = {(row.layer, row.noise_level): row for row in records}
    found = [[known.get((layer, level)) for layer in pairs.layers] for level in pairs.levels]
    ends = tuple(
        np.array([[np.nan if row is None else getattr(row, end) for row in level] for level in found], np.float64)
        for end in ("value", "low", "high")
    )
    missing = f"there is no {metric}"
    notes = [
        [missing if row is None else str(row.note) if np.isnan(row.value) else "" for row in level] for level in found
    ]
    return ends, notes  # type: ignore[return-value]


def _unpaired_gap(
    pairs: _Pairs, criterion: str, ends: tuple[Floats, Floats, Floats], notes: Sequence[Sequence[str]]
) -> _Numbers:
    """A gap whose interval is that of two independent numbers, which is too wide for numbers of the same samples."""
    value, low, high = ends
    half = np.hypot(*((high - low)[:, places] / 2 for places in (pairs.students, pairs.teachers)))
    gap = value[:, pairs.teachers] - value[:, pairs.students]
    # The same samples at all levels: widths average, they do not shrink.
    mean = _ends(gap.mean(0), half.mean(0))
    return _Numbers(criterion, *_ends(gap, half), mean, [pairs.joined(level) for level in notes])
