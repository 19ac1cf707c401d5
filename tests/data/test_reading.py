"""What was read is counted here by an own walk, and worded in a few lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pictures import encode, noise, write_folder, write_parquet

from layerprobe.data import DataSource
from layerprobe.data.reading import Reading, reading_lines

pytestmark = pytest.mark.usefixtures("offline")


def reading_of(source: Path, **options: object) -> Reading:
    """What a loader tells, as a file keeps it."""
    reading = DataSource(str(source), **options).load().train.reading  # type: ignore[arg-type]
    assert reading is not None
    return Reading.from_dict(json.loads(json.dumps(reading.to_dict())))


def lines(source: Path, **options: object) -> dict[str, str]:
    return reading_lines(reading_of(source, **options))


def test_files_and_class_folders(tmp_path: Path) -> None:
    write_folder(tmp_path, noise(20), ("bus", "train"))
    for name in ("bus/a.txt", "README.md", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "emu").mkdir()
    reading = reading_of(tmp_path)
    assert reading.files_read == len(list(tmp_path.rglob("*.png"))) == reading.rows["train"]
    assert reading.files_read + sum(reading.files_left.values()) == sum(p.is_file() for p in tmp_path.rglob("*"))
    assert reading_lines(reading) == {
        "files": "20 of 23 read; left: 1 .md, 1 .txt, 1 hidden",
        "labels": "top folder, 2 classes",
        "no items in": "emu",
    }


def test_files_of_other_parts_are_not_read(tmp_path: Path) -> None:
    for part, n in (("train", 12), ("test", 6)):
        write_folder(tmp_path / part, noise(n))
    assert lines(tmp_path)["files"] == "18 of 18 read"
    assert lines(tmp_path, split="test")["files"] == "6 of 18 read; left: 12 of other parts"


def test_parts_that_no_split_is_taken_from(tmp_path: Path) -> None:
    items = [encode(image) for image in noise(10)]
    for part, labels in (("train", [0, 1] * 5), ("validation", [0, 1] * 5), ("test", [-1] * 10), ("extra", [0, 1] * 5)):
        write_parquet(tmp_path / f"{part}-00000-of-00001.parquet", items, label=labels)
    assert lines(tmp_path) == {
        "files": "4 of 4 read",
        "labels": "column 'label', 2 classes",
        "not used": "extra (10 rows); --split reads one part",
        "left out": "test (10 rows), which has no labels while train has",
    }


@pytest.mark.parametrize(
    ("columns", "options", "text"),
    [
        ({"label": [0, 1] * 6}, {"label_column": "none"}, "none, as --label-column none asks"),
        (
            {"kind": [0, 1] * 6},
            {},
            "none: no column is named like labels or has the type of classes; see --label-column",
        ),
        ({"label": [-1] * 12}, {}, "none: column 'label' is empty or negative in every row"),
    ],
)
def test_why_tables_have_no_labels(
    tmp_path: Path, columns: dict[str, list[object]], options: dict[str, object], text: str
) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(image) for image in noise(12)], **columns)
    assert lines(path, **options)["labels"] == text


def test_why_files_have_no_labels(tmp_path: Path) -> None:
    for i, image in enumerate(noise(6)):
        image.save(tmp_path / f"{i}.png")
    assert lines(tmp_path)["labels"].startswith("none: the files are not in one folder per class, and no metadata has")


def test_class_names_that_need_a_look(tmp_path: Path) -> None:
    items = [encode(image) for image in noise(20)]
    path = write_parquet(tmp_path / "x.parquet", items, label=["cat", "Cat ", "dog", "nan"] * 5)
    assert lines(path)["check names"] == "'Cat ' and 'cat', 'nan': classes of their own; are they spelled as meant?"
    write_folder(tmp_path / "d", noise(24), tuple(map(str, range(1, 13))))
    assert "10 before 2, as torchvision numbers folders" in lines(tmp_path / "d")["class order"]
    write_folder(tmp_path / "padded", noise(24), tuple(f"{i:02}" for i in range(12)))
    assert "class order" not in lines(tmp_path / "padded")


def test_small_classes(tmp_path: Path) -> None:
    write_folder(tmp_path, noise(20))
    for name in ("a", "b"):
        write_folder(tmp_path, noise(1), (name,))
    with pytest.raises(ValueError, match=r"2 of 4 classes have fewer than 2 samples .* pass --min-per-class 2"):
        reading_of(tmp_path)
    found = lines(tmp_path, min_per_class=5)
    assert found["small classes"] == "2 with fewer than 5 samples left out, 2 samples: a, b"


def test_items_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    write_folder(tmp_path, noise(20))
    next(tmp_path.rglob("*.png")).write_bytes(b"")
    assert lines(tmp_path, skip_bad=2)["cannot be read"] == "1 of 20 in train, left out as --skip-bad allows"


def test_only_the_first_of_several_frames_is_read(tmp_path: Path) -> None:
    write_folder(tmp_path, noise(20))
    assert "first frames" not in lines(tmp_path)
    for path in sorted(tmp_path.rglob("*.png"))[:3]:
        first, *others = noise(4)
        first.save(path.with_suffix(".tif"), save_all=True, append_images=others)
        path.unlink()
    assert lines(tmp_path)["first frames"].startswith("3 images have several frames")


def test_a_column_that_names_parts_is_told(tmp_path: Path) -> None:
    items = [encode(image) for image in noise(20)]
    path = write_parquet(tmp_path / "t.parquet", items, label=[0, 1] * 10, split=["Train"] * 10 + ["test"] * 10)
    assert lines(path)["check parts"].startswith("column 'split' (Train, test) is not used, so its parts are mixed")
    path = write_parquet(tmp_path / "u.parquet", items, label=[0, 1] * 10, split=["train"] * 20, set=["x", "y"] * 10)
    assert "check parts" not in lines(path)


def test_a_single_folder_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, noise(10), ("cat",))
    assert lines(tmp_path)["labels"] == "none: all files lie in the folder cat, and one folder is no class"
