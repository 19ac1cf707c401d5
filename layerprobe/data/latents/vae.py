"""Encoding images into latents with a diffusers `AutoencoderKL`, and decoding them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerprobe.configs import check_numbers, read_config
from layerprobe.data.latents.samples import SD_SCALE, ArrayRows, LatentSamples, check_scale, files_hash
from layerprobe.data.samples import Samples, content_hash
from layerprobe.files import InUse, MissingWeights, atomic_write, locked, one_line
from layerprobe.memory import BatchSize, pass_on
from layerprobe.progress import StepProgress
from layerprobe.records import claim

PART = 128  # images in a partial file; independent of the batch size and the number of processes
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
    by the weights and the images, 8 bytes per latent value, twice as much until it is finished. An interrupted encoding
    continues; a finished one returns at once and does not need diffusers. Processes that encode the same images at the
    same time, such as those of torchrun, share them.

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
    record, path = _encoding(samples, folder, cache_folder)
    claim(path.parent, "latents.json", record, what="latents")
    if not path.is_file():
        shape = tuple(record["shape"][1:])
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


def is_encoded(samples: Samples, vae_folder: str | Path, cache_folder: str | Path) -> bool:
    """Whether `encode` with these arguments finds the finished latents in its cache."""
    return _encoding(samples, _vae_folder(vae_folder), cache_folder)[1].is_file()


def _encoding(samples: Samples, folder: Path, cache_folder: str | Path) -> tuple[dict[str, Any], Path]:
    """What determines the latents of these images, and the path of their file."""
    channels, *grid = latent_shape(samples.shape, folder)
    record = {"latents": 1, "vae": autoencoder_hash(folder)}
    record |= {"data": samples.fingerprint, "shape": [len(samples), 2 * channels, *grid]}
    key = content_hash(sorted(record.items()))[:16]
    return record, Path(cache_folder).expanduser() / key / "moments.npy"


def autoencoder_hash(vae_folder: str | Path) -> str:
    """Returns a hash of the files of an autoencoder, see `files_hash`.

    Args:
        vae_folder: Folder of the autoencoder, as in `encode`.

    Raises:
        FileNotFoundError: If the folder contains no autoencoder, or not its weights.
    """
    folder = _vae_folder(vae_folder)
    return files_hash([folder / "config.json", *_vae_weights(folder)])


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


def decoder(
    vae_folder: str | Path, *, scale: float | None = None, batch_size: int = 16, device: str | torch.device = "cpu"
) -> Callable[[Tensor], Tensor]:
    """Returns a function that decodes latents into images; the weights are loaded when it is first called.

    It takes latents as a diffusion model sees them, shape (B, C, h, w), and returns images, shape (B, 3, H, W) in
    [-1, 1], on the CPU. It raises a ValueError if the latents do not fit the autoencoder.

    Args:
        vae_folder: Folder of the autoencoder, as in `encode`.
        scale: Scale of the latents; None for the `scaling_factor` of the autoencoder's configuration.
        batch_size: Number of latents per batch.
        device: Device that the autoencoder runs on.

    Raises:
        ValueError: If the folder contains no `AutoencoderKL`.
        ModuleNotFoundError: If diffusers is not installed; raised by the function.
    """
    folder = _vae_folder(vae_folder)
    config = _vae_config(folder)
    shift, factor = _factors(config, scale)
    channels, size = config["latent_channels"], BatchSize(batch_size)
    opened = cache(partial(_autoencoder, folder, device))

    @torch.inference_mode()
    def decode(latents: Tensor) -> Tensor:
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)} but the autoencoder decodes (B, {channels}, h, w); "
                "pass its own latents"
            )
        vae, z = opened(), latents.cpu().float() / factor + shift

        def images(rows: range) -> Tensor:
            decoded: Tensor = vae.decode(z[rows.start : rows.stop].to(device)).sample
            return decoded.clamp(-1, 1).cpu()

        return torch.cat([x for _, x in size.batches(len(z), images)])

    return decode


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
        pass_on(error)
        raise ValueError(f"{folder} is not a complete AutoencoderKL ({one_line(error)}); copy it again") from error
    if info["missing_keys"]:  # diffusers would continue with random weights
        key = info["missing_keys"][0]
        raise ValueError(f"{folder} is not a complete AutoencoderKL (it lacks {key}); copy it again")
    return vae.to(device).eval()


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
    """Writes the latents part by part, each by the process that comes to it first, and then joins the parts."""
    vae, size, n = _autoencoder(folder, device), BatchSize(batch_size), len(samples)
    rows_of = [range(start, min(start + PART, n)) for start in range(0, n, PART)]
    parts = {path.with_name("parts") / f"{rows.start:08d}.npy": rows for rows in rows_of}
    for wait in (False, True):  # The second time for parts that another process had in work, and may have left.
        for part, rows in parts.items():
            with suppress(InUse), locked(part.with_suffix(""), wait=wait):
                # The whole is there before its parts are removed.
                if part.is_file() or path.is_file():
                    continue
                moments = _moments(vae, samples, rows, size, device)
                with atomic_write(part) as partial, partial.open("wb") as file:
                    np.save(file, moments)
                if progress:
                    progress(rows.stop, n)
    with locked(path.parent, wait=True):
        if not path.is_file():
            _join([*parts], path, (n, *shape))
            shutil.rmtree(path.with_name("parts"), ignore_errors=True)
            for earlier in ("unfinished.npy", "done.json"):  # of an encoding that an earlier version began
                path.with_name(earlier).unlink(missing_ok=True)


@torch.inference_mode()
def _moments(
    vae: Any, samples: Samples, rows: range, size: BatchSize, device: str | torch.device
) -> NDArray[np.float32]:
    """Mean and standard deviation of the latents of some images, shape (rows, 2 C, h, w)."""

    def encoded(batch_rows: range) -> Tensor:
        batch = samples.batch(batch_rows)
        posterior = vae.encode(batch.x.to(device)).latent_dist
        moments = torch.cat([posterior.mean, posterior.std], dim=1).cpu()
        bad = batch.ids[~moments.flatten(1).isfinite().all(1)]
        if len(bad):
            raise ValueError(f"the autoencoder outputs values that are not finite for image {int(bad[0])}; remove it")
        return moments

    batches = size.batches(rows.stop, encoded, start=rows.start)
    return np.concatenate([moments.numpy() for _, moments in batches])


def _join(parts: Sequence[Path], path: Path, shape: tuple[int, ...]) -> None:
    with atomic_write(path) as partial, partial.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.load(part).data)
