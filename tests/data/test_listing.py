"""Every file of a data set is read, counted as left, or refused; and the class of a file is its top folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from layerprobe.data.listing import PART_OF, list_files

VOC = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog")
VOC += ("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
PICTURES = (".png", ".jpeg", ".npy")


def files(root: Path, *names: str) -> Path:
    """Empty files; no listing opens an item."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def classes(root: Path, *names: str, count: int = 4) -> Path:
    return files(root, *(f"{name}/{i}.png" for name in names for i in range(count)))


def image_folder(root: Path) -> dict[Path, str]:
    """The rule of torchvision's ImageFolder: the class of a file is the folder of the root that it lies below."""
    tops = sorted(folder for folder in root.iterdir() if folder.is_dir())
    return {file: top.name for top in tops for file in sorted(top.rglob("*")) if file.suffix.lower() in PICTURES}


@pytest.mark.parametrize(
    "names",
    [
        ("bus", "car", "train", "tram"),
        VOC,
        ("fail", "pass", "test"),
        ("hal", "sal", "val"),
        ("design", "validation"),
        ("dev", "ops"),
        ("10", "2", "1"),
        ("cat", "dog/small", "dog/big"),
        ("cat/day", "cat/night", "dog/day", "dog/night"),
    ],
)
def test_folders_are_classes_as_in_torchvision(tmp_path: Path, names: tuple[str, ...]) -> None:
    listing = list_files(classes(tmp_path, *names), PICTURES)
    assert dict(listing.classes) == image_folder(tmp_path)
    assert list(listing.parts) == ["train"]
    assert listing.num_read == 4 * len(names)
    assert not listing.left


def test_split_words_in_the_names_of_items_mean_nothing(tmp_path: Path) -> None:
    files(tmp_path, *(f"{c}/street_{'test_' * (i < 10)}{i}.png" for c in "abc" for i in range(50)))
    listing = list_files(tmp_path, PICTURES)
    assert {name: len(part) for name, part in listing.parts.items()} == {"train": 150}


@pytest.mark.parametrize("word", ["train", *PART_OF, "Train", "VAL"])
def test_folders_are_parts_where_each_is_one(tmp_path: Path, word: str) -> None:
    other = "test" if PART_OF[word.lower()] == "train" else "train"
    for folder in (word, other):
        classes(tmp_path / folder, "a", "b")
    classes(tmp_path / word, "c")
    listing = list_files(tmp_path, PICTURES)
    assert set(listing.parts) == {PART_OF[word.lower()], other}
    assert next(iter(listing.parts)) == "train"
    expected = image_folder(tmp_path / word) | image_folder(tmp_path / other)
    assert dict(listing.classes) == expected
    assert listing.classes_from == ""


@pytest.mark.parametrize(
    ("train", "held_out", "part"),
    [("train2017", "val2017", "validation"), ("seg_train/seg_train", "seg_test/seg_test", "test")],
)
def test_folders_with_a_word_for_a_part_in_their_names(tmp_path: Path, train: str, held_out: str, part: str) -> None:
    classes(tmp_path, f"{train}/a", f"{train}/b", f"{held_out}/a", f"{held_out}/b")
    listing = list_files(tmp_path, PICTURES)
    assert {name: len(listed) for name, listed in listing.parts.items()} == {"train": 8, part: 8}
    assert set(listing.classes.values()) == {"a", "b"}


def test_an_empty_folder_of_a_part_is_told(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    listing = list_files(classes(tmp_path / "train", "a", "b"), PICTURES)
    assert list_files(tmp_path, PICTURES).empty_folders == ["test"]
    assert not listing.empty_folders


def test_tiny_imagenet_as_downloaded(tmp_path: Path) -> None:
    words = ("n01443537", "n01629819")
    for word in words:
        files(tmp_path, *(f"train/{word}/images/{word}_{i}.jpeg" for i in range(5)))
        (tmp_path / "train" / word / f"{word}_boxes.txt").write_text(f"{word}_0.jpeg\t0\t0\t5\t5\n")
    files(tmp_path, *(f"{part}/images/{part}_{i}.jpeg" for part in ("val", "test") for i in range(4)))
    rows = [f"val_{i}.jpeg\t{words[i % 2]}\t0\t0\t5\t5\n" for i in range(4)]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(rows))
    (tmp_path / "wnids.txt").write_text("\n".join(words))
    listing = list_files(tmp_path, PICTURES)
    found = {
        part: [listing.classes[file] for file in listed if part != "train" or file.name.endswith("_0.jpeg")]
        for part, listed in listing.parts.items()
    }
    assert found == {"train": list(words), "validation": [*words, *words], "test": [None] * 4}
    assert [file.name for file in listing.annotations] == ["val_annotations.txt"]
    assert (listing.num_read, listing.left) == (10 + 8 + 1, {".txt": 3})


