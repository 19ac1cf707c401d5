"""Latents that were encoded by the tools of REPA, LightningDiT or fast-DiT, as `Samples`.

A diffusion model sees `(z - shift) * scale`, where z is the latent of the autoencoder, shape (C, H, W). Files contain
either z or the mean and standard deviation of its posterior. In the latter case z is drawn with noise keyed by the
sample id, so a sample is the same at every access. Only labels and ids are held in memory.

| format | content | default scale |
|---|---|---|
| `vae-sd` (REPA) | one .npy (2C, H, W) per image, mean and standard deviation; labels in `dataset.json` | 0.18215 |
| `lightningdit` | safetensors shards of z and labels; mean and std per channel in `latents_stats.pt` | 1 / std |
| `fast-dit` | one .npy (1, C, H, W) per image in `*features`, already scaled; one per label in `*labels` | 1 |

Source: the data loaders of REPA (sihyun-yu/REPA, dataset.py and train.py), LightningDiT (hustvl/LightningDiT,
datasets/img_latent_dataset.py) and fast-DiT (chuanyangjin/fast-DiT, train.py).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from layerprobe.data.contents import check_file, folders_of, read_text
from layerprobe.data.latents.samples import (
    SD_SCALE,
    FileRows,
    Format,
    LatentSamples,
    Rows,
    ShardRows,
    check_scale,
    files_hash,
    load_npy,
    open_shard,
)
from layerprobe.data.listing import count_left, walk
from layerprobe.data.reading import Reading
from layerprobe.data.samples import Samples
from layerprobe.files import one_line
from layerprobe.memory import pass_on

_STATS = "latents_stats.pt"
MAX_LABEL = 10**6  # a table of classes has a row for each


def latent_format(source: str | Path) -> Format | None:
    """Returns the format of the latents in a folder; None if it is not a folder or contains no latents."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return None
    if next(folder.glob("*.safetensors"), None):
        return "lightningdit"
    if _feature_folders(folder):
        return "fast-dit"
    return "vae-sd" if _moments_folder(folder) else None


def load_latents(
    source: str | Path, *, scale: float | None = None, seed: int = 0, data_root: str | Path | None = None
) -> Samples:
    """Loads the latents in a folder; the id of a sample is its row, with files and shards sorted as strings.

    Args:
        source: Folder for which `latent_format` is not None; for `vae-sd` also its parent folder. The `latents_flip` in
            the shards of LightningDiT, a horizontal-flip augmentation, are ignored.
        scale: Factor of z, applied after the normalization if there is one; None for the default in the table above.
            With a factor, `lightningdit` latents without statistics are read without normalization.
        seed: Seed of the draws from the posterior.
        data_root: Folder that links of the data may lead to, beside that of the data.

    Raises:
        ValueError: If files are missing, damaged or inconsistent.
    """
    folder, kind = Path(source).expanduser(), latent_format(source)
    if kind is None:
        raise ValueError(f"{source} contains no latents; pass a folder as REPA, LightningDiT or fast-DiT write them")
    check_scale(scale)
    folders = folders_of(folder, data_root)
    if kind == "vae-sd":
        return _load_moments(_moments_folder(folder) or folder, SD_SCALE if scale is None else scale, seed, folders)
    if kind == "lightningdit":
        return _load_shards(folder, scale, folders)
    return _load_pairs(folder, 1.0 if scale is None else scale, folders)


def _moments_folder(folder: Path) -> Path | None:
    """The folder of REPA's latents: this one or `vae-sd` in it."""
    if (folder / "vae-sd").is_dir():
        return folder / "vae-sd"
    is_repa = folder.name == "vae-sd" or (folder / "dataset.json").is_file()
    return folder if is_repa and next(folder.rglob("*.npy"), None) else None


