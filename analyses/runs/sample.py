"""The job of `layerprobe sample`: samples as pictures, films and recordings, or as an archive to score."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerprobe.analyses.figures import film, sample_grid, save_figure, strip
from layerprobe.analyses.runs.stages import DECODING, FIGURES, SAMPLING, StageClock
from layerprobe.backbones import Backbone
from layerprobe.checkpoints import training_record, weights_hash
from layerprobe.checksums import recorded_write
from layerprobe.data import (
    DataSource,
    Rendering,
    autoencoder_hash,
    content_hash,
    decoder,
    rendering_of,
    write_wav,
)
from layerprobe.files import atomic_write
from layerprobe.precision import rounded_by
from layerprobe.progress import StepProgress, TaskProgress, named_progress
from layerprobe.ranks import current, together
from layerprobe.records import check_claim, check_same, claim, write_record
from layerprobe.sampling import SamplingPlan, sample

# Samples in a partial file, of an archive and of what is shown; independent of batch size and number of processes.
PART, FEW = 256, 16
SHOWN = 20  # samples in a figure or film, if they are not images
RECORD, ARCHIVE_RECORD = "samples.json", "sampling.json"  # what the samples of pictures and of an archive are made of
_PARTS = "parts-" + 16 * "[0-9a-f]"


@dataclass(frozen=True)
class Meaning:
    """What the samples of a model represent.

    Attributes:
        rendering: Conversion of samples to pictures, films or sound; None for images and latents.
        class_names: Name of each class, or empty.
    """

    rendering: Rendering | None = None
    class_names: tuple[str, ...] = ()


def find_meaning(checkpoint: str, backbone: Backbone, data: DataSource | None = None) -> Meaning:
    """Returns what the samples of a checkpoint represent.

    Args:
        checkpoint: Path of the checkpoint; its training record is used if no data is passed.
        backbone: Model of the checkpoint.
        data: Data that the model was trained on.

    Raises:
        ValueError: If the data cannot be read or has another shape.
    """
    if data is not None:
        samples = data.load(expect_shape=backbone.shape).train
        return Meaning(rendering_of(samples), samples.class_names)
    record = {} if checkpoint == "digits" else training_record(checkpoint)
    rendering = Rendering.from_dict(record["rendering"]) if "rendering" in record else None
    return Meaning(rendering, tuple(record.get("class_names", ())))


@together("folder")
def draw_samples(
    backbone: Backbone,
    folder: str | Path,
    *,
    num: int = 80,
    plan: SamplingPlan | None = None,
    keep: bool = False,
    vae: str | Path | None = None,
    meaning: Meaning | None = None,
    length: int | None = None,
    clock: StageClock | None = None,
) -> Path:
    """Draws samples, one class after another if the model has classes, and saves them as `samples.png` and `.svg`.

    Images are shown in a grid. Of other samples the figure shows the first `SHOWN`, as spectrograms or film strips;
    motion and video are also saved as `samples.gif`, and each recording as a file in `wav/`.

    The processes of torchrun or srun share the samples in parts of `FEW`; the files are equal for any number of them.
    After an interruption, finished parts are kept.

    Args:
        backbone: Model to sample from.
        folder: Folder of the files, and of finished parts during the run.
        num: Number of samples.
        plan: Sampling plan: solver, steps, guidance and seed.
        keep: Whether to save the samples themselves too, shape (num, C, *grid), as `samples.npy` with zeros as padding,
            the lengths (num,) of padded samples as `lengths.npy`, and what they were drawn from as `samples.json`.
        vae: Folder of the autoencoder that decodes the samples of a model of latents.
        meaning: What the samples represent; images if None.
        length: Length of every sample along its time axis; as in the training data if None.
        clock: Clock of the stages, whose times are kept in the folder in place of those of other samples; none are kept
            if None.

    Returns:
        The path of `samples.png`.

    Raises:
        ValueError: If it is unknown what the samples represent, they cannot have that length, or the folder keeps other
            samples.
    """
    meaning, plan, clock = meaning or Meaning(), plan or SamplingPlan(), clock or StageClock(folder)
    place, record_path = Path(folder) / "samples.png", Path(folder) / RECORD
    pictures = _pictures(backbone, Path(folder), num, plan, vae, meaning, length, keep=keep)
    labels, mask = pictures.labels, pictures.mask
    pictures.tell_begun(clock)
    current().barrier()  # No process draws before all have looked.
    decode = _decoder(backbone, vae)

    def drawn(indices: range) -> NDArray[Any]:
        return _drawn(backbone, indices, plan, decode, clock, mask=mask).numpy()

    parts = _draw_parts(pictures.parts_folder, num, FEW, drawn)
    clock.end()
    current().barrier()
    if not current().is_first:
        return place
    clock.begin(FIGURES)
    x = torch.from_numpy(np.concatenate([np.load(part) for part in parts]))
    _draw(x, place.parent, meaning, labels, mask, columns=_columns(backbone, num))
    if keep:
        write_record(record_path, pictures.made_of)
        _save_array(place.with_suffix(".npy"), x.numpy())
        if meaning.rendering is not None and mask is not None:
            _save_array(place.with_name("lengths.npy"), meaning.rendering.lengths_of(mask).numpy())
    for parts_folder in place.parent.glob(_PARTS):
        shutil.rmtree(parts_folder)
    clock.end()
    return place


def check_pictures(
    backbone: Backbone,
    folder: str | Path,
    *,
    num: int,
    plan: SamplingPlan,
    vae: str | Path | None = None,
    meaning: Meaning | None = None,
    length: int | None = None,
    clock: StageClock,
) -> None:
    """Checks what `draw_samples` is asked for, if it keeps the samples; nothing is written.

    The clock begins anew if no part is finished yet.

    Raises:
        ValueError: As `draw_samples` before it draws.
    """
    _pictures(backbone, Path(folder), num, plan, vae, meaning or Meaning(), length, keep=True).tell_begun(clock)


@dataclass(frozen=True)
class _Pictures:
    """What is known of pictures before they are drawn: what determines them, and where their parts lie."""

    made_of: dict[str, Any]
    labels: Tensor | None
    mask: Tensor | None
    parts_folder: Path

    def tell_begun(self, clock: StageClock) -> None:
        """Lets the clock begin anew if no part is finished, since earlier times are then of other drawings."""
        if not any(self.parts_folder.glob("*.npy")):
            clock.begin_anew((SAMPLING, DECODING, FIGURES))


def _pictures(
    backbone: Backbone,
    folder: Path,
    num: int,
    plan: SamplingPlan,
    vae: str | Path | None,
    meaning: Meaning,
    length: int | None,
    *,
    keep: bool,
) -> _Pictures:
    """Checks what `draw_samples` is asked for."""
    made_of = _made_of(backbone, num, plan, vae) | {"length": length}
    if keep:
        check_same(folder / RECORD, made_of, what="samples")
    if meaning.rendering is None and vae is None and (len(backbone.shape) != 3 or backbone.shape[0] not in (1, 3)):
        raise ValueError(
            f"{backbone.name} makes samples of shape {backbone.shape}, and the file does not say what they represent; "
            "pass --data with what it was trained on, or --vae for latents"
        )
    labels = _labels(backbone, range(num))
    mask = sample_mask(backbone, meaning.rendering, num, labels=labels, seed=plan.seed, length=length)
    # Finished parts are found again by what they are drawn from, since samples.json comes last. It has the path of the
    # autoencoder only, at which another one may lie by now.
    decoded_by = () if vae is None else (autoencoder_hash(vae),)
    key = content_hash(sorted(made_of.items()), mask, *decoded_by)[:16]
    return _Pictures(made_of, labels, mask, folder / f"parts-{key}")


def sample_mask(
    backbone: Backbone,
    rendering: Rendering | None,
    num: int,
    *,
    labels: Tensor | None,
    seed: int,
    length: int | None = None,
) -> Tensor | None:
    """Returns the positions of each sample that are not padding, shape (num, *grid); None if samples fill their grid.

    Args:
        backbone: Model to sample from.
        rendering: Time axis, and the lengths of the training data.
        num: Number of samples.
        labels: Class of each sample, shape (num,), or None.
        seed: Seed of the lengths.
        length: Length of all samples, in place of drawn lengths.

    Raises:
        ValueError: If the model makes no samples of that length.
    """
    if length is None:
        if rendering is None or not rendering.lengths or not backbone.takes_mask:
            return None
        return rendering.mask(rendering.draw_lengths(torch.arange(num), labels, seed=seed), backbone.shape)
    if rendering is None:
        raise ValueError("--frames has an effect on audio, motion and video only; leave it out")
    longest = backbone.shape[rendering.time_axis]
    if not 1 <= length <= longest:
        raise ValueError(f"--frames is {length}, but {backbone.name} makes 1 to {longest}; change --frames")
    return None if length == longest else rendering.mask(torch.full((num,), length), backbone.shape)


def _columns(backbone: Backbone, num: int) -> int:
    return backbone.num_classes if 1 < backbone.num_classes <= 16 else min(10, num)


def _draw(
    x: Tensor, folder: Path, meaning: Meaning, labels: Tensor | None, mask: Tensor | None, *, columns: int
) -> Path:
    rendering, names = meaning.rendering, meaning.class_names
    titles = [str(i) for i in range(len(x))]
    if labels is not None:
        titles = [names[label] if names else str(label) for label in labels.tolist()]
    if rendering is None:
        figure = sample_grid(x.numpy(), None if labels is None else titles, columns=columns)
        return save_figure(figure, folder, "samples")[0]
    first = slice(SHOWN)
    shown = None if mask is None else mask[first]
    place = save_figure(strip(x[first], rendering, titles[first], mask=shown), folder, "samples")[0]
    if rendering.modality == "video" or rendering.skeleton is not None:
        film(x[first], rendering, titles[first], place.with_suffix(".gif"), mask=shown)
    if rendering.audio is not None:
        _record_wavs(x, rendering, folder / "wav", titles, mask)
    return place


def _record_wavs(x: Tensor, rendering: Rendering, folder: Path, titles: Sequence[str], mask: Tensor | None) -> None:
    assert rendering.audio is not None
    folder.mkdir(exist_ok=True)
    lengths = [x.shape[1 + rendering.time_axis]] * len(x) if mask is None else rendering.lengths_of(mask).tolist()
    for i, (title, length) in enumerate(zip(titles, lengths, strict=True)):
        name = re.sub(r"[^\w-]+", "_", title)
        write_wav(
            folder / f"{i:0{len(str(len(x) - 1))}d}-{name}.wav", rendering.waveform(x[i], length), rendering.audio.rate
        )


@together("folder")
def draw_archive(
    backbone: Backbone,
    folder: str | Path,
    *,
    num: int,
    plan: SamplingPlan | None = None,
    batch_size: int = 256,
    vae: str | Path | None = None,
    clock: StageClock | None = None,
    progress: TaskProgress | None = None,
) -> Path:
    """Draws samples into `samples.npz`, in the format of ADM's evaluation and similar tools.

    `arr_0` contains the images, shape (num, H, W, 3), uint8, with equal channels for gray ones; if the model has
    classes, `arr_1` contains the labels, one class after another. Image i is the same for any batch size and number of
    processes up to rounding. The processes of torchrun or srun share the parts. After an interruption, finished parts
    are kept, and a finished archive is not drawn again. Memory holds one part, independent of `num`.

    Args:
        backbone: Model to sample from, of images in [-1, 1] or of latents.
        folder: Folder of `sampling.json`, `samples.npz`, and `parts/` or `parts-.../` during the run.
        num: Number of samples; 50 000 is usual.
        plan: Sampling plan: solver, steps, guidance and seed.
        batch_size: Samples per batch.
        vae: Folder of the autoencoder that decodes the samples of a model of latents.
        clock: Clock of the stages, whose times are kept in the folder.
        progress: Called with (task name, parts of this process done, parts of this process).

    Returns:
        The path of `samples.npz`.

    Raises:
        ValueError: If the model makes no images and no autoencoder is given, if `num` or `batch_size` is below 1, or if
            the folder contains other files.
    """
    folder, plan, clock = Path(folder), plan or SamplingPlan(), clock or StageClock(folder)
    _check_images(backbone, num, batch_size, vae)
    archive, ranks = folder / "samples.npz", current()
    parts_folder = folder / ("parts" if vae is None else f"parts-{autoencoder_hash(vae)[:16]}")
    if ranks.is_first:
        claim(folder, ARCHIVE_RECORD, _made_of(backbone, num, plan, vae), what="samples")
        clock.writes = True  # The folder is the job's own only now.
    ranks.barrier()
    if not ranks.once(archive.is_file):
        decode = _decoder(backbone, vae)

        def drawn(indices: range) -> NDArray[Any]:
            return pixels(_drawn(backbone, indices, plan, decode, clock, batch_size=batch_size))

        parts = _draw_parts(parts_folder, num, PART, drawn, named_progress(progress, "samples"))
        ranks.barrier()
        if ranks.is_first:
            _join(parts, archive, labels=_labels(backbone, range(num)))
    if ranks.is_first:
        clock.end()
        for earlier in (folder / "parts", *folder.glob(_PARTS)):
            shutil.rmtree(earlier, ignore_errors=True)
    return archive


def check_archive(
    backbone: Backbone,
    folder: str | Path,
    *,
    num: int,
    plan: SamplingPlan,
    batch_size: int = 256,
    vae: str | Path | None = None,
) -> None:
    """Checks what `draw_archive` is asked for; nothing is written.

    Raises:
        ValueError: As `draw_archive` before it draws.
    """
    _check_images(backbone, num, batch_size, vae)
    check_claim(Path(folder), ARCHIVE_RECORD, _made_of(backbone, num, plan, vae), what="samples")


def _check_images(backbone: Backbone, num: int, batch_size: int, vae: str | Path | None) -> None:
    if num < 1 or batch_size < 1:
        raise ValueError(f"cannot draw {num} samples in batches of {batch_size}; both count from 1")
    if vae is None and (len(backbone.shape) != 3 or backbone.shape[0] not in (1, 3)):
        raise ValueError(
            f"{backbone.name} makes samples of shape {backbone.shape}, which are not images; pass --vae with the "
            "autoencoder that decodes them"
        )


def pixels(x: Tensor) -> NDArray[np.uint8]:
    """Converts images (B, 1 or 3, H, W) in [-1, 1] to uint8 (B, H, W, 3), rounding halves up as ADM and SiT do."""
    levels = (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    stored: NDArray[np.uint8] = levels.expand(-1, -1, -1, 3).contiguous().cpu().numpy()
    return stored


def _labels(backbone: Backbone, indices: range) -> Tensor | None:
    return torch.tensor(indices) % backbone.num_classes if backbone.num_classes else None


def _decoder(backbone: Backbone, vae: str | Path | None) -> Callable[[Tensor], Tensor] | None:
    return decoder(vae, device=backbone.device) if vae else None


def _drawn(
    backbone: Backbone,
    indices: range,
    plan: SamplingPlan,
    decode: Callable[[Tensor], Tensor] | None,
    clock: StageClock,
    *,
    mask: Tensor | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Samples after the decoder; `mask` is that of all samples."""
    own_mask = None if mask is None else mask[indices.start : indices.stop]
    labels = _labels(backbone, indices)
    clock.begin(SAMPLING)
    x = sample(backbone, indices, labels=labels, plan=plan, mask=own_mask, batch_size=batch_size)
    if not bool(x.isfinite().all()):
        raise ValueError(f"samples {indices[0]} to {indices[-1]} are not all finite; try more steps or less guidance")
    if decode is None:
        return x
    clock.begin(DECODING)
    return decode(x)


