"""`layerprobe train` from start to finish: where a training starts, what it aligns, what is measured on the way."""

from __future__ import annotations

from pathlib import Path

from layerprobe.analyses.runs import Progress, read_selection
from layerprobe.backbones.base import Backbone
from layerprobe.backbones.sit import SiTConfig, new_sit
from layerprobe.checkpoints import open_checkpoint, resolve_device
from layerprobe.data.base import Splits
from layerprobe.data.splits import take
from layerprobe.files import write_text
from layerprobe.layersync import LayerPair
from layerprobe.training import TrainingPlan, held_out_loss, train


def training_start(checkpoint: str | None, config: SiTConfig, *, seed: int, device: str = "auto") -> Backbone:
    """The model that a training starts from: a checkpoint, or a SiT with fresh weights where there is none."""
    if checkpoint is not None:
        return open_checkpoint(checkpoint, device=device)
    backbone = new_sit(config, seed=seed)
    backbone.module.to(resolve_device(device))
    return backbone


def train_run(
    backbone: Backbone, splits: Splits, plan: TrainingPlan, folder: str | Path, *, progress: Progress | None = None
) -> Backbone:
    """Trains on the fit samples; `held_out.csv` gets the loss on the choose samples, ten times on the way."""
    folder = Path(folder)
    held_out = take(splits, num_choose=min(len(splits.choose), 1000)).choose
    steps = [round(i * plan.steps / 10) for i in range(11)]

    def observe(step: int, model: Backbone) -> None:
        losses = held_out_loss(model, held_out)
        place = folder / "held_out.csv"
        before = (
            [line for line in place.read_text().splitlines() if not line.startswith(f"{step},")]
            if place.is_file()
            else []
        )
        header = "step," + ",".join(f"noise level {level:g}" for level in losses)
        row = f"{step}," + ",".join(f"{loss:.6f}" for loss in losses.values())
        write_text(place, "\n".join([*(before or [header]), row]) + "\n")

    report = None if progress is None else lambda step, total, _: progress("training", step, total)
    return train(backbone, splits.fit, plan, folder, observe=observe, observe_at=steps, progress=report)


def picked_pairs(run: str | Path | None) -> tuple[LayerPair, ...]:
    """The pick of a run as a training takes it; none for no run.

    Raises:
        ValueError: If the run has no admissible pair.
    """
    if run is None:
        return ()
    selection = read_selection(run)
    if selection.pick is None:
        raise ValueError(f"{run} has no admissible pair ({selection.reason}); pass --pair")
    return (selection.pick,)
