"""Sentences about layer quality during a training."""

from __future__ import annotations

from layerprobe.analyses.tables import CAUGHT_UP, COLLAPSED, DRIFTED, CurveFinding

_SHOWN = 4  # layers in a sentence


def curve_finding_text(finding: CurveFinding, metric: str) -> str:
    """Returns a finding as a sentence, without its step.

    Args:
        finding: The finding.
        metric: What the quality of a layer is.
    """
    numbers, layers = finding.numbers, finding.layers
    if finding.code == "richest":
        return f"{layers[0]} is the richest layer: {metric} {numbers['value']:.3g} +- {numbers['half_width']:.2g}"
    if finding.code == "richest moved":
        lead = f"{metric} higher by {numbers['lead']:.2g} +- {numbers['half_width']:.2g}"
        return f"the richest layer has moved from {layers[0]} to {layers[1]}: {lead}"
    if finding.code == "caught up":
        reached = f"cosine {numbers['cosine']:.2f} and CKA {numbers['cka']:.2f}, both at least {CAUGHT_UP:g}"
        return f"the student {layers[0]} has caught up with its teacher {layers[1]}: {reached}"
    if finding.code == "drifted":
        return f"{_listed(layers)} drifted from the start: CKA down to {numbers['lowest']:.2f}, below {DRIFTED:g}"
    share = f"effective rank down to {numbers['lowest']:.0%} of its highest, below {COLLAPSED:.0%}"
    return f"{_listed(layers)} collapsed: {share}"


def _listed(layers: tuple[str, ...]) -> str:
    names = ", ".join(layers[:_SHOWN]) + (f" and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else "")
    return f"{names} {'has' if len(layers) == 1 else 'have'}"
