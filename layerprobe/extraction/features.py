"""The feature store: features of every layer, sample and noise level on disk.

A store is a folder with `manifest.json` (plan, model, data), `samples.safetensors` (ids, labels, splits and extra label
columns) and safetensors shards of consecutive samples. A shard has one tensor per layer, shape (noise levels, draws,
samples, D). If the plan keeps tokens, a shard with such samples has a second file with one tensor per layer, shape
(noise levels, draws, kept samples, T, D). All features are float32, because residual streams exceed the range of
float16. Files are written atomically.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from layerprobe.files import atomic_write, claim

SPLITS = ("train", "validation", "test")


class FeatureStore:
    """Features of one model on one data set, read from disk on access.

    Attributes:
        folder: Folder of the store.
        layers: Layer names, in execution order.
        noise_levels: Noise levels, ascending.
        draws: Number of noise draws per sample and noise level.
        ids: Sample ids, shape (n,), int64.
        labels: Class labels, shape (n,), int64, or None for unlabeled data.
        splits: Split names, shape (n,), each "train", "validation" or "test".
        columns: Extra labels by column name, shape (n,), or (n, frames) for labels of frames; int64, with
            `layerprobe.data.MISSING` for missing labels. The manifest holds their class names.
        manifest: Record of the plan, the model and the data.
        tokens_padded: Whether kept tokens may be padding; only probes on labels of frames leave it out, since padded
            frames have no label.
        token_rows: Rows of the samples whose tokens are kept, shape (n_kept,), ascending; empty without tokens.
        token_ids: Ids of these samples, shape (n_kept,).
        token_labels: Class labels of these samples, shape (n_kept,), or None.
        token_splits: Split names of these samples, shape (n_kept,).
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], samples: Mapping[str, NDArray[np.int64]]) -> None:
        self.folder, self.manifest = folder, manifest
        self.layers: tuple[str, ...] = tuple(manifest["plan"]["layers"])
        self.noise_levels: tuple[float, ...] = tuple(manifest["plan"]["noise_levels"])
        self.draws: int = manifest["plan"]["draws"]
        self.ids = samples["ids"]
        self.labels = samples.get("labels")
        self.columns = {name: samples[column_key(name)] for name in manifest.get("columns", {})}
        self.splits = np.array(SPLITS, dtype=object)[samples["splits"]]
        self.tokens_padded: bool = manifest.get("tokens", {}).get("padded", False)
        self.token_rows = token_rows(samples["splits"], manifest["plan"].get("token_samples", 0))
        self.token_ids, self.token_splits = self.ids[self.token_rows], self.splits[self.token_rows]
        self.token_labels = None if self.labels is None else self.labels[self.token_rows]

    @classmethod
    def open(cls, folder: str | Path) -> FeatureStore:
        """Opens a finished store.

        Raises:
            FileNotFoundError: If the folder contains no store.
            ValueError: If files are missing because the extraction has not finished, or a file is damaged.
        """
        folder = Path(folder)
        if not (folder / "manifest.json").is_file():
            raise FileNotFoundError(f"{folder} contains no features; run `layerprobe probe` or `extract` first")
        manifest = json.loads((folder / "manifest.json").read_text())
        files = [folder / "samples.safetensors", *(shard_path(folder, i) for i in range(manifest["num_shards"]))]
        files += [token_path(folder, i) for i in manifest.get("tokens", {}).get("shards", ())]
        missing = [path for path in files if not path.is_file()]
        if missing:
            raise ValueError(
                f"{folder} is unfinished ({len(missing)} of {len(files)} files missing); "
                "repeat the command that made it"
            )
        try:
            samples = load_file(folder / "samples.safetensors")
        except SafetensorError as error:
            raise _damaged(folder / "samples.safetensors", error) from error
        return cls(folder, manifest, samples)

    def __getitem__(self, key: tuple[str, float]) -> NDArray[np.float32]:
        """Returns the features of a layer at a noise level for the first draw, shape (n, D)."""
        return self.features(*key)

    def features(
        self, layer: str, noise_level: float, *, draw: int = 0, split: str | None = None
    ) -> NDArray[np.float32]:
        """Returns the features of a layer at a noise level, shape (n, D).

        Args:
            layer: Name of the layer.
            noise_level: Noise level of the plan.
            draw: Index of the noise draw.
            split: Split whose rows to return; None for all rows.

        Raises:
            KeyError: If the layer, level or draw was not extracted, or the split is unknown.
        """
        level = self._level(layer, noise_level, draw, split)
        rows = []
        for index in range(self.manifest["num_shards"]):
            with _open_shard(shard_path(self.folder, index)) as shard:
                rows.append(shard.get_slice(layer)[level : level + 1, draw : draw + 1][0, 0])
        features: NDArray[np.float32] = np.concatenate(rows)
        return features if split is None else features[self.splits == split]

    def tokens(self, layer: str, noise_level: float, *, draw: int = 0, split: str | None = None) -> NDArray[np.float32]:
        """Returns the kept tokens of a layer at a noise level, shape (n_kept, T, D), in the order of `token_rows`.

        Args:
            layer: Name of the layer.
            noise_level: Noise level of the plan.
            draw: Index of the noise draw.
            split: Split whose rows to return; None for all rows.

        Raises:
            KeyError: If the layer, level or draw was not extracted, the split is unknown, or no tokens were kept.
        """
        level = self._level(layer, noise_level, draw, split)
        self._check_tokens()
        rows = []
        for index in self.manifest["tokens"]["shards"]:
            with _open_shard(token_path(self.folder, index)) as shard:
                rows.append(shard.get_slice(layer)[level : level + 1, draw : draw + 1][0, 0])
        tokens: NDArray[np.float32] = np.concatenate(rows)
        return tokens if split is None else tokens[self.token_splits == split]

    def grid(self, layer: str) -> tuple[int, ...] | None:
        """Returns the row-major grid of the kept tokens of a layer: (L,), (H, W) or (F, H, W); None without a grid.

        Raises:
            KeyError: If the layer was not extracted, or no tokens were kept.
        """
        self._level(layer, self.noise_levels[0], 0, None)
        self._check_tokens()
        grid = self.manifest["tokens"]["grids"][layer]
        return None if grid is None else tuple(grid)

    def _level(self, layer: str, noise_level: float, draw: int, split: str | None) -> int:
        if split is not None and split not in SPLITS:
            raise KeyError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")
        if layer not in self.layers or noise_level not in self.noise_levels or not 0 <= draw < self.draws:
            raise KeyError(
                f"{layer} at noise level {noise_level}, draw {draw} was not extracted; the store has layers "
                f"{self.layers}, noise levels {self.noise_levels} and {self.draws} draws"
            )
        return self.noise_levels.index(noise_level)

    def _check_tokens(self) -> None:
        if not len(self.token_rows):
            raise KeyError(f"{self.folder} contains no tokens; extract with token_samples into another folder")


