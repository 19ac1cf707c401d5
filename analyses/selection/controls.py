"""Controls: what the probe accuracy of a layer must be compared with before it means anything.

- **Random weights**: the best layer of the same network without training.
- **Raw input**: the noisy sample itself, without any network.
- **Majority class**: the share of the most frequent class of the samples on which accuracy is measured, which a
  constant answer reaches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from layerprobe.analyses.selection.records import Caution, CautionCode, Objection, SelectionBasis
from layerprobe.analyses.tables import LAST_PENALTY, PROBE, RANDOM_WEIGHTS, RAW_INPUT, UNFINISHED, Number

MAJORITY = "majority class"


def control_accuracies(
    quality: pd.DataFrame, labels: NDArray[np.int64] | None, noise_levels: Sequence[float]
) -> dict[str, float]:
    """Returns the accuracy of each control on the validation split, averaged over noise levels; of layers the best.

    Args:
        quality: Quality table of the run.
        labels: Labels of the validation split, shape (n,); None for unlabeled data, which has no controls.
        noise_levels: Noise levels to average over.
    """
    if labels is None:
        return {}
    return {MAJORITY: float(np.bincount(labels).max()) / len(labels)} | measured_controls(quality, noise_levels)


def measured_controls(quality: pd.DataFrame, noise_levels: Sequence[float]) -> dict[str, float]:
    """Returns the accuracy of random weights and of the raw input, as `control_accuracies` does."""
    controls = {}
    for source in (RANDOM_WEIGHTS, RAW_INPUT):
        rows = _probes(quality, source, noise_levels)
        if not rows.empty:
            controls[source] = float(rows.groupby("layer")["value"].mean().max())
    return controls


# What the note of a quality row says if a probe may be too bad.
_PROBE_CAUTIONS: Mapping[CautionCode, str] = {
    "probes not converged": UNFINISHED,
    "probes at the end of the search": LAST_PENALTY,
}


def probe_cautions(quality: pd.DataFrame, metric: str, split: str) -> list[Caution]:
    """Returns cautions about probes that may be too bad, by source: the model and its controls.

    Args:
        quality: Quality table.
        metric: Metric of the probes.
        split: Split of the rows to count.
    """
    rows = quality[(quality["metric"] == metric) & (quality["split"] == split)]
    return [
        Caution(code, str(source), value=count, limit=len(notes))
        for source, notes in rows.groupby("source", sort=False)["note"]
        for code, sign in _PROBE_CAUTIONS.items()
        if (count := int(notes.str.contains(sign, regex=False).sum()))
    ]


def below_controls(teacher: Number, controls: Mapping[str, float]) -> list[Objection]:
    """Returns the objections against a teacher that a control refutes.

    Args:
        teacher: Probe accuracy of the teacher.
        controls: Accuracy of each control, see `control_accuracies`.
    """
    refuted = {
        # Without an interval that clears it, an accuracy near the most frequent class is no knowledge.
        MAJORITY: lambda control: teacher.lower_bound <= control,
        RANDOM_WEIGHTS: lambda control: teacher.value <= control,
        # The raw input has more numbers than the pooled features of a layer, so it may be ahead within the uncertainty.
        RAW_INPUT: lambda control: teacher.upper_bound < control,
    }
    return [
        Objection("below a control", name, teacher.value, *teacher.ends, control)
        for name, control in controls.items()
        if refuted[name](control)
    ]


def near_controls(teacher: Number, basis: SelectionBasis) -> list[Caution]:
    """Returns a caution for each control that a teacher is not surely above."""
    return [
        Caution("control knows as much", name, value=teacher.value, limit=control)
        for name, control in basis.controls
        if teacher.lower_bound <= control
    ]


def _probes(quality: pd.DataFrame, source: str, noise_levels: Sequence[float]) -> pd.DataFrame:
    """Rows of a source with the probe accuracy on the validation split at these noise levels."""
    rows = quality[(quality["source"] == source) & (quality["metric"] == PROBE)]
    return rows[(rows["split"] == "validation") & rows["noise_level"].isin(list(noise_levels))]
