from __future__ import annotations

import io
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from layerprobe.data import Samples, Splits, Subset, TensorSamples, load
from layerprobe.data.digits import digits
from layerprobe.data.images import EncodedImages, load_images
from layerprobe.data.samples import content_hash, pixels_to_float
from layerprobe.data.splits import for_probing, keyed_order, split, take
from layerprobe.data.tables import first_id


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is thrown away, and no network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))

    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def noise(n: int, *, size: tuple[int, int] = (8, 8), mode: str = "RGB", seed: int = 0) -> list[Image.Image]:
    shape = (n, size[1], size[0], 3) if mode == "RGB" else (n, size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_parquet(path: Path, items: list[bytes], **columns: list[object]) -> Path:
    """A parquet file as other tools than `datasets` write them: without its metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": item, "path": f"{i}.png"} for i, item in enumerate(items)]
    pq.write_table(pa.table({"image": images, **columns}), path)
    return path


def write_folder(root: Path, images: list[Image.Image], classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    for i, image in enumerate(images):
        folder = root / classes[i % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i:03}.png")
    return root


def pixels(samples: Samples) -> Tensor:
    """All samples as 0 ... 255."""
    return ((samples.batch(range(len(samples))).x + 1) * 127.5).round().to(torch.uint8)


def expected(images: list[Image.Image]) -> Tensor:
    arrays = [np.asarray(image).reshape(image.height, image.width, -1) for image in images]
    return torch.from_numpy(np.stack(arrays).transpose(0, 3, 1, 2))


def labeled(counts: list[int], *, first: int = 0) -> TensorSamples:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    n = len(labels)
    return TensorSamples(torch.zeros(n, 1, 2, 2), labels, ids=torch.arange(first, first + n))


def all_ids(splits: Splits) -> dict[str, set[int]]:
    return {name: set(samples.ids.tolist()) for name, samples in splits.items()}


# Tensors and subsets


def test_uint8_stands_for_minus_one_to_one() -> None:
    x = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    batch = TensorSamples(x, torch.zeros(256)).batch([0, 255, 51])
    assert batch.x.flatten().tolist() == pytest.approx([-1, 1, -0.6], abs=1e-7)  # float32
    assert batch.ids.tolist() == [0, 255, 51]
    assert batch.x.dtype == torch.float32
    assert batch.labels is not None
    assert batch.labels.dtype == torch.int64


def test_subset_keeps_ids_labels_and_order() -> None:
    samples = TensorSamples(torch.randn(10, 1, 2, 2), torch.arange(10), ids=torch.arange(100, 110))
    subset = Subset(Subset(samples, [9, 3, 5, 1], name="a"), [2, 0], name="b")
    batch = subset.batch([0, 1])
    assert batch.ids.tolist() == subset.ids.tolist() == [105, 109]
    assert torch.equal(batch.x, samples.x[[5, 9]])
    assert batch.labels is not None
    assert subset.labels is not None
    assert batch.labels.tolist() == subset.labels.tolist() == [5, 9]


def test_fingerprint_changes_with_the_content() -> None:
    x, labels = torch.zeros(4, 1, 2, 2), torch.tensor([0, 0, 1, 1])
    other = x.clone()
    other[3, 0, 1, 1] = 1e-6
    samples = TensorSamples(x, labels)
    assert samples.fingerprint == TensorSamples(x.clone(), labels).fingerprint
    different = [
        TensorSamples(other, labels),
        TensorSamples(x, 1 - labels),
        TensorSamples(x),
        TensorSamples(x, labels, ids=torch.arange(1, 5)),
        Subset(samples, [0, 1], name="a"),
        Subset(samples, [0, 2], name="a"),
    ]
    assert len({samples.fingerprint, *(s.fingerprint for s in different)}) == len(different) + 1
    assert content_hash(torch.zeros(2, 3)) != content_hash(torch.zeros(3, 2))


def test_bad_tensors_are_refused() -> None:
    x = torch.zeros(3, 1, 2, 2)
    with pytest.raises(ValueError, match="3 samples but 2 labels; pass one label per sample"):
        TensorSamples(x, torch.zeros(2))
    with pytest.raises(ValueError, match="3 samples but 2 ids; pass one id per sample"):
        TensorSamples(x, ids=torch.zeros(2))
    with pytest.raises(ValueError, match="labels range from -1 to 1; pass labels from 0"):
        TensorSamples(x, torch.tensor([-1, 0, 1]))
    with pytest.raises(ValueError, match="labels range from 0 to 2; pass labels from 0 to 1"):
        TensorSamples(x, torch.tensor([0, 1, 2]), class_names=("a", "b"))
    with pytest.raises(ValueError, match=r"samples have type torch.int64; pass floating point"):
        TensorSamples(x.long())
    for bad in (float("nan"), float("inf")):
        y = x.clone()
        y[1, 0, 0, 0] = bad
        with pytest.raises(ValueError, match=r"1 of 3 samples have NaN or infinite values \(first: 1\); remove them"):
            TensorSamples(y)


# The embedded digits


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    splits = load("digits")
    for _, samples in splits.items():
        batch = samples.batch(range(len(samples)))
        rows = batch.ids.numpy()
        np.testing.assert_array_equal((batch.x.flatten(1).numpy() + 1) * 8, images[rows])  # exact: multiples of 1/8
        assert batch.labels is not None
        np.testing.assert_array_equal(batch.labels.numpy(), labels[rows])
        assert batch.x.shape[1:] == samples.shape == (1, 8, 8)
        assert batch.x.dtype == torch.float32
        assert samples.class_names == tuple("0123456789")
        assert np.bincount(labels[rows]).min() > 0.9 * len(rows) / 10
    assert [len(samples) for _, samples in splits.items()] == [1000, 397, 400]
    assert set().union(*all_ids(splits).values()) == set(range(1797))


def test_digits_never_change() -> None:
    # Stored features of the digits are recognized by this; a change makes every one of them stale.
    assert digits().train.fingerprint == "26297147c4b7a81af3fe71e722df37d0/train-95a012b0"
    assert digits().test.ids[:5].tolist() == digits().test.ids[:5].tolist()


def test_fewer_digits_are_the_first_of_each_split() -> None:
    few, every = load("digits", num_train=50, num_validation=20, num_test=30), digits()
    assert few.train.ids.tolist() == every.train.ids[:50].tolist()
    assert [len(samples) for _, samples in few.items()] == [50, 20, 30]


def test_digits_take_no_options_for_images() -> None:
    with pytest.raises(
        ValueError, match="embedded digits are 1x8x8 and labeled as they are; leave out --size --label-co"
    ):
        load("digits", size=16, label_column="label")
    with pytest.raises(ValueError, match="8x8 with 1 channel but the model takes 3x32x32; pass other data"):
        load("digits", expect_shape=(3, 32, 32))
    with pytest.raises(
        ValueError, match="--num-train asks for 1001 samples but that split has 1000; pass at most 1000"
    ):
        load("digits", num_train=1001)
    assert load("digits", expect_shape=(1, 8, 8), require_labels=True).train.num_classes == 10


# Every kind of source


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
        ValueError, match=r"gone \(not a local path, so searched on the Hub\) cannot be read: Couldn't reach the Hub;"
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


# Modes, channels and sizes


def test_every_8_bit_mode_reads_as_pillow_shows_it(tmp_path: Path) -> None:
    color, gray = noise(1, size=(9, 6))[0], noise(1, size=(9, 6), mode="L")[0]
    cases = {
        "palette": (encode(color.quantize(16)), color.quantize(16).convert("RGB")),
        "bits": (encode(gray.convert("1")), gray.convert("1").convert("L")),
        "cmyk": (encode(color.convert("CMYK"), "TIFF"), color.convert("CMYK").convert("RGB")),
        "opaque": (encode(color.convert("RGBA")), color),
        "gray and alpha": (encode(gray.convert("LA")), gray),
        "lossless webp": (encode(color, "WEBP", lossless=True), color),
        "bmp": (encode(color, "BMP"), color),
    }
    for name, (encoded, image) in cases.items():
        samples = load_images(write_parquet(tmp_path / name / "x.parquet", [encoded]))["train"]
        assert samples.shape == (len(image.getbands()), 6, 9), name
        assert torch.equal(pixels(samples), expected([image])), name


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    keyed = Image.new("L", (2, 1), 7)
    keyed.putpixel((1, 0), 40)
    path = write_parquet(tmp_path / "x.parquet", [encode(image), encode(keyed, transparency=7)])
    samples = load_images(path, channels=3)["train"]
    assert pixels(samples)[0].flatten().tolist() == [255, 10, 255, 20, 255, 30]
    assert pixels(samples)[1].flatten().tolist() == [255, 40] * 3


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = noise(1, size=(16, 8))[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = image.transpose(Image.Transpose.ROTATE_270)
    samples = load_images(write_parquet(tmp_path / "x.parquet", [encode(image, exif=exif)]))["train"]
    assert samples.shape == (3, 16, 8)
    assert torch.equal(pixels(samples), expected([turned]))


def test_gray_and_color_convert_when_asked(tmp_path: Path) -> None:
    gray, color = noise(2, mode="L"), noise(3)
    path = write_parquet(tmp_path / "x.parquet", [encode(image) for image in gray + color])
    with pytest.raises(ValueError, match="2 images are gray and 3 are in color; pass --channels 1 or --channels 3"):
        load_images(path)
    for channels, mode in ((1, "L"), (3, "RGB")):
        samples = load_images(path, channels=channels)["train"]
        assert torch.equal(pixels(samples), expected([image.convert(mode) for image in gray + color]))


def test_size_crops_the_center_and_resizes(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 30)[None, :].repeat(10, 0)
    images = [Image.fromarray(ramp.astype(np.uint8)), Image.fromarray(ramp.T.astype(np.uint8))]
    path = write_parquet(tmp_path / "x.parquet", [encode(image) for image in images])
    with pytest.raises(ValueError, match=r"image 1 of train \(1.png\) is 30x10 but the first is 10x30; pass --size 10"):
        load_images(path)
    wide, tall = pixels(load_images(path, size=5)["train"])[:, 0].float()
    # Pixel j averages columns 10 + 2 j and 11 + 2 j of the ramp, up to rounding and the edges of the bicubic window.
    torch.testing.assert_close(wide[2], torch.tensor([92.0, 110.0, 127.5, 145.0, 163.0]), atol=2.0, rtol=0)
    assert torch.equal(wide, tall.T)
    # Antialiasing: a checkerboard becomes its mean, where taking every second pixel would give 0 or 255.
    board = Image.fromarray((np.indices((16, 16)).sum(0) % 2 * 255).astype(np.uint8))
    board_path = write_parquet(tmp_path / "b" / "x.parquet", [encode(board)])
    small = pixels(load_images(board_path, size=8)["train"])
    assert (small.int() - 127).abs().max() <= 20  # the window is cut at the edges
    for size in (0, -4):
        with pytest.raises(ValueError, match=f"--size is {size}; pass a positive number"):
            load_images(path, size=size)
    with pytest.raises(ValueError, match=r"--channels is 4; pass 1 .* or 3"):
        load_images(path, channels=4)


def test_fingerprint_changes_with_size_channels_labels_and_bytes(tmp_path: Path) -> None:
    items = [encode(image) for image in noise(4)]
    path = write_parquet(tmp_path / "x.parquet", items, label=[0, 1, 0, 1], target=[1, 0, 1, 0])
    again = write_parquet(tmp_path / "elsewhere" / "y.parquet", items, label=[0, 1, 0, 1])
    other = write_parquet(tmp_path / "z.parquet", [*items[:3], items[0]], label=[0, 1, 0, 1])
    plain = load_images(path)["train"].fingerprint
    assert plain == load_images(again)["train"].fingerprint == load_images(path, size=8)["train"].fingerprint
    different = {
        load_images(path, size=4)["train"].fingerprint,
        load_images(path, channels=1)["train"].fingerprint,
        load_images(path, label_column="target")["train"].fingerprint,
        load_images(other)["train"].fingerprint,
    }
    assert len(different | {plain}) == 5


def test_decoded_once_or_at_every_access_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [encode(image, "JPEG", quality=60) for image in noise(10, size=(20, 14))]
    path = write_parquet(tmp_path / "x.parquet", items)
    num_bytes = 10 * 3 * 8 * 8
    kept = load_images(path, size=8, memory_budget_bytes=num_bytes)["train"]
    lazy = load_images(path, size=8, memory_budget_bytes=num_bytes - 1)["train"]
    decoded: list[int] = []
    decode = EncodedImages.decode

    def counted(self: EncodedImages, index: Tensor, shape: tuple[int, ...]) -> Tensor:
        decoded.extend(index.tolist())
        return decode(self, index, shape)

    monkeypatch.setattr(EncodedImages, "decode", counted)
    order = [3, 7, 3, 0, -1]
    first = kept.batch(order)
    assert torch.equal(first.x, lazy.batch(order).x)
    assert torch.equal(first.x, kept.batch(order).x)
    assert sorted(decoded) == sorted([0, 3, 7, 9, *[3, 7, 3, 0, 9]])  # kept: once each; lazy: all of them
    assert torch.equal(kept.batch(range(10)).x, lazy.batch(range(10)).x)
    assert torch.equal(kept.batch(order).x, first.x)
    assert first.ids.tolist() == [3, 7, 3, 0, 9]
    assert kept.fingerprint == lazy.fingerprint
    assert len(kept.batch([]).x) == len(lazy.batch([]).x) == 0


def test_damaged_items_are_named(tmp_path: Path) -> None:
    good = encode(noise(1, size=(64, 64))[0])
    sixteen = encode(Image.fromarray(np.zeros((64, 64), np.uint16)))
    for item, message in {
        b"no image": r"image 1 of train \(1.png\) cannot be read: it is not a JPEG, PNG, .* image; repair or remove it",
        b"": r"image 1 of train \(1.png\) cannot be read: it is not a JPEG",
        good[:20]: r"image 1 of train \(1.png\) cannot be read: ",
        sixteen: r"image 1 of train \(1.png\) cannot be read: its pixels are I;16, not 8-bit gray or color",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n": "it is not a JPEG",
    }.items():
        path = write_parquet(tmp_path / str(len(item)) / "x.parquet", [good, item])
        with pytest.raises(ValueError, match=message) as error:
            load_images(path)
        assert "\n" not in str(error.value)
    cut = write_parquet(tmp_path / "cut.parquet", [good, good[: len(good) // 2]])
    samples = load_images(cut)["train"]  # the header is sound
    with pytest.raises(
        ValueError, match=r"image 1 of train \(1.png\) cannot be read: .*truncated.*; repair or remove it"
    ):
        samples.batch([0, 1])
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "/no/such.png"}]}), tmp_path / "gone.parquet")
    with pytest.raises(ValueError, match=r"image 0 of train \(/no/such.png\) cannot be read: .*No such file"):
        load_images(tmp_path / "gone.parquet")
    pq.write_table(pa.table({"image": pa.array([None], pa.binary())}), tmp_path / "null.parquet")
    with pytest.raises(ValueError, match="image 0 of train is empty; remove it"):
        load_images(tmp_path / "null.parquet")


def test_damaged_file_in_a_folder_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, noise(4))
    (tmp_path / "dog" / "001.png").write_bytes(b"oops")
    with pytest.raises(ValueError, match=r"image 2 of train \(.*dog/001.png\) cannot be read"):
        load_images(tmp_path)


# Columns and labels


def test_image_column_is_found_or_named(tmp_path: Path) -> None:
    a, b = ([{"bytes": encode(image), "path": None} for image in noise(2, seed=seed)] for seed in (0, 1))
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"left": a, "right": b, "n": [1, 2]}), path)
    with pytest.raises(ValueError, match="the columns left, right all contain images; pass one as --image-column"):
        load_images(path)
    assert torch.equal(pixels(load_images(path, image_column="right")["train"]), expected(noise(2, seed=1)))
    with pytest.raises(ValueError, match="train has no column 'up'; pass one of left, right, n as --image-column"):
        load_images(path, image_column="up")
    with pytest.raises(
        ValueError, match="column 'n' contains no encoded images; pass one of left, right as --image-col"
    ):
        load_images(path, image_column="n")
    pq.write_table(pa.table({"mask": a, "image": b}), path)
    assert torch.equal(pixels(load_images(path)["train"]), expected(noise(2, seed=1)))
    pq.write_table(pa.table({"png": [item["bytes"] for item in a]}), path)
    assert torch.equal(pixels(load_images(path)["train"]), expected(noise(2)))


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


# Splits


def test_single_part_is_divided_60_20_20() -> None:
    splits = split(labeled([50, 30, 20]))
    ids = all_ids(splits)
    assert {name: len(part) for name, part in ids.items()} == {"train": 60, "validation": 20, "test": 20}
    assert set.union(*ids.values()) == set(range(100))
    for samples, counts in zip(
        (splits.train, splits.validation, splits.test), ([30, 18, 12], [10, 6, 4], [10, 6, 4]), strict=True
    ):
        assert samples.labels is not None
        assert (samples.labels.bincount(minlength=3) - torch.tensor(counts)).abs().max() <= 1


def test_report_comes_from_the_test_part() -> None:
    train, test, validation = labeled([50, 50]), labeled([30, 30], first=10**9), labeled([9, 9], first=2 * 10**9)
    for parts, held_out in (
        ({"train": train, "test": test}, test),
        ({"validation": validation, "train": train, "test": test}, test),
        ({"train": train, "val": validation}, validation),
    ):
        splits = split(parts)
        assert set(splits.test.ids.tolist()) == set(held_out.ids.tolist())
        assert len(splits.train) == 80
        assert set(splits.train.ids.tolist()) | set(splits.validation.ids.tolist()) == set(train.ids.tolist())
    assert len(split({"train": train, "other": test}).test) == 20  # of train


def test_probing_takes_no_more_than_it_needs_unless_told() -> None:
    owned = split({"train": labeled([30_000, 20_000]), "test": labeled([6000, 4000], first=10**9)})
    assert [len(samples) for _, samples in owned.items()] == [40_000, 10_000, 10_000]
    assert len(for_probing(take(owned, num_train=9000), given={"num_train": 9000}).train) == 9000
    splits = for_probing(owned, given={})
    assert [len(samples) for _, samples in splits.items()] == [8000, 2000, 5000]
    assert [samples.labels.bincount().tolist() for _, samples in splits.items() if samples.labels is not None] == [
        [4800, 3200],
        [1200, 800],
        [3000, 2000],
    ]


def test_same_sample_stays_on_its_side_whatever_the_counts() -> None:
    data = labeled([40, 60])
    every = all_ids(split(data))
    for num_train, num_validation, num_test in ((10, 5, 5), (60, 20, 20), (33, 7, 19)):
        some = all_ids(split(data, num_train=num_train, num_validation=num_validation, num_test=num_test))
        assert all(some[name] <= every[name] for name in every)
        assert [len(part) for part in some.values()] == [num_train, num_validation, num_test]
        assert sum(map(len, some.values())) == len(set.union(*some.values()))


def test_splits_depend_on_ids_and_seed_and_not_on_the_order() -> None:
    data = labeled([40, 60])
    shuffled = Subset(data, torch.randperm(100, generator=torch.Generator().manual_seed(0)), name="shuffled")
    first, again, other = split(data, num_train=20), split(shuffled, num_train=20), split(data, num_train=20, seed=1)
    for (_, a), (_, b), (_, c) in zip(first.items(), again.items(), other.items(), strict=True):
        assert a.ids.tolist() == b.ids.tolist() != c.ids.tolist()
    assert first.train.fingerprint == split(data, num_train=20).train.fingerprint != other.train.fingerprint


def test_order_is_that_of_splitmix64() -> None:
    # Another release, platform or numpy must divide the same data in the same way.
    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    golden = 0x9E3779B97F4A7C15
    assert mix(golden) == 0xE220A8397B1DCDAF  # the first number of the published generator from seed 0
    ids = [0, 1, 2, 3, 10**9, 2 * 10**9, 2**40, 2**62]
    samples = TensorSamples(torch.zeros(8, 1, 1, 1), ids=torch.tensor(ids))
    for seed in (0, 1, 2**63 - 1):
        keys = [mix((mix((seed + golden) % 2**64) + i * golden) % 2**64) for i in ids]
        assert keyed_order(samples, seed=seed).tolist() == sorted(range(8), key=keys.__getitem__)


def test_order_is_uniform() -> None:
    unlabeled = TensorSamples(torch.zeros(20_000, 1, 1, 1))
    order = keyed_order(unlabeled, seed=3).double()
    assert sorted(order.tolist()) == list(range(20_000))
    # Correlations of permutations have standard deviation 1/sqrt(n) = 0.007: four of them.
    for lag in (1, 2, 7):
        assert abs(torch.corrcoef(torch.stack([order[:-lag], order[lag:]]))[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack([order, torch.arange(20_000).double()]))[0, 1]) < 0.03
    other = keyed_order(unlabeled, seed=4).double()
    assert abs(torch.corrcoef(torch.stack([order, other]))[0, 1]) < 0.03


def test_every_beginning_holds_every_class() -> None:
    data = labeled([20] * 50)
    splits = split(data, num_train=50, num_validation=50, num_test=100)
    assert splits.train.labels is not None
    assert splits.test.labels is not None
    assert splits.train.labels.bincount().tolist() == [1] * 50
    assert splits.test.labels.bincount(minlength=50).tolist() == [2] * 50


def test_impossible_splits_are_refused() -> None:
    data, unlabeled = labeled([40, 60]), TensorSamples(torch.zeros(4, 1, 2, 2), ids=torch.arange(10**9, 10**9 + 4))
    for name, most in (("train", 60), ("validation", 20), ("test", 20)):
        with pytest.raises(
            ValueError, match=f"--num-{name} asks for {most + 1} samples but that split has {most}; pass at"
        ):
            split(data, **{f"num_{name}": most + 1})
        with pytest.raises(ValueError, match=f"--num-{name} is 0; pass at least 1"):
            split(data, **{f"num_{name}": 0})
    with pytest.raises(
        ValueError, match=r"training split of 3 samples lacks 7 of 10 classes \(first: .\); pass a larger --num-train"
    ):
        split(labeled([10] * 10), num_train=3)
    with pytest.raises(ValueError, match=r"2 of 3 classes have fewer than 2 samples \(first: 0\); leave them out"):
        split(labeled([1, 30, 1]))
    named = TensorSamples(torch.zeros(9, 1, 2, 2), torch.tensor([0] * 8 + [1]), class_names=("cat", "dog", "emu"))
    with pytest.raises(ValueError, match=r"2 of 3 classes have fewer than 2 samples \(first: dog\)"):
        split(named)
    with pytest.raises(ValueError, match="2 samples are too few for three splits; pass at least 5"):
        split(TensorSamples(torch.zeros(2, 1, 2, 2)))
    with pytest.raises(
        ValueError, match="the data has the parts a, b, but none is named train; pass one of them as --sp"
    ):
        split({"a": data, "b": data})
    with pytest.raises(ValueError, match="the data has the parts nothing"):
        split({})
    with pytest.raises(ValueError, match="20 sample ids occur twice; give every sample a unique id"):
        split({"train": data, "test": Subset(split(data).train, range(20), name="leak")})
    with pytest.raises(ValueError, match="only train has labels; pass --split train"):
        split({"train": data, "test": unlabeled})
    with pytest.raises(ValueError, match=r"train has 2 classes and test has 3, or their names differ"):
        split({"train": data, "test": labeled([2, 2, 2], first=10**9)})
    with pytest.raises(ValueError, match=r"train has shape \(1, 2, 2\) but test has \(1, 4, 4\)"):
        split({"train": data, "test": TensorSamples(torch.zeros(4, 1, 4, 4), ids=torch.arange(10**9, 10**9 + 4))})
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=f"seed must be between 0 and .*, got {seed}"):
            split(data, seed=seed)


def test_five_samples_are_enough_and_taking_all_is_the_same() -> None:
    splits = split(TensorSamples(torch.zeros(5, 1, 2, 2)))
    assert [len(samples) for _, samples in splits.items()] == [3, 1, 1]
    assert all_ids(take(splits)) == all_ids(splits)


# The way in


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


# Real data


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
