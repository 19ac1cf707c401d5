"""Proof by training: the same run with and without the picked pair, seed by seed.

An arm is a layer pair, or none. All arms of a seed share initial weights, data order, noise and noise levels, so
their difference is the pair's doing. The answer may be that there is none, or that it is too early to tell: alignment
can cost quality for the first thousands of steps and pay afterwards (docs/method.md), so a loss while either run still
improves is not a verdict. Nor is a gain over a baseline that training has made worse.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from layerprobe.backbones.base import Backbone
from layerprobe.data.base import Samples, Splits, Subset
from layerprobe.fidelity import (
    Extractor,
    all_features,
    classifier_extractor,
    frechet_distance,
    gaussian,
    sample_features,
)
from layerprobe.files import claim, write_text
from layerprobe.layersync import LayerPair, depth_heuristic
from layerprobe.sampling import SamplingPlan, sample
from layerprobe.training import TrainingPlan, held_out_loss, train

HELD_OUT_SAMPLES = 1000
FRECHET, HELD_OUT = "Frechet distance", "held-out loss"
BASELINE, PICK, RUNNER_UP, HEURISTIC = "no alignment", "pick", "runner-up", "depth heuristic"
CONTROL = "bad control"
# A run that still loses this share of its distance over the last part of its steps is in the middle of its training;
# the part is fixed, so that more frequent evaluations do not make a run look settled.
STILL_IMPROVING = 0.05
LAST_PART = 0.25

Answer = Literal["helps", "hurts", "no difference found", "too early to tell"]
Progress = Callable[[str, int, int], None]
Scores = dict[int, dict[str, float]]  # metrics by step


@dataclass(frozen=True)
class Arm:
    """One way to train; `pair` is None for no alignment."""

    name: str
    pair: LayerPair | None


@dataclass(frozen=True)
class ConfirmationPlan:
    """How arms are compared.

    Attributes:
        training: What all arms share; its pairs and seed are set by arm and seed.
        seeds: At least two; each is a fresh data order and noise, and fresh initial weights where the arms start from
            scratch.
        num_evaluations: Evenly spaced over the steps, the last one at the end.
        num_samples: Drawn for each Fréchet distance.
        sampling: How they are drawn.
    """

    training: TrainingPlan
    seeds: tuple[int, ...] = (0, 1, 2)
    num_evaluations: int = 4
    num_samples: int = 1000
    sampling: SamplingPlan = field(default_factory=lambda: SamplingPlan(solver="heun", steps=12))

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < 2:
            raise ValueError(f"a paired difference needs at least 2 seeds, got {list(self.seeds)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"a seed stands twice in {list(self.seeds)} and would count twice; pass each once")
        if not 1 <= self.num_evaluations <= self.training.steps:
            raise ValueError(f"{self.num_evaluations} evaluations do not fit into {self.training.steps} steps")
        if self.num_samples < 2:
            raise ValueError(f"a Fréchet distance needs at least 2 samples, got {self.num_samples}")

    @property
    def evaluation_steps(self) -> tuple[int, ...]:
        """0 and `num_evaluations` steps after it."""
        return tuple(round(i * self.training.steps / self.num_evaluations) for i in range(self.num_evaluations + 1))


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
        low: Lower end of its 95 % t interval over seeds.
        high: Upper end.
        steps_to_baseline: Steps at which the arm reaches the baseline's final distance, one per seed; None where it
            never does.
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


@dataclass(frozen=True)
class Verdict:
    """What the confirmation found; `paragraph` says it in words."""

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

    def to_json(self) -> str:
        """As in verdict.json."""
        return json.dumps(asdict(self) | {"curves_csv": "confirmation.csv"}, indent=1)


def arms_for(ranked: Sequence[LayerPair], layers: Sequence[str]) -> tuple[Arm, ...]:
    """No alignment, the pick, the depth heuristic, and a control that breaks every rule: the last two layers.

    An arm whose pair stands already is left out. Where the heuristic is the pick, the runner-up takes its place.

    Args:
        ranked: Admissible pairs, best first; the first is the pick.
        layers: Names in execution order.
    """
    heuristic = depth_heuristic(tuple(layers))
    wanted = [Arm(BASELINE, None), *(Arm(PICK, pair) for pair in ranked[:1]), Arm(HEURISTIC, heuristic)]
    wanted += [Arm(RUNNER_UP, pair) for pair in ranked[1:2] if ranked[0] == heuristic]
    wanted.append(Arm(CONTROL, LayerPair(layers[-2], layers[-1])))
    arms: list[Arm] = []
    for arm in wanted:
        if arm.pair not in [other.pair for other in arms]:
            arms.append(arm)
    return tuple(arms)


def confirm(
    start: Callable[[int], Backbone],
    splits: Splits,
    arms: Sequence[Arm],
    plan: ConfirmationPlan,
    folder: str | Path,
    *,
    start_name: str,
    extractor: Extractor | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Trains every arm with every seed and compares them; interrupted work continues when the call is repeated.

    Arms learn from the fit samples. Fréchet distance and held-out loss are measured against the report samples, which
    no arm has seen.

    Args:
        start: The model to start from, by seed: the same checkpoint for a branch, fresh weights from scratch.
        splits: The data.
        arms: The first is the baseline.
        plan: Seeds, steps, evaluations.
        folder: Gets one training run per arm and seed, `confirmation.csv` and `verdict.json`.
        start_name: "from scratch", or which checkpoint; goes into the verdict.
        extractor: For the Fréchet distance; a small classifier trained on the fit samples where not given.
        progress: Called with (what is running, steps done, steps in all) over all arms.

    Raises:
        ValueError: If the first arm aligns layers, no other does, two have one name, or the folder holds another run.
    """
    folder = Path(folder)
    _check_arms(arms)
    # Seeds and arms may be added later: each has a run of its own.
    comparable = {key: value for key, value in asdict(plan).items() if key != "seeds"}
    record = {
        "plan": comparable,
        "start": start_name,
        "data": splits.report.fingerprint,
        "extractor": extractor.name if extractor else None,
    }
    claim(folder, "confirmation.json", record, what="a confirmation")
    extractor = extractor or classifier_extractor(splits.fit, folder / "extractor.safetensors")
    scorer = Scorer(splits.report, extractor, num_samples=plan.num_samples, sampling=plan.sampling)
    training = replace(plan.training, checkpoint_every=_checkpoint_every(plan))
    rows: list[dict[str, Any]] = []
    beginnings: dict[int, Scores] = {}
    # Each seed starts once, so that its arms start equal even if `start` draws fresh weights at every call.
    starts = ((seed, start(seed)) for seed in plan.seeds)
    runs = ((seed, backbone, arm) for seed, backbone in starts for arm in arms)
    total = len(plan.seeds) * len(arms) * plan.training.steps
    for index, (seed, backbone, arm) in enumerate(runs):
        done = index * plan.training.steps

        def report(step: int, _: int, __: float, done: int = done, what: str = f"seed {seed}, {arm.name}") -> None:
            if progress:
                progress(what, done + step, total)

        scores = train_arm(
            backbone,
            splits.fit,
            arm,
            replace(training, seed=seed),
            run_folder(folder, arm, seed),
            score=scorer.means,
            score_at=plan.evaluation_steps,
            # The arms of a seed start from the same weights: what the first scored there, all score.
            known=beginnings.get(seed, {}),
            progress=report,
        )
        rows += [
            {"arm": arm.name, "seed": seed, "step": step, "metric": metric, "value": value}
            for step, values in scores.items()
            for metric, value in values.items()
        ]
        beginnings[seed] = {0: scores[0]}
    curves = pd.DataFrame(rows, columns=["arm", "seed", "step", "metric", "value"])
    verdict = judge(curves, arms, plan, extractor_name=extractor.name, start_name=start_name)
    write_text(folder / "confirmation.csv", curves.to_csv(index=False))
    write_text(folder / "verdict.json", verdict.to_json())
    return verdict


