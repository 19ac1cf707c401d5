"""The trainer: flow matching with or without LayerSync, interruptible at any moment.

Order, noise, noise level and label drop of a sample depend on (seed, sample id, epoch) only. Runs that share a seed
and differ in their layer pairs therefore see the same batches and the same noise, and a run that was killed ends
bit-equal to one that was not.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from layerprobe.backbones.base import Backbone
from layerprobe.capture import evaluating
from layerprobe.checkpoints import save_checkpoint, training_record, weights_hash
from layerprobe.data.base import Batch, Samples, content_hash
from layerprobe.files import claim, whole, write_text
from layerprobe.layersync import LayerPair, LayerSync
from layerprobe.noise import NoiseKey, target

HELD_OUT_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class TrainingPlan:
    """How a model is trained. Defaults are the published recipe of SiT and LayerSync, except for the batch size.

    Attributes:
        steps: Optimizer steps.
        batch_size: Samples per step.
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
    weight: float = 0.3
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    seed: int = 0
    checkpoint_every: int = 1000
    log_every: int = 50

    def __post_init__(self) -> None:
        for name in ("batch_size", "checkpoint_every", "log_every"):
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
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be between 0 and 2**63 - 1, got {self.seed}")

    def identity(self) -> dict[str, Any]:
        """What must agree for a run to be continued: everything but how long it runs and how often it writes."""
        record: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {key: value for key, value in record.items() if key not in ("steps", "checkpoint_every", "log_every")}


@dataclass
class TrainingState:
    """Everything a run needs to go on."""

    module: nn.Module
    ema: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    step: int = 0
    log: list[dict[str, float]] = field(default_factory=list)


Observer = Callable[[int, Backbone], None]
Progress = Callable[[int, int, float], None]


def train(
    backbone: Backbone,
    samples: Samples,
    plan: TrainingPlan,
    folder: str | Path,
    *,
    observe: Observer | None = None,
    observe_at: Sequence[int] = (),
    progress: Progress | None = None,
) -> Backbone:
    """Trains a model from the weights it has, and gives it back with averaged weights.

    The folder holds `training.json` (plan and data), `state.pt` (to go on from), `log.jsonl` and, at the end,
    `model.safetensors` (the averaged weights). Repeating the call continues where the last checkpoint was; a finished
    run returns at once. The backbone passed in keeps its weights.

    Args:
        backbone: The model to start from.
        samples: What it learns; labels are used where the model knows classes.
        plan: How it is trained.
        folder: Where the run is kept.
        observe: Called with (step, averaged model) after each step of `observe_at`, and before the first for step 0.
        observe_at: Steps to observe; those passed before an interruption are not observed again.
        progress: Called with (steps done, steps in all, loss).

    Raises:
        ValueError: If the data does not fit, the folder holds another run, or the loss is not finite; the last
            checkpoint stays. Also if the run has more steps already than the plan.
    """
    folder = Path(folder)
    _check(backbone, samples)
    claim(folder, "training.json", _record(backbone, samples, plan), what="a training")
    state = _start(backbone, plan)
    if (folder / "state.pt").is_file():
        _restore(state, folder)
    if state.step > plan.steps:
        raise ValueError(
            f"{folder} holds {state.step} steps, more than the {plan.steps} wanted; pass more --steps or another --out"
        )
    live = replace(backbone, module=state.module)
    if observe and state.step == 0 and 0 in observe_at:
        observe(0, _averaged(backbone, state))
    if plan.compile:
        state.module.compile()
    with ExitStack() as stack:
        sync = None
        if plan.pairs:
            sync = LayerSync(state.module, plan.pairs, weight=plan.weight, tokens=backbone.tokens)
            stack.enter_context(sync)
        # Networks that draw random numbers themselves, for dropout, leave the caller's generators alone.
        stack.enter_context(torch.random.fork_rng([backbone.device] if backbone.device.type == "cuda" else []))
        began, first = time.perf_counter(), state.step
        for batch in batches(samples, plan, start=state.step):
            loss, cosines = _step(live, state, batch, plan, sync)
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss} at step {state.step}; lower the learning rate (checkpoint kept in {folder})"
                )
            if state.step % plan.log_every == 0:
                rate = (state.step - first) * plan.batch_size / (time.perf_counter() - began)
                state.log.append({"step": state.step, "loss": loss, "samples_per_s": round(rate, 1)} | cosines)
            if observe and state.step in observe_at:
                observe(state.step, _averaged(backbone, state))
            if state.step % plan.checkpoint_every == 0 or state.step == plan.steps:
                _save(state, folder)
            if progress:
                progress(state.step, plan.steps, loss)
    averaged = _averaged(backbone, state)
    # A run that was killed between its last checkpoint and here may hold the model of an earlier, shorter run.
    if _steps_of(folder / "model.safetensors") != state.step:
        training = plan.identity() | {
            "steps": state.step,
            "data": samples.fingerprint,
            "class_names": list(samples.class_names),
        }
        save_checkpoint(folder / "model.safetensors", averaged, averaged.module.state_dict(), training=training)
    return averaged


