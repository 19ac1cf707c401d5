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
from typing import Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from layerprobe.checksums import check, is_damaged, recorded_write, told_again
from layerprobe.extraction.plan import ExtractionPlan
from layerprobe.files import one_line
from layerprobe.memory import pass_on
from layerprobe.records import claim, damaged, parse, read_record

SPLITS = ("train", "validation", "test")
MAX_SHARDS = 10**6
REMEDY = "repeat the `layerprobe probe` or `extract` that made it, which makes it again"


class _Tokens(TypedDict):
    shards: list[int]
    grids: dict[str, tuple[int, ...] | None]
    padded: NotRequired[bool]


class _Column(TypedDict):
    class_names: list[str]
    labels_hash: str
    axis: NotRequired[Any]


class _Manifest(TypedDict):
    plan: ExtractionPlan
    num_shards: int
    num_samples: NotRequired[int]
    layer_shapes: NotRequired[dict[str, tuple[int, int]]]
    columns: NotRequired[dict[str, _Column]]
    tokens: NotRequired[_Tokens]
    class_names: NotRequired[list[str]]
    data: NotRequired[dict[str, Any]]
    layerprobe: NotRequired[str]
    plan_hash: NotRequired[str]
    model: NotRequired[str]
    given: NotRequired[str]
    model_hash: NotRequired[str]
    schedule: NotRequired[str]
    schedule_hash: NotRequired[str]
    prediction: NotRequired[str]


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
        manifest: Record of the plan, the model and the data; "given" is the source of features that another program
            has computed.
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
        manifest = read_record(folder / "manifest.json", _manifest, remedy=REMEDY)
        files = [folder / "samples.safetensors", *(shard_path(folder, i) for i in range(manifest["num_shards"]))]
        files += [token_path(folder, i) for i in manifest.get("tokens", {}).get("shards", ())]
        missing = [path for path in files if not path.is_file()]
        if missing:
            raise ValueError(
                f"{folder} is unfinished ({len(missing)} of {len(files)} files missing); "
                "repeat the command that made it"
            )
        samples = _read_samples(folder / "samples.safetensors", manifest)
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
            rows.append(self._read(shard_path(self.folder, index), layer, level, draw))
        features = self._joined(rows, len(self.ids))
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
            rows.append(self._read(token_path(self.folder, index), layer, level, draw))
        tokens = self._joined(rows, len(self.token_rows))
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

    def _read(self, path: Path, layer: str, level: int, draw: int) -> NDArray[np.float32]:
        """The rows of a layer at a noise level in a shard."""
        check(path, REMEDY)
        try:
            with safe_open(path, framework="np") as shard:
                values = shard.get_slice(layer)
                if values.get_dtype() != "F32" or values.get_shape()[:2] != [len(self.noise_levels), self.draws]:
                    raise damaged(path, f"{layer} is {values.get_dtype()} {values.get_shape()}", REMEDY)
                rows: NDArray[np.float32] = values[level : level + 1, draw : draw + 1][0, 0]
                return rows
        except SafetensorError as error:
            raise damaged(path, one_line(error), REMEDY) from error

    def _joined(self, rows: list[NDArray[np.float32]], count: int) -> NDArray[np.float32]:
        if len({part.shape[1:] for part in rows}) > 1 or sum(map(len, rows)) != count:
            shapes = ", ".join(str(part.shape) for part in rows[:4])
            raise damaged(self.folder, f"its shards have the shapes {shapes} for {count} samples", REMEDY)
        return np.concatenate(rows)

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
    if not is_whole(folder / "samples.safetensors"):
        write_tensors(folder / "samples.safetensors", samples)


def write_tensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Writes a safetensors file atomically."""
    with recorded_write(path) as partial:
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
    with recorded_write(path) as partial, partial.open("wb") as file:
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


def is_whole(path: Path) -> bool:
    """Whether a file of a store exists and can be read, with the content that was written; tells if it is damaged."""
    if not path.is_file():
        return False
    whole = not is_damaged(path)
    if whole:  # A file without a recorded checksum at least has all of its bytes.
        try:
            with safe_open(path, framework="np"):
                return True
        except (SafetensorError, OSError) as error:
            pass_on(error)
    told_again(path)
    return False


def _manifest(value: Any) -> dict[str, Any]:
    """Checks a manifest: the types of its values, and that they agree."""
    manifest = parse(_Manifest, value)
    plan: ExtractionPlan = manifest["plan"]
    tokens = manifest.get("tokens", {})
    samples, shards = manifest.get("num_samples"), manifest["num_shards"]
    if not 0 <= shards <= MAX_SHARDS or (samples is not None and shards != -(-samples // plan.shard_size)):
        raise ValueError(f"{shards} shards cannot hold {samples} samples")
    if set(manifest.get("layer_shapes", plan.layers)) != set(plan.layers):
        raise ValueError("its layers have no shapes")
    if not all(0 <= shard < shards for shard in tokens.get("shards", [])):
        raise ValueError("it names shards of tokens that there are not")
    if tokens and set(tokens["grids"]) != set(plan.layers):
        raise ValueError("its layers have no grids of tokens")
    checked: dict[str, Any] = value
    return checked


def _read_samples(path: Path, manifest: Mapping[str, Any]) -> dict[str, NDArray[np.int64]]:
    """Reads ids, labels and splits of the samples."""
    check(path, REMEDY)
    try:
        samples: dict[str, NDArray[np.int64]] = load_file(path)
    except SafetensorError as error:
        raise damaged(path, one_line(error), REMEDY) from error
    needed = ["ids", "splits", *map(column_key, manifest.get("columns", {}))]
    if lacking := [name for name in needed if name not in samples]:
        raise damaged(path, f"it has no {lacking[0]}", REMEDY)
    count = manifest.get("num_samples", len(samples["ids"]))
    if any(len(column) != count for column in samples.values()):
        raise damaged(path, f"it has not {count} samples", REMEDY)
    if not np.isin(samples["splits"], range(len(SPLITS))).all():
        raise damaged(path, "it names splits that there are not", REMEDY)
    return samples