def _draw_parts(
    folder: Path, num: int, size: int, draw: Callable[[range], NDArray[Any]], progress: StepProgress | None = None
) -> list[Path]:
    """Writes this process' share of the parts that are not there yet, and returns the files of all parts in order."""
    parts = {
        folder / f"{part:06d}.npy": range(start, min(start + size, num))
        for part, start in enumerate(range(0, num, size))
    }
    mine = current().mine([*parts])
    for done, path in enumerate(mine, 1):
        if not path.is_file():
            part = draw(parts[path])
            folder.mkdir(parents=True, exist_ok=True)
            _save_array(path, part)
        if progress:
            progress(done, len(mine))
    return [*parts]


def _made_of(backbone: Backbone, num: int, plan: SamplingPlan, vae: str | Path | None) -> dict[str, Any]:
    """Returns everything that determines the samples."""
    return {
        "weights": weights_hash(backbone.module),
        "schedule_hash": content_hash(backbone.schedule.to_config())[:16],
        "prediction": backbone.prediction,
        "num": num,
        "plan": asdict(plan),
        "vae": None if vae is None else str(Path(vae).resolve()),
        **rounded_by(backbone.precision),
    }


def _save_array(path: Path, array: NDArray[Any]) -> None:
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.save(file, array)


def _join(parts: Sequence[Path], archive: Path, *, labels: Tensor | None) -> None:
    """Writes one `.npz` from all parts, reading one after another."""
    first = np.load(parts[0], mmap_mode="r")
    num = PART * (len(parts) - 1) + len(np.load(parts[-1], mmap_mode="r"))
    header = {"descr": "|u1", "fortran_order": False, "shape": (num, *first.shape[1:])}
    with recorded_write(archive) as place, zipfile.ZipFile(place, "w", zipfile.ZIP_STORED, allowZip64=True) as zipped:
        with zipped.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.load(part).data)
        if labels is not None:
            with zipped.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, labels.numpy())