def _feature_folders(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*features")) if next(path.glob("*.npy"), None)]


def _load_moments(folder: Path, scale: float, seed: int, folders: Sequence[Path]) -> Samples:
    # Sorted as strings like in the official loader: `Path` would sort "a/b" before "a-b".
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.npy"))
    if not names:
        raise ValueError(f"{folder} contains no .npy file; pass the folder of the latents")
    labels = _dataset_labels(folder / "dataset.json", names)
    paths = [folder / name for name in names]
    rows = FileRows(paths, folders)
    return LatentSamples(
        rows,
        content=files_hash(paths, folder),
        labels=labels,
        shift=torch.zeros(()),
        scale=torch.tensor(scale),
        posterior_seed=seed,
        reading=_reading(folder, rows, labels, [*paths, folder / "dataset.json"]),
    )


def _reading(folder: Path, rows: Rows, labels: Tensor | None, read: Collection[Path]) -> Reading:
    """What was read of the files in a folder of latents."""
    tree = walk(folder)
    return Reading(
        files_read=len(read),
        files_left=count_left(tree, read),
        rows={"train": len(rows)},
        label="unlabeled latents" if labels is None else "latents",
        num_classes=0 if labels is None else len(set(labels.tolist())),
    )


def _dataset_labels(path: Path, names: Sequence[str]) -> Tensor | None:
    """The labels of these files; None if the file declares the data unlabeled."""
    if not path.is_file():
        raise ValueError(f'the labels file {path} is missing; copy it, or write {{"labels": null}} for unlabeled data')
    try:
        entries = json.loads(read_text(path))["labels"]
        table = None if entries is None else {str(name): label for name, label in entries}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} contains no labels of the form [file, label] ({one_line(error)}); write it again"
        ) from error
    if table is None:
        return None
    if len(table) < len(entries):
        twice = next(name for name, count in Counter(str(name) for name, _ in entries).items() if count > 1)
        raise ValueError(
            f"{path} names {len(entries) - len(table)} files twice (first: {twice}); keep one entry of each"
        )
    missing = [name for name in names if type(table.get(name)) is not int]
    if missing:
        raise ValueError(
            f"{path} has no class for {len(missing)} of {len(names)} files (first: {missing[0]}); add them"
        )
    absent = sorted(table.keys() - set(names))
    if absent:
        raise ValueError(
            f"{len(absent)} of the {len(table)} files that {path} names are not there (first: {absent[0]}); copy them, "
            "or remove their entries"
        )
    beyond = next((name for name in names if abs(table[name]) > MAX_LABEL), None)
    if beyond is not None:
        raise ValueError(f"{path} has label {table[beyond]} for {beyond}; labels count from 0, to at most {MAX_LABEL}")
    return torch.tensor([table[name] for name in names])


def _load_shards(folder: Path, scale: float | None, folders: Sequence[Path]) -> Samples:
    paths = sorted(folder.glob("*.safetensors"), key=str)
    _check_numbers(folder, [path.name for path in paths])
    for path in paths:
        check_file(path, folders)
    rows, stats = ShardRows(paths), folder / _STATS
    labels = []
    for path, count in zip(paths, rows.counts, strict=True):
        with open_shard(path) as file:
            labels.append(_whole_labels(path, file.get_tensor("labels")))
        if len(labels[-1]) != count:
            raise ValueError(f"{path} has {count} latents but {len(labels[-1])} labels; encode its images again")
    if scale is None and not stats.is_file():
        raise ValueError(
            f"{stats} is missing, so the latents cannot be normalized; copy it from the training data of the model, or "
            "pass --latent-scale for a model trained without it"
        )
    mean, deviation = (
        _read_stats(stats, rows.shape[0], folders) if stats.is_file() else (torch.zeros(()), torch.ones(()))
    )
    every_label = torch.cat(labels)
    return LatentSamples(
        rows,
        content=files_hash(paths, folder),
        labels=every_label,
        shift=mean,
        scale=(1.0 if scale is None else scale) / deviation,
        reading=_reading(folder, rows, every_label, [*paths, *folder.glob(_STATS)]),
    )


