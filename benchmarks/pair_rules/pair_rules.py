"""Rules that rank layer pairs by their evidence, and how they fare on models that they were not fitted on.

A rule is a weighted sum of criteria, each turned into ranks within its atlas, of mean 0 and variance 1: the sizes of
criteria and gains differ too much between models to be compared. With three to six models, and pairs that are far from
independent, little can be learned, so every way of fitting here has few parameters or none, and nothing is tuned.

Whatever is reported of a rule was predicted from the other models. The best of several rules is still partly lucky;
`chosen` repeats the choice among them without the model that it is judged on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import optimize, stats
from sweep_cases import CONFIDENCE, Case, by_model, rank_correlation, worth

from layerprobe.analyses.measures import Z95, Floats
from layerprobe.analyses.selection import rank_pairs, standard_ranks

# ---------------------------------------------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Calibration:
    """What a rule's scores are worth, learned on sweeps of other models.

    Attributes:
        level: Mean gain of all pairs of a network: the share by which a pair undercuts the score without alignment.
        slope: Gain per unit of score.
        half_width: Half width of the 95 % interval of an expected gain.
        error: Standard error of the difference between two pairs' gains beyond what the score explains.
        source: Sweeps that it was learned on.
    """

    level: float
    slope: float
    half_width: float
    error: float
    source: str


@dataclass(frozen=True)
class Rule:
    """Which criteria count how much.

    Attributes:
        weights: Weights of the criteria; the sign says which end is good.
        calibration: What the scores are worth; None as long as nothing is known of it.
    """

    weights: Mapping[str, float]
    calibration: Calibration | None = None


# The order that is expected of a case's pairs, shape (P,): larger is better, nan for pairs that are refused.
PairScorer = Callable[[Case], Floats]
# A rule, or anything else that can order pairs, from the cases to learn from.
Fitter = Callable[[Sequence[Case]], Rule | PairScorer]


def scores(rule: Rule, case: Case) -> Floats:
    """Weighted sum of standard ranks, shape (P,); a criterion that an atlas has not got adds nothing there."""
    total: Floats = _columns(case, list(rule.weights)) @ np.array(list(rule.weights.values()), dtype=float)
    return total


def _columns(case: Case, criteria: Sequence[str]) -> Floats:
    """Standard ranks of these criteria, shape (P, criteria)."""
    have, columns = _standard(case), np.zeros((len(case.pairs), len(criteria)))
    for i, name in enumerate(criteria):
        columns[:, i] = have.get(name, 0.0)
    return columns


@lru_cache(maxsize=256)  # one atlas is asked for in every fit that it is not left out of
def _standard(case: Case) -> dict[str | None, Floats]:
    """Standard ranks of all criteria, and of the gain under None."""
    ranks: dict[str | None, Floats] = {None: standard_ranks(case.gain)}
    return ranks | {str(name): standard_ranks(case.criteria[name].to_numpy(float)) for name in case.criteria.columns}


def known_criteria(cases: Sequence[Case], *, labels: bool = True) -> tuple[str, ...]:
    """Criteria of any of the cases, in their order; without those that need labels if asked."""
    barred = frozenset().union(*(case.needs_labels for case in cases))
    names = dict.fromkeys(name for case in cases for name in case.criteria.columns)
    return tuple(name for name in names if labels or name not in barred)


def fixed(weights: Mapping[str, float]) -> Fitter:
    """A rule that nothing is learned for."""
    return lambda cases: Rule(weights)


def as_selected(fitter: Fitter, *, label_free: bool = False) -> Fitter:
    """A rule as `layerprobe select` applies it: with its limits, its ties, and "none".

    Without evidence, or without what the limits need of it, every pair is refused.
    """

    def fit(cases: Sequence[Case]) -> PairScorer:
        rule = fitter(cases)
        assert isinstance(rule, Rule)

        def order(case: Case) -> Floats:
            place = np.full(len(case.pairs), np.nan)
            try:
                if case.evidence is None:
                    return place
                selection = rank_pairs(case.evidence, label_free=label_free, rule=rule.weights)
            except ValueError:
                return place
            ranked = {} if selection.pick is None else {pair.pair: -i for i, pair in enumerate(selection.ranked)}
            return np.array([float(ranked.get(pair, np.nan)) for pair in case.pairs])

        return order

    return fit


def single(criteria: Sequence[str]) -> Fitter:
    """The one criterion that correlates best on average, with that sign."""

    def fit(cases: Sequence[Case]) -> Rule:
        _, with_gain = _moments(cases, criteria)
        best = int(np.abs(with_gain).argmax())
        return Rule({criteria[best]: float(np.sign(with_gain[best]))})

    return fit


def rank_average(criteria: Sequence[str]) -> Fitter:
    """The mean of all criteria whose correlation has one sign in all models that have them; of all if none has."""

    def fit(cases: Sequence[Case]) -> Rule:
        of_models = np.array([_moments(group, criteria)[1] for group in by_model(cases).values()])
        signs = np.sign(of_models)
        agreed = np.sign(signs.sum(axis=0)) * (np.abs(signs.sum(axis=0)) == np.abs(signs).sum(axis=0))
        weights = agreed if agreed.any() else np.sign(of_models.mean(axis=0))
        count = max(np.abs(weights).sum(), 1)
        return Rule({name: float(w / count) for name, w in zip(criteria, weights, strict=True) if w})

    return fit


def ridge(criteria: Sequence[str], *, penalty: float = 1.0) -> Fitter:
    """Ridge regression of the gain's standard ranks in which no weight opposes its criterion's own correlation.

    Models count equally. The penalty is in units of a criterion's variance, so 1 halves the weight of a criterion that
    stands alone; it is fixed, not tuned: a handful of models cannot tell.
    """

    def fit(cases: Sequence[Case]) -> Rule:
        among, with_gain = _moments(cases, criteria)
        signs = np.sign(with_gain)
        oriented = among * np.outer(signs, signs) + penalty * np.eye(len(criteria))
        root = np.linalg.cholesky(oriented)
        sizes, _ = optimize.nnls(root.T, np.linalg.solve(root, np.abs(with_gain)))
        return Rule({name: float(s * w) for name, s, w in zip(criteria, signs, sizes, strict=True) if w > 0})

    return fit


def same_depths(cases: Sequence[Case]) -> PairScorer:
    """What pairs at the same depths were worth in the models known, whatever was measured: what evidence must beat.

    A pair's score is the mean standard gain of the other models' pairs, weighed by a Gaussian of the distance in
    (student depth, teacher depth); its width is one layer of the model scored.
    """
    known = [(_depths(case), _standard(case)[None]) for case in cases]

    def score(case: Case) -> Floats:
        own, width = _depths(case), 1 / (len(case.layers) - 1)
        total = np.zeros(len(own))
        for places, gains in known:
            away = ((own[:, None] - places[None]) ** 2).sum(axis=2) / (2 * width**2)
            weights = np.exp(away.min(axis=1, keepdims=True) - away)  # the nearest has weight 1: never 0 / 0
            total += weights @ gains / weights.sum(axis=1)
        return total / len(known)

    return score


def _depths(case: Case) -> Floats:
    return case.ends / (len(case.layers) - 1)


def chosen(candidates: Mapping[str, Fitter]) -> Fitter:
    """The candidate that did best when each model known was left out in turn; the first one if there is one model.

    The best of several rules in a comparison is partly lucky. This one is what choosing the best brings.
    """

    def fit(cases: Sequence[Case]) -> Rule | PairScorer:
        if len(by_model(cases)) < 2:
            return next(iter(candidates.values()))(cases)
        merits = {name: _merit(fitter, cases) for name, fitter in candidates.items()}
        return candidates[max(merits, key=lambda name: merits[name])](cases)

    return fit


def _merit(fitter: Fitter, cases: Sequence[Case]) -> float:
    found = [rank_correlation(order, case.gain, case.ends).rho for case, order in _left_out(fitter, cases)]
    return float(np.mean(np.nan_to_num(found)))


def _left_out(fitter: Fitter, cases: Sequence[Case]) -> list[tuple[Case, Floats]]:
    """Each case with the scores of a rule fitted on the other models."""
    pairs = []
    for model, group in by_model(cases).items():
        rule = fitter([case for case in cases if case.model != model])
        pairs += [(case, _ordered(rule, case)) for case in group]
    return pairs


def _ordered(rule: Rule | PairScorer, case: Case) -> Floats:
    return scores(rule, case) if isinstance(rule, Rule) else rule(case)


def _moments(cases: Sequence[Case], criteria: Sequence[str]) -> tuple[Floats, Floats]:
    """Mean correlations over models, of the criteria among themselves and with the gain."""
    among, with_gain = np.zeros((len(criteria), len(criteria))), np.zeros(len(criteria))
    groups = by_model(cases)
    for group in groups.values():
        for case in group:
            x, share = _columns(case, criteria), 1 / (len(case.pairs) * len(group) * len(groups))
            among += share * x.T @ x
            with_gain += share * x.T @ _standard(case)[None]
    return among, with_gain


# ----------------------------------------------------------------------------------------------- judged on other models


@dataclass(frozen=True, eq=False)
class RulePrediction:
    """What a rule that has not seen this model says about its pairs.

    Attributes:
        rule: Its name.
        case: What it is about.
        order: As the rule orders the pairs, larger is better, shape (P,); nan for pairs that it refuses.
        calibration: What that is worth, from the models known.
    """

    rule: str
    case: Case
    order: Floats
    calibration: Calibration

    @property
    def expected(self) -> Floats:
        """Gains, shape (P,); nan for pairs that are refused."""
        return self.calibration.level + self.calibration.slope * _unit(self.order)

    @property
    def pick(self) -> int | None:
        """Index of the best pair, of equal ones the first; None if all are refused."""
        return int(np.nanargmax(self.order)) if np.isfinite(self.order).any() else None

    @property
    def none(self) -> bool:
        """Whether the rule says that no pair is worth it: even the pick's upper end lies below no alignment."""
        return self.pick is None or bool(self.expected[self.pick] + self.calibration.half_width < 0)

    @property
    def gain(self) -> float:
        """What the pick gains; of equal ones the mean, for the rule does not say which of them to take; nan if none."""
        return float(self.case.gain[self.order == self.order[self.pick]].mean()) if self.pick is not None else np.nan

    @property
    def ties(self) -> NDArray[np.bool_]:
        """Pairs expected to be within one standard error of the pick, without the pick, shape (P,)."""
        if self.pick is None:
            return np.zeros(len(self.order), dtype=bool)
        close: NDArray[np.bool_] = self.expected[self.pick] - self.expected < self.calibration.error
        close[self.pick] = False
        return close


