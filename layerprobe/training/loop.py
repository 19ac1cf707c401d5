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
from collections.abc import Callable, Collection, Generator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerprobe.backbones import Backbone, layer_shapes
from layerprobe.capture import evaluating, real_tokens
from layerprobe.checkpoints import save_checkpoint, training_record, weights_hash
from layerprobe.data import Samples, content_hash, rendering_of
from layerprobe.extraction import token_grid
from layerprobe.files import claim
from layerprobe.layersync import LayerPair, LayerSync
from layerprobe.progress import TrainingProgress
from layerprobe.training.batches import TrainingBatch, batches, prefetched
from layerprobe.training.distributed import (
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
from layerprobe.training.losses import condition_of, loss_weights, prediction_loss
from layerprobe.training.plan import TrainingPlan
from layerprobe.training.state import (
    TrainingState,
    diverged,
    log_row,
    new_state,
    newest_checkpoint,
    restore,
    save,
    write_logs,
)


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
Log = Callable[[int, dict[str, float]], None]


def train(
    backbone: Backbone,
    samples: Samples,
    plan: TrainingPlan,
    folder: str | Path,
    *,
    observe: Observer | None = None,
    observe_at: Collection[int] = (),
    progress: TrainingProgress | None = None,
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
        teacher.predict(x_t, level.to(x_t.dtype), condition_of(live, batch))


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
                rendering = rendering_of(samples)
                kept = {} if rendering is None else {"rendering": rendering.to_dict()}
                save_checkpoint(folder / name, backbone, weights, training=made | {"ema_decay": decay} | kept)


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
