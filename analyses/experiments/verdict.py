"""From the curves of a confirmation to its verdict; nothing here trains, reads or writes.

The verdict never says more than the curves show. It is on one pair, by one comparison that was fixed beforehand: the
distance at the end against that without alignment, paired over seeds; all other numbers stand beside it for
description. It may be "too early to tell": alignment can cost quality for the first thousands of steps and pay
afterwards (docs/method.md), so a loss while either run still improves is not a verdict. Nor is a gain over a baseline
that training has made worse.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats

from layerprobe.analyses.experiments.arms import (
    BASELINE,
    CONTROL,
    FIRST,
    FRECHET,
    HEURISTIC,
    LEARNING_RATE,
    RANDOM,
    RUNNER_UP,
    Arm,
    ConfirmationPlan,
)
from layerprobe.analyses.experiments.power import (
    LEVEL,
    POWER,
    Array,
    Resolution,
    Spread,
    detectable,
    error_rate,
    p_value,
)

# A run that still loses this share of its distance over the last part of its steps is in the middle of its training;
# the part is fixed, so that more frequent evaluations do not make a run look settled.
STILL_IMPROVING = 0.05
LAST_PART = 0.25

Answer = Literal["helps", "hurts", "no difference found", "too early to tell"]


@dataclass(frozen=True)
class ArmResult:
    """What an arm came to.

    Attributes:
        name: The arm.
        student: None for no alignment, like `teacher`.
        teacher: See `student`.
        weight: Of the alignment; 0 for none.
        final: Fréchet distance at the end, one per seed.
        difference: Mean paired difference to no alignment; negative is better. None for no alignment itself.
        low: Lower end of its t interval over seeds, 95 % unless the verdict's level is another.
        high: Upper end.
        steps_to_baseline: Steps at which the arm reaches the baseline's final distance, one per seed; None where it
            never does.
        learning_rate: That it was trained at.
        also: Other names under which this pair would have stood.
    """

    name: str
    student: str | None
    teacher: str | None
    weight: float
    final: list[float]
    difference: float | None
    low: float | None
    high: float | None
    steps_to_baseline: list[float | None]
    learning_rate: float
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What the confirmation found; `paragraph` says it in words.

    Attributes:
        metric: That decides.
        extractor: Whose features it is measured in.
        lower_is_better: Of the metric.
        start: "from scratch", or which checkpoint.
        steps: Of each arm.
        num_seeds: That were trained.
        num_samples: Drawn for each distance.
        answer: On the judged arm.
        paragraph: For people.
        arms: No alignment first.
        judged: Name of the arm that the answer is about.
        planned_seeds: More than were trained where the difference was clear before.
        level: Of the t test that decided.
        looks: {number of seeds: level} of every look that could have ended in a finding, earlier verdicts included.
        error_rate: How often these looks find a difference where there is none.
        resolution: The difference that so many seeds find with a chance of 80 %, by the spread that they showed; see
            `Resolution`. None where they showed none.
    """

    metric: str
    extractor: str
    lower_is_better: bool
    start: str
    steps: int
    num_seeds: int
    num_samples: int
    answer: Answer
    paragraph: str
    arms: tuple[ArmResult, ...]
    judged: str
    planned_seeds: int
    level: float
    looks: dict[int, float] = field(default_factory=dict)
    error_rate: float = LEVEL
    resolution: Resolution | None = None

    def to_json(self) -> str:
        """As in verdict.json."""
        record = asdict(self) | {"curves_csv": "confirmation.csv"}
        record["resolution"] = self.resolution and self.resolution.to_dict()
        return json.dumps(record, indent=1)


def check_arms(arms: Sequence[Arm]) -> None:
    """Refuses arms that do not compare.

    Raises:
        ValueError: If the first arm aligns layers, no other does, one differs in nothing from the first, or two have
            one name.
    """
    if not arms or arms[0].pair is not None or arms[0].matched is not None:
        raise ValueError("the first arm must be the one without alignment")
    if not any(arm.pair for arm in arms) or not all(arm.pair or arm.matched for arm in arms[1:]):
        raise ValueError(
            "every arm after the first must align layers or match the steps of one that does, and one must align; "
            "pass arms with a pair"
        )
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ValueError(f"two arms have the same name ({', '.join(names)}); give every arm a name of its own")


def judged_arm(arms: Sequence[Arm]) -> Arm:
    """The arm that the verdict is on: the first that aligns layers and is not the bad control."""
    aligned = [arm for arm in arms if arm.pair]
    return next((arm for arm in aligned if arm.name != CONTROL), aligned[0])


