"""The trainer: flow matching and diffusion with or without LayerSync, resumable after any interruption.

Order, noise, noise level and label drop of a sample depend only on (seed, sample id, epoch). Runs with the same seed
and different layer pairs therefore see the same batches and the same noise, and a resumed run gives the same bits as
an uninterrupted one: on a CPU, and on a GPU with `compute_deterministically` (`--deterministic`).
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
from layerprobe.capture import as_tokens, evaluating, real_tokens
from layerprobe.checkpoints import save_checkpoint, training_record, weights_hash
from layerprobe.checksums import is_damaged, told_again
from layerprobe.data import Samples, content_hash, rendering_of
from layerprobe.extraction import token_grid
from layerprobe.files import locked
from layerprobe.layersync import LayerPair, LayerSync
from layerprobe.precision import precision_on, products_of
from layerprobe.progress import TrainingProgress
from layerprobe.ranks import Ranks, current, processes
from layerprobe.records import check_claim, claim
from layerprobe.threads import prefetched
from layerprobe.training.batches import TrainingBatch, batches
from layerprobe.training.distributed import (
    accumulating,
    announced,
    average_gradients,
    clip_gradients,
    gradient_norm,
    host_copy,
    parallel,
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
    """A decision during training about the layers to align from now on.

    Attributes:
        pairs: Layer pairs to align; empty for no alignment.
        record: Evidence for the decision, JSON-compatible.
    """

    pairs: tuple[LayerPair, ...]
    record: dict[str, Any]


_CLAIM: dict[str, Any] = {"what": "a training", "added": ("num_heads",)}  # of the folder, see `claim`

Observer = Callable[[int, Backbone], None]
Director = Callable[[int, Backbone], Decision | None]
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
    """Trains a model from its current weights, and returns it with averaged weights.

    Under torchrun or srun, every process calls this with the same arguments. The first process writes the folder and
    calls the functions passed in. A run may be resumed by any number of processes; with the same number, the result is
    the same bit for bit on a CPU, and on GPUs with `compute_deterministically`.

    The folder contains `training.json` (plan and data), `checkpoints/`, `log.jsonl`, `log.csv` and, at the end,
    `model.safetensors` (averaged weights). Repeating the call resumes from the last checkpoint; a finished run returns
    at once. The backbone passed in keeps its weights.

    Args:
        backbone: The model to start from.
        samples: Training samples, read in a separate thread; labels are used if the model is conditioned on classes.
        plan: Plan of the training.
        folder: Folder of the run.
        observe: Function called with (step, averaged model) after each step of `observe_at`; step 0 is the start.
        observe_at: Steps to observe; steps before an interruption are not observed again.
        progress: Function called after each step with (steps done, steps in total, loss).
        log: Function called with (step, row) for each row of the log.
        direct: Function called with (step, averaged model) after each step of `direct_at`; step 0 is the start. The
            pairs of its decision are aligned from the next step on; None decides nothing. Decisions are stored in
            `decisions.jsonl` and not repeated after an interruption.
        direct_at: Steps of the decisions.
        fsdp: Whether several processes share weights, gradients and optimizer state (FSDP2).

    Raises:
        ValueError: If the data does not match the model, the folder belongs to another run, the run already has more
            steps than the plan, the batch cannot be split over the processes, or the loss, the gradient or a weight is
            not finite. The last checkpoint is kept.
        ConnectionError: If another process was killed; the last checkpoint is kept.
    """
    folder = Path(folder)
    plan = replace(plan, precision=precision_on(plan.precision, backbone.device))
    with ExitStack() as stack:
        ranks = stack.enter_context(processes())
        _check(backbone, samples)
        _check_ranks(plan, ranks, fsdp=fsdp)
        if ranks.is_first:
            stack.enter_context(locked(folder))
            claim(folder, "training.json", _record(backbone, samples, plan), **_CLAIM)
        # Random numbers of the network itself, such as dropout, must not change the caller's generators.
        stack.enter_context(torch.random.fork_rng([backbone.device] if backbone.device.type == "cuda" else []))
        aligned = stack.enter_context(ExitStack())
        content = announced(newest_checkpoint(folder) if ranks.is_first else None, ranks)
        # Sharded from the host, so that no process has a second whole network on its device.
        module = host_copy(backbone.module) if fsdp else copy.deepcopy(backbone.module)
        live = replace(backbone.in_precision(plan.precision), module=module.train())
        live = parallel(live, ranks, fsdp=fsdp, device=backbone.device)
        state = _start(live.module, backbone, plan, aligned, content, ranks)
        if state.step > plan.steps:
            raise ValueError(
                f"{folder} has {state.step} steps already, more than the {plan.steps} of this plan; "
                "pass more --steps or another --out"
            )
        if state.step < plan.steps and ranks.is_first:
            write_logs(state, folder)  # Removes rows of steps after the last checkpoint.

        def between_steps() -> None:
            undecided = state.step not in [row["step"] for row in state.decisions]
            decision = None
            if direct and state.step in direct_at and undecided:
                averaged = _averaged(backbone, state)
                decision = ranks.broadcast(direct(state.step, averaged) if ranks.is_first else None)
                if decision is not None:
                    _decide(state, backbone, plan, decision, aligned)
            if observe and state.step in observe_at:
                averaged = _averaged(backbone, state)
                if ranks.is_first:
                    observe(state.step, averaged)
                ranks.barrier()
            is_regular = state.step > 0 and state.step % plan.checkpoint_every == 0
            if decision is not None or is_regular or state.step == plan.steps:
                save(state, folder, ranks, keep_last=plan.keep_last)

        if state.step == 0:
            between_steps()
        began, num_samples = time.perf_counter(), 0
        for batch in stack.enter_context(closing(_ready_batches(live, samples, plan, state.step, ranks))):
            loss, norm = _step(live, state, batch, plan, folder, ranks)
            num_samples += plan.batch_size
            if state.step % plan.log_every == 0 and ranks.is_first:
                row = _row(state, loss, norm, num_samples / (time.perf_counter() - began))
                began, num_samples = time.perf_counter(), 0
                log_row(state, row, folder)
                if log:
                    log(state.step, row)
            paused = time.perf_counter()
            between_steps()
            began += time.perf_counter() - paused
            if progress and ranks.is_first:
                progress(state.step, plan.steps, loss)
        averaged = _averaged(backbone, state)
        _write_models(averaged, samples, plan, state, folder, ranks)
    return averaged


def check_training(backbone: Backbone, samples: Samples, plan: TrainingPlan, folder: str | Path) -> None:
    """Checks that model, data, batch and folder of `train` with the same arguments fit together; nothing is written.

    Raises:
        ValueError: If they do not.
    """
    plan = replace(plan, precision=precision_on(plan.precision, backbone.device))
    _check(backbone, samples)
    _check_ranks(plan, current(), fsdp=False)
    check_claim(Path(folder), "training.json", _record(backbone, samples, plan), **_CLAIM)


def _step(
    live: Backbone, state: TrainingState, batch: TrainingBatch, plan: TrainingPlan, folder: Path, ranks: Ranks
) -> tuple[float, float]:
    """Takes one optimizer step; returns the prediction loss and the norm of the gradient before clipping."""
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
            with products_of(plan.precision):
                (total * share / plan.accumulate).backward()  # type: ignore[no-untyped-call]
        loss += predicted.detach() * share / plan.accumulate
    parameters = state.parameters()
    average_gradients(state.sync.parameters() if state.sync else (), ranks)
    loss, norm = ranks.mean(loss), gradient_norm(parameters)
    # The only synchronization with the device. It comes before the update, which overlaps with the next step.
    loss_value, norm_value = torch.stack([loss, norm.to(loss)]).tolist()
    for name, value in (("loss", loss_value), ("gradient norm", norm_value)):
        if not math.isfinite(value):
            raise diverged(f"the {name} is {value}", state.step + 1, folder)
    if plan.clip_norm:
        clip_gradients(parameters, plan.clip_norm, norm)
    state.optimizer.step()
    state.step += 1
    state.average()
    if state.sync and plan.sync.teacher_decay:
        state.sync.update_teacher()
    return loss_value, norm_value


def _losses(live: Backbone, state: TrainingState, batch: TrainingBatch, plan: TrainingPlan) -> tuple[Tensor, Tensor]:
    """Computes the mean prediction loss of a batch, without and with the alignment."""
    batch = batch.mapped(lambda tensor: tensor.to(live.device, non_blocking=True))
    token_mask = _real_tokens(state, batch)
    losses = prediction_loss(live, batch)
    if plan.loss_weighting != "none":
        weights = loss_weights(live, batch.level, weighting=plan.loss_weighting, snr_gamma=plan.snr_gamma)
        losses = losses * weights.to(losses.dtype)
    loss = losses.mean()
    if state.sync and plan.sync.second_pass:
        _teach(live, state.sync, batch, plan)
    if state.sync is None:
        return loss, loss
    return loss, loss + state.sync.loss(state.step, noise_level=batch.level, mask=token_mask)


def _teach(live: Backbone, sync: LayerSync, batch: TrainingBatch, plan: TrainingPlan) -> None:
    """Runs the teacher on the batch, with the same noise at the noise levels of the teacher."""
    level = batch.level
    if batch.teacher_draw is not None:
        level = plan.sync.teacher_level(level, batch.teacher_draw)
    x_t = live.schedule.corrupt(batch.x, batch.eps, level)
    with sync.teaching() as module:
        teacher = replace(live, module=module).masked(batch.mask)
        teacher.predict(x_t, level.to(x_t.dtype), condition_of(live, batch))


def _real_tokens(state: TrainingState, batch: TrainingBatch) -> Tensor | None:
    """Returns which tokens of the aligned layers are not padding, shape (B, T); None without padding."""
    if batch.mask is None or state.sync is None:
        return None
    if state.token_grid is None:
        raise ValueError(
            "the tokens of the aligned layers have no grid that matches the input; cut all samples to one length"
        )
    return real_tokens(batch.mask, state.token_grid)


def _row(state: TrainingState, loss: float, norm: float, rate: float) -> dict[str, float]:
    """Creates a row of the log."""
    row = {"step": state.step, "loss": loss, "grad_norm": norm, "learning_rate": state.optimizer.param_groups[0]["lr"]}
    return row | {"samples_per_s": round(rate, 1)} | (state.sync.statistics() if state.sync else {})


def _ready_batches(
    backbone: Backbone, samples: Samples, plan: TrainingPlan, start: int, ranks: Ranks
) -> Generator[TrainingBatch]:
    """Prepares the batches of the next steps in advance; for a GPU in pinned memory, which it copies asynchronously."""
    prepared = batches(backbone, samples, plan, start=start, select=ranks.mine)
    pinned = (batch.mapped(Tensor.pin_memory) for batch in prepared)
    return prefetched(pinned if backbone.device.type == "cuda" else prepared)


def _start(
    module: nn.Module,
    backbone: Backbone,
    plan: TrainingPlan,
    aligned: ExitStack,
    content: dict[str, Any] | None,
    ranks: Ranks,
) -> TrainingState:
    """Creates the state before the first step, or restores that of a checkpoint."""
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
    """Replaces the aligned pairs."""
    aligned.close()
    for parameter in [p for group in state.optimizer.param_groups[1:] for p in group["params"]]:
        state.optimizer.state.pop(parameter, None)
    del state.optimizer.param_groups[1:]
    state.sync, state.token_grid = None, None
    if not pairs:
        return
    _reseed(plan, state.step)
    # LayerSync also looks at the network's input, which `as_tokens` does not have.
    tokens = None if backbone.tokens is as_tokens else backbone.tokens
    sync = LayerSync(state.module, pairs, weight=plan.weight, options=plan.sync, tokens=tokens)
    if plan.sync.projector_width:
        args, kwargs = _network_arguments(replace(backbone, module=state.module))
        sync.prepare(*args, **kwargs)
        state.optimizer.add_param_group({"params": list(sync.parameters())})
    state.sync = aligned.enter_context(sync)
    # Measured on the original backbone, since sharded modules do not support inference mode.
    with evaluating(backbone.module):
        num_tokens, _ = layer_shapes(backbone, [pairs[0].student])[pairs[0].student]
    state.token_grid = token_grid(num_tokens, backbone.shape[1:], known=backbone.token_grid)


def _network_arguments(backbone: Backbone) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments with which the backbone calls its network."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = backbone.module.register_forward_pre_hook(lambda _, *arguments: calls.append(arguments), with_kwargs=True)
    with evaluating(backbone.module), torch.no_grad():
        device = backbone.device
        backbone.predict(torch.zeros(1, *backbone.shape, device=device), torch.full((1,), 0.5, device=device))
    hook.remove()
    return calls[0]


def _decide(
    state: TrainingState, backbone: Backbone, plan: TrainingPlan, decision: Decision, aligned: ExitStack
) -> None:
    """Records a decision and aligns its pairs."""
    current_pairs = state.sync.pairs if state.sync else ()
    row = {"step": state.step, "pairs": [[p.student, p.teacher] for p in decision.pairs], "record": decision.record}
    state.decisions.append(json.loads(json.dumps(row)))
    if decision.pairs != current_pairs:
        _align(state, backbone, plan, decision.pairs, aligned)


def _reseed(plan: TrainingPlan, step: int, rank: int = 0) -> None:
    """Seeds the random numbers of the network itself, such as dropout, by seed, step and process."""
    entropy = (plan.seed, step, rank) if rank else (plan.seed, step)
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


def _record(backbone: Backbone, samples: Samples, plan: TrainingPlan) -> dict[str, Any]:
    """Returns the description of the run in `training.json`: everything that determines its results."""
    return {
        "plan": plan.identity(),
        "data": samples.fingerprint,
        "start": weights_hash(backbone.module),
        "num_heads": backbone.num_heads,  # which the weights do not tell
        "schedule": backbone.schedule.name,
        "schedule_hash": content_hash(backbone.schedule.to_config())[:16],
        "prediction": backbone.prediction,
    }


def _averaged(backbone: Backbone, state: TrainingState, decay: float | None = None) -> Backbone:
    """Returns the model with averaged weights, by default those of the first average."""
    average = next(iter(state.averages.values())) if decay is None else state.averages[decay]
    module = copy.deepcopy(backbone.module).eval()
    own = module.state_dict()  # which shares memory with the module
    for name, tensor in (state.module.state_dict() | average).items():
        own[name].copy_(unsharded(tensor))  # one at a time: together they are one more network
    return replace(backbone, module=module)


def _write_models(
    backbone: Backbone, samples: Samples, plan: TrainingPlan, state: TrainingState, folder: Path, ranks: Ranks
) -> None:
    """Writes the models of all averages that are not written yet."""
    record = plan.identity() | {
        "steps": state.step,
        "data": samples.fingerprint,
        "class_names": list(samples.class_names),
    }
    for decay in state.averages:
        name = "model.safetensors" if decay == plan.ema_decay else f"model-ema-{decay}.safetensors"
        # If the run was extended and then killed after its last checkpoint, the file has the model of fewer steps.
        if ranks.broadcast(ranks.is_first and _num_steps(folder / name) != state.step):
            weights = _averaged(backbone, state, decay).module.state_dict()
            if ranks.is_first:
                rendering = rendering_of(samples)
                extra = {} if rendering is None else {"rendering": rendering.to_dict()}
                save_checkpoint(folder / name, backbone, weights, training=record | {"ema_decay": decay} | extra)


def _num_steps(path: Path) -> int | None:
    """Returns the number of training steps of a model file, or None if it does not exist or is damaged."""
    if not path.is_file():
        return None
    if is_damaged(path):
        told_again(path)
        return None
    steps: int | None = training_record(path).get("steps")
    return steps


def _check_ranks(plan: TrainingPlan, ranks: Ranks, *, fsdp: bool) -> None:
    if fsdp and ranks.world_size == 1:
        raise ValueError(
            "--fsdp needs several processes to share the weights; start them with torchrun or srun, or leave out --fsdp"
        )
    parts = plan.accumulate * ranks.world_size
    if plan.batch_size < parts or (plan.accumulate > 1 and plan.batch_size % parts):
        raise ValueError(
            f"a batch of {plan.batch_size} cannot be cut into {plan.accumulate} equal parts on each of "
            f"{ranks.world_size} processes; change batch_size or accumulate"
        )
    if fsdp and plan.sync.teacher_decay:
        raise ValueError("an averaged teacher is a whole copy of the network on every process; leave out --fsdp")


def _check(backbone: Backbone, samples: Samples) -> None:
    if samples.shape != backbone.shape:
        raise ValueError(
            f"the samples have shape {samples.shape}, {backbone.name} takes {backbone.shape}; pass --size or other data"
        )
    if len(samples) == 0:
        raise ValueError("there are no samples to train on")
    if backbone.num_classes and samples.num_classes and backbone.num_classes != samples.num_classes:
        raise ValueError(
            f"{backbone.name} has {backbone.num_classes} classes, the data has {samples.num_classes}; "
            "pass data with the same labels"
        )