def calibrate(fitter: Fitter, known: Sequence[Case]) -> Calibration:
    """How far to trust a way of fitting, learned by leaving out each known model in turn.

    How much of the gain's spread the order explains there, and what it leaves. Where there is one known model it is
    ordered by the rule fitted on itself, which flatters, and the interval of an expected gain is infinite: the level of
    a model's gains is not read from its evidence but is the mean level of the known models, as unsure as they differ.
    """
    groups = by_model(known)
    apart = len(groups) > 1
    tried = _left_out(fitter, known) if apart else [(case, _ordered(fitter(known), case)) for case in known]
    shapes = [
        (_unit(order)[kept], _unit(case.gain)[kept]) for case, order in tried if (kept := np.isfinite(order)).any()
    ]
    slope = max(fmean([float(order @ gain) / len(gain) for order, gain in shapes] or [0.0]), 0.0)
    left = np.sqrt(fmean([float(np.square(gain - slope * order).mean()) for order, gain in shapes] or [1.0]))
    levels = np.array([np.mean([case.gain.mean() for case in group]) for group in groups.values()])
    spread = float(np.mean([np.mean([case.gain.std() for case in group]) for group in groups.values()]))
    half = np.inf
    if apart:
        n = len(levels)
        of_level = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * levels.std(ddof=1) * np.sqrt(1 + 1 / n)
        half = float(np.hypot(of_level, Z95 * left * spread))
    source = ", ".join(case.name for case in known)
    return Calibration(float(levels.mean()), spread * slope, half, float(np.sqrt(2) * left * spread), source)


