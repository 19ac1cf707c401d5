"""`layerprobe sample`: samples of a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from layerprobe.checkpoints import CheckpointSource
from layerprobe.cli import options
from layerprobe.cli.costs import emit_forecast, tell_forecast, tell_took
from layerprobe.cli.fields import Given, from_dataclasses, only, without
from layerprobe.cli.output import emit, progress_bar
from layerprobe.data import DataSource
from layerprobe.extraction import ExtractionPlan
from layerprobe.messages import unknown
from layerprobe.options import CHECKPOINT_PANEL, OUTPUT_PANEL, SAMPLING_PANEL
from layerprobe.sampling import SamplingPlan


@from_dataclasses(several_processes=True)
def sample(
    checkpoint: CheckpointSource,
    *,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for samples.png, .svg, .npy, .gif and wav/, or samples.npz.", rich_help_panel=OUTPUT_PANEL
        ),
    ],
    num: Annotated[int, typer.Option(min=1, help="Number of samples.", rich_help_panel=SAMPLING_PANEL)] = 100,
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="png for pictures, sound and arrays; npz for uint8 images for ADM's evaluation.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = "png",
    frames: Annotated[
        int | None,
        typer.Option(
            help="Length of every sample in time; as in the training data if not given.", rich_help_panel=SAMPLING_PANEL
        ),
    ] = None,
    plan: SamplingPlan,
    extraction_options: Annotated[Given, only(ExtractionPlan, "precision")],
    batch_size: Annotated[int, typer.Option(min=1, help="Number of samples per batch, with npz.")] = 256,
    vae: Annotated[
        str | None,
        typer.Option(
            help="Folder of the diffusers AutoencoderKL that decodes the samples, if they are latents.",
            rich_help_panel=CHECKPOINT_PANEL,
        ),
    ] = None,
    # Samples of latents are decoded by --vae; their data does not show what they represent.
    data: Annotated[DataSource | None, without("vae", "latent_scale", *options.COUNTS)],
    seed: options.Seed = 0,
    device: options.Device = "auto",
    deterministic: options.Deterministic = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Draw samples, one class after another if the model has classes; several processes share them.

    --data is the data that the model was trained on, if the checkpoint does not say what samples represent.

    Examples:
        # A picture of 64 samples.
        layerprobe sample runs/plain/model.safetensors --num 64 --out samples/
        # An archive for an evaluation, with guidance, on a GPU.
        layerprobe sample model.safetensors --format npz --num 50000 --guidance 1.5 --device cuda --out archive/
    """
    from layerprobe.analyses.runs import (
        SAMPLING,
        Cost,
        StageClock,
        check_archive,
        check_pictures,
        draw_archive,
        draw_samples,
        find_meaning,
        rough_sampling_seconds,
        sampling_cost,
    )
    from layerprobe.ranks import processes

    if file_format not in ("png", "npz"):
        raise ValueError(unknown("format", file_format, ("png", "npz")))
    if file_format == "npz" and (frames is not None or data is not None):
        raise ValueError("--format npz is for images; leave out --frames and --data")
    plan = replace(plan, seed=seed)
    with processes() as ranks:
        backbone = checkpoint.open(device=device).in_precision(extraction_options.get("precision", "auto"))

        pictures, meaning, clock = file_format == "png", None, StageClock(out)
        if pictures:
            meaning = find_meaning(checkpoint.path, backbone, data)
            check_pictures(backbone, out, num=num, plan=plan, vae=vae, meaning=meaning, length=frames, clock=clock)
        else:
            check_archive(backbone, out, num=num, plan=plan, batch_size=batch_size, vae=vae)

        def cost() -> Cost:
            several = ranks.world_size
            return sampling_cost(
                backbone, plan, num, pictures=pictures, batch_size=batch_size, vae=vae, processes=several
            )

        if dry_run:
            record = {"model": backbone.name, "num": num, "out": str(out), "device": str(backbone.device)}
            emit_forecast(record | {"precision": backbone.precision}, cost(), as_json=as_json)
            return
        clock.foretell(SAMPLING, lambda: rough_sampling_seconds(backbone, plan, num), cost, tell_forecast)
        if pictures:
            clock.writes = ranks.is_first
            path = draw_samples(
                backbone, out, num=num, plan=plan, keep=True, vae=vae, meaning=meaning, length=frames, clock=clock
            )
        else:
            with progress_bar() as bar:
                progress = bar if ranks.is_first else None
                path = draw_archive(
                    backbone, out, num=num, plan=plan, batch_size=batch_size, vae=vae, clock=clock, progress=progress
                )
        tell_took(out)
        emit({"samples": str(path)}, [str(path)], as_json=as_json)