def run_folder(folder: Path, arm: Arm, seed: int) -> Path:
    """Where a seed of an arm is trained; its scores lie beside it, under the same name with .json."""
    return folder / f"seed-{seed}" / arm.name.replace(" ", "-")


def train_arm(
    backbone: Backbone,
    samples: Samples,
    arm: Arm,
    training: TrainingPlan,
    folder: Path,
    *,
    score: Callable[[Backbone], dict[str, float]],
    score_at: Sequence[int],
    known: Scores | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Scores:
    """Trains one seed of an arm and scores it on the way; what is done already is not done again.

    Args:
        backbone: Where it starts.
        samples: What it learns from.
        arm: Its pair replaces those of the plan.
        training: How; the same for all arms that are to be compared.
        folder: Gets the training; the scores lie beside it.
        score: Metrics of an averaged model.
        score_at: Steps to score.
        known: Scores that need no repeating.
        progress: As in `train`.

    Raises:
        ValueError: As `train`, or if a score of a finished training is lost.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = folder.with_name(f"{folder.name}.json")
    evaluations = _Evaluations(place, score)
    evaluations.scores |= known or {}
    plan = replace(training, pairs=(arm.pair,) if arm.pair else ())
    train(backbone, samples, plan, folder, observe=evaluations.observe, observe_at=score_at, progress=progress)
    missing = [step for step in score_at if step not in evaluations.scores]
    if missing:
        raise ValueError(f"{place} lacks step {missing[0]} of a finished run; delete {folder} to repeat that run")
    return evaluations.scores


class Scorer:
    """Scores models against samples that no arm has seen.

    Args:
        samples: The unseen ones; the first `HELD_OUT_SAMPLES` for the losses, all for the distance.
        extractor: For the Fréchet distance.
        num_samples: Drawn for each distance.
        sampling: How they are drawn.
    """

    def __init__(self, samples: Samples, extractor: Extractor, *, num_samples: int, sampling: SamplingPlan) -> None:
        self._extractor, self._num_samples, self._sampling = extractor, num_samples, sampling
        self._reference = gaussian(all_features(extractor, samples))
        self._held_out = Subset(samples, range(min(len(samples), HELD_OUT_SAMPLES)), name="held out")
        self._labels = None if samples.labels is None else _like(samples.labels, num_samples)

    def means(self, model: Backbone) -> dict[str, float]:
        """The Fréchet distance, and the held-out loss averaged over noise levels."""
        losses = self.losses(model)
        return {FRECHET: self.distance(model), HELD_OUT: float(np.mean(list(losses.values())))}

    def losses(self, model: Backbone) -> dict[float, float]:
        """The held-out loss by noise level."""
        return held_out_loss(model, self._held_out)

    def distance(self, model: Backbone) -> float:
        """The Fréchet distance of what the model draws."""
        # Classes as often as among the real samples; without labels the model has learned none in this training.
        labels = self._labels if model.num_classes else None
        x = sample(model, range(self._num_samples), labels=labels, plan=self._sampling)
        return frechet_distance(gaussian(sample_features(self._extractor, x)), self._reference)


def judge(
    curves: pd.DataFrame, arms: Sequence[Arm], plan: ConfirmationPlan, *, extractor_name: str, start_name: str
) -> Verdict:
    """Curves (arm, seed, step, metric, value) -> verdict on the first aligned arm that is not the bad control. Pure.

    Raises:
        ValueError: If the arms do not compare, or a score is missing or not finite.
    """
    _check_arms(arms)
    scores = _scores(curves, arms, plan)
    baseline = scores[arms[0].name]
    results = tuple(_arm_result(scores[arm.name], baseline, arm, plan) for arm in arms)
    tried = next((result for result in results[1:] if result.name != CONTROL), results[1])
    answer, reason = _answer(tried, scores[tried.name], baseline)
    return Verdict(
        metric=FRECHET,
        extractor=extractor_name,
        lower_is_better=True,
        start=start_name,
        steps=plan.training.steps,
        num_seeds=len(plan.seeds),
        num_samples=plan.num_samples,
        answer=answer,
        paragraph=_paragraph(tried, results[0], reason, plan, start_name),
        arms=results,
    )


def _check_arms(arms: Sequence[Arm]) -> None:
    if not arms or arms[0].pair is not None:
        raise ValueError("the first arm must be the one without alignment")
    if len(arms) < 2 or any(arm.pair is None for arm in arms[1:]):
        raise ValueError("every arm after the first must align layers, and there must be one; pass arms with a pair")
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ValueError(f"two arms have the same name ({', '.join(names)}); give every arm a name of its own")


def _scores(curves: pd.DataFrame, arms: Sequence[Arm], plan: ConfirmationPlan) -> dict[str, pd.DataFrame]:
    """Fréchet distances of each arm: a row for each seed, a column for each step."""
    rows = pd.MultiIndex.from_product([[arm.name for arm in arms], plan.seeds], names=["arm", "seed"])
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


def _arm_result(curve: pd.DataFrame, baseline: pd.DataFrame, arm: Arm, plan: ConfirmationPlan) -> ArmResult:
    final, goal = curve.iloc[:, -1].to_numpy(), baseline.iloc[:, -1].to_numpy()
    mean, low, high = (None, None, None) if arm.pair is None else paired_interval(final - goal)
    steps = [float(step) for step in curve.columns]
    reached = [steps_to_reach(steps, row, aim) for row, aim in zip(curve.to_numpy(), goal, strict=True)]
    student, teacher = (None, None) if arm.pair is None else (arm.pair.student, arm.pair.teacher)
    weight = plan.training.weight if arm.pair else 0.0
    return ArmResult(arm.name, student, teacher, weight, final.tolist(), mean, low, high, reached)


def paired_interval(differences: np.ndarray, *, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of paired differences (n,) and its t interval, n at least 2."""
    n, mean = len(differences), float(np.mean(differences))
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * np.std(differences, ddof=1) / math.sqrt(n))
    return mean, mean - half, mean + half


