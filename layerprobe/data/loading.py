"""Reading a data set of any kind."""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layerprobe.data import images, tables
from layerprobe.data.arrays import array_modality
from layerprobe.data.contents import folders_of
from layerprobe.data.embedded_digits import digits
from layerprobe.data.kind import DataKind
from layerprobe.data.latents.layouts import latent_format, load_latents
from layerprobe.data.latents.samples import LatentSamples
from layerprobe.data.latents.vae import encode, is_encoded, latent_shape
from layerprobe.data.listing import TABLES, list_files, walk
from layerprobe.data.names import Modality
from layerprobe.data.parts import prepare_parts
from layerprobe.data.samples import Samples, Splits
from layerprobe.data.sequences import audio, motion, video
from layerprobe.data.splits import split as divide
from layerprobe.data.splits import take
from layerprobe.messages import unknown
from layerprobe.progress import StepProgress

if TYPE_CHECKING:
    from datasets import Dataset


def load(
    source: str | Path,
    *,
    latent_scale: float | None = None,
    num_train: int | None = None,
    num_validation: int | None = None,
    num_test: int | None = None,
    min_per_class: int | None = None,
    seed: int = 0,
    expect_shape: tuple[int, ...] | None = None,
    require_labels: bool = False,
    **options: Any,
) -> Splits:
    """Reads a data set and divides it into splits. See `DataSource`, which has these options as fields.

    Args:
        source: "digits" for the embedded scans (a folder of that name is "./digits"), a folder of latents (see
            `load_latents`), or what `load_images`, `load_audio`, `load_motion` or `load_video` takes.
        latent_scale: Factor of the latents in a folder, see `load_latents`.
        num_train: Number of samples of the training split; None for all, see `splits.split`.
        num_validation: Number of samples of the validation split; None for all.
        num_test: Number of samples of the test split; None for all.
        min_per_class: Smallest number of samples of a class in the training part; smaller classes are left out.
        seed: Seed that assigns samples to splits; without effect on the digits, whose splits are fixed.
        expect_shape: Shape (C, *grid) that the model takes.
        require_labels: Whether to refuse unlabeled data.
        options: Options of the loader of the data's modality, and `modality` itself if the data leaves it open. Options
            that are None count as not given.

    Raises:
        ValueError: If the data cannot be read or divided, or is not as expected.
    """
    counts = {"num_train": num_train, "num_validation": num_validation, "num_test": num_test}
    options = {name: value for name, value in options.items() if value is not None}
    if source == "digits":
        surplus = _flags(options) + ["--latent-scale"] * (latent_scale is not None)
        surplus += ["--min-per-class"] * (min_per_class is not None)
        if surplus:
            raise ValueError(f"the embedded digits are 1x8x8 and labeled as they are; leave out {' '.join(surplus)}")
        embedded = digits()
        _check_shape(embedded.train, expect_shape, source)
        return take(embedded, **counts)
    if latent_format(source) is not None:
        data_root = options.pop("data_root", None)
        if surplus := _flags(options):
            raise ValueError(f"{source} holds latents, which are read as they are; leave out {' '.join(surplus)}")
        latents = load_latents(source, scale=latent_scale, seed=seed, data_root=data_root)
        _check_shape(latents, expect_shape, source)
        if require_labels and latents.labels is None:
            raise ValueError(f"{source} has no labels; write them where the tool that encoded the latents does")
        return divide(prepare_parts({"train": latents}, min_per_class), **counts, seed=seed)
    if latent_scale is not None:
        raise ValueError(f"{source} holds no latents, so --latent-scale has no effect; leave it out, or pass --vae too")
    modality = options.pop("modality", None) or guess_modality(
        source, split=options.get("split"), data_root=options.get("data_root")
    )
    loader = _kind(modality).load
    parameters = inspect.signature(loader).parameters
    if unknown := _flags([name for name in options if name not in parameters]):
        raise ValueError(f"{source} holds {modality} data, for which {' '.join(unknown)} has no effect; leave it out")
    if modality == "video" and "size" not in options:
        raise ValueError(f"{source} holds video; pass --size, the side of a frame in pixels")
    parts = prepare_parts(loader(source, **options), min_per_class)
    for samples in parts.values():
        _check_shape(samples, expect_shape, source)
        if require_labels and samples.labels is None:
            raise ValueError(f"{source} has no labels; pass --label-column, or put the items in one folder per class")
    return divide(parts, **counts, seed=seed)


# In the order in which they are recognized; images are what is left.
KINDS: dict[Modality, DataKind] = {
    "image": images.KIND,
    "audio": audio.KIND,
    "motion": motion.KIND,
    "video": video.KIND,
}


def read_table(
    source: str | Path, modality: str, *, split: str | None = None, data_root: str | Path | None = None
) -> dict[str, Dataset]:
    """Returns the rows of a data set by part, as the loader of this modality reads them.

    Raises:
        ValueError: As `load` does.
    """
    return _kind(modality).read(source, split=split, data_root=data_root)


