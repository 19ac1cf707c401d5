"""The trainer: flow matching and diffusion with or without LayerSync, interruptible at any moment.

Order, noise, noise level and label drop of a sample depend on (seed, sample id, epoch) only. Runs that share a seed
and differ in their layer pairs therefore see the same batches and the same noise, and a run that was killed ends
bit-equal to one that was not.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from layerprobe.backbones.base import Backbone, layer_shapes
from layerprobe.batches import TrainingBatch, batches, prefetched
from layerprobe.capture import evaluating, real_tokens
from layerprobe.checkpoints import save_checkpoint, training_record, weights_hash
from layerprobe.data.base import Batch, Samples, content_hash
from layerprobe.distributed import (
    Ranks,
    accumulating,
    announced,
    average_gradients,
    clip_gradients,
    gradient_norm,
    parallel,
    processes,
    unsharded,
)
from layerprobe.extract import token_grid
from layerprobe.files import claim
from layerprobe.layersync import WEIGHT, LayerPair, LayerSync
from layerprobe.noise import END, NoiseKey, error_weight, target
from layerprobe.sync_options import SyncOptions
from layerprobe.training_state import (
    TrainingState,
    diverged,
    log_row,
    new_state,
    newest_checkpoint,
    restore,
    save,
    write_logs,
)

HELD_OUT_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)

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


@dataclass(frozen=True)
class Decision:
    """Which layers a training aligns from now on, decided on the way.

    Attributes:
        pairs: Empty for no alignment.
        record: The evidence; JSON.
    """

    pairs: tuple[LayerPair, ...]
    record: dict[str, Any]


Observer = Callable[[int, Backbone], None]
Director = Callable[[int, Backbone], Decision]
Progress = Callable[[int, int, float], None]
Log = Callable[[int, dict[str, float]], None]


def train(
    backbone: Backbone,
    samples: Samples,
    plan: TrainingPlan,
    folder: str | Path,
    *,
    observe: Observer | None = None,
    observe_at: Collection[int] = (),
    progress: Progress | None = None,
    log: Log | None = None,
    direct: Director | None = None,
    direct_at: Collection[int] = (),
    fsdp: bool = False,
) -> Backbone:
    """Trains a model from the weights it has, and gives it back with averaged weights.

    Under torchrun or srun, every process calls this with the same arguments; the first one calls what is to be called
    and writes the folder, which may be continued by any number of processes: with the same number, bit for bit.

    The folder holds `training.json` (plan and data), `checkpoints/` (to go on from), `log.jsonl`, `log.csv` and, at
    the end, `model.safetensors` (the averaged weights). Repeating the call continues where the last checkpoint was; a
    finished run returns at once. The backbone passed in keeps its weights.

    Args:
        backbone: The model to start from.
        samples: What it learns; labels are used where the model knows classes. Read by a thread of its own.
        plan: How it is trained.
        folder: Where the run is kept.
        observe: Called with (step, averaged model) after each step of `observe_at`, and before the first for step 0.
        observe_at: Steps to observe; those passed before an interruption are not observed again.
        progress: Called with (steps done, steps in all, loss).
        log: Called with (step, row) for each row of the log.
        direct: Called with (step, averaged model) after each step of `direct_at`, and before the first for step 0; its
            pairs are aligned from the next step on. Decisions are kept in `decisions.jsonl` and not made again.
        direct_at: Steps to decide at.
        fsdp: With several processes, spread weights, gradients and the optimizer's state over them.

    Raises:
        ValueError: If the data does not fit, the folder holds another run, or the loss, the gradient or a weight is
            not finite; the last checkpoint stays. Also if the run has more steps already than the plan, or the batch
            cannot be cut for the processes.
        ConnectionError: If another process was killed; the last checkpoint stays.
    """
    folder = Path(folder)
    with ExitStack() as stack:
        ranks = stack.enter_context(processes())
        _check(backbone, samples)
        _check_ranks(plan, ranks, fsdp=fsdp)
        if ranks.is_first:
            claim(folder, "training.json", _record(backbone, samples, plan), what="a training")
        # Networks that draw random numbers themselves, for dropout, leave the caller's generators alone.
        stack.enter_context(torch.random.fork_rng([backbone.device] if backbone.device.type == "cuda" else []))
        aligned = stack.enter_context(ExitStack())
        content = announced(newest_checkpoint(folder) if ranks.is_first else None, ranks)
        live = replace(backbone, module=copy.deepcopy(backbone.module).train())
        live = parallel(live, ranks, fsdp=fsdp)
        state = _start(live.module, backbone, plan, aligned, content, ranks)
        if state.step > plan.steps:
            raise ValueError(
                f"{folder} holds {state.step} steps, more than the {plan.steps} wanted; "
                "pass more --steps or another --out"
            )
        if state.step < plan.steps and ranks.is_first:
            write_logs(state, folder)  # Without the rows of steps that an interruption took back.

        def visit() -> None:
            undecided = state.step not in [row["step"] for row in state.decisions]
            decide = direct is not None and state.step in direct_at and undecided
            if direct and decide:
                averaged = _averaged(backbone, state)
                decision = ranks.broadcast(direct(state.step, averaged) if ranks.is_first else Decision((), {}))
                _decide(state, backbone, plan, decision, aligned)
            if observe and state.step in observe_at:
                averaged = _averaged(backbone, state)
                if ranks.is_first:
                    observe(state.step, averaged)
                ranks.barrier()
            if decide or state.step == plan.steps or (state.step and state.step % plan.checkpoint_every == 0):
                save(state, folder, ranks, keep_last=plan.keep_last)

        if state.step == 0:
            visit()
        began, seen = time.perf_counter(), 0
        for batch in stack.enter_context(closing(_ready_batches(live, samples, plan, state.step, ranks))):
            loss, norm = _step(live, state, batch, plan, folder, ranks)
            seen += plan.batch_size
            if state.step % plan.log_every == 0 and ranks.is_first:
                row = _row(state, loss, norm, seen / (time.perf_counter() - began))
                began, seen = time.perf_counter(), 0
                log_row(state, row, folder)
                if log:
                    log(state.step, row)
            paused = time.perf_counter()
            visit()
            began += time.perf_counter() - paused
            if progress and ranks.is_first:
                progress(state.step, plan.steps, loss)
        averaged = _averaged(backbone, state)
        _write_models(averaged, samples, plan, state, folder, ranks)
    return averaged


def prediction_loss(backbone: Backbone, batch: TrainingBatch) -> Tensor:
    """Mean squared error of each sample in what the model predicts (velocity on the linear path), shape (B,).

    Of a padded sample, only what is real counts. The error of a score is counted in units of 1 / sigma, as published.
    """
    batch = batch.mapped(lambda tensor: tensor.to(backbone.device))
    x, eps, level = batch.x, batch.eps, batch.level
    x_t = backbone.schedule.corrupt(x, eps, level)
    wanted = target(backbone.prediction, backbone.schedule, x=x, eps=eps, level=level)
    output = backbone.masked(batch.mask).predict(x_t, level.to(x.dtype), _condition(backbone, batch))
    error = (output.float() - wanted) ** 2
    if batch.mask is not None:
        real = batch.mask.unsqueeze(1).expand_as(error).flatten(1)
        loss = error.flatten(1).masked_fill(~real, 0.0).sum(1) / real.sum(1)
    else:
        loss = error.flatten(1).mean(1)
    return loss * error_weight(backbone.prediction, backbone.schedule, level).to(loss.dtype)


def loss_weights(backbone: Backbone, level: Tensor, *, weighting: LossWeighting, snr_gamma: float = 5.0) -> Tensor:
    """The factor of each sample's prediction loss, shape (B,), float64.

    A weighting is defined for one kind of prediction; at a given x_t the errors of all kinds are proportional, which
    turns it into the factor for what this network predicts.

    - "none": 1.
    - "min-snr": min(snr, gamma) on the error of x_0 (Hang et al. 2023, arXiv:2303.09556).
    - "velocity": 1 on the error of the velocity, so that a network of any kind is trained as one of velocities.
    - "likelihood": (Song et al. 2021, arXiv:2101.09258) as SiT has it (arXiv:2401.08740): g / sigma^2 on the error of
      eps, where g is the drift's variance, and the velocity's error is g / sigma times that of eps.

    The factors are those at 1e-3 and 1 - 1e-3 beyond these levels, where some are infinite.
    """
    if weighting == "none":
        return torch.ones_like(level)
    schedule, at = backbone.schedule, level.double().clamp(END, 1 - END)
    alpha, sigma = schedule.alpha(at), schedule.sigma(at)
    # x_t stays where it is while eps moves by alpha and x_0 by -sigma; so far do predictions move then.
    own, velocity = (
        target(kind, schedule, x=-sigma, eps=alpha, level=at) for kind in (backbone.prediction, "velocity")
    )
    if weighting == "min-snr":
        wanted = schedule.log_snr(at).exp().clamp(max=snr_gamma) * sigma**2
    elif weighting == "velocity":
        wanted = velocity**2
    else:
        wanted = velocity * alpha / sigma
    return wanted / (own**2 * error_weight(backbone.prediction, schedule, at))


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
                noised = TrainingBatch(batch.x, eps, at, None, batch.mask)
                sums[level] += float(prediction_loss(backbone, noised).sum())
    return {level: total / len(samples) for level, total in sums.items()}


def _step(
    live: Backbone, state: TrainingState, batch: TrainingBatch, plan: TrainingPlan, folder: Path, ranks: Ranks
) -> tuple[float, float]:
    """One step of the optimizer; gives the prediction loss and the norm of the gradient before clipping."""
    _reseed(plan, state.step, ranks.rank)
    for group in state.optimizer.param_groups:
        group["lr"] = plan.learning_rate * min(1.0, (state.step + 1) / (plan.warmup_steps + 1))
    state.optimizer.zero_grad()
    loss = torch.zeros((), device=live.device)
    share = ranks.share(len(batch.x), plan.batch_size)
    parts = batch.split(plan.accumulate)
    for part in parts:
        with nullcontext() if part is parts[-1] else accumulating(live):
            predicted, total = _losses(live, state, part, plan)
            (total * share / plan.accumulate).backward()  # type: ignore[no-untyped-call]
        loss += predicted.detach() * share / plan.accumulate
    parameters = state.parameters()
    average_gradients(state.sync.parameters() if state.sync else (), ranks)
    loss, norm = ranks.mean(loss), gradient_norm(parameters)
    # The one place where the device is waited for: before the update, which then runs while the next step is prepared.
    loss_now, norm_now = torch.stack([loss, norm.to(loss)]).tolist()
    for what, value in (("loss", loss_now), ("gradient's norm", norm_now)):
        if not math.isfinite(value):
            raise diverged(f"the {what} is {value}", state.step + 1, folder)
    if plan.clip_norm:
        clip_gradients(parameters, plan.clip_norm, norm)
    state.optimizer.step()
    state.step += 1
    state.average()
    if state.sync and plan.sync.teacher_decay:
        state.sync.update_teacher()
    return loss_now, norm_now


def _losses(live: Backbone, state: TrainingState, batch: TrainingBatch, plan: TrainingPlan) -> tuple[Tensor, Tensor]:
    """The mean prediction loss of some samples, and with the alignment."""
    batch = batch.mapped(lambda tensor: tensor.to(live.device, non_blocking=True))
    tokens = _real_tokens(live, state, batch)
    with torch.autocast(live.device.type, torch.bfloat16, enabled=plan.precision == "bfloat16"):
        losses = prediction_loss(live, batch)
        if plan.loss_weighting != "none":
            weights = loss_weights(live, batch.level, weighting=plan.loss_weighting, snr_gamma=plan.snr_gamma)
            losses = losses * weights.to(losses.dtype)
        loss = losses.mean()
        if state.sync and plan.sync.second_pass:
            _teach(live, state.sync, batch, plan)
    if state.sync is None:
        return loss, loss
    return loss, loss + state.sync.loss(state.step, noise_level=batch.level, mask=tokens)


def _teach(live: Backbone, sync: LayerSync, batch: TrainingBatch, plan: TrainingPlan) -> None:
    """Shows the teacher the batch, with the same noise at its own levels."""
    level = batch.level
    if batch.teacher_draw is not None:
        level = plan.sync.teacher_level(level, batch.teacher_draw)
    x_t = live.schedule.corrupt(batch.x, batch.eps, level)
    with sync.teaching() as module:
        teacher = replace(live, module=module).masked(batch.mask)
        teacher.predict(x_t, level.to(x_t.dtype), _condition(live, batch))


def _condition(backbone: Backbone, batch: TrainingBatch) -> Tensor | None:
    return batch.condition if backbone.num_classes else None


def _real_tokens(live: Backbone, state: TrainingState, batch: TrainingBatch) -> Tensor | None:
    """Which tokens of the aligned layers are no padding, shape (B, T); None where all of them count."""
    if batch.mask is None or state.sync is None:
        return None
    if state.token_grid is None:
        raise ValueError("the aligned layers' tokens lie on no grid like the input's; cut all samples to one length")
    return real_tokens(batch.mask, state.token_grid)


def _row(state: TrainingState, loss: float, norm: float, rate: float) -> dict[str, float]:
    """A row of the log."""
    row = {"step": state.step, "loss": loss, "grad_norm": norm, "learning_rate": state.optimizer.param_groups[0]["lr"]}
    return row | {"samples_per_s": round(rate, 1)} | (state.sync.statistics() if state.sync else {})


def _ready_batches(
    backbone: Backbone, samples: Samples, plan: TrainingPlan, start: int, ranks: Ranks
) -> Generator[TrainingBatch]:
    """The batches of the steps to come, prepared ahead; in pinned memory for a GPU, which copies them unwaited."""
    made = batches(backbone, samples, plan, start=start, mine=ranks.positions)
    pinned = (batch.mapped(Tensor.pin_memory) for batch in made)
    return prefetched(pinned if backbone.device.type == "cuda" else made)


def _start(
    module: nn.Module,
    backbone: Backbone,
    plan: TrainingPlan,
    aligned: ExitStack,
    content: dict[str, Any] | None,
    ranks: Ranks,
) -> TrainingState:
    """The state before the first step, or that of a checkpoint."""
    fused = backbone.device.type in ("cpu", "cuda")
    decays = (plan.ema_decay, *plan.more_ema_decays)
    state = new_state(module, decays, lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=fused)
    if plan.compile:
        module.compile()
    if content:
        state.decisions = content.get("decisions", [])
    decided = state.decided_pairs()
    _align(state, backbone, plan, plan.pairs if decided is None else decided, aligned)
    if content:
        restore(state, content, ranks)
    return state


def _align(
    state: TrainingState, backbone: Backbone, plan: TrainingPlan, pairs: tuple[LayerPair, ...], aligned: ExitStack
) -> None:
    """Aligns these pairs from now on, and no others."""
    aligned.close()
    for parameter in [p for group in state.optimizer.param_groups[1:] for p in group["params"]]:
        state.optimizer.state.pop(parameter, None)
    del state.optimizer.param_groups[1:]
    state.sync, state.token_grid = None, None
    if not pairs:
        return
    _reseed(plan, state.step)
    sync = LayerSync(state.module, pairs, weight=plan.weight, options=plan.sync, tokens=backbone.tokens)
    if plan.sync.projector_width:
        arguments, named = _arguments(replace(backbone, module=state.module))
        sync.prepare(*arguments, **named)
        state.optimizer.add_param_group({"params": list(sync.parameters())})
    state.sync = aligned.enter_context(sync)
    # Of the backbone as it was given: one that is sharded bears no inference mode.
    with evaluating(backbone.module):
        count, _ = layer_shapes(backbone, [pairs[0].student])[pairs[0].student]
    state.token_grid = token_grid(count, backbone.shape[1:], known=backbone.token_grid)


def _arguments(backbone: Backbone) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the network itself is called with, whatever the backbone makes of its arguments."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = backbone.module.register_forward_pre_hook(lambda _, *given: seen.append(given), with_kwargs=True)
    with evaluating(backbone.module), torch.no_grad():
        device = backbone.device
        backbone.predict(torch.zeros(1, *backbone.shape, device=device), torch.full((1,), 0.5, device=device))
    hook.remove()
    return seen[0]


def _decide(
    state: TrainingState, backbone: Backbone, plan: TrainingPlan, decision: Decision, aligned: ExitStack
) -> None:
    before = state.sync.pairs if state.sync else ()
    row = {"step": state.step, "pairs": [[p.student, p.teacher] for p in decision.pairs], "record": decision.record}
    state.decisions.append(json.loads(json.dumps(row)))
    if decision.pairs != before:
        _align(state, backbone, plan, decision.pairs, aligned)


def _reseed(plan: TrainingPlan, step: int, rank: int = 0) -> None:
    """What a network draws itself depends on the seed, the step and the process."""
    entropy = (plan.seed, step, rank) if rank else (plan.seed, step)
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


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


def _averaged(backbone: Backbone, state: TrainingState, decay: float | None = None) -> Backbone:
    """The model with averaged weights; those of the first average unless told otherwise."""
    average = next(iter(state.averages.values())) if decay is None else state.averages[decay]
    module = copy.deepcopy(backbone.module).eval()
    weights = state.module.state_dict() | average
    module.load_state_dict({name: unsharded(tensor) for name, tensor in weights.items()})
    return replace(backbone, module=module)


def _write_models(
    backbone: Backbone, samples: Samples, plan: TrainingPlan, state: TrainingState, folder: Path, ranks: Ranks
) -> None:
    """Every average, unless it is there."""
    made = plan.identity() | {
        "steps": state.step,
        "data": samples.fingerprint,
        "class_names": list(samples.class_names),
    }
    for decay in state.averages:
        name = "model.safetensors" if decay == plan.ema_decay else f"model-ema-{decay}.safetensors"
        # A run that was killed between its last checkpoint and here may hold the model of an earlier, shorter run.
        if ranks.broadcast(ranks.is_first and _steps_of(folder / name) != state.step):
            weights = _averaged(backbone, state, decay).module.state_dict()
            if ranks.is_first:
                form = {} if samples.form is None else {"form": samples.form.to_dict()}
                save_checkpoint(folder / name, backbone, weights, training=made | {"ema_decay": decay} | form)


def _steps_of(path: Path) -> int | None:
    if not path.is_file():
        return None
    steps: int | None = training_record(path).get("steps")
    return steps


def _check_ranks(plan: TrainingPlan, ranks: Ranks, *, fsdp: bool) -> None:
    if fsdp and ranks.world_size == 1:
        raise ValueError(
            "one process has nobody to share the weights with; start several with torchrun or srun, or leave out --fsdp"
        )
    parts = plan.accumulate * ranks.world_size
    if plan.batch_size < parts or (plan.accumulate > 1 and plan.batch_size % parts):
        raise ValueError(
            f"a batch of {plan.batch_size} cannot be cut into {plan.accumulate} equal parts on each of "
            f"{ranks.world_size} processes; change batch_size or accumulate"
        )
    if fsdp and plan.sync.teacher_decay:
        raise ValueError("a teacher of its own is a whole copy of the network on every process; leave out --fsdp")


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
