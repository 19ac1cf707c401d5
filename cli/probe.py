"""`layerprobe probe`, the main job, and its two halves, `extract` and `analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerprobe.cli import options
from layerprobe.cli.output import emit, progress_bar

if TYPE_CHECKING:
    from layerprobe.analyses.runs import RunPlan

Out = Annotated[Path, typer.Option(help="Run folder; repeat the command to continue an interrupted run.")]
EVERYTHING: dict[str, Any] = {
    "extraction": options.EXTRACTION,
    "opening": options.OPENING,
    "reading": options.READING,
    "counts": options.COUNTS,
}


@options.spread(**EVERYTHING)
def probe(
    checkpoint: options.Checkpoint,
    *,
    data: options.Data,
    out: Out,
    extraction: options.Given,
    opening: options.Given,
    reading: options.Given,
    counts: options.Given,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Measure every layer at every noise level, pick student and teacher, draw figures and a report."""
    from layerprobe.analyses.runs import (
        describe_convention,
        describe_labels,
        describe_selection,
        probe_run,
        selection_record,
    )

    plan = _plan(checkpoint, data, extraction, opening, reading | counts, seed)
    if dry_run:
        _forecast(plan, device, as_json)
        return
    with progress_bar() as progress:
        selection = probe_run(plan, out, device=device, progress=progress, **_manner(extraction))
    record = {"run": str(out)} | selection_record(selection)
    lines = [*describe_convention(out), *describe_labels(out), *describe_selection(selection)]
    emit(record, [*lines, f"report   {out / 'report.html'}"], as_json=as_json)


@options.spread(**EVERYTHING)
def extract(
    checkpoint: options.Checkpoint,
    *,
    data: options.Data,
    out: Out,
    extraction: options.Given,
    opening: options.Given,
    reading: options.Given,
    counts: options.Given,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Only read the layers, on a machine with the model; `analyze` goes on with the run folder anywhere."""
    from layerprobe.analyses.runs import (
        describe_convention,
        extract_run,
    )

    plan = _plan(checkpoint, data, extraction, opening, reading | counts, seed)
    if dry_run:
        _forecast(plan, device, as_json)
        return
    with progress_bar() as progress:
        extract_run(plan, out, device=device, progress=progress, **_manner(extraction))
    emit({"run": str(out)}, [*describe_convention(out), f"features {out / 'features'}"], as_json=as_json)


def analyze(
    run: options.Run,
    analysis: Annotated[
        list[str] | None,
        typer.Option(help="A function of your own, file.py:name, to run as well; may be repeated."),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="Compare the layers with it: a transformers folder such as DINOv2, or file.py:function."),
    ] = None,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Measure the features of a run anew, pick, draw and report."""
    from layerprobe.analyses.report import write_report
    from layerprobe.analyses.runs import (
        analyze_run,
        describe_labels,
        describe_selection,
        draw_figures,
        selection_record,
    )
    from layerprobe.analyses.tables import ANALYSES
    from layerprobe.checkpoints import import_object

    own = [import_object(spec, "--analysis") for spec in analysis or []]
    for spec, found in zip(analysis or [], own, strict=True):
        if not callable(found):
            raise ValueError(f"--analysis {spec} is no function; name one that takes a Representation")
    outside = None
    if encoder is not None:
        from layerprobe.analyses.generation import open_encoder

        outside = open_encoder(encoder)
    with progress_bar() as progress:
        selection = analyze_run(run, analyses=(*ANALYSES, *own), encoder=outside, progress=progress)
    draw_figures(run)
    write_report(run)
    record = {"run": str(run)} | selection_record(selection)
    lines = [*describe_labels(run), *describe_selection(selection), f"report   {run / 'report.html'}"]
    emit(record, lines, as_json=as_json)


def _forecast(plan: RunPlan, device: str, as_json: bool) -> None:
    from layerprobe.analyses.runs import forecast

    record = forecast(plan, device=device)
    emit(record, [f"{key}: {value}" for key, value in record.items()], as_json=as_json)


def _manner(extraction: options.Given) -> options.Given:
    """What decides how layers are read and not what the numbers are, so is no part of the plan."""
    return {name: extraction[name] for name in ("trust_convention", "batch_size")}


def _plan(
    checkpoint: str,
    data: str,
    extraction: options.Given,
    opening: options.Given,
    reading: options.Given,
    seed: int,
) -> RunPlan:
    from layerprobe.analyses.runs import RunPlan

    return RunPlan(
        checkpoint=options.locate(checkpoint),
        data=options.locate(data),
        noise_levels=options.numbers(extraction["noise_levels"], "--noise-levels"),
        checkpoint_options=options.checkpoint_options(opening),
        data_options=options.located_vae(reading),
        draws=extraction["draws"],
        pool_cells=extraction["pool_cells"],
        token_samples=extraction["token_samples"],
        condition="label" if extraction["true_labels"] else "null",
        precision=extraction["precision"],
        seed=seed,
    )
