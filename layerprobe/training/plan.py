"""The plan of a training run: everything that decides its outcome."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, get_args

from layerprobe.layersync import WEIGHT, LayerPair, SyncOptions
from layerprobe.messages import unknown
from layerprobe.options import LAYERSYNC_PANEL, LEARNING_PANEL, OPTIMIZER_PANEL, RUNNING_PANEL, check_ranges, option
from layerprobe.precision import Precision, check_precision

TimeSampling = Literal["uniform", "logit-normal"]
LossWeighting = Literal["none", "min-snr", "velocity", "likelihood"]
# Fields that may change when a run is continued: its length, how often it writes, and the parts of a step.
_FREE = ("steps", "checkpoint_every", "log_every", "accumulate", "keep_last")
# Fields left out of the identity at their defaults, so that runs from before these fields existed can be continued.
_ADDED = ("sync", "time_sampling", "time_mean", "time_std", "loss_weighting", "snr_gamma", "more_ema_decays")


@dataclass(frozen=True)
class TrainingPlan:
    """The settings of a training run.

    The defaults are the published recipe of SiT and LayerSync, except for the batch size.

    Attributes:
        steps: Number of optimizer steps.
        batch_size: Number of samples per step, over all processes and parts.
        learning_rate: Learning rate of AdamW, constant after the warm-up.
        warmup_steps: Number of steps in which the learning rate rises linearly.
        weight_decay: Weight decay of AdamW.
        clip_norm: Norm to which larger gradients are scaled down; 0 for no clipping.
        ema_decay: Decay of the averaged weights, which are evaluated and saved; at most (step + 1) / (step + 10) early
            in training.
        label_drop: Share of labels replaced by the null label, so that guidance works.
        pairs: Layer pairs to align; empty trains without LayerSync.
        weight: Weight of the alignment term in the loss.
        precision: Precision of the network: float32, tf32 or bfloat16; auto is tf32 on GPUs that have it, otherwise
            float32. Weights and optimizer stay in float32.
        compile: Compile the network.
        seed: Seed of the order of samples, the noise, the noise levels and the dropped labels.
        checkpoint_every: Number of steps between checkpoints.
        log_every: Number of steps between rows of the log.
        sync: Options of the alignment; those of the paper by default.
        accumulate: Number of equal parts in which a step's batch is processed one after the other, to save memory.
        time_sampling: Distribution of path time: uniform, or logit-normal for more intermediate times
            (arXiv:2403.03206).
        time_mean: Mean of the logit-normal distribution; above 0 is noisier.
        time_std: Standard deviation of the logit-normal distribution.
        loss_weighting: Weighting of the squared error of the prediction: none, min-snr, velocity (the error of the
            velocity, whatever the network predicts) or likelihood.
        snr_gamma: Largest signal-to-noise ratio that counts in min-snr.
        more_ema_decays: Decays of further averaged weights, each saved as `model-ema-DECAY.safetensors`, such as
            0.999,0.99.
        keep_last: Number of checkpoints to keep.

    Raises:
        ValueError: If a value is out of its range.
    """

    PANEL: ClassVar[str] = OPTIMIZER_PANEL

    steps: int = field(metadata=option(minimum=1, maximum=10**9))
    batch_size: int = field(default=128, metadata=option(panel=OPTIMIZER_PANEL, minimum=1, maximum=10**7))
    learning_rate: float = field(default=1e-4, metadata=option(panel=OPTIMIZER_PANEL))
    warmup_steps: int = field(default=0, metadata=option(panel=OPTIMIZER_PANEL, minimum=0, maximum=10**9))
    weight_decay: float = field(default=0.0, metadata=option(panel=OPTIMIZER_PANEL, minimum=0))
    clip_norm: float = field(default=0.0, metadata=option(panel=OPTIMIZER_PANEL, minimum=0))
    ema_decay: float = field(default=0.9999, metadata=option(panel=OPTIMIZER_PANEL))
    label_drop: float = field(default=0.1, metadata=option(panel=LEARNING_PANEL, minimum=0, maximum=1))
    pairs: tuple[LayerPair, ...] = ()
    weight: float = field(default=WEIGHT, metadata=option(panel=LAYERSYNC_PANEL))
    precision: Precision = field(default="auto", metadata=option(panel=RUNNING_PANEL))
    compile: bool = field(default=False, metadata=option(panel=RUNNING_PANEL))
    seed: int = 0
    checkpoint_every: int = field(default=500, metadata=option(panel=RUNNING_PANEL, minimum=1))
    log_every: int = field(default=50, metadata=option(panel=RUNNING_PANEL, minimum=1))
    sync: SyncOptions = field(default_factory=SyncOptions)
    accumulate: int = field(default=1, metadata=option(panel=OPTIMIZER_PANEL, minimum=1, maximum=10**6))
    time_sampling: TimeSampling = field(default="uniform", metadata=option(panel=LEARNING_PANEL))
    time_mean: float = field(default=0.0, metadata=option(panel=LEARNING_PANEL))
    time_std: float = field(default=1.0, metadata=option(panel=LEARNING_PANEL))
    loss_weighting: LossWeighting = field(default="none", metadata=option(panel=LEARNING_PANEL))
    snr_gamma: float = field(default=5.0, metadata=option(panel=LEARNING_PANEL))
    more_ema_decays: tuple[float, ...] = field(default=(), metadata=option(panel=OPTIMIZER_PANEL))
    keep_last: int = field(default=1, metadata=option(panel=RUNNING_PANEL, minimum=1, maximum=10**6))

    def __post_init__(self) -> None:
        check_ranges(self, skip=() if self.steps else ("steps",))  # a plan of no steps stands for the defaults
        if not (self.learning_rate > 0 and 0 <= self.ema_decay < 1):
            raise ValueError(
                f"need learning_rate > 0 and ema_decay in [0, 1); got {self.learning_rate} and {self.ema_decay}"
            )
        if not math.isfinite(self.weight):
            raise ValueError(f"the weight of the alignment must be finite, got {self.weight}")
        check_precision(self.precision)
        for name, choices in (("time_sampling", TimeSampling), ("loss_weighting", LossWeighting)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(unknown(name, getattr(self, name), get_args(choices)))
        for name in ("time_std", "snr_gamma"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not math.isfinite(self.time_mean):
            raise ValueError(f"time_mean must be finite, got {self.time_mean}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"a batch of {self.batch_size} cannot be cut into {self.accumulate} equal parts; change accumulate"
            )
        decays = (self.ema_decay, *self.more_ema_decays)
        if len(set(decays)) < len(decays) or not all(0 <= decay < 1 for decay in decays):
            raise ValueError(f"averages need different decays in [0, 1), got {', '.join(map(str, decays))}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be between 0 and 2**63 - 1, got {self.seed}")

    def identity(self) -> dict[str, Any]:
        """Returns the fields that must be equal for a run to be continued, as a JSON-compatible dict."""
        record, default = (json.loads(json.dumps(asdict(plan))) for plan in (self, TrainingPlan(steps=0)))
        left_out = {*_FREE, *(name for name in _ADDED if record[name] == default[name])}
        return {key: value for key, value in record.items() if key not in left_out}