def steps_to_reach(steps: Sequence[float], values: np.ndarray, goal: float) -> float | None:
    """The step at which a curve first reaches the goal from above, linear between evaluations; None if never."""
    for i, value in enumerate(values):
        if value <= goal:
            if i == 0:
                return steps[0]
            share = (values[i - 1] - goal) / (values[i - 1] - value)
            return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))
    return None


def _answer(tried: ArmResult, curve: pd.DataFrame, baseline: pd.DataFrame) -> tuple[Answer, str]:
    """The answer, and the sentence that gives its reason; curves have a row for each seed, a column for each step."""
    assert tried.low is not None and tried.high is not None
    doubt = _doubt(tried, curve, baseline)
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


def _doubt(tried: ArmResult, curve: pd.DataFrame, baseline: pd.DataFrame) -> str | None:
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
        beats_best = paired_interval((curve.iloc[:, -1] - baseline.iloc[:, best]).to_numpy())[2] < 0
        return None if beats_best else worsened
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


def _paragraph(tried: ArmResult, baseline: ArmResult, reason: str, plan: ConfirmationPlan, start_name: str) -> str:
    level = float(np.mean(baseline.final))
    unpicked = " No pair was picked, so this is the depth heuristic." if tried.name == HEURISTIC else ""
    return (
        f"Aligning {tried.student} to {tried.teacher} changed the Fréchet distance by {tried.difference:+.3g} "
        f"(95 % interval {tried.low:+.3g} to {tried.high:+.3g}) from {level:.3g} without alignment, after "
        f"{plan.training.steps} steps {start_name}, {len(plan.seeds)} seeds.{unpicked} {reason}"
    )


def _checkpoint_every(plan: ConfirmationPlan) -> int:
    """At least as often as evaluations, so that a short arm has checkpoints too."""
    return min(plan.training.checkpoint_every, max(1, plan.training.steps // plan.num_evaluations))


def _like(labels: Tensor, n: int) -> Tensor:
    """As many labels as wanted, with the classes in the proportions of the given ones, whatever their order."""
    return labels.sort().values[torch.arange(n) * len(labels) // n]


class _Evaluations:
    """What one arm scored, kept in a file as it goes."""

    def __init__(self, path: Path, score: Callable[[Backbone], dict[str, float]]) -> None:
        self._path, self._score = path, score
        kept = json.loads(path.read_text()) if path.is_file() else {}
        self.scores: Scores = {int(step): values for step, values in kept.items()}

    def observe(self, step: int, model: Backbone) -> None:
        if step not in self.scores:
            self.scores[step] = self._score(model)
            write_text(self._path, json.dumps(self.scores))
