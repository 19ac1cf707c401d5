"""How well evidence predicts the gain of layer pairs: criteria compared with the results of pair sweeps.

A pair sweep (`layerprobe atlas`) measures the gain of every pair by experiment; `evidence.csv` holds the measurements
on the checkpoint before it. Pair sweeps are few (three to six), small (15 or 28 pairs) and noisy (one or two seeds),
and the statistics here are made for that:

- **Gain** of a pair: the share by which its score is below the baseline's, of the same seed at the same step. With
  several seeds, its noise is the residual of the gains after subtracting the mean of each pair and the mean of each
  seed. With one seed, it is the residual of one effect per student and one per teacher, too large on average.
- **Rank correlations** are Spearman's. Pairs share layers, so they are not independent. The variance of Fisher's z is
  the jackknife variance over layers minus the jackknife variance over pairs, which it counts twice (as for dyadic data;
  Fafchamps and Gubert 2007), and at least that of independent pairs (Bonett and Wright 2000). The quantile is Student's
  with one degree of freedom fewer than layers. A bootstrap over pairs would give intervals that are far too narrow if
  gains follow layers. Even so, two quantities that both vary smoothly with depth correlate by chance (`false_alarms`
  counts how often). A partial correlation removes what the depths of the two layers explain. Only the agreement of
  models, for which `pooled` has an interval, shows that a criterion holds for other models.
- **Regret** is the share of the best pair's gain that a pick misses. The best pair of a noisy sweep owes a part of its
  gain to luck. With two seeds or more it is also chosen on all seeds but one and evaluated on that one. Its gain is
  then too small, because another pair may be better, while the largest mean gain is too large. The truth lies between.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from layerprobe.analyses.experiments import FRECHET, read_pair_sweep
from layerprobe.analyses.measures import Floats
from layerprobe.analyses.selection import prior_pair
from layerprobe.analyses.tables import CRITERIA, DISTANCE, STUDENT_DEPTH, TEACHER_DEPTH, PairEvidence
from layerprobe.layersync import LayerPair

DEPTHS = (STUDENT_DEPTH, TEACHER_DEPTH, DISTANCE)
CONFIDENCE = 0.95
FEWEST_LAYERS, FEWEST_PAIRS = 5, 6  # 6 pairs are left of 5 layers where one is left out


# ----------------------------------------------------------------------------------------------- sweep and evidence


@dataclass(frozen=True, eq=False)
class Case:
    """A pair sweep with its evidence: the gains of pairs, and the measurements before the training.

    Attributes:
        name: Name of the pair sweep.
        model: Name of the model; sweeps of one model are left out together.
        metric: Metric of the gains.
        step: Optimizer step of the scores.
        layers: Layer names in execution order.
        pairs: P pairs, in execution order of the student, then of the teacher.
        gains: Shares by which the scores are below the baseline's, shape (P, seeds).
        criteria: Means over noise levels, a row for each pair, a column for each criterion; nan if not measured.
        needs_labels: Names of the criteria that need labels.
        evidence: All evidence; None if it is missing.
    """

    name: str
    model: str
    metric: str
    step: int
    layers: tuple[str, ...]
    pairs: tuple[LayerPair, ...]
    gains: Floats
    criteria: pd.DataFrame
    needs_labels: frozenset[str] = frozenset()
    evidence: PairEvidence | None = None

    @property
    def gain(self) -> Floats:
        """Gains averaged over seeds, shape (P,)."""
        return np.asarray(self.gains.mean(axis=1))

    @property
    def num_seeds(self) -> int:
        """Number of seeds in which all pairs are finished."""
        return int(self.gains.shape[1])

    @property
    def ends(self) -> NDArray[np.int64]:
        """Indices of student and teacher among the layers, shape (P, 2)."""
        index = {layer: i for i, layer in enumerate(self.layers)}
        return np.array([[index[pair.student], index[pair.teacher]] for pair in self.pairs])


def read_case(
    atlas: str | Path,
    evidence: str | Path | None,
    *,
    metric: str = FRECHET,
    step: int | None = None,
    name: str | None = None,
    model: str | None = None,
) -> Case:
    """Reads the table of a pair sweep and the evidence on its start.

    A seed counts once it has all pairs that any seed has, so a sweep may be read while it is running. Depths are always
    among the criteria. Without evidence, the layers are those that the pairs name.

    Args:
        atlas: Path of an `atlas.csv`.
        evidence: Path of an `evidence.csv`; None for no evidence.
        metric: Metric of the gains, of which lower values are better.
        step: Optimizer step of the scores; None for the last one.
        name: Name of the pair sweep; None for the name of the file, or of its folder if the file is `atlas.csv`.
        model: Name of the model; None for `name` up to "-steps-".

    Raises:
        ValueError: If a file is another table, the sweep has no gains in this metric at this step, or the evidence
            contains none of its pairs.
    """
    atlas = Path(atlas)
    name = name or (atlas.parent.name if atlas.name == "atlas.csv" else atlas.stem)
    model = model or name.split("-steps-")[0]
    gains, step = _finished(read_pair_sweep(atlas), metric, step, name)
    measured = None if evidence is None else PairEvidence.read_csv(evidence)
    names = gains.index.tolist()
    layers = execution_order(names + ([] if measured is None else list(measured.pairs)))
    names.sort(key=lambda pair: [layers.index(layer) for layer in pair])
    pairs = tuple(LayerPair(student, teacher) for student, teacher in names)
    criteria, needs_labels = _criteria(measured, pairs, layers)
    values = gains.loc[names].to_numpy(float)
    return Case(name, model, metric, step, layers, pairs, values, criteria, needs_labels, measured)


def _finished(table: pd.DataFrame, metric: str, step: int | None, name: str) -> tuple[pd.DataFrame, int]:
    """Benefits by pair and seed at one step, without the seeds that lack pairs; and that step."""
    rows = table[(table["metric"] == metric) & (table["student"] != "") & table["benefit"].notna()]
    step = int(rows["step"].max()) if step is None and len(rows) else step
    by_seed = rows[rows["step"] == step].pivot(index=["student", "teacher"], columns="seed", values="benefit")
    if by_seed.empty or step is None:
        present = f"metrics {', '.join(dict.fromkeys(table['metric']))}; steps {sorted(set(table['step']))}"
        raise ValueError(
            f"{name} has no gains in {metric!r} at step {step} (it has {present}); finish its branches first"
        )
    fullest = by_seed[by_seed.notna().sum().idxmax()].dropna().index
    return by_seed.loc[fullest].dropna(axis=1), step


def by_model(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Groups cases by model, in their order."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.model, []).append(case)
    return groups


def execution_order(pairs: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Returns the layers of (student, teacher) pairs in an order in which each student comes before its teacher.

    All pairs of a model determine the order. With fewer pairs, layers in undetermined order are sorted by number.

    Raises:
        ValueError: If no order has each student before its teacher.
    """
    before: dict[str, set[str]] = {}
    for student, teacher in pairs:
        before.setdefault(student, set())
        before.setdefault(teacher, set()).add(student)
    sorter, order = TopologicalSorter(before), list[str]()
    try:
        sorter.prepare()
    except CycleError as error:
        circle = " before ".join(error.args[1])
        raise ValueError(f"no execution order has every student before its teacher ({circle})") from error
    ready: list[tuple[list[tuple[bool, int, str]], str]] = []
    while sorter.is_active():
        for layer in sorter.get_ready():
            heapq.heappush(ready, (_natural(layer), layer))
        order.append(heapq.heappop(ready)[1])
        sorter.done(order[-1])
    return tuple(order)


