"""Features of another program: read as they are, or refused in one line."""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from layerprobe.extraction import features_from_arrays, features_from_file, own_splits, store_features
from layerprobe.extraction.features import SPLITS
from layerprobe.extraction.own_features import features_hash

N = 40
LAYERS, LEVELS = ("blocks.0", "blocks.2", "blocks.10"), (0.1, 0.5)


def arrays(**changes: Any) -> dict[str, Any]:
    """Three layers at two levels, in an order that is not theirs, with labels; None takes an array away."""
    generator = np.random.default_rng(0)
    found: dict[str, Any] = {
        f"{layer}@{level:g}": generator.normal(size=(N, 3 + i)).astype(np.float32)
        for level in reversed(LEVELS)
        for i, layer in enumerate(reversed(LAYERS))
    }
    found["labels"] = np.arange(N) % 4
    return {name: values for name, values in (found | changes).items() if values is not None}


def npz(path: Path, content: Mapping[str, Any], **_: Any) -> Path:
    np.savez(path / "own.npz", **content)
    return path / "own.npz"


def compressed(path: Path, content: Mapping[str, Any]) -> Path:
    np.savez_compressed(path / "own.npz", **content)
    return path / "own.npz"


def safetensors(path: Path, content: Mapping[str, Any]) -> Path:
    save_file({name: torch.tensor(values) for name, values in content.items()}, path / "own.safetensors")
    return path / "own.safetensors"


def h5(path: Path, content: Mapping[str, Any]) -> Path:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(path / "own.h5", "w") as file:
        for name, values in content.items():
            file[name] = values
    return path / "own.h5"


@pytest.mark.parametrize("write", [npz, compressed, safetensors, h5])
def test_a_store_holds_the_arrays_row_by_row(write: Callable[..., Path], tmp_path: Path) -> None:
    content = arrays(ids=np.arange(N)[::-1] + 100)
    features = features_from_file(write(tmp_path, content))
    assert (features.layers, features.noise_levels, features.num_samples) == (LAYERS, LEVELS, N)
    splits = own_splits(features)
    store = store_features(features, splits, tmp_path / "store")
    assert (store.layers, store.noise_levels, store.draws) == (LAYERS, LEVELS, 1)
    assert sorted(store.ids) == sorted(content["ids"])
    assert {name: int((store.splits == name).sum()) for name in SPLITS} == {"train": 24, "validation": 8, "test": 8}
    rows = [int(np.flatnonzero(content["ids"] == i)[0]) for i in store.ids]
    assert np.array_equal(store.labels, content["labels"][rows])  # type: ignore[arg-type]
    for layer in LAYERS:
        for level in LEVELS:
            assert np.array_equal(store[layer, level], content[f"{layer}@{level:g}"][rows])
    assert store_features(features, splits, tmp_path / "store").manifest == store.manifest


def test_arrays_in_memory_are_those_of_a_file(tmp_path: Path) -> None:
    content = arrays()
    of_file = features_from_file(npz(tmp_path, content))
    keyed = {
        (name.split("@")[0], float(name.split("@")[1])): torch.tensor(x) for name, x in content.items() if "@" in name
    }
    in_memory = features_from_arrays(keyed, content["labels"].tolist())
    assert features_hash(in_memory) == features_hash(of_file)
    assert features_hash(in_memory) != features_hash(features_from_arrays(keyed))
    close = {("blocks.0", level): keyed["blocks.0", 0.1] for level in (0.12345678, 0.12345679)}
    assert features_from_arrays(close).noise_levels == (0.12345678, 0.12345679)
    half = features_from_arrays({key: x.bfloat16() for key, x in keyed.items()})
    assert np.array_equal(half.read("blocks.0", 0.1), keyed["blocks.0", 0.1].bfloat16().float().numpy())


