"""`layerprobe confirm`: the pick on trial."""

from __future__ import annotations

from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.output import emit, progress_bar


def confirm(
    run: options.Run,
    steps: options.Steps = 1000,
    num_seeds: Annotated[int, typer.Option(min=2, help="Seeds, at least two.")] = 3,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Fresh weights instead of the checkpoint's.")
    ] = False,
    weight: options.Weight = 0.3,
    batch_size: Annotated[int | None, typer.Option(min=1, help="As the checkpoint was trained, else 128.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="As the checkpoint was trained, else 1e-4.")] = None,
    num_evaluations: Annotated[int, typer.Option(min=1, help="Evenly spaced over the steps.")] = 4,
    num_samples: Annotated[int, typer.Option(min=2, help="Drawn for each Frechet distance.")] = 1000,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Train with and without the pick, seed by seed, and say whether it helps."""
    from layerprobe.analyses import runs

    training = runs.confirmation_training(
        run, steps=steps, **options.given(weight=weight, batch_size=batch_size, learning_rate=learning_rate)
    )
    seeds = tuple(range(seed, seed + num_seeds))
    if dry_run:
        record = {
            "run": str(run),
            "arms": runs.arm_names(run),
            "seeds": list(seeds),
            "steps": steps,
            "learning_rate": training.learning_rate,
        }
        emit(record, [f"{key}: {value}" for key, value in record.items()], as_json=as_json)
        return
    with progress_bar() as progress:
        verdict = runs.confirm_run(
            run,
            training,
            seeds=seeds,
            from_scratch=from_scratch,
            num_evaluations=num_evaluations,
            num_samples=num_samples,
            device=device,
            progress=progress,
        )
    emit(
        {"run": str(run), "answer": verdict.answer, "paragraph": verdict.paragraph},
        [f"verdict  {verdict.answer}", verdict.paragraph, f"report   {run / 'report.html'}"],
        as_json=as_json,
    )
