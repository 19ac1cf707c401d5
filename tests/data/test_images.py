from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pictures import encode, expected, noise, pixels, write_folder, write_parquet
from PIL import Image
from torch import Tensor

from layerprobe.data.images import EncodedImages, load_images

pytestmark = pytest.mark.usefixtures("offline")


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


def test_several_threads_read_what_one_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [encode(image, "JPEG", quality=60) for image in noise(70, size=(20, 14))]
    good = write_parquet(tmp_path / "good.parquet", items)
    bad = write_parquet(tmp_path / "bad.parquet", [b"no" if i in (40, 66) else item for i, item in enumerate(items)])
    found = []
    for threads in (1, 4):
        monkeypatch.setattr("layerprobe.threads.num_threads", lambda threads=threads: threads)
        samples = load_images(good, size=8)["train"]
        skipped = load_images(bad, size=8, skip_bad=2)["train"]
        with pytest.raises(ValueError, match=r"^image 40 of train") as error:
            load_images(bad, size=8)
        found.append((samples, skipped, str(error.value)))
    (one, one_skipped, problem), (many, many_skipped, same_problem) = found
    assert torch.equal(one.batch(range(70)).x, many.batch(range(70)).x)
    assert (one.fingerprint, one.stored_digests()) == (many.fingerprint, many.stored_digests())
    assert one_skipped.ids.tolist() == many_skipped.ids.tolist() == [i for i in range(70) if i not in (40, 66)]
    assert problem == same_problem


def test_reading_leaves_the_warnings_of_others_as_they_are(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(image) for image in noise(40)])
    before = warnings.filters[:]
    load_images(path)["train"].batch(range(40))
    added = [entry for entry in warnings.filters if entry not in before]
    assert [module.pattern for _, _, _, module, _ in added if module] in ([], [r"PIL\."])
    assert len(added) <= 1


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
    with pytest.raises(
        ValueError, match=r"image 0 of train \(/no/such.png\) cannot be read: .*such.png leads out of the folder"
    ):
        load_images(tmp_path / "gone.parquet")
    pq.write_table(pa.table({"image": pa.array([None], pa.binary())}), tmp_path / "null.parquet")
    with pytest.raises(ValueError, match="image 0 of train is empty in column 'image'; remove it, or write all in"):
        load_images(tmp_path / "null.parquet")


def test_damaged_file_in_a_folder_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, noise(4))
    (tmp_path / "dog" / "001.png").write_bytes(b"oops")
    with pytest.raises(ValueError, match=r"image 2 of train \(.*dog/001.png\) cannot be read"):
        load_images(tmp_path)


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
