"""Which evidence tells what a layer pair is worth: criteria and rules against pair atlases.

An atlas (`layerprobe atlas`) says what every pair was worth by experiment, `evidence.csv` says what was measured on the
checkpoint beforehand. This module asks how well the second predicts the first. Atlases are few (three to six), small
(15 or 28 pairs) and noisy (one or two seeds), so every number here is built for that:

- **Gain** of a pair: the share by which it undercuts the score without alignment, of the same seed at the same step.
  Its noise is what is left of the gains of several seeds once each pair has its mean and each seed its own; with one
  seed, what is left beyond one effect of each student and one of each teacher, which overstates it on average.
- **Rank correlations** are Spearman's. Pairs share layers, so they are not independent. The variance of Fisher's z is
  what leaving out one layer at a time tells, less what that counts twice, the variance from leaving out one pair at a
  time (as for dyadic data; Fafchamps and Gubert 2007), and at least that of independent pairs (Bonett and Wright
  2000); the quantile is Student's with one degree of freedom fewer than layers. A bootstrap over pairs would be far
  too sure of itself where gains follow layers. Even so, two quantities that both vary smoothly with depth correlate by
  chance (`false_alarms` counts how often). `partial` takes out what the depths of the two layers explain, and only the
  agreement of models, for which `pooled` has an interval, shows that a criterion holds elsewhere.
- **Regret** is what a pick misses of the best pair's gain. The best pair of a noisy atlas owes a part of its gain to
  luck. Where there are two seeds or more it is chosen on all but one and read on that one: such a best pair may be the
  wrong one and so its gain is too small, where the largest mean gain is too large. The truth lies between.
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
from layerprobe.analyses.tables import CRITERIA, DISTANCE, STUDENT_DEPTH, TEACHER_DEPTH, PairEvidence
from layerprobe.layersync import LayerPair, depth_heuristic

DEPTHS = (STUDENT_DEPTH, TEACHER_DEPTH, DISTANCE)
CONFIDENCE = 0.95
FEWEST_LAYERS, FEWEST_PAIRS = 5, 6  # 6 pairs are left of 5 layers where one is left out


# --------------------------------------------------------------------------------------------------- atlas and evidence


@dataclass(frozen=True, eq=False)
class Case:
    """An atlas beside its evidence: what pairs were worth, and what was known of them before.

    Attributes:
        name: Of the atlas.
        model: Atlases of one model share it and are left out together.
        metric: What the gains are gains in.
        step: Optimizer step of the scores.
        layers: In execution order.
        pairs: P pairs, in execution order of the student, then of the teacher.
        gains: Share by which no alignment is undercut, shape (P, seeds).
        criteria: Mean over noise levels, a row for each pair, a column for each criterion; nan where not measured.
        needs_labels: Criteria that cannot be had without labels.
        evidence: All evidence, if there is any.
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
        """Mean over seeds, shape (P,)."""
        return np.asarray(self.gains.mean(axis=1))

    @property
    def num_seeds(self) -> int:
        """Seeds in which all pairs are finished."""
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
    """Reads an atlas and the evidence that was taken of its starting point.

    A seed counts once it has all pairs that any seed has, so an atlas may be read while it is trained. Depths are added
    where the evidence has none: an atlas without any evidence is a case too, of the layers that its pairs name.

    Args:
        atlas: An `atlas.csv`.
        evidence: An `evidence.csv`, or None.
        metric: Lower is better.
        step: The last one if not given.
        name: The name of the file, or of its folder if it is called `atlas.csv`, if not given.
        model: `name` up to "-steps-" if not given.

    Raises:
        ValueError: If a file is another table, the atlas has no gains in this metric at this step, or the evidence
            knows none of its pairs.
    """
    atlas = Path(atlas)
    name = name or (atlas.parent.name if atlas.name == "atlas.csv" else atlas.stem)
    model = model or name.split("-steps-")[0]
    gains, step = _finished(read_pair_sweep(atlas), metric, step, name)
    known = None if evidence is None else PairEvidence.read_csv(evidence)
    names = gains.index.tolist()
    layers = execution_order(names + ([] if known is None else list(known.pairs)))
    names.sort(key=lambda pair: [layers.index(layer) for layer in pair])
    pairs = tuple(LayerPair(student, teacher) for student, teacher in names)
    criteria, needs_labels = _criteria(known, pairs, layers)
    values = gains.loc[names].to_numpy(float)
    return Case(name, model, metric, step, layers, pairs, values, criteria, needs_labels, known)


