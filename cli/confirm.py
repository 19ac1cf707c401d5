"""`layerprobe confirm`: the pick on trial."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.output import emit, progress_bar


@options.spread(sync_options=options.SYNC)
def confirm(
    run: options.Run,
    *,
    steps: options.Steps = 1000,
    num_seeds: Annotated[int, typer.Option(min=2, help="Seeds, at least two.")] = 3,
    stop_early: Annotated[
        bool, typer.Option("--stop-early", help="Look after every seed from the third on; stop once it is clear.")
    ] = False,
    arms: Annotated[
        str | None,
        typer.Option(help="Some of none,pick,runner-up,heuristic,random:2,learning-rate,bad; else the usual four."),
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Fresh weights instead of the checkpoint's.")
    ] = False,
    weight: options.Weight = 0.3,
    batch_size: Annotated[int | None, typer.Option(min=1, help="As the checkpoint was trained, else 128.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="As the checkpoint was trained, else 1e-4.")] = None,
    num_evaluations: Annotated[int, typer.Option(min=1, help="Evenly spaced over the steps.")] = 4,
    num_samples: Annotated[int, typer.Option(min=2, help="Drawn for each Frechet distance.")] = 1000,
    spread: Annotated[
        float | None,
        typer.Option(help="Known spread over seeds of a difference, as a share of the distance; only to foretell."),
    ] = None,
    pilot: Annotated[
        Path | None, typer.Option(help="Another confirmed run, or a pair sweep, whose spread to take.")
    ] = None,
    sync_options: options.Given,
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
        steps=steps,
        from_scratch=from_scratch,
        sync=options.sync_options(sync_options),
        **options.given(weight=weight, batch_size=batch_size, learning_rate=learning_rate),
    )
    seeds = tuple(range(seed, seed + num_seeds))
    wanted = None if arms is None else options.names(arms)
    planned = arm_names(run, wanted, seed=seed)
    resolution = confirmation_resolution(run, num_seeds=num_seeds, stop_early=stop_early, spread=spread, pilot=pilot)
    cautions = length_cautions(steps, trained_steps=trained_steps(run) if from_scratch else None)
    beforehand = [*resolution_sentences(resolution), *cautions]
    if dry_run:
        record = {
            "run": str(run),
            "arms": planned,
            "seeds": list(seeds),
            "steps": steps,
            "learning_rate": training.learning_rate,
            **sync_options,
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
            arms=wanted,
            stop_early=stop_early,
            from_scratch=from_scratch,
            num_evaluations=num_evaluations,
            num_samples=num_samples,
            device=device,
            progress=progress,
        )
    paragraph = verdict_paragraph(verdict)
    emit(
        {"run": str(run), "answer": verdict.answer, "paragraph": paragraph},
        [f"verdict  {verdict.answer}", paragraph, f"report   {run / 'report.html'}"],
        as_json=as_json,
    )
