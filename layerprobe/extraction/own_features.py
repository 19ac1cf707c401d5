"""Features that another program has computed, as a store: everything that reads a `FeatureStore` works with them.

Arrays are named by layer and noise level, such as `blocks.5@0.3`, and have shape (n, D): one row per sample, in the
same order in all arrays. Beside them there may be `labels` (n,), integers or texts, and `ids` (n,), integers. The kinds
of files are those of `feature_files`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from layerprobe import __version__
from layerprobe.data import Splits, TensorSamples, content_hash, for_probing, numbered_labels, split
from layerprobe.extraction.feature_files import StoredArray, held, stored_arrays
from layerprobe.extraction.features import (
    SPLITS,
    FeatureStore,
    begin_store,
    filled_tensors,
    is_whole,
    shard_path,
)
from layerprobe.extraction.plan import ExtractionPlan

LABELS, IDS = "labels", "ids"
Key = tuple[str, float]
"""Layer and noise level."""


@dataclass(frozen=True, eq=False)
class OwnFeatures:
    """Features by layer and noise level, whose sizes have been checked and whose values have not been read.

    Attributes:
        source: File that they are in, or "arrays".
        layers: Names of the layers, in the order in which they run.
        noise_levels: Noise levels, ascending.
        labels: Class labels, shape (n,), int64; None to measure without labels.
        class_names: Names of the classes, or empty.
        ids: Sample ids, shape (n,), int64; None for the positions.
        num_samples: Number of samples n.
    """

    source: str
    layers: tuple[str, ...]
    noise_levels: tuple[float, ...]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    ids: NDArray[np.int64] | None
    num_samples: int
    _arrays: Mapping[Key, StoredArray]

    def read(self, layer: str, noise_level: float) -> NDArray[np.float32]:
        """Reads the features of a layer at a noise level, shape (n, D).

        Raises:
            ValueError: If a value is not finite, or the file is damaged.
        """
        values = np.asarray(self._arrays[layer, noise_level].read())
        with np.errstate(over="ignore"):
            features: NDArray[np.float32] = values.astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(features).all(1))
        if len(bad):
            raise ValueError(
                f"{_name(layer, noise_level)} of {self.source} has values that are not finite in float32 in {len(bad)} "
                f"of {len(features)} rows, first in row {bad[0]}; leave these samples out of all arrays"
            )
        return features


def features_from_file(path: str | Path, *, layers: Sequence[str] = ()) -> OwnFeatures:
    """Opens a file of features.

    Args:
        path: The file.
        layers: Names of the layers to read, in the order in which they run; by default all of them, ordered by number
            if they are of one list, such as blocks.0 to blocks.11, or by their order in an `.npz`.

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If h5py is needed and not installed.
        ValueError: If the file is damaged or of another kind, or an array does not fit the others.
    """
    path = Path(path)
    return _checked(stored_arrays(path), str(path), layers, keeps_order=path.suffix == ".npz")


def features_from_arrays(
    arrays: Mapping[Any, Any], labels: Any = None, *, ids: Any = None, layers: Sequence[str] = ()
) -> OwnFeatures:
    """Takes features that are in memory.

    Args:
        arrays: Arrays or tensors (n, D) by (layer, noise level), as from `Model.features`, or by "LAYER@LEVEL".
        labels: One label per sample: integers or texts; None to measure without labels.
        ids: One integer per sample; None for the positions.
        layers: As for `features_from_file`; by default the order of the mapping.

    Raises:
        ValueError: If an array does not fit the others.
    """
    named = {_name(*key) if isinstance(key, tuple) and len(key) == 2 else str(key): x for key, x in arrays.items()}
    if len(named) < len(arrays):
        raise ValueError("two arrays have the same layer and noise level; name each once")
    named |= {name: values for name, values in ((LABELS, labels), (IDS, ids)) if values is not None}
    return _checked({name: held(values) for name, values in named.items()}, "arrays", layers, keeps_order=True)


def own_splits(features: OwnFeatures, *, seed: int = 0) -> Splits:
    """Divides the samples as those of a data set are, see `layerprobe.data.for_probing`.

    Samples whose features are equal stay in one split. The samples of the result are the features of the first layer at
    the first level, shape (1, D).

    Args:
        features: Features, with or without labels.
        seed: Seed of the assignment of samples to splits.

    Raises:
        ValueError: If the samples cannot be divided.
    """
    first = torch.from_numpy(features.read(features.layers[0], features.noise_levels[0])).unsqueeze(1)
    labels = None if features.labels is None else torch.from_numpy(features.labels)
    ids = None if features.ids is None else torch.from_numpy(features.ids)
    # Only the ids that the user gave tell that features of two networks are of the same samples.
    told = None if ids is None else content_hash("own features", ids, *([] if labels is None else [labels]))
    samples = TensorSamples(first, labels, ids=ids, class_names=features.class_names, fingerprint=told)
    return for_probing(split(samples, seed=seed), given={})


def store_features(features: OwnFeatures, splits: Splits, folder: str | Path, *, seed: int = 0) -> FeatureStore:
    """Writes features into a store; a finished one is kept.

    Args:
        features: The features.
        splits: Result of `own_splits`; samples that it left out are left out here.
        folder: Folder of the store; created if it does not exist.
        seed: Seed of the measures.

    Raises:
        ValueError: If a value is not finite, or the folder belongs to other features.
    """
    folder = Path(folder)
    positions = {int(i): position for position, i in enumerate(_ids(features).tolist())}
    parts = [samples for _, samples in splits.items()]
    rows = np.array([positions[int(i)] for part in parts for i in part.ids])
    codes = np.repeat(np.arange(len(SPLITS)), [len(part) for part in parts]).astype(np.int64)
    plan = ExtractionPlan(features.layers, features.noise_levels, seed=seed, shard_size=len(rows))
    widths = {layer: features._arrays[layer, features.noise_levels[0]].shape[1] for layer in features.layers}
    columns = {"ids": _ids(features)[rows], "splits": codes}
    if features.labels is not None:
        columns[LABELS] = features.labels[rows]
    manifest = {
        "layerprobe": __version__,
        "plan": plan.to_dict(),
        "plan_hash": plan.hash(),
        "model": f"features of {Path(features.source).name}",
        "given": features.source,
        "data": {name: samples.fingerprint for name, samples in splits.items()},
        "class_names": list(features.class_names),
        "layer_shapes": {layer: [1, width] for layer, width in widths.items()},
        "num_samples": len(rows),
        "num_shards": 1,
    }
    begin_store(folder, manifest, columns)
    if not is_whole(shard_path(folder, 0)):
        shapes = {layer: (len(plan.noise_levels), 1, len(rows), width) for layer, width in widths.items()}
        with filled_tensors(shard_path(folder, 0), shapes) as put:
            for layer in features.layers:
                for index, level in enumerate(features.noise_levels):
                    put(layer, (index, 0), np.ascontiguousarray(features.read(layer, level)[rows]))
    return FeatureStore.open(folder)


def features_hash(features: OwnFeatures) -> str:
    """Returns a hash of all values, names, labels and ids, 16 hexadecimal digits; it reads every array once."""
    parts = (torch.from_numpy(features.read(*key)) for key in sorted(features._arrays))
    digests = [content_hash(part) for part in parts]
    tables = [values for values in (features.labels, features.ids) if values is not None]
    return content_hash(features.layers, *digests, *map(torch.from_numpy, tables))[:16]


def _ids(features: OwnFeatures) -> NDArray[np.int64]:
    return np.arange(features.num_samples) if features.ids is None else features.ids


def _name(layer: Any, noise_level: Any) -> str:
    return f"{layer}@{repr(float(noise_level)).removesuffix('.0')}"  # all digits, since it is read again


# --------------------------------------------------------------------------------------------------------------- checks


def _checked(arrays: Mapping[str, StoredArray], source: str, order: Sequence[str], *, keeps_order: bool) -> OwnFeatures:
    """Features whose names and sizes fit together."""
    keyed: dict[Key, StoredArray] = {}
    for name, array in arrays.items():
        if name not in (LABELS, IDS):
            key = _key(name, source)
            if key in keyed:
                raise ValueError(f"{source} has {_name(*key)} twice, once as {name}; keep one of them")
            keyed[key] = array
    if not keyed:
        raise ValueError(f"{source} has no features; name arrays by layer and noise level, such as blocks.5@0.3")
    for key, array in keyed.items():
        _check_array(_name(*key), array, source)
    lengths = {_name(*key): array.shape[0] for key, array in keyed.items()}
    count = next(iter(lengths.values()))
    if other := next((name for name, length in lengths.items() if length != count), None):
        raise ValueError(
            f"{source} has {count} rows of {next(iter(lengths))} and {lengths[other]} of {other}; "
            "give every array one row per sample, in the same order"
        )
    layers = _ordered(tuple(dict.fromkeys(layer for layer, _ in keyed)), order, source, keeps_order=keeps_order)
    levels = tuple(sorted({level for layer, level in keyed if layer in layers}))
    for layer in layers:
        if missing := [level for level in levels if (layer, level) not in keyed]:
            raise ValueError(f"{source} has no {_name(layer, missing[0])}; give every layer the same noise levels")
        widths = {keyed[layer, level].shape[1] for level in levels}
        if len(widths) > 1:
            raise ValueError(f"{layer} has features of widths {sorted(widths)} in {source}; give it one width")
    for name in (LABELS, IDS):
        if name in arrays and arrays[name].shape != (count,):
            raise ValueError(
                f"the {name} of {source} have shape {arrays[name].shape}; pass one for each of the {count} samples"
            )
    labels, names = _labels(arrays.get(LABELS), source)
    kept = {(layer, level): keyed[layer, level] for layer in layers for level in levels}
    return OwnFeatures(source, layers, levels, labels, names, _read_ids(arrays.get(IDS), source), count, kept)


def _key(name: str, source: str) -> Key:
    layer, _, level = name.rpartition("@")
    try:
        value = float(level)
    except ValueError:
        value = math.nan
    if not layer or not 0 <= value <= 1:
        raise ValueError(
            f"{source} has an array {name[:80]!r}; name features LAYER@LEVEL with a noise level from 0 (clean) to 1, "
            f"such as blocks.5@0.3, and the others {LABELS} and {IDS}"
        )
    return layer, value


def _check_array(name: str, array: StoredArray, source: str) -> None:
    if not re.match(r"(b?float|u?int)\d+$", array.dtype):
        raise ValueError(f"{name} of {source} holds {array.dtype}, not numbers; save it as floating point")
    if len(array.shape) != 2 or not array.shape[1]:
        advice = "; average or flatten its tokens" if len(array.shape) > 2 else ""
        raise ValueError(f"{name} of {source} has shape {array.shape}; pass (samples, features){advice}")
    if 4 * math.prod(array.shape) > _half_of_memory():
        raise ValueError(
            f"{name} of {source} takes {4 * math.prod(array.shape) / 2**30:.3g} GiB, too much for the memory; save "
            "fewer samples or narrower features"
        )


def _ordered(layers: tuple[str, ...], order: Sequence[str], source: str, *, keeps_order: bool) -> tuple[str, ...]:
    """The layers in the order in which they run."""
    if order:
        if unknown := [name for name in order if name not in layers]:
            raise ValueError(f"{source} has no layer {unknown[0]}; it has {', '.join(layers[:8])}")
        if len(set(order)) < len(order):
            raise ValueError(f"a layer is named twice in {', '.join(order)}; name each layer once")
        return tuple(order)
    numbers = [re.fullmatch(r"(.*?)(\d+)", layer) for layer in layers]
    if all(numbers) and len({match[1] for match in numbers if match}) == 1:
        return tuple(sorted(layers, key=lambda layer: int(re.findall(r"\d+$", layer)[0])))
    if keeps_order or len(layers) == 1:
        return layers
    raise ValueError(
        f"{source} does not tell in which order its layers run ({', '.join(layers[:4])}, ...); pass --layers with all "
        "of them in this order"
    )


def _labels(array: StoredArray | None, source: str) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    if array is None:
        return None, ()
    values = array.read()
    if values.dtype.kind == "i" and values.size and values.min() < 0:
        raise ValueError(
            f"{source} has the label {values.min()}; leave samples without a label out of all arrays, and count "
            "classes from 0"
        )
    numbers, names = numbered_labels(values)
    labels: NDArray[np.int64] = numbers.numpy()
    counts = np.bincount(labels)
    if (counts > 0).sum() < 2:
        raise ValueError(f"all labels of {source} are of one class, and a probe needs two; leave the labels out")
    return labels, names


def _read_ids(array: StoredArray | None, source: str) -> NDArray[np.int64] | None:
    if array is None:
        return None
    values = array.read()
    if values.dtype.kind not in "iu":
        raise ValueError(f"the ids of {source} have type {values.dtype}; pass one integer for each sample")
    ids: NDArray[np.int64] = values.astype(np.int64)
    if len(np.unique(ids)) < len(ids):
        raise ValueError(f"two samples of {source} have the same id; give every sample a unique id")
    return ids


def _half_of_memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 if hasattr(os, "sysconf") else math.inf