def _whole_labels(path: Path, labels: Tensor) -> Tensor:
    """Labels of a shard, shape (n,), int64."""
    if labels.ndim != 1 and labels.shape[1:].numel() != 1:
        raise ValueError(f"{path} has labels of shape {tuple(labels.shape)}; pass one class per latent")
    if labels.is_floating_point() and not torch.equal(labels, labels.round()):  # NaN also fails this
        raise ValueError(f"{path} has labels that are no whole numbers; pass one class per latent")
    if labels.numel() and int(labels.max()) > MAX_LABEL:
        raise ValueError(f"{path} has label {int(labels.max())}; labels count from 0, to at most {MAX_LABEL}")
    return labels.long().flatten()


def _check_numbers(folder: Path, names: Sequence[str]) -> None:
    """Checks that shards named by process and number, as LightningDiT does, are there from the first to the last."""
    found = {(int(match[1]), int(match[2])) for name in names if (match := re.search(r"rank(\d+)_shard(\d+)\.", name))}
    last = {rank: max(shard for of, shard in found if of == rank) for rank, _ in found}
    expected = ((rank, shard) for rank in range(max(last, default=-1) + 1) for shard in range(last.get(rank, 0) + 1))
    for rank, shard in expected:
        if (rank, shard) not in found:
            raise ValueError(
                f"{folder} has no latents_rank{rank:02}_shard{shard:03}.safetensors but later ones; copy it, or encode "
                "its images again"
            )


def _read_stats(path: Path, channels: int, folders: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, shape (C, 1, 1)."""
    try:
        content = torch.load(check_file(path, folders), map_location="cpu", weights_only=True)
        mean, deviation = (content[key].float().view(channels, 1, 1) for key in ("mean", "std"))
    except Exception as error:  # a damaged file can raise any exception
        pass_on(error)
        raise ValueError(f"{path} contains no mean and std of {channels} channels; copy it again") from error
    if not bool(mean.isfinite().all() and deviation.isfinite().all() and (deviation > 0).all()):
        raise ValueError(f"{path} contains a mean or std that is not finite, or a std of 0; copy it again")
    return mean, deviation


def _load_pairs(folder: Path, scale: float, folders: Sequence[Path]) -> Samples:
    features, *others = _feature_folders(folder)
    if others:
        raise ValueError(f"{folder} contains both {features.name} and {others[0].name}; move one of them elsewhere")
    labels = features.with_name(f"{features.name.removesuffix('features')}labels")
    if not labels.is_dir():
        raise ValueError(f"the labels folder {labels} is missing; copy it beside {features.name}")
    names = sorted(path.name for path in features.glob("*.npy"))
    unmatched = sorted(set(names) ^ {path.name for path in labels.glob("*.npy")})
    if unmatched:
        has, lacks = (features, labels) if (features / unmatched[0]).exists() else (labels, features)
        raise ValueError(
            f"{len(unmatched)} files have no counterpart: {unmatched[0]} is in {has.name} but not in {lacks.name}; "
            "copy it"
        )
    paths = [features / name for name in names]
    rows = FileRows(paths, folders)
    classes = torch.tensor([_one_label(labels / name, folders) for name in names])
    return LatentSamples(
        rows,
        content=files_hash(paths, folder),
        labels=classes,
        shift=torch.zeros(()),
        scale=torch.tensor(scale),
        reading=_reading(folder, rows, classes, [*paths, *(labels / name for name in names)]),
    )


def _one_label(path: Path, folders: Sequence[Path]) -> int:
    array = load_npy(path, folders)
    if array.size != 1 or not float(array.item()).is_integer() or abs(array.item()) > MAX_LABEL:
        raise ValueError(f"{path} contains {array.size} numbers of type {array.dtype}, not one class; encode it again")
    return int(array.item())
