"""Encoding images into latents with a diffusers `AutoencoderKL`, and decoding them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerprobe.checksums import write_recorded_text
from layerprobe.configs import check_numbers, read_config
from layerprobe.data.latents.samples import SD_SCALE, ArrayRows, LatentSamples, check_scale, files_hash
from layerprobe.data.samples import Samples, content_hash
from layerprobe.files import MissingWeights, locked, one_line, reserve
from layerprobe.memory import BatchSize
from layerprobe.progress import StepProgress
from layerprobe.records import claim, read_record, typed

_VAE_WEIGHTS = "diffusion_pytorch_model*.safetensors"


def encode(
    samples: Samples,
    vae_folder: str | Path,
    cache_folder: str | Path,
    *,
    scale: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    progress: StepProgress | None = None,
) -> Samples:
    """Encodes images into latents of a diffusers `AutoencoderKL`, once, and stores them on disk.

    The mean and standard deviation of the posterior of each image are written to a file in `cache_folder` that is keyed
    by the weights and the images, 8 bytes per latent value. An interrupted encoding continues; a finished one returns
    at once and does not need diffusers.

    Args:
        samples: Images, shape (3, H, W) in [-1, 1]; their labels, extra columns and ids are kept.
        vae_folder: Folder written by `save_pretrained`, with safetensors weights; or a pipeline folder that contains
            such a `vae`.
        cache_folder: Folder of the encodings; created if it does not exist, and shared by all encodings.
        scale: Scale of the latents; None for the `scaling_factor` of the autoencoder's configuration.
        seed: Seed of the draws from the posterior.
        batch_size: Number of images per batch; it changes the latents by rounding only.
        device: Device that the autoencoder runs on.
        progress: Called with (images done, images in total).

    Raises:
        ValueError: If the folder contains no `AutoencoderKL`, the images do not fit it, or a latent is not finite.
        ModuleNotFoundError: If diffusers is not installed.
    """
    folder = _vae_folder(vae_folder)
    shift, factor = _factors(_vae_config(folder), scale)
    channels, *grid = latent_shape(samples.shape, folder)
    shape = (2 * channels, *grid)
    record = {"latents": 1, "vae": files_hash([folder / "config.json", *_vae_weights(folder)])}
    record |= {"data": samples.fingerprint, "shape": [len(samples), *shape]}
    encoding_dir = Path(cache_folder).expanduser() / content_hash(sorted(record.items()))[:16]
    claim(encoding_dir, "latents.json", record, what="latents")
    path = encoding_dir / "moments.npy"
    with locked(encoding_dir, wait=True):  # Other processes wait, and then find the latents.
        if not path.is_file():
            _encode(samples, folder, path, shape, batch_size=batch_size, device=device, progress=progress)
    return LatentSamples(
        ArrayRows(path),
        content=content_hash(sorted(record.items())),
        labels=samples.labels,
        ids=samples.ids,
        class_names=samples.class_names,
        columns=samples.columns,
        shift=shift,
        scale=factor,
        posterior_seed=seed,
        reading=samples.reading,
    )


def latent_shape(shape: tuple[int, ...], vae_folder: str | Path) -> tuple[int, int, int]:
    """Returns the shape (C, h, w) of the latents of images of this shape.

    Args:
        shape: Shape (3, H, W) of an image.
        vae_folder: Folder of the autoencoder, as in `encode`.

    Raises:
        ValueError: If the folder contains no `AutoencoderKL`, or the images do not fit it.
    """
    config = _vae_config(_vae_folder(vae_folder))
    stride, channels = 2 ** (len(config["block_out_channels"]) - 1), config["in_channels"]
    if len(shape) != 3 or shape[0] != channels:
        raise ValueError(
            f"the autoencoder takes images of {channels} channels but these have shape {shape}; "
            f"pass --channels {channels}"
        )
    if any(edge % stride for edge in shape[1:]):
        raise ValueError(
            f"the autoencoder needs sides that are multiples of {stride} but the images have {shape[1]}x{shape[2]}; "
            "pass --size"
        )
    return config["latent_channels"], shape[1] // stride, shape[2] // stride


@torch.inference_mode()
def decode(
    latents: Tensor,
    vae_folder: str | Path,
    *,
    scale: float | None = None,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Decodes latents into images.

    Args:
        latents: Latents as a diffusion model sees them, shape (B, C, h, w).
        vae_folder: Folder of the autoencoder, as in `encode`.
        scale: Scale of the latents; None for the `scaling_factor` of the autoencoder's configuration.
        batch_size: Number of latents per batch.
        device: Device that the autoencoder runs on.

    Returns:
        Images, shape (B, 3, H, W) in [-1, 1], on the CPU.

    Raises:
        ValueError: If the folder contains no `AutoencoderKL`, or the latents do not fit it.
        ModuleNotFoundError: If diffusers is not installed.
    """
    folder = _vae_folder(vae_folder)
    config = _vae_config(folder)
    shift, factor = _factors(config, scale)
    channels = config["latent_channels"]
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(
            f"latents have shape {tuple(latents.shape)} but the autoencoder decodes (B, {channels}, h, w); "
            "pass its own latents"
        )
    vae = _autoencoder(folder, device)
    z = latents.cpu().float() / factor + shift

    def images(rows: range) -> Tensor:
        decoded: Tensor = vae.decode(z[rows.start : rows.stop].to(device)).sample
        return decoded.clamp(-1, 1).cpu()

    return torch.cat([x for _, x in BatchSize(batch_size).batches(len(z), images)])


