"""The verdict of a confirmation from its curves; nothing here trains, reads or writes.

The verdict is about one pair and rests on one comparison that was fixed beforehand: the distance at the end against
the baseline's, paired over seeds. All other numbers are description. The answer may be "too early to tell": alignment
can cost quality for the first thousands of steps and pay off afterwards (docs/method.md), so a loss is no verdict while
either run still improves. A gain is no verdict either if training has made the baseline worse.

A verdict holds numbers and codes; `layerprobe.analyses.wording` puts them into words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats

from layerprobe.analyses.experiments.arms import (
    FRECHET,
    LEARNING_RATE,
    NEGATIVE_CONTROL,
    PICK,
    PRIOR,
    RANDOM,
    RUNNER_UP,
    SAME_DISTANCE,
    SRA,
    Arm,
    ConfirmationPlan,
)
from layerprobe.analyses.experiments.branching import BRANCHED, BranchCourse, branch_course
from layerprobe.analyses.experiments.power import (
    LEVEL,
    Array,
    Resolution,
    Spread,
    SpreadSource,
    detectable,
    error_rate,
    p_value,
)
from layerprobe.records import parse

# A run that still loses this share of its distance over the last part of its steps is in the middle of its training.
# The part is fixed, so that more frequent evaluations do not make a run look settled.
STILL_IMPROVING = 0.05
LAST_PART = 0.25

Answer = Literal["helps", "hurts", "no difference found", "too early to tell"]
VerdictCaution = Literal[
    "judged arm is not the pick",
    "no spread over seeds",
    "baseline got worse",
    "baseline still improves",
    "aligned arm still improves",
    "no arm moved",
    "looks not planned together",
    "gain may come from step length",
    "start looks converged",
]
Against = Literal["published prior", "same distance", "learning rate", "random pairs"]


@dataclass(frozen=True)
class Trend:
    """Course of an arm's distance, averaged over seeds.

    Attributes:
        best: Lowest mean distance at any evaluation.
        best_step: Step of that evaluation.
        late_gain: Share of the mean distance that was lost over the last quarter of the steps; negative for a rise.
        late_step: Step at which that last quarter begins.
    """

    best: float
    best_step: int
    late_gain: float
    late_step: int


@dataclass(frozen=True)
class ArmResult:
    """Result of one arm.

    Attributes:
        name: Name of the arm.
        student: Student layer; None for an arm without alignment.
        teacher: Teacher layer; None for an arm without alignment.
        weight: Weight of the alignment; 0 for an arm without alignment.
        final: Fréchet distance at the end, one value per seed.
        difference: Mean paired difference to the baseline, negative if the arm is better; None for the baseline.
        low: Lower end of its t interval over seeds, 95 % unless the level of the verdict differs.
        high: Upper end of that interval.
        steps_to_baseline: Step at which the arm reaches the final distance of the baseline, one value per seed; None
            for a seed that never reaches it.
        learning_rate: Learning rate of the training.
        trend: Course of the distance during the training.
        also: Names of further requested arms that have the same pair.
        options: Options of the alignment that differ from those of the other arms.
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
    trend: Trend
    also: tuple[str, ...] = ()
    options: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Difference of final distances between the judged arm and other arms, paired over seeds.

    Attributes:
        against: Arms on the other side, which are averaged.
        num_arms: Number of these arms.
        difference: Mean difference; negative if the judged arm is better.
        low: Lower end of its interval, of the same confidence as those of the arms.
        high: Upper end of that interval.
    """

    against: Against
    num_arms: int
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """Result of a confirmation.

    Attributes:
        metric: Metric that decides.
        extractor: Name of the extractor in whose features the metric is measured.
        lower_is_better: Whether a lower value of the metric is better.
        start: Where the arms start: "from scratch" or "from the checkpoint".
        steps: Training steps of each arm.
        num_seeds: Number of seeds that were trained.
        num_samples: Number of samples drawn for each distance.
        answer: Answer about the judged arm.
        cautions: Reasons to doubt the answer, or why there is none yet.
        arms: Results of the arms, the baseline first.
        judged: Name of the arm that the answer is about.
        comparisons: Differences of the judged arm to arms other than the baseline.
        planned_seeds: Number of planned seeds; larger than `num_seeds` if the difference was clear before.
        stop_early: Whether the plan allowed the seeds to stop early.
        level: Level of the t test that decided.
        looks: {number of seeds: level} of every test that could have found a difference, earlier verdicts included.
        error_rate: How often these looks find a difference where there is none.
        resolution: Difference that this number of seeds finds with a power of 80 %, given the spread they showed; None
            if they showed no spread.
        branch: Course of the baseline, if the arms branch from a checkpoint.
        end_step: Steps since fresh weights at which the arms ended; None where the checkpoint's are not recorded.
    """

    metric: str
    extractor: str
    lower_is_better: bool
    start: str
    steps: int
    num_seeds: int
    num_samples: int
    answer: Answer
    cautions: tuple[VerdictCaution, ...]
    arms: tuple[ArmResult, ...]
    judged: str
    comparisons: tuple[Comparison, ...]
    planned_seeds: int
    stop_early: bool
    level: float
    looks: dict[int, float] = field(default_factory=dict)
    error_rate: float = LEVEL
    resolution: Resolution | None = None
    branch: BranchCourse | None = None
    end_step: int | None = None

    def arm(self, name: str) -> ArmResult:
        """Returns the result of the arm with this name."""
        return next(arm for arm in self.arms if arm.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Returns the verdict as JSON values."""
        return asdict(self) | {"resolution": self.resolution and self.resolution.to_dict()}

    def to_json(self) -> str:
        """Returns the content of verdict.json."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Verdict:
        """Reads what `to_dict` returns.

        Raises:
            ValueError: If a field is missing or has another type, or a code is unknown.
        """
        fields = {name: value for name, value in record.items() if name != "resolution"}
        verdict: Verdict = parse(cls, fields)
        found = record.get("resolution")
        return verdict if found is None else replace(verdict, resolution=Resolution.from_dict(found))


def check_arms(arms: Sequence[Arm]) -> None:
    """Checks that arms can be compared.

    Raises:
        ValueError: If the first arm is not the baseline, no arm aligns layers, an arm equals the baseline, or two arms
            have the same name.
    """
    if not arms or arms[0].pair is not None or arms[0].matched is not None:
        raise ValueError("the first arm must be the baseline, which aligns no layers; put it first")
    if not any(arm.pair for arm in arms) or not all(arm.pair or arm.matched for arm in arms[1:]):
        raise ValueError(
            "every arm after the baseline must align layers or match the steps of one that does, and at least one must "
            "align; pass arms with a pair"
        )
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ValueError(f"two arms have the same name ({', '.join(names)}); give every arm a name of its own")


def judged_arm(arms: Sequence[Arm]) -> Arm:
    """Returns the arm that the verdict is about: the first that aligns layers and is not the negative control."""
    aligned = [arm for arm in arms if arm.pair]
    return next((arm for arm in aligned if arm.name != NEGATIVE_CONTROL), aligned[0])


def is_clear(curves: pd.DataFrame, arms: Sequence[Arm], plan: ConfirmationPlan) -> bool:
    """Returns whether the seeds may stop: a look is due, and the judged arm's difference passes the test of that look.

    A clear difference ends the seeds whatever the answer will be. If the curves still move, the confirmation needs more
    steps rather than more seeds.

    Args:
        curves: Scores of the seeds that are finished, see `judge`.
        arms: Arms of the confirmation, the baseline first.
        plan: Plan of the confirmation.
    """
    seeds = _seeds_in(curves, plan)
    level = plan.looks.get(len(seeds))
    if level is None:
        return False
    baseline, judged = _scores(curves, (arms[0], judged_arm(arms)), seeds, plan).values()
    return p_value((judged - baseline).iloc[:, -1].to_numpy(np.float64)) <= level


def judge(
    curves: pd.DataFrame,
    arms: Sequence[Arm],
    plan: ConfirmationPlan,
    *,
    extractor_name: str,
    start_name: str,
    looked: Mapping[int, float] | None = None,
    trained_steps: int | None = None,
) -> Verdict:
    """Returns the verdict on the judged arm, see `judged_arm`.

    Args:
        curves: Scores of all seeds of the plan, or of those up to an early stop; columns arm, seed, step, metric and
            value.
        arms: Arms of the confirmation, the baseline first.
        plan: Plan by which they were trained.
        extractor_name: Name of the extractor of the distance.
        start_name: Where the arms started, "from scratch" or "from the checkpoint".
        looked: Looks of earlier verdicts on fewer seeds, {number of seeds: level}.
        trained_steps: Steps of training that the arms start after: 0 from scratch; None where they are not recorded.

    Raises:
        ValueError: If the arms cannot be compared, or a score is missing or not finite.
    """
    check_arms(arms)
    seeds = _seeds_in(curves, plan) if plan.stop_early else plan.seeds
    if len(seeds) not in plan.looks:
        raise ValueError(f"the curves have {len(seeds)} of {len(plan.seeds)} seeds; finish the runs first")
    level, looks = plan.looks[len(seeds)], _all_looks(plan, len(seeds), looked or {})
    planned = looks.items() <= plan.looks.items()
    scores = _scores(curves, arms, seeds, plan)
    baseline = scores[arms[0].name]
    results = tuple(_arm_result(scores[arm.name], baseline, arm, plan, level) for arm in arms)
    judged = results[arms.index(judged_arm(arms))]
    answer, doubts = _answer(judged, results[0], scores[judged.name], baseline, level)
    comparisons = _comparisons(judged, results, level)
    rows = curves[(curves["arm"] == arms[0].name) & curves["seed"].isin(seeds)]
    branch = branch_course(rows) if start_name == BRANCHED else None
    if branch and branch.looks_converged and "baseline still improves" not in doubts:  # one of the two is false
        doubts = (*doubts, "start looks converged")
    return Verdict(
        metric=FRECHET,
        extractor=extractor_name,
        lower_is_better=True,
        start=start_name,
        steps=plan.training.steps,
        num_seeds=len(seeds),
        num_samples=plan.num_samples,
        answer=answer,
        cautions=(*doubts, *_other_cautions(judged, answer, comparisons, planned)),
        arms=results,
        judged=judged.name,
        comparisons=comparisons,
        planned_seeds=len(plan.seeds),
        stop_early=plan.stop_early,
        level=level,
        looks=looks,
        error_rate=LEVEL if planned else error_rate({**plan.looks, **looks}),
        resolution=_resolution(scores[judged.name], baseline, plan.training.steps, level),
        branch=branch,
        end_step=None if trained_steps is None else trained_steps + plan.training.steps,
    )


def _seeds_in(curves: pd.DataFrame, plan: ConfirmationPlan) -> tuple[int, ...]:
    finished = set(curves["seed"])
    return tuple(seed for seed in plan.seeds if seed in finished)


def _all_looks(plan: ConfirmationPlan, num_seeds: int, looked: Mapping[int, float]) -> dict[int, float]:
    """Every look so far, with the higher level where there were two after the same number of seeds."""
    current = {n: level for n, level in plan.looks.items() if n <= num_seeds}
    return {n: max(current.get(n, 0.0), looked.get(n, 0.0)) for n in sorted({*current, *looked})}


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
    student, teacher = (None, None) if arm.pair is None else (arm.pair.student, arm.pair.teacher)
    return ArmResult(
        name=arm.name,
        student=student,
        teacher=teacher,
        weight=plan.training.weight if arm.pair else 0.0,
        final=final.tolist(),
        difference=mean,
        low=low,
        high=high,
        steps_to_baseline=[steps_to_reach(steps, row, aim) for row, aim in zip(curve.to_numpy(), goal, strict=True)],
        learning_rate=arm.learning_rate or plan.training.learning_rate,
        trend=_trend(curve),
        also=arm.also,
        options=dict(arm.options),
    )


def _trend(curve: pd.DataFrame) -> Trend:
    mean, steps = curve.mean(), curve.columns.to_numpy()
    best = int(mean.argmin())
    late = max(int((steps <= (1 - LAST_PART) * steps[-1]).sum()) - 1, 0)
    earlier = float(mean.iloc[late])
    late_gain = 1 - float(mean.iloc[-1]) / earlier if earlier > 0 else 0.0
    return Trend(float(mean.iloc[best]), int(steps[best]), late_gain, int(steps[late]))


def paired_interval(differences: Array, *, confidence: float = 0.95) -> tuple[float, float, float]:
    """Returns mean, lower end and upper end of the t interval of paired differences, shape (n,), n at least 2."""
    n, mean = len(differences), float(np.mean(differences))
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * np.std(differences, ddof=1) / np.sqrt(n))
    return mean, mean - half, mean + half


def steps_to_reach(steps: Sequence[float], values: Array, goal: float) -> float | None:
    """Returns the step at which a curve first falls to the goal, linear between evaluations; None if it never does."""
    for i, value in enumerate(values):
        if value <= goal:
            if i == 0:
                return steps[0]
            share = (values[i - 1] - goal) / (values[i - 1] - value)
            return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))
    return None


def _answer(
    judged: ArmResult, reference: ArmResult, curve: pd.DataFrame, baseline: pd.DataFrame, level: float
) -> tuple[Answer, tuple[VerdictCaution, ...]]:
    """The answer and its doubts; curves have a row for each seed and a column for each step."""
    assert judged.low is not None and judged.high is not None
    doubt = _doubt(judged, reference, curve, baseline, level)
    if doubt:
        return "too early to tell", (doubt,)
    if judged.high < 0:
        # The lead may not last.
        return "helps", ("baseline still improves",) if reference.trend.late_gain > STILL_IMPROVING else ()
    return ("hurts" if judged.low > 0 else "no difference found"), ()


def _doubt(
    judged: ArmResult, reference: ArmResult, curve: pd.DataFrame, baseline: pd.DataFrame, level: float
) -> VerdictCaution | None:
    """Why these curves decide nothing yet; None if they do."""
    assert judged.difference is not None and judged.low is not None and judged.high is not None
    if judged.difference and judged.high - judged.low <= 1e-9 * abs(judged.difference):
        return "no spread over seeds"
    if judged.high < 0:
        to_best = (curve.iloc[:, -1] - baseline[reference.trend.best_step]).to_numpy()
        return None if paired_interval(to_best, confidence=1 - level)[2] < 0 else "baseline got worse"
    if reference.trend.late_gain > STILL_IMPROVING:
        return "baseline still improves"
    if judged.trend.late_gain > STILL_IMPROVING:
        return "aligned arm still improves"
    if float(np.mean(reference.final)) > (1 + STILL_IMPROVING) * reference.trend.best:
        return "baseline got worse"
    return None if _moved(baseline) or _moved(curve) else "no arm moved"


def _moved(curve: pd.DataFrame) -> bool:
    mean = curve.mean()
    return bool(((mean - mean.iloc[0]).abs() > STILL_IMPROVING * mean.iloc[0]).any())


def _other_cautions(
    judged: ArmResult, answer: Answer, comparisons: Sequence[Comparison], planned: bool
) -> list[VerdictCaution]:
    cautions: list[VerdictCaution] = []
    if judged.name.startswith((PRIOR, SAME_DISTANCE, RUNNER_UP, RANDOM, SRA, f"{PICK} with ", NEGATIVE_CONTROL)):
        cautions.append("judged arm is not the pick")
    if not planned:
        cautions.append("looks not planned together")
    # The baseline with steps of the same length may gain as much.
    if answer == "helps" and any(one.against == "learning rate" and one.high >= 0 for one in comparisons):
        cautions.append("gain may come from step length")
    return cautions


def _resolution(curve: pd.DataFrame, baseline: pd.DataFrame, steps: int, level: float) -> Resolution | None:
    differences = (curve - baseline).iloc[:, -1].to_numpy(np.float64)
    spread = spread_of(differences[None], baseline.iloc[:, -1], "this verdict", steps=steps)
    n = len(curve)
    return None if spread is None else Resolution(n, level, detectable(n, level=level), spread)


def spread_of(differences: Array, baseline: Any, source: SpreadSource, *, steps: int) -> Spread | None:
    """Returns the spread over seeds of paired differences; None if they do not vary.

    Args:
        differences: Differences to the baseline, shape (arms, seeds).
        baseline: Distances of the baseline, one per seed.
        source: Origin of the seeds.
        steps: Training steps after which the distances were measured.
    """
    share = float(np.sqrt(np.mean(np.var(differences, axis=1, ddof=1))) / max(np.mean(baseline), 1e-300))
    return Spread(share, differences.shape[1], source, steps) if 0 < share < np.inf else None


def _comparisons(judged: ArmResult, results: Sequence[ArmResult], level: float) -> tuple[Comparison, ...]:
    groups: dict[Against, list[ArmResult]] = {
        "published prior": [result for result in results if result.name == PRIOR and result is not judged],
        "same distance": [result for result in results if result.name == SAME_DISTANCE and result is not judged],
        "learning rate": [result for result in results if result.name == LEARNING_RATE],
        "random pairs": [result for result in results if result.name.startswith(RANDOM) and result is not judged],
    }
    comparisons = []
    for against, others in groups.items():
        if others:
            mean = np.mean([other.final for other in others], axis=0)
            interval = paired_interval(np.asarray(judged.final) - mean, confidence=1 - level)
            comparisons.append(Comparison(against, len(others), *interval))
    return tuple(comparisons)
