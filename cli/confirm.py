"""`layerprobe confirm`: test of the pick by training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.fields import Given, changed, from_dataclasses, only
from layerprobe.cli.output import emit, progress_bar, tell_reading
from layerprobe.cli.parsing import names
from layerprobe.layersync import SyncOptions
from layerprobe.training import TrainingPlan


@from_dataclasses()
def confirm(
    run: options.Run,
    *,
    training_options: Annotated[
        Given,
        only(
            TrainingPlan,
            *("steps", "weight", "batch_size", "learning_rate"),
            steps=1000,
            batch_size=options.AS_TRAINED,
            learning_rate=options.AS_TRAINED,
        ),
    ],
    num_seeds: Annotated[int, typer.Option(min=2, help="Number of seeds, at least two.")] = 3,
    stop_early: Annotated[
        bool,
        typer.Option(
            "--stop-early", help="Compare after every seed from the third on, and stop once the verdict is clear."
        ),
    ] = False,
    arms: Annotated[
        str | None,
        typer.Option(
            help="Arms, separated by commas, of none,pick,runner-up,heuristic,random:2,learning-rate,bad; the usual "
            "four if not given."
        ),
    ] = None,
    from_scratch: options.FromScratch = False,
    num_evaluations: options.NumEvaluations = 4,
    num_samples: options.NumSamples = 1000,
    spread: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of a difference over seeds, as a share of the distance; for the forecast only."
        ),
    ] = None,
    pilot: Annotated[
        Path | None, typer.Option(help="Another confirmed run, or a pair sweep, whose spread is used.")
    ] = None,
    sync_options: SyncOptions,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Train with and without the pick, seed by seed, and say whether it helps."""
    from layerprobe.analyses.runs import (
        arm_names,
        confirm_run,
        confirmation_resolution,
        confirmation_training,
        trained_steps,
    )
    from layerprobe.analyses.wording import length_cautions, resolution_sentences, spread_source, verdict_paragraph

    training = confirmation_training(
        run,
        from_scratch=from_scratch,
        sync=sync_options,
        **training_options,
    )
    seeds = tuple(range(seed, seed + num_seeds))
    arm_choice = None if arms is None else names(arms)
    planned = arm_names(run, arm_choice, seed=seed)
    resolution = confirmation_resolution(run, num_seeds=num_seeds, stop_early=stop_early, spread=spread, pilot=pilot)
    cautions = length_cautions(training.steps, trained_steps=trained_steps(run) if from_scratch else None)
    beforehand = [*resolution_sentences(resolution), *cautions]
    if dry_run:
        record = {
            "run": str(run),
            "arms": planned,
            "seeds": list(seeds),
            "steps": training.steps,
            "learning_rate": training.learning_rate,
            **changed(sync_options),
        }
        lines = [f"{key}: {value}" for key, value in record.items()] + beforehand
        source = resolution.spread and spread_source(resolution.spread)
        numbers = resolution.to_dict() | {"spread_from": source}
        emit(record | {"resolution": numbers, "cautions": cautions}, lines, as_json=as_json)
        return
    for line in beforehand:
        typer.echo(line, err=True)
    with progress_bar() as progress:
        verdict = confirm_run(
            run,
            training,
            seeds=seeds,
            arms=arm_choice,
            stop_early=stop_early,
            from_scratch=from_scratch,
            num_evaluations=num_evaluations,
            num_samples=num_samples,
            device=device,
            on_reading=tell_reading,
            progress=progress,
        )
    paragraph = verdict_paragraph(verdict)
    emit(
        {"run": str(run), "answer": verdict.answer, "paragraph": paragraph},
        [f"verdict  {verdict.answer}", paragraph, f"report   {run / 'report.html'}"],
        as_json=as_json,
    )
