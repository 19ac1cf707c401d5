"""Sentences about recommended layers: for features, to align with an external encoder, to leave out."""

from __future__ import annotations

from collections.abc import Sequence

from layerprobe.analyses.selection import Recommendation


def recommendation_text(answer: Recommendation) -> str:
    """Returns a recommendation in words, with its numbers."""
    return {"features": _features, "encoder": _encoder, "prune": _prune}[answer.purpose](answer)


def _features(answer: Recommendation) -> str:
    if not answer.candidates:
        return f"No features can be recommended: the run has no {answer.metric}."
    best, *others = answer.candidates
    figures = f"{answer.metric} {best.value:.3f} ({best.low:.3f} to {best.high:.3f})"
    if answer.test_value is not None:
        figures += f", {answer.test_value:.3f} on the test split, which nothing was chosen on"
    tied = [f"{other.layer} at {other.noise_level:g}" for other in others]
    ties = f"; the data cannot tell {_listed(tied)} from it" if tied else ""
    beyond = {"lowest": "a lower", "highest": "a higher"}.get(answer.level_end)
    edge = (
        f" It is the {answer.level_end} level that was measured; at {beyond} one they may be richer." if beyond else ""
    )
    known = [f"{name} {value:.3f}" for name, value in answer.controls if value >= best.low]
    no_better = f" They are not surely above the control {_listed(known)}." if known else ""
    place = f"{best.layer} at noise level {best.noise_level:g}"
    return f"The richest features are those of {place}: {figures}{ties}.{no_better}{edge}"


def _encoder(answer: Recommendation) -> str:
    if not answer.by_depth:
        return "There are fewer than two layers."
    measured = "".join(f" Its mean {metric} is {value:.3f}." for metric, value in answer.encoder_similarity)
    return (
        f"To align with an external encoder: {answer.by_depth}, at about 0.3 of the depth, where REPA aligns.{measured}"
    )


def _prune(answer: Recommendation) -> str:
    if not answer.candidates:
        return "What skipping a layer costs was not measured, or no layer can be skipped."
    least = answer.candidates[0]
    costs = f"the loss rises by {least.value:.4f} ({least.low:.4f} to {least.high:.4f})"
    if answer.layers:
        return f"The network does as well without {_listed(answer.layers)}, each alone; without {least.layer} {costs}."
    return f"No layer can be left out; the least needed one is {least.layer}: without it {costs}."


def _listed(names: Sequence[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
