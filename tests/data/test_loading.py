from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from pictures import all_ids, encode, expected, noise, pixels, write_folder, write_parquet
from PIL import Image

from layerprobe.data import loading
from layerprobe.data.kind import DataKind
from layerprobe.data.loading import guess_modality, load
from layerprobe.data.samples import Samples, Subset, TensorSamples
from layerprobe.data.tables import first_id

pytestmark = pytest.mark.usefixtures("offline")


def test_load_divides_what_it_reads(tmp_path: Path) -> None:
    images = noise(20)
    write_folder(tmp_path, images)
    splits = load(tmp_path, num_train=6, seed=5, expect_shape=(3, 8, 8), require_labels=True)
    assert [len(samples) for _, samples in splits.items()] == [6, 4, 4]
    by_row = expected([images[i] for i in (*range(0, 20, 2), *range(1, 20, 2))])
    for _, samples in splits.items():
        assert torch.equal(pixels(samples), by_row[samples.ids])
    assert (
        all_ids(load(tmp_path, num_train=6, seed=5)) == all_ids(splits) != all_ids(load(tmp_path, num_train=6, seed=6))
    )


def test_load_tells_what_the_model_takes(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(image) for image in noise(9, mode="L")])
    for shape, message in {
        (3, 32, 32): r"images are 8x8 with 1 channel but the model takes 3x32x32; pass --size 32 --channels 3$",
        (1, 32, 32): r"takes 1x32x32; pass --size 32$",
        (3, 8, 8): r"takes 3x8x8; pass --channels 3$",
        (3, 8, 16): r"takes 3x8x16; resize them to 8x16 first$",
        (4, 32, 32): r"takes 4x32x32; encode them as the model's training did: pass --vae",
        (263, 196): r"takes 263x196; encode them",
    }.items():
        with pytest.raises(ValueError, match=message):
            load(path, expect_shape=shape)
    assert load(path, size=32, channels=3, expect_shape=(3, 32, 32)).train.shape == (3, 32, 32)
    with pytest.raises(
        ValueError, match=r"x.parquet has no labels; pass --label-column, or put the items in one folder"
    ):
        load(path, require_labels=True)
    assert load(path).train.batch([0]).labels is None


def test_importing_the_package_imports_no_data_library() -> None:
    code = "import sys, layerprobe.data; print(sorted({'datasets', 'PIL', 'pyarrow', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_real_cifar10(shared_data: Path) -> None:
    splits = load(shared_data / "cifar10", split="test", size=16, num_train=100, num_validation=50, num_test=50)
    assert splits.train.shape == (3, 16, 16)
    assert splits.train.class_names[:2] == ("airplane", "automobile")
    rows = datasets.load_dataset("parquet", data_files=str(shared_data / "cifar10" / "test.parquet"), split="train")
    row = int(splits.test.ids[0]) - first_id("test")
    image = rows[row]["image"].resize((16, 16), Image.Resampling.BICUBIC)
    assert torch.equal(pixels(Subset(splits.test, [0], name="first")), expected([image]))
    assert splits.test.labels is not None
    assert splits.test.labels[0] == rows[row]["label"]
    assert splits.test.labels.bincount().tolist() == [5] * 10


def test_real_mnist(shared_data: Path) -> None:
    splits = load(shared_data / "mnist", split="test", num_train=100, num_validation=50, num_test=50)
    assert splits.train.shape == (1, 28, 28)
    batch = splits.train.batch(range(100))
    assert batch.x.min() == -1
    assert batch.x[:, :, 0].max() == -1  # paper at the border


def test_a_new_kind_of_data_takes_its_record_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/architecture.md says: a `DataKind` that is recognized by its files and loads them."""

    def load_numbers(source: str | Path, *, split: str | None = None) -> dict[str, Samples]:
        values = [float(path.read_text()) for path in sorted(Path(source).glob("*.number"))]
        return {"train": TensorSamples(torch.tensor(values).view(-1, 1, 1, 1))}

    kind = DataKind(load_numbers, (".number",), telling=(".number",))
    monkeypatch.setattr(loading, "KINDS", loading.KINDS | {"number": kind})
    for i in range(10):
        (tmp_path / f"{i}.number").write_text(str(i / 10))
    assert guess_modality(tmp_path) == "number"
    splits = load(tmp_path, num_train=4, num_validation=1, num_test=1)
    assert splits.train.shape == (1, 1, 1)
    assert len(splits.train) == 4


def test_files_of_several_modalities_are_asked_for(tmp_path: Path) -> None:
    write_folder(tmp_path, noise(20))
    (tmp_path / "demo.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="20 image files and 1 video file; pass --modality image, or another"):
        load(tmp_path)
    reading = load(tmp_path, modality="image").train.reading
    assert reading is not None
    assert reading.files_left == {".mp4": 1}


@pytest.mark.parametrize("layout", ["HWC", "CHW", "HW"])
def test_arrays_of_pixels_are_images(tmp_path: Path, layout: str) -> None:
    images = noise(20, mode="L" if layout == "HW" else "RGB")
    for i, image in enumerate(images):
        array = np.asarray(image).transpose(2, 0, 1) if layout == "CHW" else np.asarray(image)
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        np.save(tmp_path / "ab"[i % 2] / f"{i:03}.npy", array)
    splits = load(tmp_path)
    assert (splits.train.modality, splits.train.num_classes) == ("image", 2)
    by_row = expected([images[i] for i in (*range(0, 20, 2), *range(1, 20, 2))])
    assert torch.equal(pixels(splits.test), by_row[splits.test.ids])


@pytest.mark.parametrize("shape", [(30, 22, 3), (30, 66), (30, 22, 6)])
def test_arrays_of_positions_are_motion(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "0.npy", np.zeros(shape, np.float32))
    assert guess_modality(tmp_path) == "motion"


@pytest.mark.parametrize("shape", [(4, 32, 32), (1, 4, 32, 32), (8, 16, 16), (1, 28, 28)])
def test_arrays_of_latents_are_asked_for(tmp_path: Path, shape: tuple[int, ...]) -> None:
    (tmp_path / "cat").mkdir()
    np.save(tmp_path / "cat" / "0.npy", np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match=r"cat/0.npy contains float32 of shape .*, a latent or an image rather than"):
        guess_modality(tmp_path)


def test_arrays_beside_pictures_are_left(tmp_path: Path) -> None:
    write_folder(tmp_path, noise(20))
    np.save(tmp_path / "labels.npy", np.arange(20.0))
    splits = load(tmp_path)
    assert splits.train.modality == "image"
    assert splits.train.reading is not None
    assert splits.train.reading.files_left == {".npy": 1}


def test_real_recordings_with_split_words_in_their_names(shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    rows = datasets.load_dataset(
        "parquet", data_files=str(shared_data / "spoken-digits" / "test.parquet"), split="train"
    ).cast_column("audio", datasets.Audio(decode=False))
    for i, row in enumerate(rows.select(range(60))):
        folder = tmp_path / str(row["label"] % 2)
        folder.mkdir(exist_ok=True)
        (folder / f"{'test' if i % 5 == 0 else 'train'}_{i}.wav").write_bytes(row["audio"]["bytes"])
    splits = load(tmp_path, length=48)
    assert sum(len(samples) for _, samples in splits.items()) == 60
    assert splits.train.num_classes == 2