def test_a_folder_around_all_files_is_no_class(tmp_path: Path) -> None:
    listing = list_files(classes(tmp_path / "animals" / "raw", "cat", "dog"), PICTURES)
    around = list_files(tmp_path, PICTURES)
    assert around.classes == listing.classes
    assert around.classes_from == "animals/raw"
    for part in ("train", "test"):
        classes(tmp_path / "parts" / part / "images", "cat", "dog")
    assert set(list_files(tmp_path / "parts", PICTURES).classes.values()) == {"cat", "dog"}
    assert not list_files(files(tmp_path / "one", "all/0.png", "all/1.png"), PICTURES).classes
    assert not list_files(files(tmp_path / "none", "0.png", "1.png"), PICTURES).classes


def test_what_is_not_read_is_counted(tmp_path: Path) -> None:
    classes(tmp_path, "cat", "dog")
    files(tmp_path, "cat/0.txt", "cat/1.txt", "cat/2.json", "README", "labels.npy", "emu/notes.md")
    files(tmp_path, "cat/._0.png", "__MACOSX/cat/0.png", "dog/.ipynb_checkpoints/0.png", "cat/.DS_Store")
    (tmp_path / "empty").mkdir()
    listing = list_files(tmp_path, PICTURES)
    assert listing.left == {".txt": 2, ".json": 1, ".md": 1, ".npy": 1, "README": 1, "hidden": 4}
    assert listing.num_read + sum(listing.left.values()) == sum(path.is_file() for path in tmp_path.rglob("*"))
    assert listing.empty_folders == ["empty", "emu"]
    assert set(listing.classes.values()) == {"cat", "dog"}


def test_upper_case_endings_and_links_to_folders_are_read(tmp_path: Path) -> None:
    files(tmp_path / "d", "cat/0.PNG", "cat/1.png")
    classes(tmp_path / "store", "dog")
    (tmp_path / "d" / "dog").symlink_to(tmp_path / "store" / "dog")
    (tmp_path / "d" / "cat" / "round").symlink_to(tmp_path / "d")  # without an end
    listing = list_files(tmp_path / "d", PICTURES)
    assert sorted(filter(None, listing.classes.values())) == ["cat"] * 2 + ["dog"] * 4


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            ("train", "trainannot", "val", "valannot"),
            "the folders train and val in .* name parts of the data but trainannot, valannot do not; move these",
        ),
        (("train/a", "test/a", "masks"), "the folders test and train in .* name parts of the data but masks does not"),
        (
            ("train/images", "train/masks"),
            "the folders images and masks in .* are no classes but different things about the same",
        ),
        (("train/a", "dev/a", "val/a"), "two of the folders dev, train, val in .* name one part; keep one of them"),
        (
            ("cat/train", "cat/test", "dog/train", "dog/test"),
            "the folders test and train lie in class folders of .*put the class folders into folders train and test",
        ),
    ],
)
def test_folders_that_may_be_parts_are_asked_for(tmp_path: Path, folders: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list_files(classes(tmp_path, *folders), PICTURES)


def test_an_item_that_belongs_to_no_part_is_refused(tmp_path: Path) -> None:
    classes(tmp_path, "train/a", "train/b", "test/a", "test/b")
    files(tmp_path, "logo.png")
    with pytest.raises(ValueError, match=r"1 files beside the folders test and train belong .* \(first: logo.png\)"):
        list_files(tmp_path, PICTURES)


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"), (2, 0, 1)),
        (("data/train-00000-of-00001-0a1b.parquet", "data/validation-00000-of-00001-9f.parquet"), (1, 1, 0)),
        (("train/0000.parquet", "train/0001.parquet", "test/0000.parquet"), (2, 0, 1)),
        (("cc3m-train-0000.tar", "cc3m-train-0001.tar", "cc3m-val-0000.tar"), (2, 1, 0)),
        (("a.parquet", "b.parquet"), (2, 0, 0)),
        (("x-train-00000-of-00001.arrow", "x-test-00000-of-00001.arrow"), (1, 0, 1)),
        (("street_trams_0.parquet", "contest_1.parquet"), (2, 0, 0)),
        (("Train.parquet", "TEST.parquet"), (1, 0, 1)),
    ],
)
def test_parts_of_tables(tmp_path: Path, names: tuple[str, ...], parts: tuple[int, ...]) -> None:
    listing = list_files(files(tmp_path, *names, "README.md"), PICTURES)
    assert tuple(len(listing.parts.get(name, ())) for name in ("train", "validation", "test")) == parts
    assert (listing.num_read, listing.left) == (len(names), {".md": 1})


