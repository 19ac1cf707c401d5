"""Sentences about the single answers that people ask of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerprobe.analyses.selection import (
    NEGLIGIBLE,
    Answers,
    Cell,
    ControlGain,
    EncoderDepth,
    Pruning,
    RichestFeatures,
    Separable,
)

_NEEDS_LABELS = "measured only with labels; pass data with classes, such as a folder of images for each class"
_LONGEST = 25  # characters of a short answer


@dataclass(frozen=True)
class AnswerLine:
    """One single answer in words.

    Attributes:
        question: What is asked, in about three words.
        short: The answer alone, at most 25 characters.
        sentence: The answer with its evidence.
    """

    question: str
    short: str
    sentence: str


def answer_lines(answers: Answers) -> tuple[AnswerLine, ...]:
    """Returns the single answers in words, in a fixed order; none where the features of the run mean nothing."""
    if answers.is_meaningless:
        return ()
    return (
        _features(answers.features),
        _training(answers.training, answers.has_labels),
        _separable(answers.separable, answers.has_labels),
        _encoder(answers.encoder),
        _pruning(answers.pruning),
    )


def _features(answer: RichestFeatures | None) -> AnswerLine:
    question = "richest features"
    if answer is None:
        return _not_measured(question, "Nothing here tells how rich a layer is; run `layerprobe probe` again.")
    best, ties = answer.best, ""
    if answer.tied:
        tied = _listed([f"{cell.layer} at {cell.noise_level:g}" for cell in answer.tied])
        ties = f" The data cannot tell {tied} from it."
    beyond = {"lowest": "a lower", "highest": "a higher"}.get(answer.level_end)
    edge = f" This is the {answer.level_end} measured level; {beyond} one may be richer." if beyond else ""
    place = f"{best.layer} at noise level {best.noise_level:g}"
    short = _short("", best.layer, f" at {best.noise_level:g}")
    if answer.is_label_free:
        figures = f"Without labels, {answer.metric} stands in for probe accuracy: {_figures(best)} for {place}."
        return AnswerLine(question, short, figures + ties + edge)
    over = answer.over_control
    if over is None:
        return AnswerLine(
            question, short, f"{place}: probe accuracy {_figures(best)} on the validation split.{ties}{edge}"
        )
    if over.gain.upper_bound < 0:
        control = f"{_signed(over.gain)} from {_control(over.control)}, so it is surely below it"
    else:
        surely = "" if over.is_certain else ", which is not sure"
        control = f"{_signed(over.gain)} above {_control(over.control)}{surely}"
    figures = f"{place}: probe accuracy {_figures(over.cell)} on the test split, {control}."
    return AnswerLine(question, short, figures + ties + edge)


def _training(answer: ControlGain | None, has_labels: bool) -> AnswerLine:
    question = "training added most"
    if answer is None:
        controls = "not known: the run has no controls; run `layerprobe probe` again"
        return _not_measured(question, f"What training added is {controls if has_labels else _NEEDS_LABELS}.")
    cell, gain = answer.cell, answer.gain
    place = f"{cell.layer} at noise level {cell.noise_level:g}"
    sentence = (
        f"{place}: {_signed(gain)} above {_control(answer.control)}, the better control there (probe accuracy "
        f"{cell.value:.3f} against {answer.control_cell.value:.3f} on the test split)."
    )
    if answer.is_certain:
        return AnswerLine(question, _short(f"{gain.value:+.2f} ", cell.layer, f" at {cell.noise_level:g}"), sentence)
    more = "" if gain.upper_bound < 0 else " More samples may tell."
    return AnswerLine(question, "not surely anywhere", f"Not surely anywhere. Most at {sentence}{more}")


def _separable(answer: Separable | None, has_labels: bool) -> AnswerLine:
    question = "classes separable"
    if answer is None:
        controls = "not known: the run has no probes; run `layerprobe probe` again"
        return _not_measured(question, f"Where classes separate is {controls if has_labels else _NEEDS_LABELS}.")
    means = "surely above both controls, with half of the largest gain over guessing"
    if answer.best is None:
        low, high = answer.levels
        sentence = f"At no measured noise level from {low:g} to {high:g} is a layer {means}."
        return AnswerLine(question, "at no measured level", sentence)
    cell, gain = answer.best.cell, answer.best.gain
    figures = (
        f"Up to noise level {cell.noise_level:g} a layer is {means}. There {cell.layer} has probe accuracy "
        f"{_figures(cell)} on the test split, {_signed(gain)} above {_control(answer.best.control)}."
    )
    beyond = (
        " It is the highest measured level; they may be separable beyond."
        if answer.next_level is None
        else f" At {answer.next_level:g} none is."
    )
    if answer.best.is_certain:
        return AnswerLine(question, f"up to noise level {cell.noise_level:g}", figures + beyond)
    return AnswerLine(question, "not confirmed on test", f"{figures} The test split does not confirm it.{beyond}")


def _encoder(answer: EncoderDepth | None) -> AnswerLine:
    question = "align to an encoder"
    if answer is None:
        sentence = "No layer lies at a depth that published trainings tried; `layerprobe confirm` can test one."
        return _not_measured(question, sentence)
    low, high = answer.published
    depths = f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"
    where = (
        f"{answer.layer}, at {answer.depth:.2f} of the depth: published trainings with an outside encoder, as in REPA, "
        f"gained most with layers at {depths} (at {answer.depth:.2f} on average {answer.share:.2f} of the best gain)."
    )
    own = ""
    if answer.quality is not None and answer.richest is not None:
        gap = answer.richest.value - answer.quality.value
        own = (
            f" Of these depths the layer knows least here: {answer.metric} {_figures(answer.quality)}, "
            f"{gap:.3f} below the richest, {answer.richest.layer}."
            if answer.by == "curve"
            else f" Here its {answer.metric} is {_figures(answer.quality)}, {gap:.3f} below the richest, "
            f"{answer.richest.layer}."
        )
    alike = "".join(f" Its mean {metric} is {value:.3f}." for metric, value in answer.similarity)
    shapes = "" if answer.one_shape else " The published networks have layers of one shape, this one has not."
    return AnswerLine(question, _short("", answer.layer), where + own + alike + shapes)


def _pruning(answer: Pruning | None) -> AnswerLine:
    question = "could be pruned"
    if answer is None or answer.least_needed is None:
        sentence = "What skipping a layer costs was not measured; `layerprobe probe` measures it where shapes allow."
        return _not_measured(question, sentence)
    least = answer.least_needed
    cost = f"the loss rises by {_small(least)}"
    open_ends = f" Of {_listed([c.layer for c in answer.undecided])} the data cannot say." if answer.undecided else ""
    if not answer.spare:
        if least.lower_bound <= 0 and least not in answer.undecided:
            cost += " on average, but surely rises at one noise level or more"
        sentence = f"No layer for sure. The least needed is {least.layer}: when it is skipped, {cost}.{open_ends}"
        return AnswerLine(question, "none for sure", sentence)
    names = [cell.layer for cell in answer.spare]
    short = _short("", names[0]) if len(names) == 1 else f"{len(names)} of {answer.num_layers} layers"
    sentence = (
        f"{_listed(names)}, each alone: when it is skipped, the loss surely does not rise, or the velocity changes by "
        f"less than {NEGLIGIBLE:.0%}.{open_ends}"
    )
    return AnswerLine(question, short, sentence)


def _not_measured(question: str, sentence: str) -> AnswerLine:
    return AnswerLine(question, "not measured", sentence)


def _control(name: str) -> str:
    return {"random weights": "the same network with random weights", "raw input": "the raw input"}.get(name, name)


def _figures(cell: Cell) -> str:
    """A value with its interval, to three decimals; larger ones to three digits."""
    value, low, high = (_rounded(number) for number in (cell.value, cell.low, cell.high))
    return value if cell.low is None or cell.high is None else f"{value} ({low} to {high})"


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"


def _signed(cell: Cell) -> str:
    return f"{cell.value:+.3f} ({cell.lower_bound:+.3f} to {cell.upper_bound:+.3f})"


def _small(cell: Cell) -> str:
    return f"{cell.value:.4f} ({cell.lower_bound:.4f} to {cell.upper_bound:.4f})"


def _short(before: str, layer: str, after: str = "") -> str:
    """A short answer about a layer; of a long name only the end, which tells layers apart."""
    room = _LONGEST - len(before) - len(after)
    return before + (layer if len(layer) <= room else f"…{layer[1 - room :]}") + after


def _listed(names: Sequence[str], most: int = 3) -> str:
    rest = len(names) - most
    if rest > 0:
        return f"{', '.join(names[:most])} and {rest} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
