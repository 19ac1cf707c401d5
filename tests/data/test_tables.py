from __future__ import annotations

import io
import logging
import os
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pictures import encode, expected, noise, pixels, write_folder, write_parquet

from layerprobe.data import load
from layerprobe.data.images import load_images
from layerprobe.data.samples import pixels_to_float
from layerprobe.data.tables import first_id

pytestmark = pytest.mark.usefixtures("offline")


def test_parquet_file(tmp_path: Path) -> None:
    images = noise(12)
    path = write_parquet(tmp_path / "x.parquet", [encode(image) for image in images], label=[0, 1, 2] * 4)
    parts = load_images(path)
    assert list(parts) == ["train"]
    samples = parts["train"]
    assert torch.equal(pixels(samples), expected(images))
    assert samples.shape == (3, 8, 8)
    assert samples.modality == "image"
    assert (samples.num_classes, samples.class_names) == (3, ("0", "1", "2"))
    batch = samples.batch([5, 0, 5])
    assert batch.labels is not None
    assert batch.ids.tolist() == [5, 0, 5]
    assert batch.labels.tolist() == [2, 0, 2]
    assert torch.equal(batch.x, pixels_to_float(expected(images)[[5, 0, 5]]))


def test_folder_of_parquet_files_has_parts(tmp_path: Path) -> None:
    train, test = noise(10), noise(4, seed=1)
    write_parquet(tmp_path / "train.parquet", [encode(image) for image in train], label=[0, 1] * 5)
    write_parquet(tmp_path / "test.parquet", [encode(image) for image in test], label=[0, 1] * 2)
    (tmp_path / "README.md").write_text("Nothing to see.")
    parts = load_images(tmp_path)
    assert list(parts) == ["train", "test"]
    assert torch.equal(pixels(parts["test"]), expected(test))
    assert parts["train"].ids.tolist() == list(range(10))
    assert parts["test"].ids.tolist() == [2 * 10**9 + i for i in range(4)]
    alone = load_images(tmp_path, split="test")
    assert list(alone) == ["test"]
    assert torch.equal(alone["test"].ids, parts["test"].ids)
    assert alone["test"].fingerprint == parts["test"].fingerprint
    with pytest.raises(ValueError, match="no split 'val'; pass one of train, test as --split"):
        load_images(tmp_path, split="val")


def test_folder_per_class(tmp_path: Path) -> None:
    images = noise(9, mode="L")
    write_folder(tmp_path / "zoo", images, ("dog", "ant", "cat"))
    samples = load_images(tmp_path / "zoo")["train"]
    assert samples.class_names == ("ant", "cat", "dog")
    by_path = [1, 4, 7, 2, 5, 8, 0, 3, 6]
    assert torch.equal(pixels(samples), expected([images[i] for i in by_path]))
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert samples.shape == (1, 8, 8)


def test_folder_per_class_in_a_folder_per_part(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", noise(6))
    write_folder(tmp_path / "test", noise(4, seed=1))
    parts = load_images(tmp_path)
    assert {name: len(samples) for name, samples in parts.items()} == {"train": 6, "test": 4}
    assert parts["train"].class_names == ("cat", "dog")


def test_folders_train_and_test_are_no_classes(tmp_path: Path) -> None:
    write_folder(tmp_path, noise(6), ("train", "test"))
    assert {name: samples.num_classes for name, samples in load_images(tmp_path).items()} == {"train": 0, "test": 0}


def test_saved_dataset_and_arrow_file(tmp_path: Path) -> None:
    images = noise(6)
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["b", "a"])})
    rows = datasets.Dataset.from_dict({"img": images, "fine_label": [0, 1] * 3}, features=features)
    rows.save_to_disk(tmp_path / "one", max_shard_size="1GB")
    datasets.DatasetDict({"train": rows, "extra": rows}).save_to_disk(tmp_path / "two")
    (arrow,) = (tmp_path / "one").glob("*.arrow")
    found = [
        load_images(tmp_path / "one")["train"],
        load_images(tmp_path / "two")["train"],
        load_images(tmp_path / "two")["extra"],
        load_images(arrow)["train"],
    ]
    for samples in found:
        assert torch.equal(pixels(samples), expected(images))
        assert samples.class_names == ("b", "a")
        assert samples.labels is not None
        assert samples.labels.tolist() == [0, 1] * 3
    assert found[2].ids[0] == first_id("extra") > 2 * 10**9


