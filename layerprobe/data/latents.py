"""Latents of an autoencoder as Samples: encoded by other people's tools, or here from images, once.

What a diffusion model sees is `(z - shift) * scale` of the autoencoder's z, shape (C, H, W). Files either hold such
tensors or the posterior of z, its mean and standard deviation; then z is drawn, keyed by the sample's id, so that a
sample is the same at every access. Nothing is held in memory but labels and ids.

| format | holds | scale unless told otherwise |
|---|---|---|
| `vae-sd` (REPA) | a .npy (2C, H, W) per image, mean and standard deviation; labels in `dataset.json` | 0.18215 |
| `lightningdit` | safetensors shards of z and labels; each channel's mean and std in `latents_stats.pt` | 1 / std |
| `fast-dit` | a .npy (1, C, H, W) per image in `*features`, scaled already; one per label in `*labels` | 1 |

Source: the data loaders of REPA (sihyun-yu/REPA, dataset.py and train.py), LightningDiT (hustvl/LightningDiT,
datasets/img_latent_dataset.py) and fast-DiT (chuanyangjin/fast-DiT, train.py).
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from layerprobe.data.base import Batch, LabelColumn, Samples, content_hash
from layerprobe.files import MissingWeights, claim, whole, write_text
from layerprobe.noise import NoiseKey

Format = Literal["vae-sd", "lightningdit", "fast-dit"]
# What Stable Diffusion's autoencoder is scaled by, which REPA's training does on the fly and fast-DiT's did on disk.
SD_SCALE = 0.18215
# Beyond it, names, sizes and times of change stand for the bytes: ImageNet's latents take many minutes to read.
MOST_HASHED_BYTES = 2 * 2**30

_STATS = "latents_stats.pt"
_VAE_WEIGHTS = "diffusion_pytorch_model*.safetensors"


def latent_format(source: str | Path) -> Format | None:
    """Which kind of latents a folder holds, by what lies in it; None if it is no folder or holds none."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return None
    if next(folder.glob("*.safetensors"), None):
        return "lightningdit"
    if _feature_folders(folder):
        return "fast-dit"
    return "vae-sd" if _moments_folder(folder) else None


def load_latents(source: str | Path, *, scale: float | None = None, seed: int = 0) -> Samples:
    """The latents in a folder; a sample's id is its row, files and shards sorted as strings.

    Args:
        source: A folder for which `latent_format` is not None. For `vae-sd` also the folder around it. `latents_flip`
            in LightningDiT's shards, which training takes half of the time, is left alone.
        scale: The factor of z, after the normalisation if there is one; None for the one in the table above. Given,
            `lightningdit` latents without statistics are taken as they are.
        seed: Of the draws from the posterior.

    Raises:
        ValueError: If a part is missing or damaged, or the files do not fit together.
    """
    folder, kind = Path(source).expanduser(), latent_format(source)
    if kind is None:
        raise ValueError(f"{source} holds no latents; pass a folder as REPA, LightningDiT or fast-DiT write them")
    _check_scale(scale)
    if kind == "vae-sd":
        return _load_moments(_moments_folder(folder) or folder, SD_SCALE if scale is None else scale, seed)
    if kind == "lightningdit":
        return _load_shards(folder, scale)
    return _load_pairs(folder, 1.0 if scale is None else scale)