def test_layers_are_ordered_by_number_by_the_file_or_by_the_user(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(N, 4))
    names = ("down.1@0.2", "mid@0.2", "up.0@0.2")
    content = dict.fromkeys(names, values.astype(np.float32))
    assert features_from_file(npz(tmp_path, content)).layers == ("down.1", "mid", "up.0")
    path = safetensors(tmp_path, content)
    with pytest.raises(
        ValueError, match=r"does not tell in which order its layers run \(down\.1, .*pass --layers with"
    ):
        features_from_file(path)
    assert features_from_file(path, layers=("mid", "down.1")).layers == ("mid", "down.1")
    for order, message in (
        (("mid", "out"), r"has no layer out; it has down\.1"),
        (("mid", "mid"), "a layer is named twice in mid, mid"),
    ):
        with pytest.raises(ValueError, match=message):
            features_from_file(path, layers=order)


def test_labels_are_numbered_and_equal_samples_stay_together() -> None:
    content = arrays(labels=None)
    names = ["cat" if i % 3 else "dog" for i in range(N)]
    features = features_from_arrays(content, names)
    assert features.class_names == ("cat", "dog")
    assert features.labels is not None
    assert features.labels.tolist() == [int(i % 3 == 0) for i in range(N)]
    for name in [name for name in content if "@" in name]:
        content[name] = np.concatenate([content[name], content[name]])
    splits = own_splits(features_from_arrays(content))
    assert sum(len(samples) for _, samples in splits.items()) < 2 * N  # without copies in validation and test
    train = {int(i) % N for i in splits.train.ids}
    assert not train & {int(i) % N for i in [*splits.validation.ids, *splits.test.ids]}


def test_only_ids_tell_that_two_networks_saw_the_same_samples() -> None:
    one, other = arrays(), {name: x + 1 if "@" in name else x for name, x in arrays().items()}
    prints = [own_splits(features_from_arrays(content)).train.fingerprint for content in (one, other)]
    assert prints[0] != prints[1]
    prints = [
        own_splits(features_from_arrays(content | {"ids": np.arange(N)})).train.fingerprint for content in (one, other)
    ]
    assert prints[0] == prints[1]


