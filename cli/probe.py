"""`layerprobe probe`, the main job, and its two halves, `extract` and `analyze`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerprobe.checkpoints import CheckpointSource
from layerprobe.cli import options
from layerprobe.cli.costs import emit_forecast, tell_forecast, tell_took
from layerprobe.cli.fields import Given, from_dataclasses, only
from layerprobe.cli.finished import show_run
from layerprobe.cli.output import emit, progress_bar, tell, tell_reading
from layerprobe.cli.parsing import names
from layerprobe.data import DataSource
from layerprobe.extraction import ExtractionPlan
from layerprobe.options import DATA_PANEL, OUTPUT_PANEL, PROBING_PANEL
from layerprobe.ranks import current

if TYPE_CHECKING:
    from layerprobe.analyses.runs import RunPlan

Out = Annotated[
    Path,
    typer.Option(help="Run folder; repeat the command to continue an interrupted run.", rich_help_panel=OUTPUT_PANEL),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Number of rows per forward pass.")]
TrustConvention = Annotated[
    bool,
    typer.Option(
        "--trust-convention", help="Continue if the weights fit another schedule or prediction; pick if they fit none."
    ),
]


@from_dataclasses(several_processes=True)
def probe(
    checkpoint: CheckpointSource,
    *,
    data: DataSource,
    out: Out,
    extraction: ExtractionPlan,
    batch_size: BatchSize = 128,
    trust_convention: TrustConvention = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    deterministic: options.Deterministic = False,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Measure every layer at every noise level, pick student and teacher, draw figures and a report.

    Examples:
        # Your checkpoint and a folder of images, a folder per class.
        layerprobe probe model.safetensors --data images/ --out runs/mine
        # The embedded model, quickly: two noise levels, few samples.
        layerprobe probe digits --data digits --noise-levels 0.2,0.6 --num-train 500 --out runs/digits
        # Some layers of a diffusers model on latents; only tell what would be done.
        layerprobe probe ./sana --data latents/ --layers 'transformer_blocks.*' --out runs/sana --dry-run
    """
    from layerprobe.analyses.runs import STAGES, describe_convention, probe_run

    plan = _plan(checkpoint, data, extraction, seed)
    if dry_run:
        _forecast(plan, out, STAGES, device, batch_size, as_json)
        return
    with progress_bar(quiet=quiet) as progress:
        selection = probe_run(
            plan,
            out,
            device=device,
            batch_size=batch_size,
            trust_convention=trust_convention,
            on_assumption=_tell_assumption,
            on_reading=None if quiet else tell_reading,
            on_forecast=None if quiet else tell_forecast,
            progress=progress,
        )
    if not quiet:
        tell_took(out)
    show_run(out, selection, before=describe_convention(out), quiet=quiet, verbose=verbose, as_json=as_json)


