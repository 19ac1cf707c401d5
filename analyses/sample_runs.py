"""Samples of a checkpoint, drawn and saved: a grid to look at, or an archive to score."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerprobe.analyses import plots
from layerprobe.backbones.base import Backbone
from layerprobe.checkpoints import weights_hash
from layerprobe.data.base import content_hash
from layerprobe.data.latents import decode
from layerprobe.distributed import processes
from layerprobe.files import claim, whole
from layerprobe.sampling import SamplingPlan, sample

PART = 256  # samples in a file that an interruption leaves; the same for any batch size and number of processes
Progress = Callable[[str, int, int], None]


def draw_samples(
    backbone: Backbone,
    folder: str | Path,
    *,
    num: int = 80,
    plan: SamplingPlan | None = None,
    keep: bool = False,
    vae: str | Path | None = None,
) -> Path:
    """Draws samples, class after class where the model knows classes, and saves the grid as `samples.png` and `.svg`.

    Args:
        backbone: The model.
        folder: Where the files go.
        num: How many.
        plan: Solver, steps, guidance and seed.
        keep: Also save the samples themselves, shape (num, C, H, W), as `samples.npy`.
        vae: Folder of the autoencoder whose latents the model makes; the images are decoded and saved.
    """
    labels = _labels(backbone, range(num))
    x = sample(backbone, range(num), labels=labels, plan=plan)
    if vae is not None:
        x = decode(x, vae, device=backbone.device)
    columns = backbone.num_classes if 1 < backbone.num_classes <= 16 else min(10, num)
    figure = plots.sample_grid(x.numpy(), None if labels is None else labels.tolist(), columns=columns)
    place = plots.save(figure, folder, "samples")[0]
    if keep:
        np.save(place.with_suffix(".npy"), x.numpy())
    return place


def draw_archive(
    backbone: Backbone,
    folder: str | Path,
    *,
    num: int,
    plan: SamplingPlan | None = None,
    batch_size: int = 256,
    vae: str | Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Draws samples into `samples.npz`, in the format that ADM's evaluation and its kin read.

    `arr_0` holds the images, shape (num, H, W, 3), uint8, grey ones three times over; where the model knows classes,
    `arr_1` holds the labels, class after class. Image i is the same for any batch size and number of processes up to
    rounding. Every process of torchrun or srun draws every so-manieth part; finished parts outlive an interruption, and
    a finished archive is not made again. Memory holds one part, whatever `num`.

    Args:
        backbone: The model, of images in [-1, 1] or of latents.
        folder: Gets `sampling.json`, `parts/` while it runs, and `samples.npz`.
        num: How many; 50 000 is the custom.
        plan: Solver, steps, guidance and seed.
        batch_size: Samples at a time.
        vae: Folder of the autoencoder whose latents the model makes.
        progress: Called with (what, parts of this process done, parts of this process).

    Raises:
        ValueError: If the model makes no images and no autoencoder is given, there is none to draw, or the folder holds
            other things.
    """
    folder, plan = Path(folder), plan or SamplingPlan()
    if num < 1 or batch_size < 1:
        raise ValueError(f"cannot draw {num} samples in batches of {batch_size}; both count from 1")
    if vae is None and (len(backbone.shape) != 3 or backbone.shape[0] not in (1, 3)):
        raise ValueError(
            f"{backbone.name} makes samples of shape {backbone.shape}, which are no images; pass --vae with the "
            "autoencoder that decodes them"
        )
    archive, parts = folder / "samples.npz", range(-(-num // PART))
    with processes() as ranks:
        if ranks.is_first:
            claim(folder, "sampling.json", _record(backbone, num, plan, vae), what="samples")
            (folder / "parts").mkdir(exist_ok=True)
        ranks.barrier()
        finished = ranks.broadcast(archive.is_file())
        own = () if finished else ranks.positions(parts)
        for done, part in enumerate(own, 1):
            place = _part(folder, part)
            if not place.is_file():
                indices = range(part * PART, min((part + 1) * PART, num))
                images = _images(backbone, indices, plan, batch_size, vae)
                with whole(place) as partial_place, partial_place.open("wb") as file:
                    np.save(file, images)
            if progress:
                progress("samples", done, len(own))
        ranks.barrier()
        if ranks.is_first and not finished:
            _join([_part(folder, part) for part in parts], archive, labels=_labels(backbone, range(num)))
        if ranks.is_first:
            shutil.rmtree(folder / "parts", ignore_errors=True)
        ranks.barrier()
    return archive


def pixels(x: Tensor) -> NDArray[np.uint8]:
    """Images (B, 1 or 3, H, W) in [-1, 1] as ADM and SiT store them: (B, H, W, 3), uint8, halves rounded up."""
    levels = (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    stored: NDArray[np.uint8] = levels.expand(-1, -1, -1, 3).contiguous().cpu().numpy()
    return stored


def _labels(backbone: Backbone, indices: range) -> Tensor | None:
    return torch.tensor(indices) % backbone.num_classes if backbone.num_classes else None


def _images(
    backbone: Backbone, indices: range, plan: SamplingPlan, batch_size: int, vae: str | Path | None
) -> NDArray[np.uint8]:
    x = sample(backbone, indices, labels=_labels(backbone, indices), plan=plan, batch_size=batch_size)
    if not bool(x.isfinite().all()):
        raise ValueError(f"samples {indices[0]} to {indices[-1]} are not all finite; try more steps or less guidance")
    return pixels(x if vae is None else decode(x, vae, device=backbone.device))


def _record(backbone: Backbone, num: int, plan: SamplingPlan, vae: str | Path | None) -> dict[str, Any]:
    """Everything that decides the archive."""
    return {
        "weights": weights_hash(backbone.module),
        "schedule_hash": content_hash(backbone.schedule.to_config())[:16],
        "prediction": backbone.prediction,
        "num": num,
        "plan": asdict(plan),
        "vae": None if vae is None else str(Path(vae).resolve()),
    }


def _part(folder: Path, part: int) -> Path:
    return folder / "parts" / f"{part:06d}.npy"


def _join(parts: Sequence[Path], archive: Path, *, labels: Tensor | None) -> None:
    """One `.npz` of all parts, read one after another."""
    first = np.load(parts[0], mmap_mode="r")
    num = PART * (len(parts) - 1) + len(np.load(parts[-1], mmap_mode="r"))
    header = {"descr": "|u1", "fortran_order": False, "shape": (num, *first.shape[1:])}
    with whole(archive) as place, zipfile.ZipFile(place, "w", zipfile.ZIP_STORED, allowZip64=True) as zipped:
        with zipped.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.load(part).data)
        if labels is not None:
            with zipped.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, labels.numpy())