def guess_modality(source: str | Path, *, split: str | None = None, data_root: str | Path | None = None) -> Modality:
    """Returns the modality of a data set by the endings of its files, or else by the names and types of its columns.

    If these do not determine it, the modality is "image".

    Raises:
        ValueError: If there are files of several modalities, or arrays that may be something else than motion.
    """
    root = Path(source).expanduser()
    files = walk(root).files if root.is_dir() else []
    endings = Counter(file.suffix.lower() for file in files)
    if not root.exists() or not (root.is_file() or endings.keys() & TABLES.keys()):
        return _modality_of_files(source, files, endings, folders_of(source, data_root))
    features = next(iter(tables.read(list_files(source, (), data_root=data_root), split=split).values())).features
    for column, feature in features.items():
        for name, kind in KINDS.items():
            if kind.holds is not None and kind.holds(column, feature):
                return name
    return "image"


def _modality_of_files(
    source: str | Path, files: Sequence[Path], endings: Mapping[str, int], folders: Sequence[Path]
) -> Modality:
    arrays = [file for file in files if file.suffix.lower() == ".npy"]
    counts = {
        name: sum(endings.get(ending, 0) for ending in kind.telling or kind.suffixes if ending != ".npy")
        for name, kind in KINDS.items()
    }
    found = [name for name, count in counts.items() if count]
    if len(found) > 1:
        content = " and ".join(f"{counts[name]} {name} file{'s' * (counts[name] != 1)}" for name in found)
        raise ValueError(f"{source} contains {content}; pass --modality {found[0]}, or another, to read these alone")
    if not found and arrays:
        return array_modality(arrays[0], folders)
    return next(iter(found), "image")


def _kind(modality: str) -> DataKind:
    for name, kind in KINDS.items():
        if name == modality:
            return kind
    raise ValueError(unknown("modality", modality, KINDS))


def _flags(names: Iterable[str]) -> list[str]:
    """Returns the flags of options as `DataSource` declares them."""
    other_flags = {"column": "--item-column", "form": "--audio-form"}
    return [other_flags.get(name, f"--{name.replace('_', '-')}") for name in names]


def encode_splits(
    splits: Splits,
    vae: str | Path,
    *,
    latent_scale: float | None = None,
    expect_shape: tuple[int, ...] | None = None,
    cache: str | Path | None = None,
    progress: StepProgress | None = None,
) -> Splits:
    """Encodes images as latents, on a GPU if there is one, and keeps the latents in the user's cache.

    Args:
        splits: Splits to encode; all of their samples are encoded, so reduce them first.
        vae: Folder of the autoencoder, see `encode`.
        latent_scale: Factor of the latents in place of the autoencoder's own.
        expect_shape: Shape (C, h, w) that the model takes.
        cache: Folder to keep them in; the user's cache if None.
        progress: Called with (images done, images in total), for one split after another.

    Raises:
        ValueError: If images, autoencoder and model do not fit together.
    """
    shape = latent_shape(splits.train.shape, vae)
    if expect_shape is not None and shape != tuple(expect_shape):
        latents, expected = ("x".join(map(str, numbers)) for numbers in (shape, expect_shape))
        raise ValueError(
            f"{vae} makes latents of {latents} but the model takes {expected}; pass --size, or another --vae"
        )
    folder = _latents_cache() if cache is None else cache
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return splits.mapped(
        lambda _, samples: encode(samples, vae, folder, scale=latent_scale, device=device, progress=progress)
    )


def num_to_encode(splits: Splits, vae: str | Path) -> int:
    """Returns how many images of the splits `encode_splits` would encode; those in the user's cache are finished."""
    return sum(len(samples) for _, samples in splits.items() if not is_encoded(samples, vae, _latents_cache()))


def _latents_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "layerprobe" / "latents"


def _check_shape(samples: Samples, expected: tuple[int, ...] | None, source: str | Path) -> None:
    if expected is None or samples.shape == tuple(expected):
        return
    shape, model_shape = ("x".join(map(str, numbers)) for numbers in (samples.shape, expected))
    if isinstance(samples, LatentSamples):
        raise ValueError(f"latents are {shape} but the model takes {model_shape}; pass those that it was trained on")
    if samples.modality != "image":
        raise ValueError(
            f"{samples.modality} samples are {shape} but the model takes {model_shape}; "
            "pass the --length and the other options of its training"
        )
    channels, height, width = samples.shape
    raise ValueError(
        f"images are {height}x{width} with {channels} channel{'s' * (channels > 1)} but the model takes {model_shape}; "
        f"{_remedy(samples.shape, expected, source)}"
    )


def _remedy(shape: tuple[int, ...], expected: tuple[int, ...], source: str | Path) -> str:
    if source == "digits":
        return "pass other data than the embedded digits"
    if len(expected) != 3 or expected[0] not in (1, 3):
        return "encode them as the model's training did: pass --vae, or a folder of latents as --data"
    if expected[1] != expected[2]:
        return f"resize them to {expected[1]}x{expected[2]} first"
    options = [f"--size {expected[1]}"] * (shape[1:] != tuple(expected[1:]))
    options += [f"--channels {expected[0]}"] * (shape[0] != expected[0])
    return f"pass {' '.join(options)}"
