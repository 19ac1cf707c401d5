"""The state of a training run (weights, averages, optimizer, log), and its checkpoints on disk.

Checkpoints are written atomically, and never with weights that are not finite.
"""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.checksums import check, recorded_write, write_recorded_text
from layerprobe.files import one_line, write_text
from layerprobe.layersync import LayerPair, LayerSync
from layerprobe.memory import pass_on
from layerprobe.ranks import Ranks
from layerprobe.records import damaged
from layerprobe.training.distributed import gathered, local, placed


@dataclass
class TrainingState:
    """Everything that a run needs to continue.

    Attributes:
        module: The network in training.
        averages: Averaged weights by name, for each decay, in at least float32; observers get the first average.
        optimizer: Optimizer; its first group holds the parameters of the network, a second group those of the
            regularizer, if it has any.
        step: Number of steps done.
        log: Rows of the log.
        decisions: Rows of `decisions.jsonl`.
        sync: Alignment of the layers, or None.
        token_grid: Grid of the aligned layers' tokens; None without alignment, or if they have no grid.
    """

    module: nn.Module
    averages: dict[float, dict[str, Tensor]]
    optimizer: torch.optim.Optimizer
    step: int = 0
    log: list[dict[str, float]] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    sync: LayerSync | None = None
    token_grid: tuple[int, ...] | None = None

    def parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that the optimizer updates, including those of the regularizer."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def average(self) -> None:
        """Updates every average with the current weights; its decay is at most (step + 1) / (step + 10)."""
        with torch.no_grad():
            weights = [local(parameter) for parameter in self.optimizer.param_groups[0]["params"]]
            for decay, average in self.averages.items():
                current_decay = min(decay, (self.step + 1) / (self.step + 10))
                tensors = [local(tensor) for tensor in average.values()]
                current = [weight.to(tensor.dtype) for weight, tensor in zip(weights, tensors, strict=True)]
                torch._foreach_lerp_(tensors, current, 1 - current_decay)

    def decided_pairs(self) -> tuple[LayerPair, ...] | None:
        """Returns the pairs of the latest decision, or None before the first decision."""
        return tuple(LayerPair(*names) for names in self.decisions[-1]["pairs"]) if self.decisions else None


