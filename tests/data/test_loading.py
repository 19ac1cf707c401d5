from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import datasets
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