def test_hub_name_goes_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images, asked = noise(4), []

    def load_dataset(name: str) -> datasets.DatasetDict:
        asked.append(name)
        if name == "someone/gone":
            raise ConnectionError("Couldn't reach the Hub\nTry again later")
        return datasets.DatasetDict(
            {"train": datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert torch.equal(pixels(load_images("someone/pictures")["train"]), expected(images))
    with pytest.raises(
        ValueError,
        match="gone is not a path here, so it was sought on the Hub: the Hub cannot be reached for",
    ):
        load_images("someone/gone")
    (tmp_path / "images").mkdir()
    for mistyped in ("images/cats", "pictures", "./someone/pictures", "../a", "/no/such", "a/b/c"):
        with pytest.raises(ValueError, match=f"{mistyped} is not a file or folder; pass a path, digits, or owner/name"):
            load_images(mistyped)
    assert asked == ["someone/pictures", "someone/gone"]


def test_nothing_is_written_beside_the_data_and_nothing_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_parquet(tmp_path / "p" / "train.parquet", [encode(image) for image in noise(4)])
    write_folder(tmp_path / "f", noise(4))
    datasets.Dataset.from_dict({"image": noise(4)}).save_to_disk(tmp_path / "s")
    capfd.readouterr()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for folder in ("p", "f", "s"):
        load(tmp_path / folder, num_train=2).train.batch([0])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert capfd.readouterr() == ("", "")
    assert not datasets.utils.are_progress_bars_disabled()


def test_rewritten_file_is_read_again(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(image) for image in noise(3)])
    old = load_images(path)["train"]
    write_parquet(path, [encode(image) for image in noise(3, seed=1)])
    os.utime(path, ns=(1, 1))
    new = load_images(path)["train"]
    assert torch.equal(pixels(new), expected(noise(3, seed=1)))
    assert new.fingerprint != old.fingerprint


def test_unreadable_sources_are_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [caplog.handler])
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.csv").write_text("1,2")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.parquet").write_bytes(b"this is no parquet file")
    write_parquet(tmp_path / "none" / "train.parquet", [])
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "words.parquet")
    for source, message in {
        "empty": r"contains no .arrow, .bmp, .* file but nothing; pass the folder of the data",
        "text": r"contains no .arrow, .bmp, .* file but a.csv; pass the folder",
        "text/a.csv": r"a.csv is not a .parquet, .arrow or .tar file; pass such a file, or the folder",
        "bad": r"bad cannot be read: .*[Pp]arquet.*; pass a valid .parquet",
        "none": r"none (has no rows in train; pass data with rows|cannot be read: .*)",
        "words.parquet": r"none of the columns text, n contains encoded images; pass image data",
        "gone": r"gone is not a file or folder; pass a path",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            load(tmp_path / source)
        assert "\n" not in str(error.value)
    assert not caplog.records  # `datasets` would tell it a second time


@pytest.mark.parametrize(
    ("values", "labels", "names"),
    [
        (["b", "c", "a", "b"], [1, 2, 0, 1], ("a", "b", "c")),
        ([2, 0, 1, 2], [2, 0, 1, 2], ("0", "1", "2")),
        ([10, 5, 7, 5], [2, 0, 1, 0], ("5", "7", "10")),
        ([1.0, 0.0, 1.0, 0.0], [1, 0, 1, 0], ("0", "1")),
        ([True, False, True, True], [1, 0, 1, 1], ("0", "1")),
        ([-1, -1, -1, -1], None, ()),
        ([float("nan")] * 4, None, ()),
    ],
)
def test_labels_become_classes(
    tmp_path: Path, values: list[object], labels: list[int] | None, names: tuple[str, ...]
) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(image) for image in noise(4)], category=values)
    samples = load_images(path)["train"]
    assert (None if samples.labels is None else samples.labels.tolist()) == labels
    assert samples.class_names == names
    assert samples.num_classes == len(names)