def test_shards_name_parts_of_their_own(tmp_path: Path) -> None:
    files(tmp_path, "train-00000-of-00001.parquet", "extra-00000-of-00001.parquet")
    assert list(list_files(tmp_path, ()).parts) == ["train", "extra"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("street_train_0.parquet", "street_tram_0.parquet", "street_bus_0.parquet"),
            r"2 of 3 tables in .* name no part .*\(first: street_bus_0.parquet\) but .*_train_0.parquet \(train\)",
        ),
        (("shard-0.tar", "shard-1.tar", "shard-test-2.tar"), "2 of 3 tables in .* name no part"),
        (("train-00000-of-00003.parquet",), "train has 1 of the 3 shards that their names tell"),
        (("en/train-00000-of-00001.parquet", "fr/train-00000-of-00001.parquet"), "shard 00000 of train occurs twice"),
        (
            ("train_sft-00000-of-00001.parquet", "train_gen-00000-of-00001.parquet"),
            "train_gen and train_sft both name the part train; pass a folder with the tables of one",
        ),
        (
            ("label=0/a.parquet", "label=1/a.parquet"),
            r"values in the names of folders \(label=0\); write them as a",
        ),
        (("a.parquet", "b.arrow"), "1 .parquet and 1 .arrow files, which are not one data set"),
        (("a.parquet", "b/0.png"), "1 .parquet and 1 .png files, which are not one data set; pass a folder"),
    ],
)
def test_tables_that_are_not_clear_are_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list_files(files(tmp_path, *names), PICTURES)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("data_batch_1", "batches.meta"), "Python pickles of CIFAR are not read: convert them to .png files"),
        (("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"), "idx files of MNIST are not read"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list_files(files(tmp_path, *names), PICTURES)


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def locked(path: str) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    classes(tmp_path, "cat", "dog")
    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(ValueError, match="dog cannot be listed: Permission denied; make it readable"):
        list_files(tmp_path, PICTURES)


def test_files_of_a_saved_data_set(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"label": [0, 1]})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path)
    (tmp_path / "train" / "cache-1.arrow").touch()
    listing = list_files(tmp_path, ())
    states = [json.loads((tmp_path / part / "state.json").read_text()) for part in ("train", "test")]
    shards = sum(len(state["_data_files"]) for state in states)
    assert (listing.form, listing.num_read, listing.left) == ("saved", shards + 5, {".arrow": 1})


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("trainval", "test"), {"train": 8, "test": 8}),
        (("trainset", "testset"), {"train": 8, "test": 8}),
        (("TrainImages", "ValImages"), {"train": 8, "validation": 8}),
        (("train_data", "eval-data"), {"train": 8, "test": 8}),
        (("trainer", "tester"), {"train": 16}),
    ],
)
def test_words_for_parts_as_people_write_them(tmp_path: Path, names: tuple[str, ...], parts: dict[str, int]) -> None:
    listing = list_files(classes(tmp_path, *(f"{name}/{c}" for name in names for c in "ab")), PICTURES)
    assert {name: len(part) for name, part in listing.parts.items()} == parts


def test_two_folders_of_one_part_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"two of the folders testA, testB, trainA, trainB in .* name one part"):
        list_files(classes(tmp_path, "trainA", "trainB", "testA", "testB"), PICTURES)


def test_folds_are_no_classes(tmp_path: Path) -> None:
    root = classes(tmp_path, "fold1", "fold2", "Fold_10")
    with pytest.raises(ValueError, match=r"the folders Fold_10 and fold1 and fold2 in .* number portions of the data"):
        list_files(root, PICTURES)
    assert not list_files(files(root, "metadata.csv"), PICTURES).classes


def test_one_name_in_two_forms_is_one_class(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    root = classes(tmp_path, f"train/{composed}", "train/tea", f"test/{decomposed}", "test/tea")
    assert set(list_files(root, PICTURES).classes.values()) == {composed, "tea"}


def test_tables_beside_the_tar_files_of_img2dataset_are_left(tmp_path: Path) -> None:
    listing = list_files(files(tmp_path, "00000.tar", "00000.parquet", "00000_stats.json"), PICTURES)
    assert [file.name for file in listing.parts["train"]] == ["00000.tar"]
    assert listing.left == {".parquet": 1, ".json": 1}


def test_an_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"file but data\.zip; unpack it first"):
        list_files(files(tmp_path, "data.zip"), PICTURES)