@from_dataclasses(several_processes=True)
def extract(
    checkpoint: CheckpointSource,
    *,
    data: DataSource,
    out: Out,
    extraction: ExtractionPlan,
    batch_size: BatchSize = 128,
    trust_convention: TrustConvention = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    deterministic: options.Deterministic = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Only read the layers, on a machine with the model; `analyze` continues with the run folder on any machine.

    Examples:
        # On the machine with the GPU.
        layerprobe extract model.safetensors --data images/ --out runs/mine --device cuda
        # How large would the features be, and how long would it take?
        layerprobe extract digits --data digits --draws 2 --out runs/digits --dry-run
    """
    from layerprobe.analyses.runs import EXTRACTION, describe_convention, describe_copies, extract_run

    plan = _plan(checkpoint, data, extraction, seed)
    if dry_run:
        _forecast(plan, out, EXTRACTION, device, batch_size, as_json)
        return
    with progress_bar() as progress:
        extract_run(
            plan,
            out,
            device=device,
            batch_size=batch_size,
            trust_convention=trust_convention,
            on_assumption=_tell_assumption,
            on_reading=tell_reading,
            on_forecast=tell_forecast,
            progress=progress,
        )
    tell_took(out)
    lines = [*describe_convention(out), *describe_copies(out), f"features {out / 'features'}"]
    emit({"run": str(out)}, lines, as_json=as_json)


@from_dataclasses(several_processes=True)
def analyze(
    run: Annotated[Path, typer.Argument(help="Run folder; with --features, the folder to make.")],
    *,
    features: Annotated[
        Path | None,
        typer.Option(
            help="Features of your own: .npz, .safetensors or .h5 with arrays (n, D) named LAYER@LEVEL, such as "
            "blocks.5@0.3, and labels (n,) if there are any.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers of --features to measure, as a,b,c in the order in which they run.", rich_help_panel=DATA_PANEL
        ),
    ] = None,
    analysis: Annotated[
        list[str] | None,
        typer.Option(
            help="Analysis of your own to run as well, as file.py:function; may be repeated.",
            rich_help_panel=PROBING_PANEL,
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Encoder to compare the layers with: a transformers folder such as DINOv2, or file.py:function.",
            rich_help_panel=PROBING_PANEL,
        ),
    ] = None,
    extraction_options: Annotated[Given, only(ExtractionPlan, "precision")],
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    device: options.MeasuringDevice = "auto",
    deterministic: options.Deterministic = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Measure the features of a run again, or those of a file, pick, draw and report.

    Examples:
        # The features of a run, after an update of layerprobe or after `extract`.
        layerprobe analyze runs/mine
        # How long would it take?
        layerprobe analyze runs/mine --dry-run
        # Beside them, how alike each layer is to the features of an encoder.
        layerprobe analyze runs/mine --encoder ./dinov2-base
        # Features that another program computed.
        layerprobe analyze runs/own --features features.npz
    """
    if features is not None:
        if dry_run:
            raise ValueError("--dry-run tells the cost of a run, and --features makes one; leave out one of them")
        _analyze_own(run, features, names(layers) if layers else [], analysis, encoder, device, quiet, verbose, as_json)
        return
    if layers:
        raise ValueError("--layers names layers of --features; pass it too, or leave out --layers")
    options.existing_run(run)
    from layerprobe.analyses.report import write_report
    from layerprobe.analyses.runs import (
        FIGURES,
        StageClock,
        analysis_forecast,
        analyze_run,
        describe_ownership,
        draw_figures,
    )
    from layerprobe.analyses.tables import ANALYSES
    from layerprobe.checkpoints import import_object, resolve_device

    own_analyses = [import_object(spec, "--analysis") for spec in analysis or []]
    for spec, function in zip(analysis or [], own_analyses, strict=True):
        if not callable(function):
            raise ValueError(f"--analysis {spec} is not a function; name one that takes a Representation")
    outside = None
    if encoder is None and extraction_options["precision"] != "auto":
        raise ValueError("--precision has no effect without --encoder; pass it too, or leave out --precision")
    if encoder is not None:
        from layerprobe.analyses.generation import open_encoder

        outside = open_encoder(encoder, device=resolve_device(device), **extraction_options)
    if dry_run:
        cost = analysis_forecast(run, device=device, num_processes=current().world_size)
        emit_forecast({"run": str(run)}, cost, as_json=as_json)
        return
    with progress_bar(quiet=quiet) as progress:
        selection = analyze_run(
            run,
            analyses=(*ANALYSES, *own_analyses),
            encoder=outside,
            device=device,
            on_forecast=None if quiet else tell_forecast,
            progress=progress,
        )
    if current().is_first:
        clock = StageClock(run, writes=True)
        clock.begin(FIGURES)
        draw_figures(run)
        write_report(run)
        clock.end()
    if not quiet:
        tell_took(run)
    before = describe_ownership(run, selection)
    show_run(run, selection, before=before, quiet=quiet, verbose=verbose, as_json=as_json)


def _analyze_own(
    run: Path,
    file: Path,
    layers: list[str],
    analysis: list[str] | None,
    encoder: str | None,
    device: str,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    from layerprobe.analyses.runs import features_run
    from layerprobe.extraction import features_from_file

    if analysis or encoder:
        flag = "--encoder needs the samples, which" if encoder else "--analysis runs on a finished run, which"
        raise ValueError(f"{flag} --features does not have; run `layerprobe analyze {run}` for it afterwards")
    with progress_bar(quiet=quiet) as progress:
        selection = features_run(features_from_file(file, layers=layers), run, device=device, progress=progress)
    show_run(run, selection, quiet=quiet, verbose=verbose, as_json=as_json)


def _plan(checkpoint: CheckpointSource, data: DataSource, extraction: ExtractionPlan, seed: int) -> RunPlan:
    from layerprobe.analyses.runs import RunPlan

    return RunPlan(checkpoint.absolute(), data.absolute(), replace(extraction, seed=seed))


def _tell_assumption(assumption: str) -> None:
    tell(f"assumed: {assumption}")


def _forecast(plan: RunPlan, out: Path, stages: Sequence[str], device: str, batch_size: int, as_json: bool) -> None:
    from layerprobe.analyses.runs import forecast

    num_processes = current().world_size
    record, cost = forecast(plan, out, device=device, batch_size=batch_size, stages=stages, num_processes=num_processes)
    emit_forecast(record, cost, as_json=as_json)
