"""Rules that rank layer pairs by their evidence, evaluated on models that they were not fitted on.

A rule is a weighted sum of criteria, each turned into ranks within its pair sweep, of mean 0 and variance 1, because
raw criteria and gains differ too much between models. With three to six models, and pairs that are far from
independent, little can be learned, so every fitter here has few parameters or none, and nothing is tuned.

All results of a rule are predictions from the other models. The best of several rules is still partly lucky; `chosen`
repeats the choice among them without the model on which it is evaluated.
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
    """Conversion of a rule's scores to expected gains, learned on pair sweeps of other models.

    Attributes:
        level: Mean gain of all pairs of a network: the share by which the score of a pair is below the baseline's.
        slope: Gain per unit of score.
        half_width: Half width of the 95 % interval of an expected gain.
        error: Standard error of the difference between two pairs' gains beyond what the score explains.
        source: Names of the pair sweeps that it was learned on.
    """

    level: float
    slope: float
    half_width: float
    error: float
    source: str


@dataclass(frozen=True)
class Rule:
    """Weights of criteria.

    Attributes:
        weights: Weights of the criteria; the sign says which end is good.
        calibration: Conversion of the scores to expected gains; None before it is learned.
    """

    weights: Mapping[str, float]
    calibration: Calibration | None = None


# Scores of the pairs of a case, shape (P,): larger is better, nan for pairs that are refused.
PairScorer = Callable[[Case], Floats]
# From training cases to a rule, or to another function that scores pairs.
Fitter = Callable[[Sequence[Case]], Rule | PairScorer]


def scores(rule: Rule, case: Case) -> Floats:
    """Computes the weighted sum of standard ranks, shape (P,); a criterion that a case lacks counts as 0."""
    total: Floats = _columns(case, list(rule.weights)) @ np.array(list(rule.weights.values()), dtype=float)
    return total


def _columns(case: Case, criteria: Sequence[str]) -> Floats:
    """Standard ranks of these criteria, shape (P, criteria)."""
    ranks, columns = _standard(case), np.zeros((len(case.pairs), len(criteria)))
    for i, name in enumerate(criteria):
        columns[:, i] = ranks.get(name, 0.0)
    return columns


@lru_cache(maxsize=256)  # every fit that does not leave a case out needs its ranks
def _standard(case: Case) -> dict[str | None, Floats]:
    """Standard ranks of all criteria, and of the gain under None."""
    ranks: dict[str | None, Floats] = {None: standard_ranks(case.gain)}
    return ranks | {str(name): standard_ranks(case.criteria[name].to_numpy(float)) for name in case.criteria.columns}


def known_criteria(cases: Sequence[Case], *, labels: bool = True) -> tuple[str, ...]:
    """Returns the criteria of all cases in their order, with or without those that need labels."""
    needs_labels = frozenset().union(*(case.needs_labels for case in cases))
    names = dict.fromkeys(name for case in cases for name in case.criteria.columns)
    return tuple(name for name in names if labels or name not in needs_labels)


def fixed(weights: Mapping[str, float]) -> Fitter:
    """Returns the fitter of a rule with fixed weights, which learns nothing."""
    return lambda cases: Rule(weights)


def as_selected(fitter: Fitter, *, label_free: bool = False) -> Fitter:
    """Returns the fitter of a rule applied as by `layerprobe select`: with limits and ties, possibly without a pick.

    Every pair is refused if the evidence is missing, or lacks a value that the limits need.
    """

    def fit(cases: Sequence[Case]) -> PairScorer:
        rule = fitter(cases)
        assert isinstance(rule, Rule)

        def order(case: Case) -> Floats:
            refused = np.full(len(case.pairs), np.nan)
            try:
                if case.evidence is None:
                    return refused
                selection = rank_pairs(case.evidence, label_free=label_free, rule=rule.weights)
            except ValueError:
                return refused
            ranked = {} if selection.pick is None else {pair.pair: -i for i, pair in enumerate(selection.ranked)}
            return np.array([float(ranked.get(pair, np.nan)) for pair in case.pairs])

        return order

    return fit


def single(criteria: Sequence[str]) -> Fitter:
    """Returns the fitter that takes the one criterion with the largest mean correlation, with the sign of that."""

    def fit(cases: Sequence[Case]) -> Rule:
        _, with_gain = _moments(cases, criteria)
        best = int(np.abs(with_gain).argmax())
        return Rule({criteria[best]: float(np.sign(with_gain[best]))})

    return fit


def rank_average(criteria: Sequence[str]) -> Fitter:
    """Returns the fitter of the mean of all criteria whose correlation has the same sign in every model.

    If there is no such criterion, it takes all of them.
    """

    def fit(cases: Sequence[Case]) -> Rule:
        of_models = np.array([_moments(group, criteria)[1] for group in by_model(cases).values()])
        signs = np.sign(of_models)
        agreed = np.sign(signs.sum(axis=0)) * (np.abs(signs.sum(axis=0)) == np.abs(signs).sum(axis=0))
        weights = agreed if agreed.any() else np.sign(of_models.mean(axis=0))
        count = max(np.abs(weights).sum(), 1)
        return Rule({name: float(w / count) for name, w in zip(criteria, weights, strict=True) if w})

    return fit


def ridge(criteria: Sequence[str], *, penalty: float = 1.0) -> Fitter:
    """Returns the fitter of a ridge regression of the gain's standard ranks on those of the criteria.

    Every weight has the sign of its criterion's own correlation. Models count equally. The penalty is in units of a
    criterion's variance, so 1 halves the weight of a single criterion; it is not tuned, because there are too few
    models.
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
    """Scores pairs by the gains of pairs at the same depths in other models: the baseline that evidence must beat.

    A pair's score is the mean standard gain of the other models' pairs, weighted by a Gaussian of the distance in
    (student depth, teacher depth) whose width is one layer of the scored model.
    """
    training = [(_depths(case), _standard(case)[None]) for case in cases]

    def score(case: Case) -> Floats:
        depths, width = _depths(case), 1 / (len(case.layers) - 1)
        total = np.zeros(len(depths))
        for other_depths, gains in training:
            distances = ((depths[:, None] - other_depths[None]) ** 2).sum(axis=2) / (2 * width**2)
            weights = np.exp(distances.min(axis=1, keepdims=True) - distances)  # the nearest has weight 1: never 0 / 0
            total += weights @ gains / weights.sum(axis=1)
        return total / len(training)

    return score