def _natural(layer: str) -> list[tuple[bool, int, str]]:
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", layer)]


def _criteria(
    evidence: PairEvidence | None, pairs: tuple[LayerPair, ...], layers: tuple[str, ...]
) -> tuple[pd.DataFrame, frozenset[str]]:
    index = pd.MultiIndex.from_tuples([(pair.student, pair.teacher) for pair in pairs], names=["student", "teacher"])
    measured, needs_labels = pd.DataFrame(index=index), frozenset[str]()
    if evidence is not None:
        evidence_index = pd.MultiIndex.from_tuples(evidence.pairs, names=["student", "teacher"])
        if not evidence_index.isin(index).any():
            raise ValueError("the evidence contains none of the pairs of the sweep; pass that of the same model")
        columns = {name: evidence.columns(name)[0] for name in CRITERIA if name not in DEPTHS and evidence.has(name)}
        measured = pd.DataFrame(columns, index=evidence_index).reindex(index).dropna(axis=1, how="all")
        needs_labels = frozenset(name for name in columns if CRITERIA[name].needs_labels)
    ends = [(layers.index(pair.student), layers.index(pair.teacher)) for pair in pairs]
    # Whole numbers are subtracted first, so that equal distances stay equal when they are ranked.
    depths = pd.DataFrame([(s, t, t - s) for s, t in ends], index=index, columns=list(DEPTHS)) / (len(layers) - 1)
    return measured.join(depths), needs_labels