def is_clear(curves: pd.DataFrame, arms: Sequence[Arm], plan: ConfirmationPlan) -> bool:
    """Whether these seeds are enough: a look is due, and the judged arm's difference is beyond its level.

    A clear difference ends the seeds whatever the verdict makes of it: if the curves still move, more steps are wanted
    and not more seeds.
    """
    seeds = _seeds_in(curves, plan)
    level = plan.looks.get(len(seeds))
    if level is None:
        return False
    scores = _scores(curves, (arms[0], judged_arm(arms)), seeds, plan)
    baseline, tried = scores.values()
    return p_value((tried - baseline).iloc[:, -1].to_numpy(np.float64)) <= level


def judge(
    curves: pd.DataFrame,
    arms: Sequence[Arm],
    plan: ConfirmationPlan,
    *,
    extractor_name: str,
    start_name: str,
    looked: Mapping[int, float] | None = None,
) -> Verdict:
    """Curves (arm, seed, step, metric, value) -> verdict on the first aligned arm that is not the bad control.

    Args:
        curves: Scores of all seeds of the plan, or of those up to an early stop.
        arms: The first is the baseline.
        plan: How they were trained.
        extractor_name: Of the distance.
        start_name: For the paragraph.
        looked: Looks of earlier verdicts on fewer seeds, {number of seeds: level}.

    Raises:
        ValueError: If the arms do not compare, or a score is missing or not finite.
    """
    check_arms(arms)
    seeds = _seeds_in(curves, plan) if plan.stop_early else plan.seeds
    if len(seeds) not in plan.looks:
        raise ValueError(f"the curves have {len(seeds)} of {len(plan.seeds)} seeds; finish the runs first")
    level, looks = plan.looks[len(seeds)], _all_looks(plan, len(seeds), looked or {})
    scores = _scores(curves, arms, seeds, plan)
    baseline, arm = scores[arms[0].name], judged_arm(arms)
    results = tuple(_arm_result(scores[arm.name], baseline, arm, plan, level) for arm in arms)
    tried = results[arms.index(arm)]
    answer, reason = _answer(tried, scores[tried.name], baseline, level)
    resolution = _resolution(scores[tried.name], baseline, level)
    rate = LEVEL if _planned(plan, looks) else error_rate({**plan.looks, **looks})
    sentences = [
        _change(tried, results[0], plan, len(seeds), start_name),
        _role(tried.name),
        reason,
        _resolved(resolution, results[0]) if answer == "no difference found" else "",
        _looks(plan, len(seeds), looks, rate),
        *_comparisons(tried, results, answer, level),
    ]
    return Verdict(
        metric=FRECHET,
        extractor=extractor_name,
        lower_is_better=True,
        start=start_name,
        steps=plan.training.steps,
        num_seeds=len(seeds),
        num_samples=plan.num_samples,
        answer=answer,
        paragraph=" ".join(filter(None, sentences)),
        arms=results,
        judged=tried.name,
        planned_seeds=len(plan.seeds),
        level=level,
        looks=looks,
        error_rate=rate,
        resolution=resolution,
    )


def _seeds_in(curves: pd.DataFrame, plan: ConfirmationPlan) -> tuple[int, ...]:
    there = set(curves["seed"])
    return tuple(seed for seed in plan.seeds if seed in there)


def _all_looks(plan: ConfirmationPlan, num_seeds: int, looked: Mapping[int, float]) -> dict[int, float]:
    """Every look so far, with the more generous level where there were two after as many seeds."""
    now = {n: level for n, level in plan.looks.items() if n <= num_seeds}
    return {n: max(now.get(n, 0.0), looked.get(n, 0.0)) for n in sorted({*now, *looked})}


def _planned(plan: ConfirmationPlan, looks: Mapping[int, float]) -> bool:
    return looks.items() <= plan.looks.items()


def _scores(
    curves: pd.DataFrame, arms: Sequence[Arm], seeds: Sequence[int], plan: ConfirmationPlan
) -> dict[str, pd.DataFrame]:
    """Fréchet distances of each arm: a row for each seed, a column for each step."""
    rows = pd.MultiIndex.from_product([[arm.name for arm in arms], seeds], names=["arm", "seed"])
    distances = curves[curves["metric"] == FRECHET]
    table = distances.pivot(index=["arm", "seed"], columns="step", values="value").sort_index(axis=1).reindex(rows)
    if table.shape[1] < 2 or int(table.columns[-1]) != plan.training.steps:
        raise ValueError(f"the curves have steps {list(table.columns)} of {plan.training.steps}; finish the runs first")
    bad = ~np.isfinite(table.to_numpy(np.float64))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        (arm, seed), step = table.index[row], table.columns[column]
        raise ValueError(f"{arm}, seed {seed} has no finite {FRECHET} at step {step}; repeat that run")
    return {arm.name: table.loc[[arm.name]].droplevel("arm") for arm in arms}