def _depths(case: Case) -> Floats:
    return case.ends / (len(case.layers) - 1)


def chosen(candidates: Mapping[str, Fitter]) -> Fitter:
    """Returns the fitter that takes the best of several candidates, each evaluated by leaving out one training model.

    With a single model it takes the first candidate. The best of several rules in a comparison is partly lucky; this
    fitter shows the result of choosing the best.
    """

    def fit(cases: Sequence[Case]) -> Rule | PairScorer:
        if len(by_model(cases)) < 2:
            return next(iter(candidates.values()))(cases)
        merits = {name: _merit(fitter, cases) for name, fitter in candidates.items()}
        return candidates[max(merits, key=lambda name: merits[name])](cases)

    return fit


def _merit(fitter: Fitter, cases: Sequence[Case]) -> float:
    correlations = [rank_correlation(order, case.gain, case.ends).rho for case, order in _left_out(fitter, cases)]
    return float(np.mean(np.nan_to_num(correlations)))


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
    """Prediction of a rule about the pairs of a model that it was not fitted on.

    Attributes:
        rule: Name of the rule.
        case: Pair sweep with its evidence.
        order: Scores of the pairs, shape (P,), larger is better; nan for pairs that the rule refuses.
        calibration: Conversion of the scores to expected gains, from the training models.
    """

    rule: str
    case: Case
    order: Floats
    calibration: Calibration

    @property
    def expected(self) -> Floats:
        """Expected gains, shape (P,); nan for pairs that are refused."""
        return self.calibration.level + self.calibration.slope * _unit(self.order)

    @property
    def pick(self) -> int | None:
        """Index of the best pair, of equal ones the first; None if all are refused."""
        return int(np.nanargmax(self.order)) if np.isfinite(self.order).any() else None

    @property
    def none(self) -> bool:
        """Whether the rule recommends no pair: all are refused, or the pick is expected to lose beyond its interval."""
        return self.pick is None or bool(self.expected[self.pick] + self.calibration.half_width < 0)

    @property
    def gain(self) -> float:
        """Gain of the pick, averaged over pairs with the same score; nan if all pairs are refused."""
        return float(self.case.gain[self.order == self.order[self.pick]].mean()) if self.pick is not None else np.nan

    @property
    def ties(self) -> NDArray[np.bool_]:
        """Whether each pair but the pick is expected to be within one standard error of the pick, shape (P,)."""
        if self.pick is None:
            return np.zeros(len(self.order), dtype=bool)
        close: NDArray[np.bool_] = self.expected[self.pick] - self.expected < self.calibration.error
        close[self.pick] = False
        return close