# ---------------------------------------------------------------------------------------------------------------- noise


@dataclass(frozen=True)
class Noise:
    """Standard deviation of the gain of one pair with one seed, without the part that all pairs of that seed share.

    Attributes:
        sd: Standard deviation, as a share like the gains; nan if it cannot be estimated.
        dof: Degrees of freedom of the estimate.
        from_seeds: Whether it is estimated from several seeds. Otherwise it is the residual of student and teacher
            effects, which is too large on average.
    """

    sd: float
    dof: int
    from_seeds: bool


def noise(case: Case) -> Noise:
    """Estimates how much a gain varies over seeds; with one seed the estimate is too large on average."""
    num_pairs, num_seeds = case.gains.shape
    if num_seeds > 1:
        residual = case.gains - case.gains.mean(axis=1, keepdims=True) - case.gains.mean(axis=0) + case.gains.mean()
        dof = (num_pairs - 1) * (num_seeds - 1)
    else:
        identity = np.eye(len(case.layers))
        effects = np.hstack([identity[case.ends[:, 0]], identity[case.ends[:, 1]]])
        weights, _, rank, _ = np.linalg.lstsq(effects, case.gain, rcond=None)
        residual, dof = case.gain - effects @ weights, num_pairs - int(rank)
    return Noise(float(np.sqrt((residual**2).sum() / dof)) if dof > 0 else np.nan, dof, num_seeds > 1)


@dataclass(frozen=True)
class Ceiling:
    """Largest correlation that a criterion can have, given the noise of the pair sweep.

    Attributes:
        between_seeds: Spearman correlation of the gains of two seeds, averaged over pairs of seeds; nan with one seed.
        low: Lower end of its 95 % interval; nan unless there are two seeds.
        high: Upper end of its 95 % interval; nan unless there are two seeds.
        of_mean: Correlation of the true gains with the mean over seeds: the square root of the mean's reliability, by
            the formula of Spearman and Brown.
    """

    between_seeds: float
    low: float
    high: float
    of_mean: float


def ceiling(case: Case) -> Ceiling:
    """Estimates the noise ceiling of a pair sweep; all values are nan with one seed."""
    n = case.num_seeds
    if n < 2:
        return Ceiling(np.nan, np.nan, np.nan, np.nan)
    between = [rank_correlation(case.gains[:, a], case.gains[:, b], case.ends) for a, b in combinations(range(n), 2)]
    rho = float(np.mean([correlation.rho for correlation in between]))
    low, high = (between[0].low, between[0].high) if n == 2 else (np.nan, np.nan)
    return Ceiling(rho, low, high, float(np.sqrt(n * max(rho, 0) / (1 + (n - 1) * max(rho, 0)))))


# ------------------------------------------------------------------------------------------------ what there is to gain


@dataclass(frozen=True)
class Worth:
    """Gains that are possible in a pair sweep, and those of picks without evidence.

    Attributes:
        best: Largest mean gain; too large on average, because its pair was chosen by the same noise.
        best_elsewhere: Gain of the pair that is best in all other seeds, averaged over seeds; too small on average. nan
            with one seed.
        best_pair: Pair with the largest mean gain.
        random: Mean gain of all pairs.
        prior: Mean gain of the published prior's pair; nan if the sweep lacks it.
        error: Standard error of a pair's mean gain over the baseline.
        dof: Degrees of freedom of the error.
        pays: Whether the best pair beats the baseline beyond the noise (one-sided, 5 %, corrected for the choice among
            all pairs).
    """

    best: float
    best_elsewhere: float
    best_pair: LayerPair
    random: float
    prior: float
    error: float
    dof: int
    pays: bool


def worth(case: Case) -> Worth:
    """Computes the gains that are possible in a pair sweep."""
    spread, gain = noise(case), case.gain
    num_pairs, num_seeds = case.gains.shape
    # The baseline is as noisy as any other branch.
    error = spread.sd * np.sqrt(2 / num_seeds)
    best, elsewhere = int(gain.argmax()), np.nan
    if num_seeds > 1:
        others = (case.gains.sum(axis=1, keepdims=True) - case.gains) / (num_seeds - 1)
        elsewhere = float(case.gains[others.argmax(axis=0), np.arange(num_seeds)].mean())
    level = 0.05 if num_seeds > 1 else 0.05 / num_pairs
    bar = error * stats.t.ppf(1 - level, spread.dof) if spread.dof > 0 else np.nan
    prior = prior_pair(case.layers)
    return Worth(
        best=float(gain[best]),
        best_elsewhere=elsewhere,
        best_pair=case.pairs[best],
        random=float(gain.mean()),
        prior=float(gain[case.pairs.index(prior)]) if prior in case.pairs else np.nan,
        error=float(error),
        dof=spread.dof,
        pays=bool((elsewhere if num_seeds > 1 else gain[best]) > bar),
    )


