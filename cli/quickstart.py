"""`layerprobe quickstart`: the pipeline on the embedded checkpoint and data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.fields import Given, from_dataclasses, only
from layerprobe.cli.output import emit, progress_bar
from layerprobe.training import TrainingPlan

TRIAL_STEPS = 600


@from_dataclasses()
def quickstart(
    *,
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/quickstart"),
    confirm: Annotated[
        bool, typer.Option("--confirm", help="Train a short trial of the pick from scratch, beside the recorded one.")
    ] = False,
    training: Annotated[Given, only(TrainingPlan, "steps", steps=TRIAL_STEPS)],
    num_seeds: Annotated[int, typer.Option(min=2, help="Number of seeds of the trial.")] = 3,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Probe the embedded digits model and pick a pair: about a minute on two cores, no download."""
    from layerprobe.analyses.runs import describe_selection, quickstart_run, quickstart_trial
    from layerprobe.analyses.wording import recorded_paragraph, verdict_paragraph

    steps = training["steps"]
    if dry_run:
        record = {"checkpoint": "digits", "data": "digits", "out": str(out), "confirm": confirm}
        trial = f" and train 2 arms x {num_seeds} seeds x {steps} steps" * confirm
        lines = [f"would probe the embedded digits model{trial} into {out}"]
        emit(record | ({"seeds": num_seeds, "steps": steps} if confirm else {}), lines, as_json=as_json)
        return
    with progress_bar() as progress:
        selection, recorded = quickstart_run(out, seed=seed, device=device, progress=progress)
        verdict = None
        if confirm:
            verdict = quickstart_trial(
                out, steps=steps, num_seeds=num_seeds, seed=seed, device=device, progress=progress
            )
    pick, told = selection.pick, recorded_paragraph(recorded, selection)
    paragraph = None if verdict is None else verdict_paragraph(verdict)
    record = {
        "run": str(out),
        "pick": None if pick is None else {"student": pick.student, "teacher": pick.teacher},
        "recorded": {"answer": recorded.verdict.answer, "paragraph": told},
        "answer": None if verdict is None else verdict.answer,
        "paragraph": paragraph,
    }
    lines = [*describe_selection(selection), f"recorded {recorded.verdict.answer}", told]
    if verdict is not None and paragraph is not None:
        lines += [f"verdict  {verdict.answer}", paragraph]
    emit(record, [*lines, f"report   {out / 'report.html'}"], as_json=as_json)