def _arm_result(
    curve: pd.DataFrame, baseline: pd.DataFrame, arm: Arm, plan: ConfirmationPlan, level: float
) -> ArmResult:
    final, goal = curve.iloc[:, -1].to_numpy(), baseline.iloc[:, -1].to_numpy()
    mean, low, high = (None, None, None) if curve is baseline else paired_interval(final - goal, confidence=1 - level)
    steps = [float(step) for step in curve.columns]
    reached = [steps_to_reach(steps, row, aim) for row, aim in zip(curve.to_numpy(), goal, strict=True)]
    student, teacher = (None, None) if arm.pair is None else (arm.pair.student, arm.pair.teacher)
    weight, rate = plan.training.weight if arm.pair else 0.0, arm.learning_rate or plan.training.learning_rate
    return ArmResult(arm.name, student, teacher, weight, final.tolist(), mean, low, high, reached, rate, arm.also)


def paired_interval(differences: Array, *, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of paired differences (n,) and its t interval, n at least 2."""
    n, mean = len(differences), float(np.mean(differences))
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * np.std(differences, ddof=1) / np.sqrt(n))
    return mean, mean - half, mean + half


def steps_to_reach(steps: Sequence[float], values: Array, goal: float) -> float | None:
    """The step at which a curve first reaches the goal from above, linear between evaluations; None if never."""
    for i, value in enumerate(values):
        if value <= goal:
            if i == 0:
                return steps[0]
            share = (values[i - 1] - goal) / (values[i - 1] - value)
            return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))
    return None


def _answer(tried: ArmResult, curve: pd.DataFrame, baseline: pd.DataFrame, level: float) -> tuple[Answer, str]:
    """The answer, and the sentence that gives its reason; curves have a row for each seed, a column for each step."""
    assert tried.low is not None and tried.high is not None
    doubt = _doubt(tried, curve, baseline, level)
    if doubt:
        return "too early to tell", f"It is too early to tell: {doubt}"
    if tried.high < 0:
        gain, since = _late_gain(baseline)
        lead = f" The baseline still improved by {gain:.0%} since step {since}, so the lead may not last."
        helps = "The pair helps: the whole interval lies on the side of the gain."
        return "helps", helps + (lead if gain > STILL_IMPROVING else "")
    if tried.low > 0:
        return "hurts", (
            "The pair hurts here: the whole interval lies on the side of the loss, and both runs have levelled off."
        )
    return "no difference found", (
        "No difference was found: the interval includes zero, and both runs have levelled off."
    )


def _doubt(tried: ArmResult, curve: pd.DataFrame, baseline: pd.DataFrame, level: float) -> str | None:
    """Why these curves settle nothing yet; None if they do."""
    assert tried.difference is not None and tried.low is not None and tried.high is not None
    if tried.difference and tried.high - tried.low <= 1e-9 * abs(tried.difference):
        return "every seed gave the same difference, so there is no spread to judge by. Run other seeds."
    mean = baseline.mean()
    best = int(mean.argmin())
    lowest, end = float(mean.iloc[best]), float(mean.iloc[-1])
    worsened = (
        f"without alignment the distance was best at step {mean.index[best]} ({lowest:.3g}) and ended at {end:.3g}, "
        "so there is no settled level to compare with. Run more steps or lower the learning rate."
    )
    if tried.high < 0:
        to_best = (curve.iloc[:, -1] - baseline.iloc[:, best]).to_numpy()
        return None if paired_interval(to_best, confidence=1 - level)[2] < 0 else worsened
    for who, (gain, since) in (("baseline", _late_gain(baseline)), ("aligned run", _late_gain(curve))):
        if gain > STILL_IMPROVING:
            return (
                f"the {who} still improved by {gain:.0%} since step {since}, and alignment can cost quality at first "
                "and pay later. Run more steps."
            )
    if end > (1 + STILL_IMPROVING) * lowest:
        return worsened
    if not _moved(baseline) and not _moved(curve):
        return f"neither run moved by {STILL_IMPROVING:.0%} since its start. Run more steps or raise the learning rate."
    return None


def _late_gain(curve: pd.DataFrame) -> tuple[float, int]:
    """The share of its mean distance that a run lost over the last part of its steps, and where that part begins."""
    mean, steps = curve.mean(), curve.columns.to_numpy()
    since = max(int((steps <= (1 - LAST_PART) * steps[-1]).sum()) - 1, 0)
    earlier = float(mean.iloc[since])
    return (1 - float(mean.iloc[-1]) / earlier if earlier > 0 else 0.0), int(steps[since])


def _moved(curve: pd.DataFrame) -> bool:
    mean = curve.mean()
    return bool(((mean - mean.iloc[0]).abs() > STILL_IMPROVING * mean.iloc[0]).any())


def _resolution(curve: pd.DataFrame, baseline: pd.DataFrame, level: float) -> Resolution | None:
    found = spread_of((curve - baseline).iloc[:, -1].to_numpy(np.float64)[None], baseline.iloc[:, -1], "these seeds")
    n = len(curve)
    return None if found is None else Resolution(n, level, detectable(n, level=level), found)


def spread_of(differences: Array, baseline: Any, source: str) -> Spread | None:
    """The spread over seeds of paired differences (arms, seeds) of one size; None where there is none.

    Args:
        differences: To no alignment.
        baseline: Distances without alignment, one per seed.
        source: Where they come from.
    """
    share = float(np.sqrt(np.mean(np.var(differences, axis=1, ddof=1))) / max(np.mean(baseline), 1e-300))
    return Spread(share, differences.shape[1], source) if 0 < share < np.inf else None


def _change(tried: ArmResult, baseline: ArmResult, plan: ConfirmationPlan, num_seeds: int, start_name: str) -> str:
    over = " over all looks" if plan.stop_early else ""
    return (
        f"Aligning {tried.student} to {tried.teacher} changed the Fréchet distance by {tried.difference:+.3g} "
        f"(95 % interval{over} {tried.low:+.3g} to {tried.high:+.3g}) from {np.mean(baseline.final):.3g} without "
        f"alignment, after {plan.training.steps} steps {start_name}, {num_seeds} seeds."
    )


def _role(name: str) -> str:
    if name == FIRST:
        return "The selection advises against every pair; this is the one that it ranks first."
    other = name in (HEURISTIC, RUNNER_UP) or name.startswith(RANDOM)
    return f"No pick was among the arms, so this is the {name}." if other else ""


def _resolved(resolution: Resolution | None, baseline: ArmResult) -> str:
    if resolution is None or resolution.share is None:
        return ""
    size = resolution.share * float(np.mean(baseline.final))
    return (
        f"With the spread that these seeds show, {resolution.num_seeds} seeds find a difference of {size:.2g} "
        f"({resolution.share:.0%}) with a chance of {POWER:.0%}."
    )


def _looks(plan: ConfirmationPlan, num_seeds: int, looks: Mapping[int, float], rate: float) -> str:
    if _planned(plan, looks):
        if not plan.stop_early:
            return ""
        clear = f", and the difference was clear after {num_seeds} of {len(plan.seeds)}"
        return (
            f"The seeds were looked at one by one, at levels that keep the error rate of all looks at {LEVEL:.0%}"
            f"{clear if num_seeds < len(plan.seeds) else ''}."
        )
    return (
        f"This was looked at after {_listed(looks)} seeds, with levels that were not planned together: where there is "
        f"no difference, one would be found in {rate:.1%} of cases."
    )


def _listed(numbers: Sequence[int] | Mapping[int, float]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def _comparisons(tried: ArmResult, results: Sequence[ArmResult], answer: Answer, level: float) -> list[str]:
    """How the judged arm stands to the others; plain differences of final distances, paired over seeds."""

    def against(others: Sequence[ArmResult]) -> tuple[float, float, float]:
        mean = np.mean([other.final for other in others], axis=0)
        return paired_interval(np.asarray(tried.final) - mean, confidence=1 - level)

    sentences = []
    rate = next((result for result in results if result.name == LEARNING_RATE), None)
    if rate is not None and answer == "helps":
        change, low, high = against([rate])
        told = "so longer or shorter steps are not the reason" if high < 0 else "so the gain may be that of its steps"
        sentences.append(
            f"The pair's difference to no alignment with steps of the same length (learning rate "
            f"{rate.learning_rate:.3g}) is {change:+.3g} ({low:+.3g} to {high:+.3g}), {told}."
        )
    drawn = [result for result in results if result.name.startswith(RANDOM) and result is not tried]
    if drawn:
        change, low, high = against(drawn)
        count = "a random pair" if len(drawn) == 1 else f"the mean of {len(drawn)} random pairs"
        sentences.append(f"Its difference to {count} is {change:+.3g} ({low:+.3g} to {high:+.3g}).")
    lowest = min(results, key=lambda result: float(np.mean(result.final)))
    if len(results) > 2:
        same = "that arm" if lowest is tried else BASELINE if lowest is results[0] else f"the {lowest.name}"
        sentences.append(f"Of the {len(results)} arms, {same} ended lowest ({np.mean(lowest.final):.3g}).")
    return sentences