def _finished(table: pd.DataFrame, metric: str, step: int | None, name: str) -> tuple[pd.DataFrame, int]:
    """Benefits by pair and seed at one step, without the seeds that lack pairs; and that step."""
    rows = table[(table["metric"] == metric) & (table["student"] != "") & table["benefit"].notna()]
    step = int(rows["step"].max()) if step is None and len(rows) else step
    by_seed = rows[rows["step"] == step].pivot(index=["student", "teacher"], columns="seed", values="benefit")
    if by_seed.empty or step is None:
        seen = f"metrics {', '.join(dict.fromkeys(table['metric']))}; steps {sorted(set(table['step']))}"
        raise ValueError(f"{name} has no gains in {metric!r} at step {step} (it has {seen}); finish its branches first")
    fullest = by_seed[by_seed.notna().sum().idxmax()].dropna().index
    return by_seed.loc[fullest].dropna(axis=1), step


def by_model(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """The cases of each model, in their order."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.model, []).append(case)
    return groups


def execution_order(pairs: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """The layers of (student, teacher) pairs, each student before its teacher.

    All pairs of a model leave one order only; of some pairs, layers that no pair decides on go by their numbers.

    Raises:
        ValueError: If there is no such order.
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
        own = pd.MultiIndex.from_tuples(evidence.pairs, names=["student", "teacher"])
        if not own.isin(index).any():
            raise ValueError("the evidence knows none of the atlas's pairs; it is of another model")
        columns = {name: evidence.columns(name)[0] for name in CRITERIA if name not in DEPTHS and evidence.has(name)}
        measured = pd.DataFrame(columns, index=own).reindex(index).dropna(axis=1, how="all")
        needs_labels = frozenset(name for name in columns if CRITERIA[name].needs_labels)
    ends = [(layers.index(pair.student), layers.index(pair.teacher)) for pair in pairs]
    # Whole numbers are subtracted first: distances that are equal must stay equal, they are ranked.
    depths = pd.DataFrame([(s, t, t - s) for s, t in ends], index=index, columns=list(DEPTHS)) / (len(layers) - 1)
    return measured.join(depths), needs_labels


# ---------------------------------------------------------------------------------------------------------------- noise


@dataclass(frozen=True)
class Noise:
    """Standard deviation of one seed's gain of one pair, beyond what all pairs of that seed share.

    Attributes:
        sd: As a share, like the gains; nan if it cannot be told.
        dof: Degrees of freedom of the estimate.
        from_seeds: Whether seeds told it. Otherwise it is what student and teacher effects leave: on average
            too large.
    """

    sd: float
    dof: int
    from_seeds: bool


def noise(case: Case) -> Noise:
    """How much a gain varies from one seed to the next, or at most so much where there is one seed."""
    num_pairs, num_seeds = case.gains.shape
    if num_seeds > 1:
        left = case.gains - case.gains.mean(axis=1, keepdims=True) - case.gains.mean(axis=0) + case.gains.mean()
        dof = (num_pairs - 1) * (num_seeds - 1)
    else:
        identity = np.eye(len(case.layers))
        effects = np.hstack([identity[case.ends[:, 0]], identity[case.ends[:, 1]]])
        weights, _, rank, _ = np.linalg.lstsq(effects, case.gain, rcond=None)
        left, dof = case.gain - effects @ weights, num_pairs - int(rank)
    return Noise(float(np.sqrt((left**2).sum() / dof)) if dof > 0 else np.nan, dof, num_seeds > 1)


@dataclass(frozen=True)
class Ceiling:
    """How well a criterion can do at all, given the noise of the atlas.

    Attributes:
        between_seeds: Spearman correlation of the gains of two seeds, averaged over pairs of seeds; nan with one seed.
        low: Of its interval; nan with more than two seeds.
        high: As `low`.
        of_mean: The correlation that the true gains would have with the mean over the seeds: the square root of the
            mean's reliability, by the formula of Spearman and Brown.
    """

    between_seeds: float
    low: float
    high: float
    of_mean: float


def ceiling(case: Case) -> Ceiling:
    """The noise ceiling of an atlas; nan where one seed does not tell."""
    n = case.num_seeds
    if n < 2:
        return Ceiling(np.nan, np.nan, np.nan, np.nan)
    between = [rank_correlation(case.gains[:, a], case.gains[:, b], case.ends) for a, b in combinations(range(n), 2)]
    rho = float(np.mean([found.rho for found in between]))
    low, high = (between[0].low, between[0].high) if n == 2 else (np.nan, np.nan)
    return Ceiling(rho, low, high, float(np.sqrt(n * max(rho, 0) / (1 + (n - 1) * max(rho, 0)))))


# ------------------------------------------------------------------------------------------------ what there is to gain


@dataclass(frozen=True)
class Worth:
    """What there is to gain in an atlas, and what picking without evidence brings.

    Attributes:
        best: The largest mean gain: too large, for it was chosen by its own noise.
        best_elsewhere: The gain of the best pair of the other seeds, averaged over seeds: too small if anything; nan
            with one seed.
        best_pair: The pair of `best`.
        random: Mean gain of a pair.
        heuristic: Of the depth heuristic's pair; nan if the atlas has not trained it.
        error: Standard error of a pair's mean gain over no alignment.
        dof: Its degrees of freedom.
        pays: Whether the best pair beats no alignment beyond the noise (one-sided, 5 %, the choice among all pairs
            allowed for).
    """

    best: float
    best_elsewhere: float
    best_pair: LayerPair
    random: float
    heuristic: float
    error: float
    dof: int
    pays: bool


def worth(case: Case) -> Worth:
    """What there is to gain in an atlas."""
    spread, gain = noise(case), case.gain
    num_pairs, num_seeds = case.gains.shape
    # The branch without alignment has the noise of any other.
    error = spread.sd * np.sqrt(2 / num_seeds)
    best, elsewhere = int(gain.argmax()), np.nan
    if num_seeds > 1:
        others = (case.gains.sum(axis=1, keepdims=True) - case.gains) / (num_seeds - 1)
        elsewhere = float(case.gains[others.argmax(axis=0), np.arange(num_seeds)].mean())
    level = 0.05 if num_seeds > 1 else 0.05 / num_pairs
    bar = error * stats.t.ppf(1 - level, spread.dof) if spread.dof > 0 else np.nan
    heuristic = depth_heuristic(case.layers)
    return Worth(
        best=float(gain[best]),
        best_elsewhere=elsewhere,
        best_pair=case.pairs[best],
        random=float(gain.mean()),
        heuristic=float(gain[case.pairs.index(heuristic)]) if heuristic in case.pairs else np.nan,
        error=float(error),
        dof=spread.dof,
        pays=bool((elsewhere if num_seeds > 1 else gain[best]) > bar),
    )


# ---------------------------------------------------------------------------------------------------- rank correlations


@dataclass(frozen=True)
class Correlation:
    """A Spearman correlation over pairs that share layers, with its 95 % interval; nan where it is undefined."""

    rho: float
    low: float
    high: float
    num_pairs: int

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def rank_correlation(x: Floats, y: Floats, ends: NDArray[np.int64], *, given: Floats | None = None) -> Correlation:
    """Spearman's correlation of two quantities of layer pairs, and an interval that knows that pairs share layers.

    The interval is Fisher's z plus and minus Student's quantile (layers - 1 degrees of freedom) times a standard error
    that leaving out single layers tells, see the top of this module.

    Args:
        x: Shape (P,); pairs in which it is nan are left out.
        y: Shape (P,).
        ends: Which two layers each pair is of, shape (P, 2).
        given: Shape (P, Q): the partial correlation, with what a linear model of their ranks explains taken out.
    """
    known = np.isfinite(x) & np.isfinite(y)
    columns = np.column_stack([x, y] if given is None else [x, y, given])[known]
    ends, (num, spare) = ends[known], (len(columns), columns.shape[1] - 2)
    layers = np.unique(ends)
    without_layer = (ends != layers[:, None, None]).all(axis=2)
    kept = np.vstack([np.ones((1, num)), without_layer, 1 - np.eye(num)])
    values = _spearman_each(columns, kept)
    rho = float(values[0])
    fewest = int(without_layer.sum(axis=1).min(initial=num))
    if len(layers) < FEWEST_LAYERS or fewest < FEWEST_PAIRS + spare or np.isnan(rho):
        return Correlation(rho, np.nan, np.nan, num)
    z = _fisher(values, kept.sum(axis=1))
    by_layer, by_pair = _jackknife(z[1 : 1 + len(layers)]), _jackknife(z[1 + len(layers) :])
    independent = (1 + rho**2 / 2) / (num - 3 - spare)
    error = np.sqrt(max(by_layer - by_pair, independent))
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(layers) - 1) * error
    return Correlation(rho, float(np.tanh(z[0] - half)), float(np.tanh(z[0] + half)), num)


