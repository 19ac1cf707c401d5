"""Where the labels of rows come from, and what is said where they are missing or not clear."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from pictures import encode, noise, write_folder, write_parquet

from layerprobe.data.images import load_images
from layerprobe.data.labels import Labels, read_labels
from layerprobe.data.listing import list_files
from layerprobe.data.tables import read

pytestmark = pytest.mark.usefixtures("offline")


def labels_of(source: Path, given: str | None = None) -> Labels:
    return read_labels(read(list_files(source, (".png",))), given)


def names(labels: Labels, part: str = "train") -> list[str]:
    numbers = labels.by_part[part]
    assert numbers is not None
    return [labels.class_names[number] for number in numbers.tolist()]


def metadata(root: Path, values: list[Any], column: str = "label", name: str = "metadata.csv") -> Path:
    """A folder of the classes cat and dog, and metadata with a column of other values."""
    write_folder(root, noise(len(values)))
    paths = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*.png"))]
    rows = [{"file_name": path, column: value} for path, value in zip(paths, values, strict=True)]
    if name.endswith(".csv"):
        lines = [f"file_name,{column}", *(",".join(map(str, row.values())) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    (root / name).write_text("\n".join(lines))
    return root


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_without_labels_leaves_the_class_folders(tmp_path: Path, name: str) -> None:
    labels = labels_of(metadata(tmp_path, ["x", "y", "x", "z"], "camera", name))
    assert (labels.column, names(labels)) == ("folder", ["cat", "cat", "dog", "dog"])
    assert names(labels_of(tmp_path, "camera")) == ["x", "y", "x", "z"]


def test_metadata_and_class_folders_that_agree(tmp_path: Path) -> None:
    labels = labels_of(metadata(tmp_path, [10, 10, 2, 2]))
    assert (labels.column, labels.class_names) == ("label", ("2", "10"))


def test_metadata_and_class_folders_that_differ_are_asked_for(tmp_path: Path) -> None:
    metadata(tmp_path, [0, 1, 0, 1])
    with pytest.raises(
        ValueError, match=r"folders and the column 'label' .* pass --label-column folder or --label-column label"
    ):
        labels_of(tmp_path)
    assert names(labels_of(tmp_path, "folder")) == ["cat", "cat", "dog", "dog"]
    assert names(labels_of(tmp_path, "label")) == ["0", "1", "0", "1"]


def test_metadata_of_mixed_types_are_refused(tmp_path: Path) -> None:
    metadata(tmp_path, [0, "a", {"b": 1}, [2]], name="metadata.jsonl")
    with pytest.raises(ValueError, match=r"metadata.jsonl cannot be read \(.*\); write one type of value per column"):
        labels_of(tmp_path)


def test_no_labels_on_request(tmp_path: Path) -> None:
    write_folder(tmp_path / "d", noise(4))
    assert labels_of(tmp_path / "d", "none").by_part == {"train": None}
    path = write_parquet(tmp_path / "x.parquet", [encode(image) for image in noise(2)], none=["a", "b"])
    assert labels_of(path, "none").class_names == ("a", "b")


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    metadata(tmp_path, ["x"] * 4, "folder")
    with pytest.raises(ValueError, match=r"metadata.csv has a column folder, a name that is taken; rename the column"):
        labels_of(tmp_path)


def test_an_item_beside_the_class_folders_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, noise(4))
    noise(1)[0].save(tmp_path / "logo.png")
    with pytest.raises(ValueError, match=r"1 of 5 rows of train have no label in 'folder' .*\(first: logo.png\)"):
        labels_of(tmp_path)
    assert labels_of(tmp_path, "none").by_part == {"train": None}


def test_a_row_without_a_label_is_named(tmp_path: Path) -> None:
    items = [encode(image) for image in noise(3)]
    with pytest.raises(ValueError, match=r"1 of 3 rows of train have no label in 'label' .*\(first: row 2\)"):
        labels_of(write_parquet(tmp_path / "x.parquet", items, label=["a", "b", None]))


def test_a_part_without_labels_keeps_those_of_the_others(tmp_path: Path) -> None:
    items = [encode(image) for image in noise(4)]
    write_parquet(tmp_path / "train.parquet", items, label=[0, 1, 0, 1])
    write_parquet(tmp_path / "test.parquet", items, label=[-1] * 4)
    labels = labels_of(tmp_path)
    assert names(labels) == ["0", "1", "0", "1"]
    assert labels.by_part["test"] is None


def test_classes_of_parts_are_numbered_together(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", noise(6), ("a", "b", "c"))
    write_folder(tmp_path / "test", noise(4), ("b", "c"))
    labels = labels_of(tmp_path)
    assert labels.class_names == ("a", "b", "c")
    assert names(labels, "test") == ["b", "b", "c", "c"]


def test_class_folders_are_numbered_as_strings(tmp_path: Path) -> None:
    write_folder(tmp_path, noise(12), tuple(map(str, range(12))))
    assert labels_of(tmp_path).class_names == tuple(sorted(map(str, range(12))))


def class_rows(names: list[str]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"image": noise(4), "label": [0, 1, 0, 1]}, features=features)


def test_parts_that_number_other_classes_are_refused(tmp_path: Path) -> None:
    class_rows(["a", "b"]).to_parquet(tmp_path / "train.parquet")
    class_rows(["b", "a"]).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="the classes in 'label' differ between train and test; pass one of them"):
        labels_of(tmp_path)


def test_shards_that_number_other_classes_are_refused(tmp_path: Path) -> None:
    for i, found in enumerate((["a", "b"], ["b", "a"])):
        class_rows(found).to_parquet(tmp_path / f"x-{i}.parquet")
    with pytest.raises(ValueError, match=r"x-1.parquet names the classes of its labels unlike x-0.parquet"):
        labels_of(tmp_path)


def write_tar(path: Path, ending: str, contents: list[bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for i, (image, content) in enumerate(zip(noise(len(contents)), contents, strict=True)):
            for name, data in ((f"{i}.png", encode(image)), (f"{i}.{ending}", content)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("ending", "column", "given"),
    [("cls", "cls", None), ("json", "json.label", None), ("json", "json.hue", "json.hue")],
)
def test_labels_in_a_webdataset(tmp_path: Path, ending: str, column: str, given: str | None) -> None:
    values = [1, 0, 1, 1]
    texts = [str(value) if ending == "cls" else json.dumps({"label": value, "hue": value}) for value in values]
    path = write_tar(tmp_path / "x.tar", ending, [text.encode() for text in texts])
    labels = labels_of(path, given)
    assert (labels.column, names(labels)) == (column, [str(value) for value in values])
    assert load_images(path, label_column=given)["train"].num_classes == 2