def encode(
    samples: Samples,
    vae_folder: str | Path,
    cache_folder: str | Path,
    *,
    scale: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """Images as latents of a diffusers `AutoencoderKL`, encoded once and kept on disk.

    The mean and standard deviation of each image's posterior go to a file in `cache_folder` that belongs to these
    weights and these images: 8 bytes per latent number. An interrupted encoding continues, a finished one returns at
    once and does not need diffusers.

    Args:
        samples: Images, shape (3, H, W) in [-1, 1]; labels, further columns and ids are kept.
        vae_folder: What `save_pretrained` wrote, with safetensors weights; or a pipeline with such a `vae` in it.
        cache_folder: Made if it is not there; may hold other encodings too.
        scale: Instead of the `scaling_factor` of the autoencoder's configuration.
        seed: Of the draws from the posterior.
        batch_size: Images at a time; it changes the latents by rounding only.
        device: Where the autoencoder runs.
        progress: Called with (images done, images in all).

    Raises:
        ValueError: If the folder holds no `AutoencoderKL`, the images do not fit it, or a latent is not finite.
        ModuleNotFoundError: If diffusers is not installed.
    """
    folder = _vae_folder(vae_folder)
    shift, factor = _factors(_vae_config(folder), scale)
    channels, *grid = latent_shape(samples.shape, folder)
    shape = (2 * channels, *grid)
    record = {"latents": 1, "vae": _content([folder / "config.json", *_vae_weights(folder)])}
    record |= {"data": samples.fingerprint, "shape": [len(samples), *shape]}
    place = Path(cache_folder).expanduser() / content_hash(sorted(record.items()))[:16]
    claim(place, "latents.json", record, what="latents")
    path = place / "moments.npy"
    if not path.is_file():
        _encode(samples, folder, path, shape, batch_size=batch_size, device=device, progress=progress)
    return LatentSamples(
        _Array(path),
        content=content_hash(sorted(record.items())),
        labels=samples.labels,
        ids=samples.ids,
        class_names=samples.class_names,
        columns=samples.columns,
        shift=shift,
        scale=factor,
        posterior_seed=seed,
    )


def latent_shape(shape: tuple[int, ...], vae_folder: str | Path) -> tuple[int, int, int]:
    """Shape (C, h, w) of the latents of images of this shape.

    Raises:
        ValueError: If the folder holds no `AutoencoderKL`, or the images do not fit it.
    """
    config = _vae_config(_vae_folder(vae_folder))
    stride, channels = 2 ** (len(config["block_out_channels"]) - 1), config["in_channels"]
    if len(shape) != 3 or shape[0] != channels:
        raise ValueError(
            f"the autoencoder takes images of {channels} channels, these have shape {shape}; pass --channels {channels}"
        )
    if any(edge % stride for edge in shape[1:]):
        raise ValueError(
            f"the autoencoder takes sides that are multiples of {stride}, the images have {shape[1]}x{shape[2]}; "
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
    """Images of latents, shape (B, 3, H, W) in [-1, 1], on the CPU.

    Args:
        latents: As a model sees them, shape (B, C, h, w).
        vae_folder: See `encode`, like what follows.
        scale: Instead of the `scaling_factor` of the autoencoder's configuration.
        batch_size: Latents at a time.
        device: Where the autoencoder runs.

    Raises:
        ValueError: If the folder holds no `AutoencoderKL`, or the latents do not fit it.
        ModuleNotFoundError: If diffusers is not installed.
    """
    folder = _vae_folder(vae_folder)
    config = _vae_config(folder)
    shift, factor = _factors(config, scale)
    channels = config["latent_channels"]
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(
            f"latents have shape {tuple(latents.shape)}, the autoencoder decodes (B, {channels}, h, w); pass its own"
        )
    vae = _autoencoder(folder, device)
    z = latents.cpu().float() / factor + shift
    parts = [z[start : start + batch_size].to(device) for start in range(0, len(z), batch_size)]
    return torch.cat([vae.decode(part).sample.clamp(-1, 1).cpu() for part in parts])


class LatentSamples(Samples):
    """Latents on disk.

    Args:
        rows: The stored tensors.
        content: A hash of them.
        labels: Shape (n,), integers, or None.
        ids: Shape (n,); rows where not given.
        class_names: One per class, or empty.
        columns: Further labels.
        shift: Taken off z, a number or shape (C, 1, 1).
        scale: Multiplies it then, likewise.
        posterior_seed: Of the draws of z where mean and standard deviation are stored, (2C, H, W); None where z is.

    Raises:
        ValueError: If labels are negative, or their number is not that of the rows.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        content: str,
        labels: Tensor | None,
        ids: Tensor | None = None,
        class_names: tuple[str, ...] = (),
        columns: tuple[LabelColumn, ...] = (),
        shift: Tensor,
        scale: Tensor,
        posterior_seed: int | None = None,
    ) -> None:
        if labels is not None and len(labels) != len(rows):
            raise ValueError(f"{len(rows)} latents but {len(labels)} labels; encode the images again")
        if labels is not None and int(labels.min()) < 0:
            raise ValueError(f"label {int(labels.min())} is negative; labels count from 0")
        self._rows, self._shift, self._scale, self._seed = rows, shift, scale, posterior_seed
        channels, *grid = rows.shape
        if posterior_seed is not None and channels % 2:
            raise ValueError(f"{rows.name(0)} has {channels} channels, which is no mean and deviation; encode it again")
        self.shape = (channels if posterior_seed is None else channels // 2, *grid)
        self.modality = "image"
        self.labels, self.class_names, self.columns = labels, class_names, columns
        self.num_classes = 0 if labels is None else len(class_names) or int(labels.max()) + 1
        self.ids = torch.arange(len(rows)) if ids is None else ids
        self.fingerprint = content_hash("latents, version 1", content, shift, scale, posterior_seed, labels, self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int]) -> Batch:
        index = torch.arange(len(self))[torch.as_tensor(indices, dtype=torch.long)]
        stored = self._rows.read(index.tolist()) if len(index) else torch.empty(0, *self._rows.shape)
        bad = index[~stored.flatten(1).isfinite().all(1)]
        if len(bad):
            raise ValueError(f"{self._rows.name(int(bad[0]))} has NaN or infinite values; encode that image again")
        labels = None if self.labels is None else self.labels[index]
        return Batch((self._z(stored, self.ids[index]) - self._shift) * self._scale, labels, self.ids[index])

    def _z(self, stored: Tensor, ids: Tensor) -> Tensor:
        if self._seed is None:
            return stored
        mean, deviation = stored.chunk(2, dim=1)
        return mean + deviation * NoiseKey(self._seed, "latent").normal(ids, self.shape)


class Rows(ABC):
    """Tensors of one shape on disk.

    Attributes:
        shape: Of one of them.
    """

    shape: tuple[int, ...]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, rows: Sequence[int]) -> Tensor:
        """These tensors in this order, shape (B, *shape), float32, not empty."""

    @abstractmethod
    def name(self, row: int) -> str:
        """Where a tensor is, for people."""


class _Files(Rows):
    """A .npy file per row, with or without a leading axis of length 1."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self.shape = self._load(0).shape
        # A file of another shape has another size, and opening a million files would take minutes.
        sizes = [path.stat().st_size for path in paths]
        for row, size in enumerate(sizes):
            if size != sizes[0]:
                self._load(row)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, rows: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.stack([self._load(row) for row in rows]).astype(np.float32, copy=False))

    def name(self, row: int) -> str:
        return str(self._paths[row])

    def _load(self, row: int) -> NDArray[Any]:
        array = _load_array(self._paths[row])
        array = array[0] if array.ndim == 4 and len(array) == 1 else array
        expected = getattr(self, "shape", array.shape)
        if array.shape != expected or array.ndim != 3:
            like = f"not {expected} like {self._paths[0].name}" if array.ndim == 3 else "not (C, H, W)"
            raise ValueError(f"{self._paths[row]} has shape {array.shape}, {like}; keep latents of one shape together")
        return array


class _Shards(Rows):
    """Safetensors files with many rows each, in `latents`."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        shapes = []
        for path in paths:
            with _shard(path) as file:
                shapes.append(tuple(file.get_slice("latents").get_shape()))
        self.shape = shapes[0][1:]
        for path, shape in zip(paths, shapes, strict=True):
            if len(shape) != 4 or shape[1:] != self.shape:
                raise ValueError(
                    f"{path} holds latents of shape {shape}, not (n, {', '.join(map(str, self.shape))}) like "
                    f"{paths[0].name}; keep latents of one shape together"
                )
        self._ends = np.cumsum([shape[0] for shape in shapes])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, rows: Sequence[int]) -> Tensor:
        out = torch.empty(len(rows), *self.shape)
        shards, inside = self._locate(rows)
        for shard in np.unique(shards):
            with _shard(self._paths[shard]) as file:
                latents = file.get_slice("latents")
                for place in np.flatnonzero(shards == shard):
                    out[place] = latents[int(inside[place]) : int(inside[place]) + 1][0]
        return out

    def name(self, row: int) -> str:
        (shard,), (inside,) = self._locate([row])
        return f"latent {inside} of {self._paths[shard]}"

    def _locate(self, rows: Sequence[int]) -> tuple[NDArray[Any], NDArray[Any]]:
        index = np.asarray(rows)
        shards = np.searchsorted(self._ends, index, side="right")
        return shards, index - np.concatenate([[0], self._ends])[shards]


class _Array(Rows):
    """One .npy file, memory-mapped; opened at each access, so that a worker process gets a path and no data."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._count: int
        self._count, *shape = _load_array(path, mmap=True).shape
        self.shape = tuple(shape)

    def __len__(self) -> int:
        return self._count

    def read(self, rows: Sequence[int]) -> Tensor:
        return torch.from_numpy(_load_array(self._path, mmap=True)[list(rows)])

    def name(self, row: int) -> str:
        return f"latent {row} of {self._path}"


def _load_array(path: Path, *, mmap: bool = False) -> NDArray[Any]:
    try:
        array = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is no whole .npy file of numbers; encode it again") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise ValueError(f"{path} holds no array of numbers; encode it again")
    return array


@contextmanager
def _shard(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            missing = {"latents", "labels"} - set(file.keys())
            if not missing:
                yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole safetensors file; copy it again") from error
    if missing:
        raise ValueError(f"{path} has no {' and no '.join(sorted(missing))}; pass a folder as LightningDiT writes it")


def _check_scale(scale: float | None) -> None:
    if scale is not None and not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"--latent-scale is {scale}; pass a positive number")


def _moments_folder(folder: Path) -> Path | None:
    """Where REPA's latents are: here or in `vae-sd`."""
    if (folder / "vae-sd").is_dir():
        return folder / "vae-sd"
    told = folder.name == "vae-sd" or (folder / "dataset.json").is_file()
    return folder if told and next(folder.rglob("*.npy"), None) else None


def _feature_folders(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*features")) if next(path.glob("*.npy"), None)]


def _load_moments(folder: Path, scale: float, seed: int) -> Samples:
    # As strings, as the official loader sorts them: `Path` would sort "a/b" before "a-b".
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.npy"))
    if not names:
        raise ValueError(f"{folder} holds no .npy file; pass the folder of the latents")
    labels = _dataset_labels(folder / "dataset.json", names)
    paths = [folder / name for name in names]
    return LatentSamples(
        _Files(paths),
        content=_content(paths, folder),
        labels=labels,
        shift=torch.zeros(()),
        scale=torch.tensor(scale),
        posterior_seed=seed,
    )


def _dataset_labels(path: Path, names: Sequence[str]) -> Tensor | None:
    """The labels of these files; None where the file says that there are none."""
    if not path.is_file():
        raise ValueError(f'the labels file {path} is missing; copy it, or write {{"labels": null}} for unlabelled data')
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["labels"]
        table = None if entries is None else {str(name): label for name, label in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no labels of the form [file, label]; write it again") from error
    if table is None:
        return None
    missing = [name for name in names if not isinstance(table.get(name), int)]
    if missing:
        raise ValueError(f"{path} has no class for {len(missing)} of {len(names)} files (first: {missing[0]}); add it")
    return torch.tensor([table[name] for name in names])


def _load_shards(folder: Path, scale: float | None) -> Samples:
    paths = sorted(folder.glob("*.safetensors"), key=str)
    rows, stats = _Shards(paths), folder / _STATS
    labels = []
    for path in paths:
        with _shard(path) as file:
            labels.append(file.get_tensor("labels").long().flatten())
    if scale is None and not stats.is_file():
        raise ValueError(
            f"{stats} is missing, so the latents cannot be normalised; copy it from where the model was trained, or "
            "pass --latent-scale for a model trained without it"
        )
    mean, deviation = _read_stats(stats, rows.shape[0]) if stats.is_file() else (torch.zeros(()), torch.ones(()))
    return LatentSamples(
        rows,
        content=_content(paths, folder),
        labels=torch.cat(labels),
        shift=mean,
        scale=(1.0 if scale is None else scale) / deviation,
    )


def _read_stats(path: Path, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, shape (C, 1, 1)."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        mean, deviation = (content[key].float().view(channels, 1, 1) for key in ("mean", "std"))
    except Exception as error:  # A damaged file can fail in any way.
        raise ValueError(f"{path} holds no mean and std of {channels} channels; copy it again") from error
    if not bool(mean.isfinite().all() and deviation.isfinite().all() and (deviation > 0).all()):
        raise ValueError(f"{path} holds a mean or std that is not finite, or a std of 0; copy it again")
    return mean, deviation


def _load_pairs(folder: Path, scale: float) -> Samples:
    features, *others = _feature_folders(folder)
    if others:
        raise ValueError(f"{folder} holds both {features.name} and {others[0].name}; move one of them elsewhere")
    labels = features.with_name(f"{features.name.removesuffix('features')}labels")
    if not labels.is_dir():
        raise ValueError(f"the labels folder {labels} is missing; copy it beside {features.name}")
    names = sorted(path.name for path in features.glob("*.npy"))
    alone = sorted(set(names) ^ {path.name for path in labels.glob("*.npy")})
    if alone:
        has, lacks = (features, labels) if (features / alone[0]).exists() else (labels, features)
        raise ValueError(
            f"{len(alone)} files have no partner: {alone[0]} is in {has.name}, not in {lacks.name}; copy it"
        )
    paths = [features / name for name in names]
    rows = _Files(paths)
    return LatentSamples(
        rows,
        content=_content(paths, folder),
        labels=torch.tensor([_one_label(labels / name) for name in names]),
        shift=torch.zeros(()),
        scale=torch.tensor(scale),
    )


def _one_label(path: Path) -> int:
    array = _load_array(path)
    if array.size != 1 or not float(array.item()).is_integer():
        raise ValueError(f"{path} holds {array.size} numbers of type {array.dtype}, not one class; encode it again")
    return int(array.item())


def _content(paths: Sequence[Path], root: Path | None = None) -> str:
    """A hash of files; see `MOST_HASHED_BYTES`."""
    digest, stats = hashlib.sha256(), [path.stat() for path in paths]
    whole_bytes = sum(stat.st_size for stat in stats) <= MOST_HASHED_BYTES
    for path, stat in zip(paths, stats, strict=True):
        digest.update(f"{path.relative_to(root) if root else path.name} {stat.st_size};".encode())
        if whole_bytes:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        else:
            digest.update(f"{stat.st_mtime_ns};".encode())
    return digest.hexdigest()


def _vae_folder(source: str | Path) -> Path:
    folder = Path(source).expanduser()
    inner = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    if not (inner / "config.json").is_file():
        raise FileNotFoundError(f"there is no config.json in {source}; pass the folder of a diffusers AutoencoderKL")
    return inner


def _vae_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = config["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no configuration of a diffusers model; copy it again") from error
    if kind != "AutoencoderKL":
        raise ValueError(
            f"{folder} holds a {kind}, only AutoencoderKL can be read; encode the images with its own tools"
        )
    # What diffusers takes where the configuration says nothing.
    config = {"in_channels": 3, "latent_channels": 4, "block_out_channels": [64], "scaling_factor": SD_SCALE} | config
    whole_numbers = all(isinstance(config[name], int) for name in ("in_channels", "latent_channels"))
    if not whole_numbers or not isinstance(config["block_out_channels"], list):
        raise ValueError(f"{path} is no configuration of an AutoencoderKL; copy it again")
    return config


def _vae_weights(folder: Path) -> list[Path]:
    weights = sorted(folder.glob(_VAE_WEIGHTS), key=str)
    if not weights:
        raise MissingWeights(f"{folder} holds no {_VAE_WEIGHTS}; put the safetensors weights there")
    return weights


def _factors(config: dict[str, Any], scale: float | None) -> tuple[Tensor, Tensor]:
    """Shift and scale: numbers, or shape (C, 1, 1) where the configuration has a mean and deviation per channel."""
    _check_scale(scale)
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
        seen = " ".join(str(error).split())[:160]
        raise ValueError(f"{folder} is no whole AutoencoderKL ({seen}); copy it again") from error
    if info["missing_keys"]:  # diffusers would go on with random weights
        raise ValueError(f"{folder} is no whole AutoencoderKL (it lacks {info['missing_keys'][0]}); copy it again")
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
    progress: Callable[[int, int], None] | None,
) -> None:
    vae, n = _autoencoder(folder, device), len(samples)
    counter = path.with_name("done.json")
    with whole(path) as partial:
        # The count is written after the rows, so that every row below it is on disk.
        done = json.loads(counter.read_text()) if counter.is_file() and partial.stat().st_size else 0
        mode = "r+" if done else "w+"
        stored = np.lib.format.open_memmap(partial, mode, dtype=np.float32, shape=(n, *shape))
        for start in range(done, n, batch_size):
            batch = samples.batch(range(start, min(start + batch_size, n)))
            posterior = vae.encode(batch.x.to(device)).latent_dist
            moments = torch.cat([posterior.mean, posterior.std], dim=1).cpu()
            bad = batch.ids[~moments.flatten(1).isfinite().all(1)]
            if len(bad):
                raise ValueError(f"the autoencoder gives values that are not finite for image {int(bad[0])}; remove it")
            stored[start : start + len(moments)] = moments.numpy()
            stored.flush()
            write_text(counter, json.dumps(start + len(moments)))
            if progress:
                progress(start + len(moments), n)
    counter.unlink(missing_ok=True)
