"""`layerprobe quickstart`: the pipeline on the embedded checkpoint and data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.fields import Given, from_dataclasses, only
from layerprobe.cli.finished import show_run
from layerprobe.cli.output import emit, progress_bar
from layerprobe.options import OUTPUT_PANEL, TRIAL_PANEL
from layerprobe.training import TrainingPlan

_YOUR_OWN = (
    ("what layerprobe reads of your own checkpoint", "layerprobe inspect model.safetensors"),
    ("the same for it, with your data", "layerprobe probe model.safetensors --data images/ --out runs/mine"),
)
TRIAL_STEPS = 200


@from_dataclasses()
def quickstart(
    *,
    out: Annotated[Path, typer.Option(help="Run folder.", rich_help_panel=OUTPUT_PANEL)] = Path("runs/quickstart"),
    confirm: Annotated[
        bool,
        typer.Option(
            "--confirm",
            help="Train a short trial of the pick from scratch, beside the recorded one.",
            rich_help_panel=TRIAL_PANEL,
        ),
    ] = False,
    training: Annotated[Given, only(TrainingPlan, "steps", steps=TRIAL_STEPS)],
    num_seeds: Annotated[
        int, typer.Option(min=2, help="Number of seeds of the trial.", rich_help_panel=TRIAL_PANEL)
    ] = 3,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    deterministic: options.Deterministic = False,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Probe the embedded digits model and pick a pair: about a minute on two cores, no download.

    Examples:
        # Everything at once; then open runs/quickstart/report.html.
        layerprobe quickstart
        # Also train with and without the pick, from scratch.
        layerprobe quickstart --confirm --out runs/trial
    """
    from layerprobe.analyses.runs import quickstart_run, quickstart_trial
    from layerprobe.analyses.wording import (
        beside_recorded_sentence,
        recorded_paragraph,
        short_answer,
        verdict_paragraph,
    )

    steps = training["steps"]
    if dry_run:
        record = {"checkpoint": "digits", "data": "digits", "out": str(out), "confirm": confirm}
        trial = f" and train 2 arms x {num_seeds} seeds x {steps} steps" * confirm
        lines = [f"would probe the embedded digits model{trial} into {out}"]
        emit(record | ({"seeds": num_seeds, "steps": steps} if confirm else {}), lines, as_json=as_json)
        return
    with progress_bar(quiet=quiet) as progress:
        selection, recorded = quickstart_run(out, seed=seed, device=device, progress=progress)
        verdict = None
        if confirm:
            verdict = quickstart_trial(
                out, steps=steps, num_seeds=num_seeds, seed=seed, device=device, progress=progress
            )
    told = recorded_paragraph(recorded, selection)
    after = [f"recorded {recorded.verdict.answer}", f"         {told}"]
    record = {"recorded": {"answer": recorded.verdict.answer, "paragraph": told}, "answer": None, "paragraph": None}
    if verdict is not None:
        paragraph = f"{verdict_paragraph(verdict)} {beside_recorded_sentence(verdict, recorded)}"
        after += [f"trial    {short_answer(verdict)}", f"         {paragraph}"]
        record |= {"answer": verdict.answer, "paragraph": paragraph}
    show_run(
        out,
        selection,
        after=after,
        record=record,
        following=_YOUR_OWN,
        quiet=quiet,
        verbose=verbose,
        as_json=as_json,
    )