def test_bad_labels_are_refused(tmp_path: Path) -> None:
    items = [encode(image) for image in noise(4)]
    for values, message in [
        ([0, -1, 1, -1], r"2 of 4 rows of train have no label in 'label' \(empty or negative\); leave them out"),
        (["a", None, "b", "a"], "1 of 4 rows of train have no label"),
        ([0.0, float("nan"), 1.0, 1.0], "1 of 4 rows of train have no label"),
        ([0.5, 1.0, 2.0, 3.0], r"column 'label' contains 0.5, which is not a class; pass another --label-column"),
        ([0.0, float("inf"), 2.0, 3.0], "column 'label' contains inf, which is not a class"),
        ([[1], [2], [3], [4]], r"column 'label' contains \[1\], which is not a class"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_images(write_parquet(tmp_path / "x.parquet", items, label=values))
    with pytest.raises(ValueError, match="train has no column 'kind'; pass one of image, label as --label-column"):
        load_images(write_parquet(tmp_path / "x.parquet", items, label=[0, 1, 0, 1]), label_column="kind")


def test_label_column_must_be_named_when_several_could_be_meant(tmp_path: Path) -> None:
    classes = datasets.ClassLabel(names=["x", "y"])
    features = datasets.Features({"image": datasets.Image(), "shape": classes, "hue": classes})
    data = {"image": noise(2), "shape": [0, 1], "hue": [1, 0]}
    datasets.Dataset.from_dict(data, features=features).save_to_disk(tmp_path / "s")
    with pytest.raises(ValueError, match="the columns shape, hue all contain classes; pass one as --label-column"):
        load_images(tmp_path / "s")
    samples = load_images(tmp_path / "s", label_column="hue")["train"]
    assert samples.labels is not None
    assert samples.labels.tolist() == [1, 0]


def test_parts_must_agree_on_the_classes(tmp_path: Path) -> None:
    def rows(names: list[str] | None, labels: list[object]) -> datasets.Dataset:
        kind = datasets.ClassLabel(names=names) if names else datasets.Value("string" if "a" in labels else "int64")
        features = datasets.Features({"image": datasets.Image(), "label": kind})
        return datasets.Dataset.from_dict({"image": noise(2), "label": labels}, features=features)

    for i, (train, test) in enumerate(
        [
            (rows(["a", "b"], [0, 1]), rows(["b", "a"], [0, 1])),
            (rows(None, ["a", "b"]), rows(None, [0, 1])),
        ]
    ):
        datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / str(i))
        with pytest.raises(ValueError, match="the classes in 'label' differ between train and test; pass one of them"):
            load_images(tmp_path / str(i))
        assert load_images(tmp_path / str(i), split="test")["test"].num_classes == 2
    schema = rows(["a", "b"], [0, 1]).data.schema  # the file says two classes and holds a third
    path = write_parquet(tmp_path / "x.parquet", [encode(image) for image in noise(2)], label=[0, 2])
    table = pq.read_table(path)
    pq.write_table(table.cast(pa.schema([table.schema.field("image"), schema.field("label")], schema.metadata)), path)
    with pytest.raises(ValueError, match="'label' has label 2 but names 2 classes; fix the file"):
        load_images(path)


def tar_file(path: Path, num: int = 8) -> Path:
    with tarfile.open(path, "w") as archive:
        for i, image in enumerate(noise(num)):
            for ending, content in (("png", encode(image)), ("cls", str(i % 2).encode())):
                member = tarfile.TarInfo(f"{i:04}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def test_tar_files_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    whole = tar_file(tmp_path / "whole.tar").read_bytes()
    assert len(load_images(tmp_path / "whole.tar")["train"]) == 8
    with tarfile.open(tmp_path / "whole.tar") as archive:
        last = archive.getmembers()[-1].offset
    for size in (len(whole) // 2, len(whole) // 2 + 200, last, last + 300, last + 513):
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=r"cut\.tar ends before the end of its archive.*; copy or download it again"
        ):
            load_images(tmp_path / "cut.tar")
    (tmp_path / "joined.tar").write_bytes(whole + whole)
    with pytest.raises(ValueError, match=r"joined\.tar goes on behind the end of its archive; if archives were joined"):
        load_images(tmp_path / "joined.tar")
    with (tmp_path / "zeros.tar").open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(
        ValueError, match=r"zeros\.tar begins with zeros, so it is no archive; copy or download it again"
    ):
        load_images(tmp_path / "zeros.tar")


def test_names_with_wildcards_are_names(tmp_path: Path) -> None:
    for name in ("a[1]", "a*", "a?"):
        path = write_parquet(tmp_path / name / "[x]*.parquet", [encode(image) for image in noise(3)])
        write_parquet(path.with_name("x.parquet"), [encode(image) for image in noise(3)])
        write_parquet(path.with_name("[x]y.parquet"), [encode(image) for image in noise(3)])
        assert len(load_images(path)["train"]) == 3
