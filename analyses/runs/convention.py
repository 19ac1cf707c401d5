"""The convention check of a checkpoint on a data set, without a run folder."""

from __future__ import annotations

from layerprobe.analyses.runs.folder import RunPlan
from layerprobe.checkpoints import ConventionCheck, check_convention
from layerprobe.data import Samples, Splits, Subset


def examine_convention(plan: RunPlan, *, num_samples: int = 64, device: str = "auto") -> ConventionCheck:
    """Checks whether the declared schedule and prediction of a checkpoint fit its weights.

    Args:
        plan: Checkpoint and data of the check.
        num_samples: Number of training samples to use; only these are encoded, if the data has an autoencoder.
        device: Device of the model.
    """
    backbone, splits = plan.open(device=device, encode=False)
    few: Samples = Subset(splits.train, range(min(num_samples, len(splits.train))), name="convention")
    few = plan.data.encode(Splits(few, few, few), expect_shape=backbone.shape).train
    return check_convention(backbone, few, num_samples=num_samples, seed=plan.seed)