def column_key(name: str) -> str:
    """Returns the key of an extra label column in `samples.safetensors`."""
    return f"column/{name}"


def token_rows(splits: NDArray[np.int64], token_samples: int) -> NDArray[np.int64]:
    """Returns the first rows of each split, ascending.

    Args:
        splits: Split of each sample as an index into `SPLITS`, shape (n,).
        token_samples: Maximum number of rows per split.
    """
    return np.concatenate([np.flatnonzero(splits == code)[:token_samples] for code in range(len(SPLITS))])


def shard_path(folder: Path, index: int) -> Path:
    """Returns the path of a shard."""
    return folder / f"shard-{index:05d}.safetensors"


def token_path(folder: Path, index: int) -> Path:
    """Returns the path of the token file of a shard; the file exists only if the shard keeps tokens."""
    return folder / f"tokens-{index:05d}.safetensors"


def begin_store(folder: Path, manifest: Mapping[str, Any], samples: Mapping[str, NDArray[np.int64]]) -> None:
    """Begins a store for this manifest in a folder, or checks that the folder already belongs to it.

    Raises:
        ValueError: If the folder contains features of another run; nothing is written then.
    """
    claim(folder, "manifest.json", manifest, what="features")
    if not (folder / "samples.safetensors").is_file():
        write_tensors(folder / "samples.safetensors", samples)


def write_tensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Writes a safetensors file atomically."""
    with atomic_write(path) as partial:
        # safetensors silently writes strided arrays in memory order.
        save_file({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}, partial)


@contextmanager
def filled_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Callable[[str, tuple[int, ...], NDArray[np.float32]], None]]:
    """Writes float32 tensors into a safetensors file block by block, so that no tensor is held in memory.

        with filled_tensors(path, {"a": (2, 3, 5)}) as put:
            put("a", (1, 2), np.zeros(5, np.float32))  # a[1, 2] = 0

    Blocks that are never put are 0. The file is written atomically.

    Source: the format is https://huggingface.co/docs/safetensors, "Format".
    """
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + end)

        def put(name: str, index: tuple[int, ...], block: NDArray[np.float32]) -> None:
            inner = shapes[name][len(index) :]
            assert block.shape == inner and block.dtype == np.float32
            position = int(np.ravel_multi_index(index, shapes[name][: len(index)]))
            file.seek(start + header[name]["data_offsets"][0] + 4 * position * math.prod(inner))
            file.write(np.asarray(block, "<f4", order="C").data)

        yield put


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: SafetensorError) -> ValueError:
    return ValueError(f"{path} is damaged ({error}); delete it and repeat the command that made it")