BLOCK = arrays()["blocks.0@0.1"]
HOSTILE: dict[str, tuple[Mapping[str, Any], str]] = {
    "nan": (
        {"blocks.2@0.5": np.where(np.arange(N)[:, None] == 7, np.nan, np.ones((N, 4)))},
        r"^blocks\.2@0\.5 of \S+own\.npz has values that are not finite in float32 in 1 of 40 rows, first in row 7;",
    ),
    "too large": ({"blocks.2@0.5": np.full((N, 4), 1e300)}, r"not finite in float32 in 40 of 40 rows"),
    "rows": (
        {"blocks.0@0.5": BLOCK[:-1]},
        r"rows of blocks\.10@0\.5 and 39 of blocks\.0@0\.5; give every array one row",
    ),
    "objects": (
        {"blocks.0@0.5": np.array([None] * N)},
        r"^blocks\.0@0\.5 of .* contains Python objects, which are not",
    ),
    "texts": ({"blocks.0@0.5": np.array([["a"]] * N)}, r"blocks\.0@0\.5 of .* holds <U1, not numbers; save it as"),
    "complex": ({"blocks.0@0.5": BLOCK * 1j}, r"holds complex\d+, not numbers"),
    "1-D": ({"blocks.0@0.5": BLOCK[:, 0]}, r"has shape \(40,\); pass \(samples, features\)$"),
    "tokens": ({"blocks.0@0.5": BLOCK[:, None]}, r"has shape \(40, 1, 5\); .*average or flatten its tokens$"),
    "no features": ({"blocks.0@0.5": BLOCK[:, :0]}, r"has shape \(40, 0\); pass \(samples, features\)$"),
    "twice": ({"blocks.0@0.50": BLOCK}, r"has blocks\.0@0\.5 twice, once as blocks\.0@0\.50; keep one"),
    "width": ({"blocks.0@0.5": BLOCK[:, :2]}, r"^blocks\.0 has features of widths \[2, 5\] in .*; give it one width$"),
    "level left out": ({"blocks.0@0.5": None}, r"has no blocks\.0@0\.5; give every layer the same noise levels$"),
    "level above 1": (
        {"blocks.0@1.5": BLOCK},
        r"has an array 'blocks\.0@1\.5'; name features LAYER@LEVEL with a noise",
    ),
    "level no number": ({"blocks.0@low": BLOCK}, r"has an array 'blocks\.0@low'; name features"),
    "level nan": ({"blocks.0@nan": BLOCK}, r"has an array 'blocks\.0@nan'; name features"),
    "no level": ({"blocks.0": BLOCK}, r"has an array 'blocks\.0'; name features LAYER@LEVEL .* labels and ids$"),
    "label below 0": ({"labels": np.arange(N) - 1}, r"has the label -1; leave samples without a label out of all"),
    "labels in float": ({"labels": np.ones(N)}, r"the labels have type float64 and shape \(40,\); pass one integer"),
    "one class": (
        {"labels": np.zeros(N, int)},
        r"all labels of \S+ are of one class, and a probe needs two; leave the",
    ),
    "too few labels": (
        {"labels": np.arange(N - 1)},
        r"the labels of \S+ have shape \(39,\); pass one for each of the 40",
    ),
    "ids twice": ({"ids": np.arange(N) // 2}, r"two samples of \S+ have the same id; give every sample a unique id$"),
    "ids in float": (
        {"ids": np.ones(N)},
        r"the ids of \S+ have type float64; pass one integer for each sample$",
    ),
}


def stored(path: Path, folder: Path) -> None:
    features = features_from_file(path)
    store_features(features, own_splits(features), folder)


@pytest.mark.parametrize(("changes", "message"), HOSTILE.values(), ids=HOSTILE)
def test_what_does_not_fit_is_one_line(changes: Mapping[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        stored(npz(tmp_path, arrays(**changes)), tmp_path / "store")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store" / "shard-00000.safetensors").exists()


def header(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def test_files_that_are_not_what_they_say_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own.npz"
    with pytest.raises(FileNotFoundError, match=r"there is no file .*own\.npz; pass features as \.npz, \.safetensors,"):
        features_from_file(path)
    for content in (b"", b"PK no archive", npz(tmp_path, arrays()).read_bytes()[:-200]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"own\.npz cannot be read as \.npz \(.*\); write it again$"):
            features_from_file(path)
    (tmp_path / "own.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match=r"own\.safetensors cannot be read as \.safetensors \(.*\); write it again$"):
        features_from_file(tmp_path / "own.safetensors")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("blocks.0@0.1.npy", header((10**9, 10**6)))
    with pytest.raises(ValueError, match=r"blocks\.0@0\.1 of \S+ cannot be read: its header says float32 of shape"):
        features_from_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("blocks.0@0.1.npy", header((0, 3)))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("blocks.0@0.1.npy", header((0, 3)))
    with pytest.raises(ValueError, match=r"own\.npz has blocks\.0@0\.1 twice; keep one of them$"):
        features_from_file(path)
    np.savez(path, labels=np.arange(3))
    with pytest.raises(ValueError, match=r"own\.npz has no features; name arrays by layer and noise level, such as"):
        features_from_file(path)
    (tmp_path / "own.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"own\.pkl is none of \.npz, \.safetensors, \.h5, \.hdf5; save the features"):
        features_from_file(tmp_path / "own.pkl")
    monkeypatch.setattr("layerprobe.extraction.own_features._half_of_memory", lambda: 100.0)
    with pytest.raises(ValueError, match=r"takes 4\.\d+e-07 GiB, too much for the memory; save fewer samples"):
        features_from_arrays(arrays())


def test_h5_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "own.h5").write_bytes(b"x")
    with pytest.raises(ModuleNotFoundError, match=r"^h5py is not installed; install layerprobe\[h5\]$"):
        features_from_file(tmp_path / "own.h5")


def test_links_of_h5_are_not_followed(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    path = h5(tmp_path, arrays())
    with h5py.File(path, "a") as file:
        file["blocks.4@0.1"] = h5py.ExternalLink("elsewhere.h5", "x")
    with pytest.raises(ValueError, match=r"blocks\.4@0\.1 of \S+ is a link; store the data themselves$"):
        features_from_file(path)
    with h5py.File(path, "a") as file:
        del file["blocks.4@0.1"]
        file.create_dataset("group/labels", data=["a", "b"])
    with pytest.raises(ValueError, match=r"has an array 'group/labels'; name features LAYER@LEVEL"):
        features_from_file(path)