def _spearman_each(columns: Floats, kept: Floats) -> Floats:
    """Spearman's correlation of the first two columns, the others taken out, within each selection of rows.

    Args:
        columns: Shape (n, 2 + Q).
        kept: 1 for rows that count, else 0, shape (K, n).

    Returns:
        Shape (K,), nan where nothing varies.
    """
    one, other = columns[:, None], columns[None]
    above = (one > other) + 0.5 * (one == other)
    ranks = np.einsum("kj,ijv->kiv", kept, above)
    ranks -= (kept[:, :, None] * ranks).sum(axis=1, keepdims=True) / np.maximum(kept.sum(axis=1), 1)[:, None, None]
    ranks *= kept[:, :, None]
    moments = ranks.transpose(0, 2, 1) @ ranks
    of_two, across = moments[:, :2, :2], moments[:, :2, 2:]
    left = of_two - across @ np.linalg.pinv(moments[:, 2:, 2:], rcond=1e-9, hermitian=True) @ across.transpose(0, 2, 1)
    sizes, whole = (np.diagonal(values, axis1=1, axis2=2) for values in (left, of_two))
    rho = np.full(len(kept), np.nan)
    # What is left of a rank that the others explain is rounding.
    varies = ((sizes > 1e-9 * whole) & (whole > 0)).all(axis=1)
    rho[varies] = left[varies, 0, 1] / np.sqrt(sizes[varies].prod(axis=1))
    return np.asarray(np.clip(rho, -1, 1))


