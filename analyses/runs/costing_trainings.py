"""What trainings cost, told before them: one training, the arms of a confirmation, the branches of a pair sweep.

The trainer itself takes a few steps of each kind, plain and aligned, and every part of an evaluation is timed; the rest
is counting.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from layerprobe.analyses.experiments import (
    EXTRACTOR,
    HELD_OUT_SAMPLES,
    MEASURED_STEPS,
    NOISE_LEVELS,
    SCORING,
    TRAINING,
    Arm,
    ConfirmationPlan,
    PairSweepPlan,
    checkpoint_every,
    probed_splits,
    probing_errors,
)
from layerprobe.analyses.generation import Extractor
from layerprobe.analyses.runs.costing import projections
from layerprobe.analyses.runs.costing_samples import extractor_seconds, features_rate
from layerprobe.analyses.runs.layer_curves import CurvePlan, LayerCurves
from layerprobe.analyses.runs.stages import (
    CHOICES,
    CURVES,
    ENCODING,
    FIGURES,
    HELD_OUT,
    Cost,
    largest_share,
    peak_device_memory,
    peak_memory,
    shared_out,
)
from layerprobe.analyses.runs.timing import (
    as_encoded,
    byte_seconds,
    encoding_seconds,
    figure_seconds,
    first,
    held_out_seconds,
    picture_seconds,
    row_seconds,
    sample_seconds,
    seconds_of,
    step_seconds,
)
from layerprobe.analyses.selection import AutoPick, prior_pair
from layerprobe.backbones import Backbone, alignable_layers, layer_shapes
from layerprobe.data import Samples, Splits
from layerprobe.extraction import ExtractionPlan
from layerprobe.layersync import LayerPair, SyncOptions
from layerprobe.sampling import SamplingPlan
from layerprobe.training import TrainingPlan, steps_done

if TYPE_CHECKING:
    from layerprobe.analyses.selection import AutoStop

EXAMINED = 11  # evaluations of the held-out loss in a training, its start among them


def training_cost(
    backbone: Backbone,
    splits: Splits,
    plan: TrainingPlan,
    *,
    vae: str | Path | None = None,
    auto: AutoPick | AutoStop | None = None,
    curves: CurvePlan | None = None,
    processes: int = 1,
) -> Cost:
    """Returns what `train_run` will cost.

    What the processes tell each other is not counted. An alignment that is to end by itself is taken to last.

    Args:
        backbone: Initial model on its device.
        splits: The data; images that are not encoded yet if there is an autoencoder.
        plan: Plan of the training.
        vae: Folder of the autoencoder.
        auto: Rule that decides during the training what is aligned.
        curves: When the layers are measured; None measures none.
        processes: Number of processes that share every batch, each with a device of its own.
    """
    encoding_s = encoding_seconds(splits, vae)
    splits = as_encoded(splits, backbone.shape)
    own = max(1, plan.batch_size // (plan.accumulate * processes)) * plan.accumulate
    steps = _Steps(backbone, splits.train, replace(plan, batch_size=own))
    training_s = steps.seconds_of(plan.pairs, plan.sync)
    if isinstance(auto, AutoPick):
        pair, before = (prior_pair(alignable_layers(backbone)),), min(auto.warmup_steps / max(plan.steps, 1), 1)
        plain_s, aligned_s = (steps.seconds_of(pairs, plan.sync) for pairs in ((), pair))
        training_s = before * plain_s + (1 - before) * aligned_s
    files = _Files(backbone, plan)
    seconds = {ENCODING: encoding_s} if encoding_s else {}
    seconds |= {
        TRAINING: training_s + files.seconds,
        HELD_OUT: EXAMINED * held_out_seconds(backbone, first(splits.validation, HELD_OUT_SAMPLES)),
    }
    if curves:
        seconds[CURVES] = _curve_seconds(backbone, splits, plan, curves, sum(seconds.values()))
    if auto:
        with tempfile.TemporaryDirectory() as folder:
            timed = replace(auto, samples=splits.train, folder=folder)
            seconds[CHOICES] = len(auto.direct_at(plan.steps)) * seconds_of(lambda: timed.direct(0, backbone))
    seconds[FIGURES] = picture_seconds()
    return _cost(seconds, backbone, files.kept_bytes, processes)


def confirmation_cost(
    backbone: Backbone,
    splits: Splits,
    arms: Sequence[Arm],
    plan: ConfirmationPlan,
    *,
    vae: str | Path | None = None,
    cells: int = 0,
    processes: int = 1,
) -> Cost:
    """Returns what `confirm_run` will cost if it does not stop early.

    Args:
        backbone: Initial model on its device.
        splits: The data; images that are not encoded yet if there is an autoencoder.
        arms: Arms of the confirmation.
        plan: Its plan.
        vae: Folder of the autoencoder.
        cells: Number of layers times that of noise levels of the run, whose figures are drawn again.
        processes: Number of processes that share the arms, each with a device of its own.
    """
    encoding_s = encoding_seconds(splits, vae)
    splits = as_encoded(splits, backbone.shape)
    training = replace(plan.training, checkpoint_every=checkpoint_every(plan))
    extractor, extractor_s = extractor_seconds(splits)
    score_s = _score_seconds(backbone, splits, extractor, plan.num_samples, plan.sampling)
    steps, files = _Steps(backbone, splits.train, training), _Files(backbone, training)
    # The process with the most arms takes the longest. A plan that stops early divides the arms of one seed at a time.
    groups, size = (len(plan.seeds), len(arms)) if plan.stop_early else (1, len(plan.seeds) * len(arms))
    seeds = groups * size * largest_share(size, processes) / len(arms)
    plans = [arm.training(training) for arm in arms]
    training_s = seeds * sum(steps.seconds_of(each.pairs, each.sync) + files.seconds for each in plans)
    matched = [arm.matched for arm in arms if arm.matched]
    for pairs in [pairs for pair in matched for pairs in ((), (pair,))]:
        training_s += min(MEASURED_STEPS / training.steps, 1) * steps.seconds_of(pairs, training.sync)
    seconds = {ENCODING: encoding_s} if encoding_s else {}
    seconds |= {
        EXTRACTOR: extractor_s,
        TRAINING: training_s,
        # The start is scored once for all arms of a seed.
        SCORING: seeds * (len(arms) * plan.num_evaluations + 1) * score_s,
        FIGURES: figure_seconds(cells),
    }
    return _cost(seconds, backbone, len(plan.seeds) * len(arms) * files.kept_bytes, processes)


def sweep_cost(
    backbone: Backbone,
    splits: Splits,
    pairs: Sequence[LayerPair],
    plan: PairSweepPlan,
    *,
    branches: int,
    vae: str | Path | None = None,
    processes: int = 1,
) -> Cost:
    """Returns what `pair_sweep_run` will cost.

    Args:
        backbone: Model that the branches start from, on its device.
        splits: The data; images that are not encoded yet if there is an autoencoder.
        pairs: Pairs to train.
        plan: Plan of the branches.
        branches: Number of branches to train, the baselines of all seeds among them.
        vae: Folder of the autoencoder.
        processes: Number of processes that share the branches, each with a device of its own.
    """
    encoding_s = encoding_seconds(splits, vae)
    splits = as_encoded(splits, backbone.shape)
    extractor, extractor_s = extractor_seconds(splits)
    score_s = _score_seconds(backbone, splits, extractor, plan.num_samples, plan.sampling)
    score_s += _probe_error_seconds(backbone, splits)
    training = replace(plan.training, steps=plan.branch_steps)
    steps, files = _Steps(backbone, splits.train, training), _Files(backbone, training)
    plain_s, aligned_s = (steps.seconds_of(each, training.sync) for each in ((), tuple(pairs[:1])))
    branch_s = (plain_s + len(pairs) * aligned_s) / (len(pairs) + 1) + files.seconds
    mine = branches * largest_share(branches, processes)
    seconds = {ENCODING: encoding_s} if encoding_s else {}
    seconds |= {
        EXTRACTOR: extractor_s,
        TRAINING: mine * branch_s,
        SCORING: mine * plan.num_evaluations * score_s,
        FIGURES: picture_seconds(),
    }
    return _cost(seconds, backbone, min(processes, branches) * files.kept_bytes, processes)


def plan_left(plan: TrainingPlan, folder: Path) -> TrainingPlan:
    """Returns a plan of as many steps as a training lacks after its newest checkpoint, to forecast them.

    Args:
        plan: Plan of the whole training.
        folder: Its folder, which need not exist.
    """
    done, stop = steps_done(folder), plan.sync.stop_step
    left = replace(plan, steps=max(plan.steps - done, 0))
    if stop is None:
        return left
    if stop <= done:
        return replace(left, pairs=())
    return replace(left, sync=replace(plan.sync, warmup_steps=0, stop_step=stop - done))


def rough_seconds(backbone: Backbone, splits: Splits, plan: TrainingPlan, vae: str | Path | None) -> float:
    """Returns about how long the steps of a training take, and encoding its images.

    Args:
        backbone: Initial model on its device.
        splits: The data; images that are not encoded yet if there is an autoencoder.
        plan: Plan of the training.
        vae: Folder of the autoencoder.
    """
    samples = as_encoded(splits, backbone.shape).train
    return encoding_seconds(splits, vae) + plan.steps * step_seconds(backbone, samples, plan)


class _Steps:
    """Times the steps of trainings of one plan; those that align alike once."""

    def __init__(self, backbone: Backbone, samples: Samples, plan: TrainingPlan) -> None:
        self._backbone, self._samples, self._plan = backbone, samples, plan
        self._timed: dict[tuple[bool, SyncOptions], float] = {}

    def seconds_of(self, pairs: tuple[LayerPair, ...], sync: SyncOptions) -> float:
        """Seconds of all steps of a training that aligns these pairs with these options."""
        steps = self._plan.steps
        aligned = min(sync.stop_step or steps, steps) if pairs else 0
        seconds = aligned * self._step_s(pairs, sync) if aligned else 0.0
        return seconds + ((steps - aligned) * self._step_s((), sync) if aligned < steps else 0.0)

    def _step_s(self, pairs: tuple[LayerPair, ...], sync: SyncOptions) -> float:
        key = bool(pairs), sync if pairs else SyncOptions()
        if key not in self._timed:
            plan = replace(self._plan, pairs=pairs, sync=sync)
            self._timed[key] = step_seconds(self._backbone, self._samples, plan)
        return self._timed[key]


class _Files:
    """Bytes of a training: those that are kept, and the seconds to write them and those that are replaced."""

    def __init__(self, backbone: Backbone, plan: TrainingPlan) -> None:
        weights, decays = _weight_bytes(backbone), 1 + len(plan.more_ema_decays)
        checkpoint, models = (3 + decays) * weights, decays * weights  # AdamW has two moments of every weight.
        saved = math.ceil(plan.steps / plan.checkpoint_every)
        self.kept_bytes: int = min(plan.keep_last, saved) * checkpoint + models
        self.seconds: float = (saved * checkpoint + models) * byte_seconds()


def _weight_bytes(backbone: Backbone) -> int:
    return 4 * sum(parameter.numel() for parameter in backbone.module.parameters())


def _score_seconds(
    backbone: Backbone, splits: Splits, extractor: Extractor, num_samples: int, sampling: SamplingPlan
) -> float:
    """Seconds of one evaluation: samples, their features, and the held-out loss."""
    held_out = first(splits.test, HELD_OUT_SAMPLES)
    features_s = features_rate(extractor, backbone.shape).of(num_samples)
    return sample_seconds(backbone, sampling, num_samples) + features_s + held_out_seconds(backbone, held_out)


def _probe_error_seconds(backbone: Backbone, splits: Splits) -> float:
    """Seconds of the probe errors of one evaluation, by a network of one and of three layers of the same width."""
    probed = probed_splits(splits)
    if probed is None:
        return 0.0
    shapes = layer_shapes(backbone, backbone.layers)
    width = round(sum(width for _, width in shapes.values()) / len(shapes))
    one, three = (projections(probed.train, [width] * num, 1) for num in (1, 3))
    one_s, three_s = (seconds_of(partial(probing_errors, network, splits)) for network in (one, three))
    rows = len(NOISE_LEVELS) * sum(len(samples) for _, samples in probed.items())
    row_s = row_seconds(backbone, ExtractionPlan(), 128)
    return one_s + (three_s - one_s) / 2 * (len(shapes) - 1) + rows * row_s


def _curve_seconds(backbone: Backbone, splits: Splits, plan: TrainingPlan, curves: CurvePlan, other_s: float) -> float:
    """Seconds of measuring the layers, as often as is due and as the bound allows; the first and last step always."""
    with tempfile.TemporaryDirectory() as folder:
        timed = LayerCurves(splits, folder, curves, pairs=plan.pairs, say=lambda line: None)
        first_s, again_s = (seconds_of(partial(timed.measure, step, backbone)) for step in (0, 1))
    due = max(math.ceil(plan.steps / curves.every), 1)
    allowed = math.inf if curves.max_share == 1 else (other_s * curves.max_share - first_s) / again_s
    return first_s + again_s * max(1, min(due, allowed))


def _cost(seconds: dict[str, float], backbone: Backbone, disk_bytes: int, processes: int) -> Cost:
    # The averaged model that is scored or written is one more than the timed steps had.
    on_host = _weight_bytes(backbone) if backbone.device.type == "cpu" else 0
    return Cost(shared_out(seconds, processes), peak_memory() + on_host, peak_device_memory(), disk_bytes)