def learned(fitter: Fitter, cases: Sequence[Case]) -> Rule:
    """A rule fitted on all cases, with its calibration: what a new model is judged by.

    Raises:
        ValueError: If the fitter does not give a weighted sum of criteria.
    """
    rule = fitter(cases)
    if not isinstance(rule, Rule):
        raise ValueError("this way of ordering pairs is no weighted sum of criteria; fit a ridge or an average")
    return replace(rule, calibration=calibrate(fitter, cases))


def predict(name: str, fitter: Fitter, known: Sequence[Case], case: Case) -> RulePrediction:
    """What a rule fitted on known atlases expects of another one."""
    return RulePrediction(name, case, _ordered(fitter(known), case), calibrate(fitter, known))


def _unit(values: Floats) -> Floats:
    """At mean 0 and variance 1; 0 where all are equal, nan where there is no value."""
    if not np.isfinite(values).any():
        return values
    centered: Floats = values - np.nanmean(values)
    size = np.nanstd(values)
    return centered / size if size > 0 else centered


def leave_one_model_out(cases: Sequence[Case], fitters: Mapping[str, Fitter]) -> list[RulePrediction]:
    """Every rule's prediction for every case, fitted on the cases of all other models.

    Raises:
        ValueError: If there is one model only.
    """
    if len(by_model(cases)) < 2:
        raise ValueError(f"all {len(cases)} atlases are of one model; to leave one out pass two models or more")
    return [
        predict(name, fitter, [other for other in cases if other.model != case.model], case)
        for name, fitter in fitters.items()
        for case in cases
    ]


