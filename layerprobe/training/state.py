"""What a training needs to go on: weights, averages, optimizer, log; and its way to disk and back.

A checkpoint appears whole or not at all, and one whose weights are not finite never does.
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

from layerprobe.files import whole, write_text
from layerprobe.layersync import LayerPair, LayerSync
from layerprobe.training.distributed import Ranks, gathered, local, placed


@dataclass
class TrainingState:
    """Everything a run needs to go on.

    Attributes:
        module: The network in training.
        averages: By decay, the averaged weights by name; the first is the one that is observed.
        optimizer: Its first group holds the network's parameters, a second one those of the regularizer, if it has any.
        step: Steps done.
        log: The rows of the log.
        decisions: The rows of `decisions.jsonl`.
        sync: The alignment, where there is one.
        token_grid: Of the aligned layers' tokens, once it has been needed.
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
        """What the optimizer changes, the regularizer's own parameters included."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def average(self) -> None:
        """Moves every average towards the weights; a decay starts lower and is reached (step + 1) / (step + 10)."""
        with torch.no_grad():
            weights = [local(parameter) for parameter in self.optimizer.param_groups[0]["params"]]
            for decay, average in self.averages.items():
                now = min(decay, (self.step + 1) / (self.step + 10))
                torch._foreach_lerp_([local(tensor) for tensor in average.values()], weights, 1 - now)

    def decided_pairs(self) -> tuple[LayerPair, ...] | None:
        """The pairs of the latest decision; None before the first."""
        return tuple(LayerPair(*names) for names in self.decisions[-1]["pairs"]) if self.decisions else None


def new_state(module: nn.Module, decays: tuple[float, ...], **adamw: Any) -> TrainingState:
    """The state before the first step; the optimizer is AdamW with these options."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    averages = {decay: {name: p.detach().clone() for name, p in trained.items()} for decay in decays}
    return TrainingState(module, averages, torch.optim.AdamW(trained.values(), **adamw))


def newest_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The content of the newest checkpoint that can be read, with a warning if it is not the newest; None without any.

    Raises:
        ValueError: If none of them can be read.
    """
    places = [*reversed(checkpoints(folder))]
    for place in places:
        try:
            content: dict[str, Any] = torch.load(place, map_location="cpu", weights_only=True)
        except Exception as error:
            if place is places[-1]:
                what = "is damaged; delete it" if len(places) == 1 else "and all older ones are damaged; delete them"
                raise ValueError(f"{places[0]} {what} to start this run again") from error
            continue
        if place is not places[0]:
            warnings.warn(f"{places[0]} is damaged; going on from {place.name}", stacklevel=3)
        return content
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = sorted((folder / "checkpoints").glob("step-*.pt"), key=lambda place: int(place.stem.removeprefix("step-")))
    # Runs once kept a single checkpoint under this name.
    return [*(place for place in [folder / "state.pt"] if place.is_file()), *found]


def restore(state: TrainingState, content: dict[str, Any], ranks: Ranks) -> None:
    """Puts a checkpoint's content into a state that is made alike: same network, same pairs.

    Args:
        state: Changed in place.
        content: As `announced` gives it, so that one process needs to read it, whatever the number of those that wrote.
        ranks: Who takes part.
    """
    own, network = state.module.state_dict(), content["module"]
    state.module.load_state_dict({name: placed(tensor, own[name], ranks) for name, tensor in network.items()})
    saved = content["averages"] if "averages" in content else dict.fromkeys(state.averages, content["ema"])
    for decay, average in state.averages.items():
        for name, tensor in average.items():
            tensor.copy_(placed(saved[decay][name], tensor, ranks))
    parameters, moments = state.parameters(), content["optimizer"]["state"]
    moments = {
        i: {
            name: placed(value, parameters[i], ranks) if isinstance(value, Tensor) else value
            for name, value in of.items()
        }
        for i, of in moments.items()
    }
    state.optimizer.load_state_dict(content["optimizer"] | {"state": moments})
    if state.sync and "sync" in content:
        beside = local(parameters[0])
        state.sync.load_state_dict({name: placed(value, beside, ranks) for name, value in content["sync"].items()})
    state.step, state.log = content["step"], content["log"]


def save(state: TrainingState, folder: Path, ranks: Ranks, *, keep_last: int) -> None:
    """Writes logs and a checkpoint, and removes all but the last ones; all processes come here, the first writes.

    Raises:
        ValueError: If a weight or an average is not finite; nothing is written then.
    """
    # A step with a finite gradient can still overflow; such weights must not replace a good checkpoint.
    bad = next((name for name, tensor in _tensors(state) if not bool(local(tensor).isfinite().all())), None)
    device = state.parameters()[0].device
    if ranks.mean(torch.tensor(float(bad is not None), device=device)):
        raise diverged(f"{bad or 'a weight'} is not finite", state.step, folder)
    content = gathered(_content(state), ranks)
    if not ranks.is_first:
        return
    # The log comes first: one that is ahead of the checkpoint is written anew, one that is behind would stay so.
    write_logs(state, folder)
    place = folder / "checkpoints" / f"step-{state.step:07d}.pt"
    place.parent.mkdir(exist_ok=True)
    with whole(place) as partial:
        torch.save(content, partial)
    # Later ones were damaged, or the run would not be here.
    places = checkpoints(folder)
    kept = places[: places.index(place) + 1][-keep_last:]
    for other in {*places, *place.parent.glob("*.partial")}.difference(kept):
        other.unlink()


def diverged(what: str, step: int, folder: Path) -> ValueError:
    """The error of a training that cannot go on."""
    last = next(reversed(checkpoints(folder)), None)
    kept = "there is no checkpoint yet" if last is None else f"{last.name} is kept in {folder}"
    return ValueError(f"{what} at step {step}; lower the learning rate or clip gradients ({kept})")


def log_row(state: TrainingState, row: dict[str, float], folder: Path) -> None:
    """Adds a row to the log, at once in `log.jsonl`; `log.csv` follows with the next checkpoint."""
    state.log.append(row)
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def write_logs(state: TrainingState, folder: Path) -> None:
    """Writes `log.jsonl`, `log.csv` and, where there are decisions, `decisions.jsonl` anew."""
    write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in state.log))
    table = io.StringIO()
    columns = dict.fromkeys(["step", *(name for row in state.log for name in row)])
    writer = csv.DictWriter(table, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(state.log)
    write_text(folder / "log.csv", table.getvalue())
    if state.decisions:
        write_text(folder / "decisions.jsonl", "".join(json.dumps(row) + "\n" for row in state.decisions))


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