@dataclass(frozen=True)
class TrainingBatch:
    """One step's data: x (B, C, *grid), eps like x, level (B,), condition (B,) or None."""

    x: Tensor
    eps: Tensor
    level: Tensor
    condition: Tensor | None


def batches(samples: Samples, plan: TrainingPlan, *, start: int = 0) -> Iterator[TrainingBatch]:
    """The batches of steps `start` ... `plan.steps - 1`; epochs follow one another without a gap."""
    order, noise = NoiseKey(plan.seed, "order"), NoiseKey(plan.seed, "noise")
    levels, drops = NoiseKey(plan.seed, "level"), NoiseKey(plan.seed, "label drop")
    n, permutations = len(samples), {}
    for step in range(start, plan.steps):
        positions = range(step * plan.batch_size, (step + 1) * plan.batch_size)
        parts = []
        for epoch in range(positions[0] // n, positions[-1] // n + 1):
            if epoch not in permutations:
                permutations = {epoch: order.permutation(n, draw=epoch)}
            here = [p - epoch * n for p in positions if p // n == epoch]
            batch = samples.batch(permutations[epoch][here].tolist())
            drop = drops.uniform(batch.ids, draw=epoch) < plan.label_drop
            labels = None if batch.labels is None else batch.labels.masked_fill(drop, samples.num_classes)
            eps = noise.normal(batch.ids, samples.shape, draw=epoch)
            parts.append(TrainingBatch(batch.x, eps, levels.uniform(batch.ids, draw=epoch), labels))
        yield parts[0] if len(parts) == 1 else _concatenate(parts)


def prediction_loss(backbone: Backbone, batch: TrainingBatch) -> Tensor:
    """Mean squared error of each sample in what the model predicts (velocity on the linear path), shape (B,)."""
    device = backbone.device
    x, eps, level = batch.x.to(device), batch.eps.to(device), batch.level.to(device)
    condition = batch.condition.to(device) if batch.condition is not None and backbone.num_classes else None
    x_t = backbone.schedule.corrupt(x, eps, level)
    wanted = target(backbone.prediction, backbone.schedule, x=x, eps=eps, level=level)
    output = backbone.predict(x_t, level.to(x.dtype), condition)
    return ((output.float() - wanted) ** 2).flatten(1).mean(1)


@torch.inference_mode()
def held_out_loss(
    backbone: Backbone,
    samples: Samples,
    *,
    levels: Sequence[float] = HELD_OUT_LEVELS,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[float, float]:
    """Mean prediction loss on unseen samples, by noise level, with the null label; noise is keyed by (seed, id)."""
    sums = dict.fromkeys(levels, 0.0)
    with evaluating(backbone.module):
        for start in range(0, len(samples), batch_size):
            batch: Batch = samples.batch(range(start, min(start + batch_size, len(samples))))
            eps = NoiseKey(seed).normal(batch.ids, samples.shape)
            for level in levels:
                at = torch.full((len(batch.x),), level, dtype=torch.float64)
                sums[level] += float(prediction_loss(backbone, TrainingBatch(batch.x, eps, at, None)).sum())
    return {level: total / len(samples) for level, total in sums.items()}


def _step(
    live: Backbone, state: TrainingState, batch: TrainingBatch, plan: TrainingPlan, sync: LayerSync | None
) -> tuple[float, dict[str, float]]:
    torch.manual_seed(int(np.random.SeedSequence((plan.seed, state.step)).generate_state(1)[0]))
    for group in state.optimizer.param_groups:
        group["lr"] = plan.learning_rate * min(1.0, (state.step + 1) / (plan.warmup_steps + 1))
    with torch.autocast(live.device.type, torch.bfloat16, enabled=plan.precision == "bfloat16"):
        loss = prediction_loss(live, batch).mean()
    total = loss + sync.loss() if sync else loss
    state.optimizer.zero_grad()
    total.backward()  # type: ignore[no-untyped-call]
    if plan.clip_norm:
        nn.utils.clip_grad_norm_(state.module.parameters(), plan.clip_norm)
    state.optimizer.step()
    state.step += 1
    decay = min(plan.ema_decay, (state.step + 1) / (state.step + 10))
    with torch.no_grad():
        torch._foreach_lerp_(list(state.ema.values()), [*_trainable(state.module)], 1 - decay)
    cosines = {} if sync is None else {f"cosine {pair}": float(cosine) for pair, cosine in sync.cosines.items()}
    return float(loss.detach()), cosines


def _record(backbone: Backbone, samples: Samples, plan: TrainingPlan) -> dict[str, Any]:
    """What a folder's run is: everything that decides its numbers."""
    return {
        "plan": plan.identity(),
        "data": samples.fingerprint,
        "start": weights_hash(backbone.module),
        "schedule": backbone.schedule.name,
        "schedule_hash": content_hash(backbone.schedule.to_config())[:16],
        "prediction": backbone.prediction,
    }


def _steps_of(path: Path) -> int | None:
    if not path.is_file():
        return None
    steps: int | None = training_record(path).get("steps")
    return steps


def _start(backbone: Backbone, plan: TrainingPlan) -> TrainingState:
    module = copy.deepcopy(backbone.module).train()
    parameters = _trainable(module)
    fused = backbone.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=fused)
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    ema = {name: p.detach().clone() for name, p in zip(names, parameters, strict=True)}
    return TrainingState(module, ema, optimizer)


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _averaged(backbone: Backbone, state: TrainingState) -> Backbone:
    module = copy.deepcopy(backbone.module).eval()
    module.load_state_dict(state.module.state_dict() | state.ema)
    return replace(backbone, module=module)


def _concatenate(parts: list[TrainingBatch]) -> TrainingBatch:
    conditions = [part.condition for part in parts if part.condition is not None]
    return TrainingBatch(
        torch.cat([part.x for part in parts]),
        torch.cat([part.eps for part in parts]),
        torch.cat([part.level for part in parts]),
        torch.cat(conditions) if conditions else None,
    )


def _check(backbone: Backbone, samples: Samples) -> None:
    if samples.shape != backbone.shape:
        raise ValueError(
            f"the samples have shape {samples.shape}, {backbone.name} takes {backbone.shape}; pass --size or other data"
        )
    if len(samples) == 0:
        raise ValueError("there are no samples to train on")
    if backbone.num_classes and samples.num_classes and backbone.num_classes != samples.num_classes:
        raise ValueError(
            f"{backbone.name} knows {backbone.num_classes} classes, the data has {samples.num_classes}; "
            "pass data with the same labels"
        )


def _save(state: TrainingState, folder: Path) -> None:
    # A finite loss can have a gradient that is not; such weights must not replace a good checkpoint.
    bad = [name for name, average in state.ema.items() if not bool(average.isfinite().all())]
    if bad:
        raise ValueError(
            f"{bad[0]} is not finite after step {state.step}; lower the learning rate (checkpoint kept in {folder})"
        )
    # The log comes first: one that is ahead of the state is written anew, one that is behind would stay so.
    write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in state.log))
    content = {
        "step": state.step,
        "module": state.module.state_dict(),
        "ema": state.ema,
        "optimizer": state.optimizer.state_dict(),
        "log": state.log,
    }
    with whole(folder / "state.pt") as partial:
        torch.save(content, partial)


def _restore(state: TrainingState, folder: Path) -> None:
    try:
        content = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{folder / 'state.pt'} is damaged; delete it to start this run again") from error
    state.module.load_state_dict(content["module"])
    for name, average in state.ema.items():
        average.copy_(content["ema"][name])
    state.optimizer.load_state_dict(content["optimizer"])
    state.step, state.log = content["step"], content["log"]
