"""`layerprobe sample`: samples of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.output import emit, progress_bar

# Latents have no data to look like: their autoencoder decodes them.
READING = {name: option for name, option in options.READING.items() if name not in ("vae", "latent_scale")}


@options.spread(opening=options.OPENING, reading=READING)
def sample(
    checkpoint: options.Checkpoint,
    *,
    out: Annotated[Path, typer.Option(help="Folder for samples.png, .svg, .npy, .gif and wav/, or samples.npz.")],
    num: Annotated[int, typer.Option(min=1, help="How many.")] = 100,
    file_format: Annotated[
        str,
        typer.Option("--format", help="png: pictures, sound and numbers; npz: uint8 images for ADM's evaluation."),
    ] = "png",
    data: Annotated[
        str | None, typer.Option(help="What the model was trained on, where its file does not say what samples mean.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="Length of every sample in time; as long as those of the training otherwise.")
    ] = None,
    solver: Annotated[str, typer.Option(help="euler, heun, dopri5 (ODE) or euler-maruyama (SDE).")] = "heun",
    steps: Annotated[int, typer.Option(min=1, help="From noise to data; dopri5 chooses its own after the first.")] = 25,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is none.")] = 1.0,
    guidance_interval: Annotated[
        str, typer.Option(help="Noise levels between which there is guidance: 0.2,0.7.")
    ] = "0,1",
    rtol: Annotated[float, typer.Option(help="Relative tolerance of dopri5.")] = 1e-3,
    atol: Annotated[float, typer.Option(help="Absolute tolerance of dopri5.")] = 1e-6,
    diffusion: Annotated[
        str, typer.Option(help="Of the SDE: sigma, sbdm, constant, linear, decreasing or increasing-decreasing.")
    ] = "sigma",
    diffusion_scale: Annotated[float, typer.Option(help="Factor of the diffusion.")] = 1.0,
    last_step: Annotated[str, typer.Option(help="Of the SDE: mean or tweedie.")] = "mean",
    last_step_size: Annotated[float, typer.Option(help="Of the SDE, in the path's time.")] = 0.04,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time, for npz.")] = 256,
    vae: Annotated[
        str | None, typer.Option(help="Decode the samples, latents, with this folder's diffusers AutoencoderKL.")
    ] = None,
    opening: options.Given,
    reading: options.Given,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Draw samples, one class after another where the model knows classes; several processes share an npz."""
    from layerprobe.analyses.runs import draw_archive, draw_samples, find_meaning
    from layerprobe.checkpoints import open_checkpoint
    from layerprobe.sampling import SamplingPlan
    from layerprobe.training import processes

    if file_format not in ("png", "npz"):
        raise ValueError(f"unknown format {file_format!r}; use png or npz")
    if file_format == "npz" and (frames is not None or data is not None):
        raise ValueError("--format npz holds images; leave out --frames and --data")
    interval = options.numbers(guidance_interval, "--guidance-interval")
    if len(interval) != 2:
        raise ValueError(f"--guidance-interval {guidance_interval} is not two noise levels; write them as 0.2,0.7")
    plan = SamplingPlan(
        solver,  # type: ignore[arg-type]
        steps,
        guidance,
        seed,
        guidance_interval=(interval[0], interval[1]),
        rtol=rtol,
        atol=atol,
        diffusion=diffusion,  # type: ignore[arg-type]
        diffusion_scale=diffusion_scale,
        last_step=last_step,  # type: ignore[arg-type]
        last_step_size=last_step_size,
    )
    with processes() as ranks:
        backbone = open_checkpoint(checkpoint, device=device, **options.checkpoint_options(opening))
        if dry_run:
            line = f"would draw {num} samples of {backbone.name} into {out}"
            record = {"model": backbone.name, "num": num}
        elif file_format == "npz":
            with progress_bar() as bar:
                shown = bar if ranks.is_first else None
                place = draw_archive(backbone, out, num=num, plan=plan, batch_size=batch_size, vae=vae, progress=shown)
            record, line = {"samples": str(place)}, str(place)
        elif ranks.world_size > 1:
            raise ValueError("several processes draw --format npz only; start one")
        else:
            meaning = find_meaning(checkpoint, backbone, data, reading)
            place = draw_samples(backbone, out, num=num, plan=plan, keep=True, vae=vae, meaning=meaning, length=frames)
            record, line = {"samples": str(place)}, str(place)
        if ranks.is_first:
            emit(record, [line], as_json=as_json)