def calibrate(fitter: Fitter, training: Sequence[Case]) -> Calibration:
    """Learns how gains follow from the scores of a fitter, by leaving out each training model in turn.

    It measures the share of the gain's spread that the scores explain and the remaining error. The level of a model's
    gains does not follow from its evidence: it is the mean level of the training models, with their spread as its
    uncertainty. A single training model is scored by the rule that was fitted on it, which is too optimistic, and the
    interval of an expected gain is then infinite.
    """
    groups = by_model(training)
    has_several = len(groups) > 1
    scored = (
        _left_out(fitter, training) if has_several else [(case, _ordered(fitter(training), case)) for case in training]
    )
    shapes = [
        (_unit(order)[admissible], _unit(case.gain)[admissible])
        for case, order in scored
        if (admissible := np.isfinite(order)).any()
    ]
    slope = max(fmean([float(order @ gain) / len(gain) for order, gain in shapes] or [0.0]), 0.0)
    residual = np.sqrt(fmean([float(np.square(gain - slope * order).mean()) for order, gain in shapes] or [1.0]))
    levels = np.array([np.mean([case.gain.mean() for case in group]) for group in groups.values()])
    spread = float(np.mean([np.mean([case.gain.std() for case in group]) for group in groups.values()]))
    half = np.inf
    if has_several:
        n = len(levels)
        of_level = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * levels.std(ddof=1) * np.sqrt(1 + 1 / n)
        half = float(np.hypot(of_level, Z95 * residual * spread))
    source = ", ".join(case.name for case in training)
    return Calibration(float(levels.mean()), spread * slope, half, float(np.sqrt(2) * residual * spread), source)


def learned(fitter: Fitter, cases: Sequence[Case]) -> Rule:
    """Fits a rule and its calibration on all cases, for use on a new model.

    Raises:
        ValueError: If the fitter does not give a weighted sum of criteria.
    """
    rule = fitter(cases)
    if not isinstance(rule, Rule):
        raise ValueError("this fitter gives no weighted sum of criteria; use a ridge or an average")
    return replace(rule, calibration=calibrate(fitter, cases))


def predict(name: str, fitter: Fitter, training: Sequence[Case], case: Case) -> RulePrediction:
    """Returns the prediction for a case of a rule that is fitted on other cases."""
    return RulePrediction(name, case, _ordered(fitter(training), case), calibrate(fitter, training))


def _unit(values: Floats) -> Floats:
    """Values scaled to mean 0 and variance 1; 0 if all are equal, nan where a value is missing."""
    if not np.isfinite(values).any():
        return values
    centered: Floats = values - np.nanmean(values)
    size = np.nanstd(values)
    return centered / size if size > 0 else centered


def leave_one_model_out(cases: Sequence[Case], fitters: Mapping[str, Fitter]) -> list[RulePrediction]:
    """Returns the prediction of every rule for every case, fitted on the cases of all other models.

    Raises:
        ValueError: If there is only one model.
    """
    if len(by_model(cases)) < 2:
        raise ValueError(
            f"all {len(cases)} pair sweeps are of one model; pass two models or more, so that one can be left out"
        )
    return [
        predict(name, fitter, [other for other in cases if other.model != case.model], case)
        for name, fitter in fitters.items()
        for case in cases
    ]


def judged(predictions: Sequence[RulePrediction]) -> pd.DataFrame:
    """Compares each prediction with the gains of its pair sweep, one row per prediction.

    Columns: rule, atlas and model; student and teacher of the pick; none (whether no pair was recommended); gain (see
    `RulePrediction.gain`) and taken (the same, 0 if no pair was recommended); rank (of the gain among all pairs, 1 is
    the best); rho, low and high (rank correlation of scores and gains, over the admissible pairs); regret and
    regret_elsewhere (missed shares of `Worth.best` and `Worth.best_elsewhere`, nan if no pair gains beyond the noise);
    harm (whether the taken pair is worse than the baseline beyond the noise: one-sided, 5 %); ties (number of ties) and
    ties_within (share of them whose gain differs from the pick's by less than 1.96 standard errors); covered (share of
    gains within their predicted intervals).
    """
    return pd.DataFrame([_judged(one) for one in predictions])


def _judged(one: RulePrediction) -> dict[str, Any]:
    case, value = one.case, worth(one.case)
    gain, taken = one.gain, 0.0 if one.none else one.gain
    correlation = rank_correlation(one.order, case.gain, case.ends)
    bar = value.error * stats.t.ppf(0.95, value.dof) if value.dof > 0 else np.nan
    pick = None if one.pick is None else case.pairs[one.pick]
    differences = np.abs(case.gain - case.gain[one.pick or 0])[one.ties]
    admissible = np.isfinite(one.expected)
    inside = np.abs(case.gain - one.expected)[admissible] < one.calibration.half_width
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
        "rho": correlation.rho,
        "low": correlation.low,
        "high": correlation.high,
        "regret": 1 - taken / value.best if value.pays else np.nan,
        "regret_elsewhere": 1 - taken / value.best_elsewhere if value.pays else np.nan,
        "harm": bool(taken < -bar),
        "ties": int(one.ties.sum()),
        "ties_within": float((differences < Z95 * one.calibration.error).mean()) if len(differences) else np.nan,
        "covered": float(inside.mean()) if admissible.any() else np.nan,
    }