# ---------------------------------------------------------------------------------------------------- rank correlations


@dataclass(frozen=True)
class Correlation:
    """A Spearman correlation over pairs that share layers, with its 95 % interval; nan where it is undefined.

    Attributes:
        rho: Correlation.
        low: Lower end of the interval.
        high: Upper end of the interval.
        num_pairs: Number of pairs.
    """

    rho: float
    low: float
    high: float
    num_pairs: int

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def rank_correlation(x: Floats, y: Floats, ends: NDArray[np.int64], *, controls: Floats | None = None) -> Correlation:
    """Computes Spearman's correlation of two quantities of layer pairs, with an interval for pairs that share layers.

    The interval is Fisher's z plus and minus Student's quantile (layers - 1 degrees of freedom) times a standard error
    by the jackknife over layers, see the docstring of this module.

    Args:
        x: First quantity, shape (P,); pairs in which it is nan are left out.
        y: Second quantity, shape (P,); pairs in which it is nan are left out.
        ends: Indices of the two layers of each pair, shape (P, 2).
        controls: Quantities of a partial correlation, shape (P, Q): what a linear model of their ranks explains is
            removed. None for the plain correlation.
    """
    is_finite = np.isfinite(x) & np.isfinite(y)
    columns = np.column_stack([x, y] if controls is None else [x, y, controls])[is_finite]
    ends, (num, num_controls) = ends[is_finite], (len(columns), columns.shape[1] - 2)
    layers = np.unique(ends)
    without_layer = (ends != layers[:, None, None]).all(axis=2)
    selections = np.vstack([np.ones((1, num)), without_layer, 1 - np.eye(num)])
    values = _spearman_each(columns, selections)
    rho = float(values[0])
    fewest = int(without_layer.sum(axis=1).min(initial=num))
    if len(layers) < FEWEST_LAYERS or fewest < FEWEST_PAIRS + num_controls or np.isnan(rho):
        return Correlation(rho, np.nan, np.nan, num)
    z = _fisher(values, selections.sum(axis=1))
    by_layer, by_pair = _jackknife(z[1 : 1 + len(layers)]), _jackknife(z[1 + len(layers) :])
    independent = (1 + rho**2 / 2) / (num - 3 - num_controls)
    error = np.sqrt(max(by_layer - by_pair, independent))
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(layers) - 1) * error
    return Correlation(rho, float(np.tanh(z[0] - half)), float(np.tanh(z[0] + half)), num)


def _spearman_each(columns: Floats, selections: Floats) -> Floats:
    """Spearman's correlation of the first two columns, with the others as controls, within each selection of rows.

    Args:
        columns: Quantities, shape (n, 2 + Q).
        selections: 1 for rows that count, else 0, shape (K, n).

    Returns:
        Correlations, shape (K,); nan if a column does not vary.
    """
    one, other = columns[:, None], columns[None]
    above = (one > other) + 0.5 * (one == other)
    ranks = np.einsum("kj,ijv->kiv", selections, above)
    counts = np.maximum(selections.sum(axis=1), 1)[:, None, None]
    ranks -= (selections[:, :, None] * ranks).sum(axis=1, keepdims=True) / counts
    ranks *= selections[:, :, None]
    moments = ranks.transpose(0, 2, 1) @ ranks
    of_two, across = moments[:, :2, :2], moments[:, :2, 2:]
    residual = of_two - across @ np.linalg.pinv(moments[:, 2:, 2:], rcond=1e-9, hermitian=True) @ across.transpose(
        0, 2, 1
    )
    sizes, whole = (np.diagonal(values, axis1=1, axis2=2) for values in (residual, of_two))
    rho = np.full(len(selections), np.nan)
    # The residual of a rank that the controls explain is rounding error.
    varies = ((sizes > 1e-9 * whole) & (whole > 0)).all(axis=1)
    rho[varies] = residual[varies, 0, 1] / np.sqrt(sizes[varies].prod(axis=1))
    return np.asarray(np.clip(rho, -1, 1))


