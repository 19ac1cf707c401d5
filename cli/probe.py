"""`layerprobe probe`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.output import emit, progress_bar

NOISE_LEVELS = "0.1,0.2,0.3,0.5,0.7,0.9"


def probe(
    checkpoint: options.Checkpoint,
    data: options.Data,
    out: Annotated[Path, typer.Option(help="Run folder; repeat the command to continue an interrupted run.")],
    noise_levels: Annotated[str, typer.Option(help="0 is clean, 1 is pure noise.")] = NOISE_LEVELS,
    draws: Annotated[int, typer.Option(min=1, help="Noise draws per sample and level.")] = 1,
    pool_cells: Annotated[
        int, typer.Option(min=1, help="Cells per grid axis to average tokens over; 1 averages over all.")
    ] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 128,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    true_labels: Annotated[bool, typer.Option("--true-labels", help="Condition on the labels; leaks them.")] = False,
    trust_convention: Annotated[
        bool, typer.Option("--trust-convention", help="Go on where the weights fit another schedule or prediction.")
    ] = False,
    family: options.Family = None,
    num_heads: options.NumHeads = None,
    model: options.Model = None,
    layers: options.Layers = None,
    schedule: options.Schedule = None,
    prediction: options.Prediction = None,
    shape: options.Shape = None,
    num_classes: options.NumClasses = None,
    size: options.Size = None,
    channels: options.Channels = None,
    split: options.Split = None,
    image_column: options.ImageColumn = None,
    label_column: options.LabelColumn = None,
    num_fit: options.NumFit = None,
    num_choose: options.NumChoose = None,
    num_report: options.NumReport = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Measure every layer at every noise level, pick student and teacher, draw figures and a report."""
    from layerprobe.analyses import runs

    plan = runs.RunPlan(
        checkpoint=options.locate(checkpoint),
        data=options.locate(data),
        noise_levels=options.numbers(noise_levels, "--noise-levels"),
        checkpoint_options=options.checkpoint_options(
            family=family,
            num_heads=num_heads,
            model=model,
            layers=layers,
            schedule=schedule,
            prediction=prediction,
            shape=shape,
            num_classes=num_classes,
        ),
        data_options=options.given(
            size=size,
            channels=channels,
            split=split,
            image_column=image_column,
            label_column=label_column,
            num_fit=num_fit,
            num_choose=num_choose,
            num_report=num_report,
        ),
        draws=draws,
        pool_cells=pool_cells,
        condition="label" if true_labels else "null",
        precision=precision,
        seed=seed,
    )
    if dry_run:
        record = runs.forecast(plan, device=device)
        emit(record, [f"{key}: {value}" for key, value in record.items()], as_json=as_json)
        return
    with progress_bar() as progress:
        selection = runs.probe(
            plan, out, trust_convention=trust_convention, device=device, batch_size=batch_size, progress=progress
        )
    record = {"run": str(out)} | runs.selection_record(selection)
    lines = [*runs.describe_convention(out), *runs.describe(selection), f"report   {out / 'report.html'}"]
    emit(record, lines, as_json=as_json)
