"""`layerprobe sample`: samples of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.output import emit


@options.spread(opening=options.OPENING)
def sample(
    checkpoint: options.Checkpoint,
    *,
    out: Annotated[Path, typer.Option(help="Folder for samples.png, samples.svg and samples.npy.")],
    num: Annotated[int, typer.Option(min=1, help="How many.")] = 100,
    solver: Annotated[str, typer.Option(help="euler or heun.")] = "heun",
    steps: options.Steps = 25,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is none.")] = 1.0,
    opening: options.Given,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Draw samples, one class after another where the model knows classes."""
    from layerprobe.analyses.sample_runs import draw_samples
    from layerprobe.checkpoints import open_checkpoint
    from layerprobe.sampling import SamplingPlan

    backbone = open_checkpoint(checkpoint, device=device, **options.checkpoint_options(opening))
    plan = SamplingPlan(solver, steps, guidance, seed)  # type: ignore[arg-type]
    if dry_run:
        emit(
            {"model": backbone.name, "num": num},
            [f"would draw {num} samples of {backbone.name} into {out}"],
            as_json=as_json,
        )
        return
    path = str(draw_samples(backbone, out, num=num, plan=plan, keep=True))
    emit({"samples": path}, [path], as_json=as_json)
