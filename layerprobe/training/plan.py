"""Everything that decides the outcome of a training run."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from layerprobe.layersync import WEIGHT, LayerPair, SyncOptions

TimeSampling = Literal["uniform", "logit-normal"]
LossWeighting = Literal["none", "min-snr", "velocity", "likelihood"]
# How long a run is, how often it writes and into how many parts it cuts a step is not what it is.
_FREE = ("steps", "checkpoint_every", "log_every", "accumulate", "keep_last")
# Left out of the identity at their defaults, so that runs from before there were such fields can be continued.
_ADDED = ("sync", "time_sampling", "time_mean", "time_std", "loss_weighting", "snr_gamma", "more_ema_decays")


@dataclass(frozen=True)
class TrainingPlan:
    """How a model is trained. Defaults are the published recipe of SiT and LayerSync, except for the batch size.

    Attributes:
        steps: Optimizer steps.
        batch_size: Samples per step, over all processes and parts.
        learning_rate: Of AdamW, constant after the warm-up.
        warmup_steps: Steps of linear warm-up.
        weight_decay: Of AdamW.
        clip_norm: Gradients are scaled down to this norm; 0 never clips.
        ema_decay: Of the averaged weights; the decay starts lower and reaches this value (step + 1) / (step + 10)
            allowing.
        label_drop: Share of labels replaced by the null label, so that guidance works.
        pairs: Layers to align; none trains without LayerSync.
        weight: Of the alignment.
        precision: "float32" or "bfloat16" autocast.
        compile: Compile the network.
        seed: Of order, noise, levels and label drop.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps between rows of the log.
        sync: How the layers are aligned; the paper's way unless given.
        accumulate: Parts of equal size that a step's batch is cut into, one after the other, where memory is short.
        time_sampling: "uniform", or "logit-normal" for more of the middle (arXiv:2403.03206), see `noise_levels`.
        time_mean: Of the logit-normal; above 0 means noisier.
        time_std: Of the logit-normal.
        loss_weighting: See `loss_weights`; "none" is the plain squared error of what the network predicts.
        snr_gamma: Of "min-snr".
        more_ema_decays: Of further averages, each written as `model-ema-DECAY.safetensors`.
        keep_last: How many checkpoints are kept.
    """

    steps: int
    batch_size: int = 128
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    ema_decay: float = 0.9999
    label_drop: float = 0.1
    pairs: tuple[LayerPair, ...] = ()
    weight: float = WEIGHT
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    seed: int = 0
    checkpoint_every: int = 1000
    log_every: int = 50
    sync: SyncOptions = field(default_factory=SyncOptions)
    accumulate: int = 1
    time_sampling: TimeSampling = "uniform"
    time_mean: float = 0.0
    time_std: float = 1.0
    loss_weighting: LossWeighting = "none"
    snr_gamma: float = 5.0
    more_ema_decays: tuple[float, ...] = ()
    keep_last: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "checkpoint_every", "log_every", "accumulate", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (self.steps >= 0 and self.learning_rate > 0 and 0 <= self.label_drop <= 1 and 0 <= self.ema_decay < 1):
            raise ValueError(
                f"need steps >= 0, learning_rate > 0, label_drop in [0, 1], ema_decay in [0, 1); got {self.steps}, "
                f"{self.learning_rate}, {self.label_drop}, {self.ema_decay}"
            )
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not math.isfinite(self.weight):
            raise ValueError(f"the weight of the alignment must be finite, got {self.weight}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"unknown precision {self.precision!r}; use float32 or bfloat16")
        for name, known in (("time_sampling", TimeSampling), ("loss_weighting", LossWeighting)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; use one of {', '.join(get_args(known))}")
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
        """What must agree for a run to be continued; everything but how long it runs, how often it writes and so on."""
        record, default = (json.loads(json.dumps(asdict(plan))) for plan in (self, TrainingPlan(steps=0)))
        left_out = {*_FREE, *(name for name in _ADDED if record[name] == default[name])}
        return {key: value for key, value in record.items() if key not in left_out}