def _fisher(rho: Floats, num: Floats) -> Floats:
    # The z of 1 is infinite: it counts as the largest correlation below 1 that this number of ranks can have.
    largest = 1 - 12 / (num**3 - num)
    return np.asarray(np.arctanh(np.clip(rho, -largest, largest)))


def _jackknife(left_out: Floats) -> float:
    """Variance of a statistic from its values with one unit left out; missing values are skipped."""
    values = left_out[np.isfinite(left_out)]
    n = len(values)
    return float((n - 1) / n * ((values - values.mean()) ** 2).sum()) if n > 1 else np.inf


def correlations(cases: Sequence[Case]) -> pd.DataFrame:
    """Computes the rank correlation of every criterion with the gain, in every pair sweep.

    Columns: atlas (name of the sweep), model, criterion, needs_labels, rho, low, high, significant, partial (controlled
    for the depths of student and teacher), partial_low, partial_high and pairs (their number).
    """
    rows = []
    for case in cases:
        depths = case.ends.astype(float)
        for criterion in case.criteria.columns:
            values = case.criteria[criterion].to_numpy(float)
            plain = rank_correlation(values, case.gain, case.ends)
            partial = Correlation(np.nan, np.nan, np.nan, plain.num_pairs)
            if criterion not in DEPTHS:
                partial = rank_correlation(values, case.gain, case.ends, controls=depths)
            rows.append(
                {
                    "atlas": case.name,
                    "model": case.model,
                    "criterion": criterion,
                    "needs_labels": criterion in case.needs_labels,
                    "rho": plain.rho,
                    "low": plain.low,
                    "high": plain.high,
                    "significant": plain.significant,
                    "partial": partial.rho,
                    "partial_low": partial.low,
                    "partial_high": partial.high,
                    "pairs": plain.num_pairs,
                }
            )
    return pd.DataFrame(rows)


def pooled(table: pd.DataFrame, *, by: str = "criterion", column: str = "rho") -> pd.DataFrame:
    """Computes the mean correlation over models and its 95 % interval, by Fisher's z; largest magnitude first.

    Sweeps of one model are averaged first, and the interval is Student's over models. It is nan with one model.

    Args:
        table: Table with the columns model, `by` and `column`, as `correlations` returns it.
        by: Column of the groups, and index of the result.
        column: Column of the correlations.
    """
    rows = {}
    for key, group in table.dropna(subset=[column]).groupby(by, sort=False):
        z = np.arctanh(group[column].clip(-0.999, 0.999)).groupby(group["model"]).mean()
        half = np.nan
        if len(z) > 1:
            half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(z) - 1) * z.std() / np.sqrt(len(z)))
        ends = (np.tanh(z.mean() + part) for part in (0, -half, half))
        rows[key] = (*ends, len(z), group[column].min(), group[column].max())
    pool = pd.DataFrame.from_dict(rows, orient="index", columns=["rho", "low", "high", "models", "smallest", "largest"])
    return pool.sort_values("rho", key=np.abs, ascending=False, kind="stable").rename_axis(by)


# ---------------------------------------------------------------------------------------------------- noise criteria


def false_alarms(
    cases: Sequence[Case], rng: np.random.Generator, *, kind: str, draws: int = 100
) -> tuple[float, float]:
    """Computes the share of correlations that count as significant although the criterion is noise.

    Args:
        cases: Cases whose gains are used.
        rng: Random generator of the noise.
        kind: Kind of noise: "pairs", an independent number for each pair; "layers", the gap between independent numbers
            of the layers; "smooth", the gap between numbers that follow a random walk over depth, as real criteria do.
        draws: Number of noise criteria per case.

    Returns:
        The share for plain correlations, and that for partial ones, controlled for the depths.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind not in ("pairs", "layers", "smooth"):
        raise ValueError(f"unknown kind of noise {kind!r}; pass pairs, layers or smooth")
    is_significant = []
    for case in cases:
        for _ in range(draws):
            of_layers = rng.standard_normal(len(case.layers))
            of_layers = of_layers.cumsum() if kind == "smooth" else of_layers
            gap = of_layers[case.ends[:, 1]] - of_layers[case.ends[:, 0]]
            values = rng.standard_normal(len(case.pairs)) if kind == "pairs" else gap
            depths = case.ends.astype(float)
            is_significant.append(
                [
                    rank_correlation(values, case.gain, case.ends, controls=controls).significant
                    for controls in (None, depths)
                ]
            )
    plain, partial = np.mean(is_significant, axis=0)
    return float(plain), float(partial)