def _vae_folder(source: str | Path) -> Path:
    folder = Path(source).expanduser()
    inner = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    if not (inner / "config.json").is_file():
        raise FileNotFoundError(f"{source} contains no config.json; pass the folder of a diffusers AutoencoderKL")
    return inner


def _vae_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = read_config(path)
        check_numbers(config, path)
        kind = config["_class_name"]
    except KeyError as error:
        raise ValueError(f"{path} is not a configuration of a diffusers model; copy it again") from error
    if kind != "AutoencoderKL":
        raise ValueError(
            f"{folder} contains a {kind} but only AutoencoderKL is supported; encode the images with its own tools"
        )
    # Defaults of diffusers for missing entries.
    config = {"in_channels": 3, "latent_channels": 4, "block_out_channels": [64], "scaling_factor": SD_SCALE} | config
    if not _is_whole(config):
        raise ValueError(f"{path} is not a configuration of an AutoencoderKL; copy it again")
    return config


def _is_whole(config: dict[str, Any]) -> bool:
    """Whether the entries that are read here are of the types that an AutoencoderKL has."""

    def are_statistics(values: Any) -> bool:
        whole = isinstance(values, list) and len(values) == config["latent_channels"]
        return values is None or (whole and all(type(value) in (int, float) for value in values))

    return (
        all(isinstance(config[name], int) for name in ("in_channels", "latent_channels"))
        and isinstance(config["block_out_channels"], list)
        and all(isinstance(config.get(name) or 0, (int, float)) for name in ("scaling_factor", "shift_factor"))
        and all(are_statistics(config.get(name)) for name in ("latents_mean", "latents_std"))
    )


def _vae_weights(folder: Path) -> list[Path]:
    weights = sorted(folder.glob(_VAE_WEIGHTS), key=str)
    if not weights:
        raise MissingWeights(f"{folder} contains no {_VAE_WEIGHTS}; put the safetensors weights there")
    return weights


def _factors(config: dict[str, Any], scale: float | None) -> tuple[Tensor, Tensor]:
    """Shift and scale: numbers, or shape (C, 1, 1) if the configuration has statistics per channel."""
    check_scale(scale)
    factor = torch.tensor(float(config["scaling_factor"] if scale is None else scale))
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, deviation = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("latents_mean", "latents_std"))
        return mean, factor / deviation
    return torch.tensor(float(config.get("shift_factor") or 0)), factor


def _autoencoder(folder: Path, device: str | torch.device) -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ModuleNotFoundError(
            "encoding and decoding images needs diffusers: pip install 'layerprobe[diffusers]'"
        ) from error
    _vae_weights(folder)
    load: Any = AutoencoderKL.from_pretrained
    try:
        vae, info = load(
            str(folder),
            torch_dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # of diffusers, safetensors, torch, ...
        raise ValueError(f"{folder} is not a complete AutoencoderKL ({one_line(error)}); copy it again") from error
    if info["missing_keys"]:  # diffusers would continue with random weights
        key = info["missing_keys"][0]
        raise ValueError(f"{folder} is not a complete AutoencoderKL (it lacks {key}); copy it again")
    return vae.to(device).eval()


@torch.inference_mode()
def _encode(
    samples: Samples,
    folder: Path,
    path: Path,
    shape: tuple[int, ...],
    *,
    batch_size: int,
    device: str | torch.device,
    progress: StepProgress | None,
) -> None:
    vae, n = _autoencoder(folder, device), len(samples)
    counter, unfinished = path.with_name("done.json"), path.with_name("unfinished.npy")
    # The count is written after the rows, so that every row below it is on disk.
    is_begun = counter.is_file() and unfinished.is_file()
    done = read_record(counter, typed(int), remedy="delete it to encode again") if is_begun else 0
    stored = np.lib.format.open_memmap(unfinished, "r+" if done else "w+", dtype=np.float32, shape=(n, *shape))
    reserve(unfinished)  # A full disk would kill a process that writes to mapped memory.

    def encoded(rows: range) -> Tensor:
        batch = samples.batch(rows)
        posterior = vae.encode(batch.x.to(device)).latent_dist
        moments = torch.cat([posterior.mean, posterior.std], dim=1).cpu()
        bad = batch.ids[~moments.flatten(1).isfinite().all(1)]
        if len(bad):
            raise ValueError(f"the autoencoder outputs values that are not finite for image {int(bad[0])}; remove it")
        return moments

    for rows, moments in BatchSize(batch_size).batches(n, encoded, start=done):
        stored[rows.start : rows.stop] = moments.numpy()
        stored.flush()
        write_recorded_text(counter, json.dumps(rows.stop))
        if progress:
            progress(rows.stop, n)
    os.replace(unfinished, path)
    counter.unlink(missing_ok=True)
