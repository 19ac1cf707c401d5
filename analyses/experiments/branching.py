"""Arms that branch from a checkpoint: does the checkpoint look converged?

LayerSync is a method for training from scratch. A checkpoint that no longer improves leaves little for an alignment to
gain, whatever the pair. Nobody can see from weights whether they are converged, so the baseline's own branch is
measured: it looks converged if further training lowers neither the held-out loss nor the Fréchet distance by more than
a little. Before any training there is only what the checkpoint's training has recorded of its held-out loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd

from layerprobe.analyses.experiments.arms import FRECHET, HELD_OUT

# Largest shares by which the held-out loss and the distance of a converged network still fall. Most of the loss is
# noise that no network predicts, so its share is smaller (docs/method.md).
LOSS_FALL, DISTANCE_FALL = 0.01, 0.05
# Part at the end of a recorded training over which its held-out loss is compared.
RECORDED_PART = 0.25

# How a confirmation names the start of its arms.
BRANCHED, FROM_SCRATCH = "from the checkpoint", "from scratch"

StartCaution = Literal["branch", "start looks converged", "convergence not known"]


@dataclass(frozen=True)
class BranchCourse:
    """How far the baseline improves that branches from a checkpoint.

    Attributes:
        steps: Steps of the branch.
        loss_fall: Largest fall of its held-out loss below that of the checkpoint, as a share; 0 if it never falls.
        distance_fall: The same of its Fréchet distance.
    """

    steps: int
    loss_fall: float
    distance_fall: float

    @property
    def looks_converged(self) -> bool:
        """Whether neither falls by more than a converged network's."""
        return self.loss_fall < LOSS_FALL and self.distance_fall < DISTANCE_FALL


def branch_course(scores: pd.DataFrame) -> BranchCourse:
    """Returns the course of a baseline, averaged over its seeds.

    Args:
        scores: Scores of the baseline at step 0 and later, columns seed, step, metric and value.
    """
    means = scores.pivot_table(index="step", columns="metric", values="value").sort_index()
    falls = {metric: max(0.0, 1 - float(means[metric].min() / means[metric].iloc[0])) for metric in (HELD_OUT, FRECHET)}
    return BranchCourse(int(means.index[-1]), falls[HELD_OUT], falls[FRECHET])


def recorded_fall(held_out: pd.DataFrame) -> float | None:
    """Returns by which share the held-out loss fell over the last quarter of a recorded training.

    Args:
        held_out: Column step and one column of losses for each noise level, as `layerprobe train` writes them.

    Returns:
        The share, negative for a rise; None if there are no two evaluations to compare.
    """
    losses = held_out.set_index("step").sort_index().mean(axis=1)
    before = losses.iloc[:-1][losses.index[:-1] <= (1 - RECORDED_PART) * losses.index.max()]
    return None if before.empty else 1 - float(losses.iloc[-1] / before.iloc[-1])


def start_cautions(*, from_scratch: bool, fall: float | None) -> tuple[StartCaution, ...]:
    """Returns what is to be said about the start of the arms before they are trained; empty from scratch.

    Args:
        from_scratch: Whether the arms start from fresh weights.
        fall: Recorded fall of the checkpoint's held-out loss, see `recorded_fall`; None where none is recorded.
    """
    if from_scratch:
        return ()
    if fall is None:
        return ("branch", "convergence not known")
    return ("branch", "start looks converged") if fall < LOSS_FALL else ("branch",)
