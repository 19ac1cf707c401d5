"""`layerprobe quickstart`: the whole pipeline on the embedded checkpoint and data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.fields import Given, from_dataclasses, only
from layerprobe.cli.finished import show_run
from layerprobe.cli.output import emit, progress_bar
from layerprobe.training import TrainingPlan

_YOUR_OWN = (
    ("what layerprobe reads of your own checkpoint", "layerprobe inspect model.safetensors"),
    ("the same for it, with your data", "layerprobe probe model.safetensors --data images/ --out runs/mine"),
)


@from_dataclasses()
def quickstart(
    *,
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/quickstart"),
    training: Annotated[Given, only(TrainingPlan, "steps", steps=90)],
    num_seeds: Annotated[int, typer.Option(min=2, help="Number of seeds of the confirmation.")] = 2,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Probe, pick and confirm on the embedded digits model: minutes on two cores, no download."""
    from layerprobe.analyses.runs import quickstart_run
    from layerprobe.analyses.wording import verdict_paragraph

    steps = training["steps"]
    if dry_run:
        record = {
            "checkpoint": "digits",
            "data": "digits",
            "out": str(out),
            "arms": 4,
            "seeds": num_seeds,
            "steps": steps,
        }
        emit(
            record,
            [
                f"would probe the embedded digits model and train up to 4 arms x {num_seeds} seeds x {steps} steps "
                f"into {out}"
            ],
            as_json=as_json,
        )
        return
    with progress_bar(quiet=quiet) as progress:
        selection, verdict = quickstart_run(
            out, steps=steps, num_seeds=num_seeds, seed=seed, device=device, progress=progress
        )
    paragraph = verdict_paragraph(verdict)
    show_run(
        out,
        selection,
        after=[f"trial    {verdict.answer}", f"         {paragraph}"],
        record={"answer": verdict.answer, "paragraph": paragraph},
        following=_YOUR_OWN,
        quiet=quiet,
        verbose=verbose,
        as_json=as_json,
    )
