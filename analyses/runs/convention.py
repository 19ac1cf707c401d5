"""Checking the declared convention of a checkpoint on a data set, without a run folder."""

from __future__ import annotations

from layerprobe.analyses.runs.data import encoded_splits, split_options
from layerprobe.analyses.runs.folder import RunPlan
from layerprobe.checkpoints import ConventionCheck, check_convention
from layerprobe.data import Samples, Splits, Subset


def examine_convention(plan: RunPlan, *, num_samples: int = 64, device: str = "auto") -> ConventionCheck:
    """Does what is declared of a checkpoint fit its weights and this data?"""
    backbone, splits = plan.open(device=device, encode=False)
    few: Samples = Subset(splits.train, range(min(num_samples, len(splits.train))), name="convention")
    encoding = split_options(plan.data_options)[1]
    if encoding:
        few = encoded_splits(Splits(few, few, few), encoding, backbone.shape, None).train
    return check_convention(backbone, few, num_samples=num_samples, seed=plan.seed)