def new_state(module: nn.Module, decays: tuple[float, ...], **adamw: Any) -> TrainingState:
    """Creates the state before the first step.

    Args:
        module: The network.
        decays: Decays of the averages.
        **adamw: Options of AdamW.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    averages = {decay: {name: _average_of(p) for name, p in trained.items()} for decay in decays}
    return TrainingState(module, averages, torch.optim.AdamW(trained.values(), **adamw))


def _average_of(parameter: nn.Parameter) -> Tensor:
    # An average in half precision would not move, since its updates are below half a step of the numbers.
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(dtype, copy=True)


def newest_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Returns the content of the newest readable checkpoint, with a warning if newer ones are damaged.

    Returns:
        The content, or None if there is no checkpoint.

    Raises:
        ValueError: If no checkpoint can be read.
    """
    paths = [*reversed(checkpoints(folder))]
    for path in paths:
        try:
            content = read_checkpoint(path)
        except ValueError as error:
            if path is paths[-1]:
                problem = "is damaged; delete it" if len(paths) == 1 else "and all older ones are damaged; delete them"
                raise ValueError(f"{paths[0]} {problem} to start this run again") from error
            continue
        if path is not paths[0]:
            warnings.warn(f"{paths[0]} is damaged; continuing from {path.name}", stacklevel=3)
        return content
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of a training.

    Raises:
        Damaged: If it is damaged.
    """
    remedy = "delete it to continue from the one before it"
    check(path, remedy)
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        pass_on(error)
        raise damaged(path, one_line(error), remedy) from error
    lacking = [name for name in ("step", "module", "optimizer", "log") if name not in content]
    if lacking:
        raise damaged(path, f"it has no {lacking[0]}", remedy)
    return content


def checkpoints(folder: Path) -> list[Path]:
    """Returns the paths of the checkpoints in a run folder, oldest first."""
    paths = sorted((folder / "checkpoints").glob("step-*.pt"), key=lambda path: int(path.stem.removeprefix("step-")))
    # Earlier versions kept a single checkpoint under this name.
    return [*(path for path in [folder / "state.pt"] if path.is_file()), *paths]


def steps_done(folder: Path) -> int:
    """Returns the step of the newest checkpoint in a run folder; 0 without one."""
    paths = checkpoints(folder)
    if not paths:
        return 0
    number = paths[-1].stem.removeprefix("step-")
    return int(number if number.isdigit() else read_checkpoint(paths[-1])["step"])


def restore(state: TrainingState, content: dict[str, Any], ranks: Ranks) -> None:
    """Restores a state with the same network and pairs from the content of a checkpoint.

    Args:
        state: State to restore, in place.
        content: Content of the checkpoint as returned by `announced`; only the first process reads the file.
        ranks: The processes.
    """
    current, weights = state.module.state_dict(), content["module"]
    state.module.load_state_dict({name: placed(tensor, current[name], ranks) for name, tensor in weights.items()})
    saved = content["averages"] if "averages" in content else dict.fromkeys(state.averages, content["ema"])
    for decay, average in state.averages.items():
        for name, tensor in average.items():
            tensor.copy_(placed(saved[decay][name], tensor, ranks))
    parameters, moments = state.parameters(), content["optimizer"]["state"]
    moments = {
        i: {
            name: placed(value, parameters[i], ranks) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for i, values in moments.items()
    }
    state.optimizer.load_state_dict(content["optimizer"] | {"state": moments})
    if state.sync and "sync" in content:
        like = local(parameters[0])
        state.sync.load_state_dict({name: placed(value, like, ranks) for name, value in content["sync"].items()})
    state.step, state.log = content["step"], content["log"]


def save(state: TrainingState, folder: Path, ranks: Ranks, *, keep_last: int) -> None:
    """Writes logs and a checkpoint, and removes old checkpoints; every process calls it, the first one writes.

    Args:
        state: State of the run.
        folder: Folder of the run.
        ranks: The processes.
        keep_last: Number of checkpoints to keep.

    Raises:
        ValueError: If a weight or an average is not finite; nothing is written then.
    """
    # A step with a finite gradient can still overflow; such weights must not replace a good checkpoint.
    not_finite = next((name for name, tensor in _tensors(state) if not bool(local(tensor).isfinite().all())), None)
    device = state.parameters()[0].device
    if ranks.mean(torch.tensor(float(not_finite is not None), device=device)):
        raise diverged(f"{not_finite or 'a weight'} is not finite", state.step, folder)
    content = gathered(_content(state), ranks)
    if not ranks.is_first:
        return
    # The log comes first: after an interruption a log ahead of the checkpoint is rewritten, one behind would stay so.
    write_logs(state, folder)
    path = folder / "checkpoints" / f"step-{state.step:07d}.pt"
    path.parent.mkdir(exist_ok=True)
    with recorded_write(path, durable=True) as partial:
        torch.save(content, partial)
    # Checkpoints of later steps are damaged, since this run has continued from an earlier one.
    paths = checkpoints(folder)
    kept = paths[: paths.index(path) + 1][-keep_last:]
    for other in set(paths).difference(kept):
        other.unlink()


def diverged(problem: str, step: int, folder: Path) -> ValueError:
    """Returns the error for a run that cannot continue because of numbers that are not finite."""
    last = next(reversed(checkpoints(folder)), None)
    checkpoint = "there is no checkpoint yet" if last is None else f"{last.name} is kept in {folder}"
    return ValueError(f"{problem} at step {step}; lower the learning rate or clip gradients ({checkpoint})")


def log_row(state: TrainingState, row: dict[str, float], folder: Path) -> None:
    """Appends a row to the log and to `log.jsonl`; `log.csv` is written with the next checkpoint."""
    state.log.append(row)
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def write_logs(state: TrainingState, folder: Path) -> None:
    """Rewrites `log.jsonl`, `log.csv` and, if there are decisions, `decisions.jsonl`."""
    write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in state.log))
    table = io.StringIO()
    columns = dict.fromkeys(["step", *(name for row in state.log for name in row)])
    writer = csv.DictWriter(table, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(state.log)
    write_recorded_text(folder / "log.csv", table.getvalue())
    if state.decisions:
        write_recorded_text(folder / "decisions.jsonl", "".join(json.dumps(row) + "\n" for row in state.decisions))


def _content(state: TrainingState) -> dict[str, Any]:
    return {
        "step": state.step,
        "module": state.module.state_dict(),
        "averages": state.averages,
        "optimizer": state.optimizer.state_dict(),
        "sync": state.sync.state_dict() if state.sync else {},
        "log": state.log,
        "decisions": state.decisions,
    }


def _tensors(state: TrainingState) -> Iterator[tuple[str, Tensor]]:
    yield from state.module.state_dict().items()
    for average in state.averages.values():
        yield from average.items()
