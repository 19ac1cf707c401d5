"""The verdict of a confirmation in words."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from layerprobe.analyses.experiments import (
    LEARNING_RATE,
    LEVEL,
    POWER,
    RANDOM,
    SAME_DISTANCE,
    SRA,
    STILL_IMPROVING,
    ArmResult,
    Comparison,
    Verdict,
    VerdictCaution,
)
from layerprobe.analyses.selection import Selection
from layerprobe.analyses.wording.confirmation import converged_sentence

_SINGLE_PAIRS = {
    "published prior": "the published prior",
    "same distance": "a random pair of the same distance",
}
_ANSWERS = {
    "helps": "The pair helps: the whole interval lies below zero.",
    "hurts": "The pair hurts: the whole interval lies above zero, and both runs have leveled off.",
    "no difference found": "No difference was found: the interval includes zero, and both runs have leveled off.",
    "too early to tell": "It is too early to tell.",
}


# -------------------------------------------------------------------------------------------------------------- verdict


def verdict_paragraph(verdict: Verdict) -> str:
    """Returns the verdict as one paragraph: the difference, the answer with its cautions, and further comparisons."""
    return " ".join([_difference(verdict), _answer(verdict), *verdict_cautions(verdict), *verdict_details(verdict)])


def verdict_details(verdict: Verdict) -> list[str]:
    """Returns what a verdict says beyond its difference, answer and cautions: one sentence each."""
    sentences = _detectable(verdict) if verdict.answer == "no difference found" else []
    sentences += [*_early_looks(verdict), *_comparisons(verdict)]
    if len(verdict.arms) > 2:
        lowest = min(verdict.arms, key=_mean)
        sentences.append(f"Of the {len(verdict.arms)} arms, {_the(lowest.name)} ended lowest ({_mean(lowest):.3g}).")
    return sentences


def short_answer(verdict: Verdict) -> str:
    """Returns the answer of a verdict in a few words: its code, or that the pair costs so far."""
    return "costs so far" if _costs_so_far(verdict) else verdict.answer


def verdict_sentence(verdict: Verdict) -> str:
    """Returns the answer of a verdict in one sentence; where it is too early to tell and nothing is seen yet, why."""
    is_open = verdict.answer == "too early to tell" and not _costs_so_far(verdict)
    reasons = verdict_cautions(verdict) if is_open else []
    return reasons[0] if reasons else _answer(verdict)


def other_pair_sentence(verdict: Verdict, selection: Selection | None) -> str:
    """Returns the sentence that a verdict is not about the pick that it stands beside; "" if it is."""
    judged, pick = verdict.arm(verdict.judged), None if selection is None else selection.pick
    if pick is not None and (judged.student, judged.teacher) == (pick.student, pick.teacher):
        return ""
    present = "the present selection has no pick" if pick is None else f"the present pick is {pick}"
    return f"This verdict is about {judged.student} <- {judged.teacher}; {present}."


def verdict_cautions(verdict: Verdict) -> list[str]:
    """Returns the cautions of a verdict: a sentence or two for each of its codes."""
    return [_caution(code, verdict) for code in verdict.cautions]


def answer_title(arm: str, verdict: Verdict | None) -> str:
    """Returns the answer about an arm as the head of a title, the name of the arm where there is no answer yet."""
    if verdict is None:
        return arm
    answer = short_answer(verdict)
    return f"{arm} {answer}" if answer in ("helps", "hurts", "costs so far") else answer


def _difference(verdict: Verdict) -> str:
    judged, over = verdict.arm(verdict.judged), " over all looks" if verdict.stop_early else ""
    return (
        f"Aligning {judged.student} to {judged.teacher} changed the Fréchet distance from the baseline's "
        f"{_mean(verdict.arms[0]):.3g} by {judged.difference:+.3g} (95 % interval{over} {judged.low:+.3g} to "
        f"{judged.high:+.3g}), after {verdict.steps} steps {verdict.start} with {verdict.num_seeds} seeds."
    )


def _costs_so_far(verdict: Verdict) -> bool:
    low = verdict.arm(verdict.judged).low
    return verdict.answer == "too early to tell" and low is not None and low > 0


def _answer(verdict: Verdict) -> str:
    if _costs_so_far(verdict):
        return "So far the pair costs: the whole interval lies above zero. It is too early to tell how it ends."
    return _ANSWERS[verdict.answer]


def _caution(code: VerdictCaution, verdict: Verdict) -> str:
    baseline, judged = verdict.arms[0], verdict.arm(verdict.judged)
    match code:
        case "judged arm is not the pick":
            return f"The pick is not among the arms, so the verdict is about {_the(judged.name)}."
        case "no spread over seeds":
            return "Every seed gave the same difference, so there is no spread to judge by. Run other seeds."
        case "baseline got worse":
            return (
                f"The baseline's distance was lowest at step {baseline.trend.best_step} ({baseline.trend.best:.3g}) "
                f"and ended at {_mean(baseline):.3g}, so there is no settled level to compare with. Run more steps or "
                "lower the learning rate."
            )
        case "baseline still improves" if verdict.answer == "helps":
            return f"{_late_gain('baseline', baseline)}, so the lead may not last."
        case "baseline still improves":
            return f"{_late_gain('baseline', baseline)}, and {_COST_FIRST}"
        case "aligned arm still improves":
            return f"{_late_gain('aligned arm', judged)}, and {_COST_FIRST}"
        case "no arm moved":
            return (
                f"Neither run changed by {STILL_IMPROVING:.0%} since its start. Run more steps or raise the learning "
                "rate."
            )
        case "looks not planned together":
            return (
                f"The difference was tested after {_listed(verdict.looks)} seeds, at levels that were not planned "
                f"together: where there is no difference, one would be found in {verdict.error_rate:.1%} of cases."
            )
        case "start looks converged":
            return "" if verdict.branch is None else converged_sentence(verdict.branch)
        case "gain may come from step length":
            return f"{_step_length(verdict)}, so the gain may come from its step length alone."


_COST_FIRST = "alignment can cost quality at first and pay off later. Run more steps."


def _late_gain(name: str, arm: ArmResult) -> str:
    return f"The {name} still improved by {arm.trend.late_gain:.0%} since step {arm.trend.late_step}"


def _step_length(verdict: Verdict) -> str:
    comparison = next(one for one in verdict.comparisons if one.against == "learning rate")
    rate = verdict.arm(LEARNING_RATE).learning_rate
    return (
        f"The pair's difference to the baseline with steps of the same length (learning rate {rate:.3g}) is "
        f"{_interval(comparison)}"
    )


def _detectable(verdict: Verdict) -> list[str]:
    resolution = verdict.resolution
    if resolution is None or resolution.share is None:
        return []
    size = resolution.share * _mean(verdict.arms[0])
    return [
        f"With the spread that these seeds show, {resolution.num_seeds} seeds find a difference of {size:.2g} "
        f"({resolution.share:.0%}) with a probability of {POWER:.0%}."
    ]


def _early_looks(verdict: Verdict) -> list[str]:
    if not verdict.stop_early or "looks not planned together" in verdict.cautions:
        return []
    clear = f", and the difference was clear after {verdict.num_seeds} of {verdict.planned_seeds}"
    return [
        f"The difference was tested seed by seed, at levels that keep the error rate of all tests at {LEVEL:.0%}"
        f"{clear if verdict.num_seeds < verdict.planned_seeds else ''}."
    ]


def _comparisons(verdict: Verdict) -> list[str]:
    judged = verdict.arm(verdict.judged)
    sentences = []
    if judged.also:
        also = " and ".join(_the(name) for name in judged.also)
        sentences.append(f"It is also the pair of {also}, which was trained once.")
    for comparison in verdict.comparisons:
        if comparison.against == "random pairs":
            num = comparison.num_arms
            others = "a random pair" if num == 1 else f"the mean of {num} random pairs"
            sentences.append(f"The pair's difference to {others} is {_interval(comparison)}.")
        elif comparison.against in _SINGLE_PAIRS:
            sentences.append(
                f"The pair's difference to {_SINGLE_PAIRS[comparison.against]} is {_interval(comparison)}."
            )
        elif verdict.answer == "helps" and "gain may come from step length" not in verdict.cautions:
            sentences.append(f"{_step_length(verdict)}, so its step length does not explain the gain.")
    return sentences


def _interval(comparison: Comparison) -> str:
    return f"{comparison.difference:+.3g} ({comparison.low:+.3g} to {comparison.high:+.3g})"


def _mean(arm: ArmResult) -> float:
    return float(np.mean(arm.final))


def _the(name: str) -> str:
    if name == SAME_DISTANCE:
        return "the random pair of the same distance"
    return name if name.startswith((RANDOM, SRA)) else f"the {name}"


def _listed(numbers: Iterable[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last
