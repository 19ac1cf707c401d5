"""The convention check of a checkpoint on a data set, without a run folder."""

from __future__ import annotations

from collections.abc import Callable

from layerprobe.analyses.runs.folder import RunPlan
from layerprobe.checkpoints import ConventionCheck, check_convention
from layerprobe.data import Reading, Samples, Splits, Subset


def examine_convention(
    plan: RunPlan,
    *,
    num_samples: int = 64,
    device: str = "auto",
    on_reading: Callable[[Reading | None], None] | None = None,
) -> ConventionCheck:
    """Checks whether the declared schedule and prediction of a checkpoint fit its weights.

    Args:
        plan: Checkpoint and data of the check.
        num_samples: Number of training samples to use; only these are encoded, if the data has an autoencoder.
        device: Device of the model.
        on_reading: Called with what was read of the data, before the model runs.
    """
    backbone, splits = plan.open(device=device)
    if on_reading:
        on_reading(splits.train.reading)
    few: Samples = Subset(splits.train, range(min(num_samples, len(splits.train))), name="convention")
    few = plan.data.encode(Splits(few, few, few), expect_shape=backbone.shape).train
    return check_convention(backbone, few, num_samples=num_samples, seed=plan.seed)
