"""`layerprobe confirm`: test of the pick by training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.costs import emit_forecast, tell_forecast, tell_took
from layerprobe.cli.fields import Given, changed, from_dataclasses, only
from layerprobe.cli.output import emit, progress_bar, span, tell_reading, warn
from layerprobe.cli.parsing import names
from layerprobe.layersync import SyncOptions
from layerprobe.options import TRIAL_PANEL
from layerprobe.training import TrainingPlan


@from_dataclasses(several_processes=True)
def confirm(
    run: options.Run,
    *,
    training_options: Annotated[
        Given,
        only(
            TrainingPlan,
            *("steps", "weight", "batch_size", "learning_rate", "precision"),
            steps=1000,
            batch_size=options.AS_TRAINED,
            learning_rate=options.AS_TRAINED,
        ),
    ],
    num_seeds: Annotated[
        int, typer.Option(min=2, help="Number of seeds, at least two.", rich_help_panel=TRIAL_PANEL)
    ] = 3,
    stop_early: Annotated[
        bool,
        typer.Option(
            "--stop-early",
            help="Compare after every seed from the third on, and stop once the verdict is clear.",
            rich_help_panel=TRIAL_PANEL,
        ),
    ] = False,
    arms: Annotated[
        str | None,
        typer.Option(
            help="Arms, separated by commas, of none,pick,prior,same-distance,runner-up,random:2,learning-rate,sra,"
            "pick+noise-gap:0.2,bad; none,pick,prior,same-distance,bad if not given.",
            rich_help_panel=TRIAL_PANEL,
        ),
    ] = None,
    from_scratch: options.FromScratch = False,
    num_evaluations: options.NumEvaluations = 4,
    num_samples: options.NumSamples = 1000,
    spread: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of a difference over seeds, as a share of the distance; for the forecast only.",
            rich_help_panel=TRIAL_PANEL,
        ),
    ] = None,
    pilot: Annotated[
        Path | None,
        typer.Option(help="Another confirmed run, or a pair sweep, whose spread is used.", rich_help_panel=TRIAL_PANEL),
    ] = None,
    sync_options: SyncOptions,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    deterministic: options.Deterministic = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Train with and without the pick, seed by seed, and say whether it helps.

    Examples:
        # How long would it take, and which difference could it find?
        layerprobe confirm runs/mine --steps 1000 --dry-run
        # Five seeds, with two random pairs and a pair that breaks the rules as controls.
        layerprobe confirm runs/mine --num-seeds 5 --arms none,pick,random:2,bad
    """
    from layerprobe.analyses.experiments import missing_arms
    from layerprobe.analyses.runs import (
        confirm_run,
        confirmation_job,
        confirmation_resolution,
        confirmation_training,
    )
    from layerprobe.analyses.wording import (
        cost_sentence,
        length_cautions,
        missing_arm_sentences,
        published_gain_sentences,
        resolution_sentences,
        short_answer,
        spread_source,
        start_sentences,
        verdict_paragraph,
    )

    training = confirmation_training(run, from_scratch=from_scratch, sync=sync_options, **training_options)
    resolution = confirmation_resolution(run, num_seeds=num_seeds, stop_early=stop_early, spread=spread, pilot=pilot)
    job = confirmation_job(
        run,
        training,
        seeds=tuple(range(seed, seed + num_seeds)),
        arms=None if arms is None else names(arms),
        stop_early=stop_early,
        from_scratch=from_scratch,
        num_evaluations=num_evaluations,
        num_samples=num_samples,
        device=device,
    )
    job.check_begun()
    start = start_sentences(job.start_cautions, trained_steps=job.trained_steps, fall=job.fall)
    cautions = length_cautions(training.steps, trained_steps=job.trained_steps if from_scratch else None)
    beforehand = [
        *([] if arms else missing_arm_sentences(missing_arms(job.arms), job.num_layers)),
        cost_sentence(
            num_arms=len(job.arms),
            num_seeds=num_seeds,
            steps=training.steps,
            num_evaluations=num_evaluations,
            num_samples=num_samples,
            duration=span(job.cost.total_s),
        ),
        *start,
        *resolution_sentences(resolution),
        *published_gain_sentences(job.end_step, resolution),
        *cautions,
    ]
    if dry_run:
        record = {
            "run": str(run),
            "arms": [str(arm) for arm in job.arms],
            "seeds": list(job.plan.seeds),
            "steps": training.steps,
            "learning_rate": training.learning_rate,
            **changed(sync_options),
        }
        source = resolution.spread and spread_source(resolution.spread)
        numbers = resolution.to_dict() | {"spread_from": source}
        further = {"start": list(job.start_cautions), "resolution": numbers}
        further |= {"cautions": [*start, *cautions], "beforehand": beforehand}
        emit_forecast(record, job.cost, as_json=as_json, lines=beforehand, further=further)
        return
    for line in [*map(str, job.arms), *beforehand]:
        typer.echo(line, err=True)
    with progress_bar() as progress:
        verdict = confirm_run(job, on_reading=tell_reading, on_forecast=tell_forecast, warn=warn, progress=progress)
    tell_took(run / "confirmation")
    paragraph = verdict_paragraph(verdict)
    emit(
        {"run": str(run), "answer": verdict.answer, "paragraph": paragraph},
        [f"verdict  {short_answer(verdict)}", paragraph, f"report   {run / 'report.html'}"],
        as_json=as_json,
    )
