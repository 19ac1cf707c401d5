"""Confirmations in words: what they can find before they start, and their verdict."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from layerprobe.analyses.experiments import (
    ENOUGH_STEPS,
    LEARNING_RATE,
    LEVEL,
    POWER,
    RANDOM,
    STILL_IMPROVING,
    ArmResult,
    Comparison,
    Resolution,
    Spread,
    Verdict,
    VerdictCaution,
    seeds_needed,
    too_short,
)
from layerprobe.analyses.selection import Selection

_ANSWERS = {
    "helps": "The pair helps: the whole interval lies below zero.",
    "hurts": "The pair hurts: the whole interval lies above zero, and both runs have leveled off.",
    "no difference found": "No difference was found: the interval includes zero, and both runs have leveled off.",
    "too early to tell": "It is too early to tell.",
}


# -------------------------------------------------------------------------------------------------------------- verdict


def verdict_paragraph(verdict: Verdict) -> str:
    """Returns the verdict as one paragraph: the difference, the answer with its cautions, and further comparisons."""
    return " ".join(
        [_difference(verdict), _ANSWERS[verdict.answer], *verdict_cautions(verdict), *verdict_details(verdict)]
    )


def verdict_details(verdict: Verdict) -> list[str]:
    """Returns what a verdict says beyond its difference, answer and cautions: one sentence each."""
    sentences = _detectable(verdict) if verdict.answer == "no difference found" else []
    sentences += [*_early_looks(verdict), *_comparisons(verdict)]
    if len(verdict.arms) > 2:
        lowest = min(verdict.arms, key=_mean)
        sentences.append(f"Of the {len(verdict.arms)} arms, {_the(lowest.name)} ended lowest ({_mean(lowest):.3g}).")
    return sentences


def verdict_sentence(verdict: Verdict) -> str:
    """Returns the answer of a verdict in one sentence; where it is too early to tell, why."""
    reasons = verdict_cautions(verdict) if verdict.answer == "too early to tell" else []
    return reasons[0] if reasons else _ANSWERS[verdict.answer]


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
    return f"{arm} {verdict.answer}" if verdict.answer in ("helps", "hurts") else verdict.answer


def _difference(verdict: Verdict) -> str:
    judged, over = verdict.arm(verdict.judged), " over all looks" if verdict.stop_early else ""
    return (
        f"Aligning {judged.student} to {judged.teacher} changed the Fréchet distance from the baseline's "
        f"{_mean(verdict.arms[0]):.3g} by {judged.difference:+.3g} (95 % interval{over} {judged.low:+.3g} to "
        f"{judged.high:+.3g}), after {verdict.steps} steps {verdict.start} with {verdict.num_seeds} seeds."
    )


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
    sentences = []
    for comparison in verdict.comparisons:
        if comparison.against == "random pairs":
            num = comparison.num_arms
            others = "a random pair" if num == 1 else f"the mean of {num} random pairs"
            sentences.append(f"The pair's difference to {others} is {_interval(comparison)}.")
        elif verdict.answer == "helps" and "gain may come from step length" not in verdict.cautions:
            sentences.append(f"{_step_length(verdict)}, so its step length does not explain the gain.")
    return sentences


def _interval(comparison: Comparison) -> str:
    return f"{comparison.difference:+.3g} ({comparison.low:+.3g} to {comparison.high:+.3g})"


def _mean(arm: ArmResult) -> float:
    return float(np.mean(arm.final))


def _the(name: str) -> str:
    return name if name.startswith(RANDOM) else f"the {name}"


def _listed(numbers: Iterable[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


# ------------------------------------------------------------------------------------------------------ before training


def resolution_sentences(resolution: Resolution) -> list[str]:
    """Returns what a confirmation can be expected to find, with the number of seeds for half of that difference."""
    expected = (
        f"{resolution.num_seeds} seeds find a difference of {resolution.in_spreads:.2g} times its spread over seeds "
        f"with a probability of at least {POWER:.0%} (two-sided t test, error rate {LEVEL:.0%})."
    )
    spread = resolution.spread
    if spread is None:
        return [expected, "The spread is not known before the first seeds; pass --spread or --pilot to state it."]
    low, high = (end * resolution.in_spreads for end in spread.interval())
    width = "" if low == high else f", or {low:.1%} to {high:.1%} given how few seeds the spread was estimated from"
    sentences = [
        expected,
        f"With a spread of {spread.share:.1%} of the distance ({spread_source(spread)}), that is "
        f"{resolution.share:.1%} of the distance{width}.",
    ]
    half = seeds_needed(resolution.in_spreads / 2)
    return sentences + ([f"A difference half as large takes {half} seeds."] if half else [])


def spread_source(spread: Spread) -> str:
    """Returns where a spread comes from, such as "3 seeds of the pilot, after 4000 steps"."""
    if spread.source == "stated":
        return "as stated"
    source = "the pilot" if spread.source == "pilot" else spread.source
    return f"{spread.num_seeds} seeds of {source}, after {spread.steps} steps"


def length_cautions(steps: int, *, trained_steps: int | None = None) -> list[str]:
    """Returns what this number of training steps cannot show; nothing if the steps are enough.

    Args:
        steps: Training steps of an arm.
        trained_steps: Length of the training that an arm from scratch stands for; None where it is not known.
    """
    sentences = {
        "few steps": (
            f"{steps} steps show what alignment costs at first rather than what it gains later: in past pair sweeps "
            f"with batches of 64 samples, gains appeared between step 2000 and {ENOUGH_STEPS}. Train at least "
            f"{ENOUGH_STEPS} steps for a verdict."
        ),
        "shorter than the training": (
            f"The checkpoint was trained for {trained_steps} steps, the arms for {steps}. A gain on the way may be a "
            "loss at the end: in a pair sweep of four seeds, six of fifteen pairs gained at step 4000 and one at step "
            "12000. Train as many steps as the final training will have."
        ),
    }
    return [sentences[code] for code in too_short(steps, trained_steps=trained_steps)]