def judged(predictions: Sequence[RulePrediction]) -> pd.DataFrame:
    """How each prediction fared.

    Columns rule, atlas, model; student and teacher of the pick; none (whether no pair was recommended); gain (as
    `RulePrediction.gain`) and taken (0 where none); rank (of such a gain, 1 the best); rho, low, high (of order and
    gains, over the pairs that were not refused); regret and regret_elsewhere (shares of `Worth.best` and
    `Worth.best_elsewhere` that are missed, nan where nothing is to gain beyond the noise); harm (whether what was taken
    is worse than no alignment beyond the noise: one-sided, 5 %); ties (how many), ties_within (share of them whose gain
    differs from the pick's by less than the uncertainty stated, 1.96 standard errors); covered (share of gains within
    the interval stated).
    """
    return pd.DataFrame([_judged(one) for one in predictions])


def _judged(one: RulePrediction) -> dict[str, Any]:
    case, value = one.case, worth(one.case)
    gain, taken = one.gain, 0.0 if one.none else one.gain
    found = rank_correlation(one.order, case.gain, case.ends)
    bar = value.error * stats.t.ppf(0.95, value.dof) if value.dof > 0 else np.nan
    pick = None if one.pick is None else case.pairs[one.pick]
    apart = np.abs(case.gain - case.gain[one.pick or 0])[one.ties]
    known = np.isfinite(one.expected)
    inside = np.abs(case.gain - one.expected)[known] < one.calibration.half_width
    return {
        "rule": one.rule,
        "atlas": case.name,
        "model": case.model,
        "student": pick.student if pick else "",
        "teacher": pick.teacher if pick else "",
        "none": one.none,
        "gain": gain,
        "taken": taken,
        "rank": 1 + int((case.gain > gain).sum()) if pick else np.nan,
        "rho": found.rho,
        "low": found.low,
        "high": found.high,
        "regret": 1 - taken / value.best if value.pays else np.nan,
        "regret_elsewhere": 1 - taken / value.best_elsewhere if value.pays else np.nan,
        "harm": bool(taken < -bar),
        "ties": int(one.ties.sum()),
        "ties_within": float((apart < Z95 * one.calibration.error).mean()) if len(apart) else np.nan,
        "covered": float(inside.mean()) if known.any() else np.nan,
    }
