"""The precision of a run's network in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def precision_sentence(precision: str, rounding: Mapping[str, Any] | None) -> str:
    """Returns in which precision the network was computed, and what that changes; "" if it was not recorded.

    Args:
        precision: Precision in the plan of the features; "" if there is none.
        rounding: Record in `rounding.json` of a run, see `RoundingError`; None without one.
    """
    if not precision:
        return ""
    if rounding is None:
        return f"The network was computed in {precision}."
    return (
        f"The network was computed in {precision}: the features of {rounding['num_samples']} samples differ from those "
        f"in float32 by at most {rounding['error']:.2%} of their spread ({rounding['layer']} at noise level "
        f"{rounding['noise_level']:g})."
    )