def _fisher(rho: Floats, num: Floats) -> Floats:
    # 1 has no z: it counts as the largest correlation below 1 that so many ranks can have.
    largest = 1 - 12 / (num**3 - num)
    return np.asarray(np.arctanh(np.clip(rho, -largest, largest)))


def _jackknife(left_out: Floats) -> float:
    """Variance of a statistic from its values with one unit left out; values that do not exist are passed over."""
    values = left_out[np.isfinite(left_out)]
    n = len(values)
    return float((n - 1) / n * ((values - values.mean()) ** 2).sum()) if n > 1 else np.inf


def correlations(cases: Sequence[Case]) -> pd.DataFrame:
    """Every criterion against the gain, in every atlas.

    Columns atlas, model, criterion, needs_labels, rho, low, high, significant, partial (given the depths of student
    and teacher), partial_low, partial_high, pairs.
    """
    rows = []
    for case in cases:
        depths = case.ends.astype(float)
        for criterion in case.criteria.columns:
            values = case.criteria[criterion].to_numpy(float)
            plain = rank_correlation(values, case.gain, case.ends)
            partial = Correlation(np.nan, np.nan, np.nan, plain.num_pairs)
            if criterion not in DEPTHS:
                partial = rank_correlation(values, case.gain, case.ends, given=depths)
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
    """Mean correlation over models and its 95 % interval, by Fisher's z; index `by`, largest magnitude first.

    Models are the sample: atlases of one model are averaged first, and the interval is Student's over models. It is nan
    with one model.

    Args:
        table: With the columns atlas, model, `by` and `column`, as `correlations` returns it.
        by: What to pool for.
        column: The correlation.
    """
    rows = {}
    for key, found in table.dropna(subset=[column]).groupby(by, sort=False):
        z = np.arctanh(found[column].clip(-0.999, 0.999)).groupby(found["model"]).mean()
        half = np.nan
        if len(z) > 1:
            half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(z) - 1) * z.std() / np.sqrt(len(z)))
        ends = (np.tanh(z.mean() + part) for part in (0, -half, half))
        rows[key] = (*ends, len(z), found[column].min(), found[column].max())
    pool = pd.DataFrame.from_dict(rows, orient="index", columns=["rho", "low", "high", "models", "smallest", "largest"])
    return pool.sort_values("rho", key=np.abs, ascending=False, kind="stable").rename_axis(by)


# ------------------------------------------------------------------------------------------------------ planted nothing


def false_alarms(
    cases: Sequence[Case], rng: np.random.Generator, *, kind: str, draws: int = 100
) -> tuple[float, float]:
    """Share of correlations called significant when the criterion is noise, beside the true gains of these atlases.

    Args:
        cases: Whose gains.
        rng: What the noise is drawn from.
        kind: "pairs": its own number for each pair; "layers": the gap between a number for each layer; "smooth": the
            same with numbers that wander along the depth, as real criteria do.
        draws: Per case.

    Returns:
        Of plain correlations, and of partial ones given the depths.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind not in ("pairs", "layers", "smooth"):
        raise ValueError(f"there is no noise of kind {kind!r}; pass pairs, layers or smooth")
    found = []
    for case in cases:
        for _ in range(draws):
            of_layers = rng.standard_normal(len(case.layers))
            of_layers = of_layers.cumsum() if kind == "smooth" else of_layers
            gap = of_layers[case.ends[:, 1]] - of_layers[case.ends[:, 0]]
            values = rng.standard_normal(len(case.pairs)) if kind == "pairs" else gap
            depths = case.ends.astype(float)
            found.append(
                [rank_correlation(values, case.gain, case.ends, given=given).significant for given in (None, depths)]
            )
    plain, partial = np.mean(found, axis=0)
    return float(plain), float(partial)
