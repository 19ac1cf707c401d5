"""Image data sets: their rows come from `tables`, and Pillow decodes them here, to 8 bits per channel.

A value p in 0 ... 255 stands for p / 127.5 - 1. Channels come first, rows from top to bottom.

Gray images have 1 channel and color images 3. A palette counts as color; transparent pixels are laid over white; the
orientation in EXIF is applied; of several frames the first is taken. More than 8 bits per pixel of gray are refused,
because they have no agreed range.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerprobe.data import tables
from layerprobe.data.samples import Batch, LabelColumn, Samples, content_hash, pixels_to_float

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

MEMORY_BUDGET_BYTES = 2 * 2**30

_IMAGE_COLUMNS = ("image", "img", "images")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")
# Not every format that Pillow knows: some of them start other programs (EPS starts Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MODE_CHANNELS = {"1": 1, "L": 1, "LA": 1, "P": 3, "PA": 3, "RGB": 3, "RGBA": 3, "CMYK": 3, "YCbCr": 3}
_EXIF_ORIENTATION = 0x0112


def load_images(
    source: str | Path,
    *,
    size: int | None = None,
    channels: int | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    probe_labels: str = "",
    skip_bad: int = 0,
    memory_budget_bytes: int = MEMORY_BUDGET_BYTES,
) -> dict[str, Samples]:
    """The parts of an image data set by name ("train", "test", ...).

    A sample's id is its row, counted per part from `tables.first_id`. Image files are sorted by path.

    Args:
        source: A .parquet or .arrow file; a folder of them, of image files (a folder per class) or from `save_to_disk`;
            or "owner/name" on the Hugging Face Hub, the only case that uses the network.
        size: Side of the square in pixels. The largest centered square is resized to it, bicubic with antialiasing. None
            keeps the images as they are.
        channels: 1 or 3; None keeps what the images have.
        split: The only part to read.
        image_column: Where the images are; found by type and name where not given.
        label_column: Where the labels are; see `tables.label_column`. Without one the samples are unlabeled.
        probe_labels: Further label columns, see `tables.further_columns`.
        skip_bad: So many images of each part may be unreadable and are left out. All are then decoded once beforehand:
            a damaged one may have a sound header.
        memory_budget_bytes: If all pixels fit, an image is decoded on first access and kept as uint8, else it is
            decoded at every access. The values are the same.

    Raises:
        ValueError: If the source cannot be read, an item is no image, or the images do not have one shape.
    """
    if size is not None and size < 1:
        raise ValueError(f"--size is {size}; pass a positive number of pixels")
    if channels not in (None, 1, 3):
        raise ValueError(f"--channels is {channels}; pass 1 (gray) or 3 (color)")
    if skip_bad < 0:
        raise ValueError(f"--skip-bad is {skip_bad}; pass 0 or more")
    parts = _read(source, split)
    column = _image_column(parts, image_column)
    labels_in = tables.label_column(parts, label_column)
    labels, class_names = tables.read_labels(parts, labels_in)
    columns = tables.read_columns(parts, tables.further_columns(probe_labels, labels_in))
    images = {name: EncodedImages(rows, column, part=name) for name, rows in parts.items()}
    headers = {name: part.headers(skip_bad=skip_bad) for name, part in images.items()}
    shape = _common_shape(images, headers, size, channels)
    num_bytes = sum(len(part) for part in images.values()) * int(np.prod(shape))
    return {
        name: ImageSamples(
            images[name],
            shape,
            labels=None if own is None else own[images[name].row_numbers],
            class_names=class_names,
            first_id=tables.first_id(name),
            content=headers[name].content,
            keep=num_bytes <= memory_budget_bytes,
            columns=tuple(column.at(images[name].row_numbers) for column in columns[name]),
        )
        for name, own in labels.items()
    }


def _read(source: str | Path, split: str | None) -> dict[str, Dataset]:
    """Rows of encoded images.

    `datasets` would leave out images that a metadata.csv does not name, and the classes of their folders.
    """
    root = Path(source).expanduser()
    if not root.is_dir() or next(root.rglob("metadata.csv"), None) is None:
        return tables.read(source, suffixes=SUFFIXES, split=split)
    from datasets import Image

    parts = tables.read_items(source, suffixes=SUFFIXES, split=split)
    for name, rows in parts.items():
        if tables.FILE in rows.features:
            parts[name] = rows.rename_column(tables.FILE, "image").cast_column("image", Image(decode=False))
    return parts


class ImageSamples(Samples):
    """Encoded images, decoded on access.

    Args:
        images: The encoded images.
        shape: Shape (C, H, W) to decode to.
        labels: Shape (n,), or None.
        class_names: One per class.
        first_id: The id of row 0.
        content: A hash of the encoded images.
        keep: Keep what was decoded in memory, as uint8.
        columns: Further labels.
    """

    def __init__(
        self,
        images: EncodedImages,
        shape: tuple[int, ...],
        *,
        labels: Tensor | None,
        class_names: tuple[str, ...],
        first_id: int,
        content: str,
        keep: bool,
        columns: tuple[LabelColumn, ...] = (),
    ) -> None:
        self.shape, self.modality, self.columns = shape, "image", columns
        self.labels, self.class_names, self.num_classes = labels, class_names, len(class_names)
        self.ids = first_id + images.row_numbers
        self.fingerprint = content_hash("images, version 1", content, shape, labels, class_names, first_id)
        self.images = images
        # Memory that was never written to costs nothing: pages are handed out as images are decoded.
        self._pixels = torch.empty((len(images), *shape), dtype=torch.uint8) if keep else None
        self._decoded = torch.zeros(len(images), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int]) -> Batch:
        index = torch.arange(len(self))[torch.as_tensor(indices, dtype=torch.long)]
        labels = None if self.labels is None else self.labels[index]
        return Batch(pixels_to_float(self._read(index)), labels, self.ids[index])

    def _read(self, index: Tensor) -> Tensor:
        if self._pixels is None:
            return self.images.decode(index, self.shape)
        new = torch.tensor(sorted(set(index[~self._decoded[index]].tolist())), dtype=torch.long)
        if len(new):
            self._pixels[new] = self.images.decode(new, self.shape)
            self._decoded[new] = True
        return self._pixels[index]


@dataclass(frozen=True)
class _Headers:
    """What the headers say: channels, height and width as shown, shape (n, 3); and a hash of all bytes."""

    shapes: NDArray[Any]
    content: str


class EncodedImages:
    """One column of encoded images.

    Attributes:
        rows: Those that are kept.
        row_numbers: Their places in the data, shape (n,).
        bad: What is wrong with the images that were left out, by name.
    """

    def __init__(self, rows: Dataset, column: str, *, part: str) -> None:
        from datasets import Image

        rows = rows.select_columns(column)
        is_image = isinstance(rows.features[column], Image)
        self.rows = rows.cast_column(column, Image(decode=False)) if is_image else rows
        self.column, self.part = column, part
        self.row_numbers = torch.arange(len(self.rows))
        self.bad: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def headers(self, *, skip_bad: int = 0) -> _Headers:
        """What the headers say, after up to `skip_bad` images that cannot be read have been left out.

        Raises:
            ValueError: If more cannot be read, or none can.
        """
        if skip_bad:
            self._leave_out_bad(skip_bad)
        shapes, digest = np.empty((len(self), 3), np.int64), hashlib.sha256()
        for start in range(0, len(self), 256):
            index = range(start, min(start + 256, len(self)))
            for row, encoded in zip(index, self._encoded(index), strict=True):
                digest.update(len(encoded).to_bytes(8, "little"))
                digest.update(encoded)
                with self._errors(row):
                    shapes[row] = _shape(encoded)
        return _Headers(shapes, digest.hexdigest())

    def _leave_out_bad(self, skip_bad: int) -> None:
        kept = []
        for row in range(len(self)):
            try:
                (encoded,) = self._encoded([row])
                with self._errors(row):
                    decode_image(encoded, _shape(encoded))
            except ValueError as error:
                self.bad[self.name(row)] = tables.one_line(error.__cause__ or error)
                if len(self.bad) > skip_bad:
                    seen = f"{len(self.bad)} images cannot be read, --skip-bad allows {skip_bad}"
                    raise ValueError(f"{seen}; the last: {error}") from error
            else:
                kept.append(row)
        if not kept:
            seen = next(f"{name}: {error}" for name, error in self.bad.items())
            raise ValueError(f"{self.part} has no image that can be read; the first is {seen}; pass other data")
        self.rows, self.row_numbers = self.rows.select(kept), self.row_numbers[kept]

    def decode(self, index: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The images in these rows as uint8, shape (B, *shape)."""
        pixels = np.empty((len(index), *shape), np.uint8)
        rows = index.tolist()
        for out, row, encoded in zip(pixels, rows, self._encoded(rows), strict=True):
            with self._errors(row):
                out[:] = decode_image(encoded, shape)
        return torch.from_numpy(pixels)

    def name(self, row: int) -> str:
        item = self.rows[row][self.column]
        path = item.get("path") if isinstance(item, dict) else None
        return f"image {int(self.row_numbers[row])} of {self.part}" + (f" ({path})" if path else "")

    def _encoded(self, index: Sequence[int]) -> Iterator[bytes]:
        items = self.rows[index][self.column] if len(index) else []
        for row, item in zip(index, items, strict=True):
            encoded = item["bytes"] if isinstance(item, dict) else item
            if encoded is None:
                if not isinstance(item, dict) or item.get("path") is None:
                    raise ValueError(f"{self.name(row)} is empty; remove it")
                with self._errors(row):
                    encoded = Path(item["path"]).read_bytes()
            yield encoded

    @contextmanager
    def _errors(self, row: int) -> Iterator[None]:
        # Decoders meet damaged data with almost any exception: OSError, SyntaxError, struct.error, IndexError, ...
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:
            seen = f"{self.name(row)} cannot be read: {tables.one_line(error)}"
            raise ValueError(f"{seen}; mend or remove it, or pass --skip-bad 1 or more") from error


def _open(encoded: bytes) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
    except UnidentifiedImageError:  # whose message names an object in memory
        raise ValueError(f"it is no {', '.join(_FORMATS)} image") from None
    if image.mode not in _MODE_CHANNELS:
        raise ValueError(f"its pixels are {image.mode}, not 8-bit gray or color")
    return image


def _orientation(image: Image) -> int:
    return int(image.getexif().get(_EXIF_ORIENTATION, 1)) if "exif" in image.info else 1


def _shape(encoded: bytes) -> tuple[int, int, int]:
    """Channels, height and width by the header alone."""
    image = _open(encoded)
    width, height = image.size
    if _orientation(image) >= 5:  # turned by a quarter
        width, height = height, width
    return _MODE_CHANNELS[image.mode], height, width


def decode_image(encoded: bytes, shape: tuple[int, ...]) -> NDArray[Any]:
    """An encoded image as uint8 of shape (C, H, W), see the top of this module."""
    from PIL import Image, ImageOps

    channels, height, width = shape
    image = _open(encoded)
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def _common_shape(
    images: Mapping[str, EncodedImages], headers: Mapping[str, _Headers], size: int | None, channels: int | None
) -> tuple[int, int, int]:
    shapes = np.concatenate([part.shapes for part in headers.values()])
    if channels is None:
        kinds, counts = np.unique(shapes[:, 0], return_counts=True)
        if len(kinds) > 1:
            seen = f"{counts[0]} images are gray and {counts[1]} are in color"
            raise ValueError(f"{seen}; pass --channels 1 or --channels 3")
        channels = int(kinds[0])
    if size is not None:
        return channels, size, size
    height, width = (int(side) for side in shapes[0, 1:])
    for name, part in headers.items():
        different = np.flatnonzero((part.shapes[:, 1:] != (height, width)).any(1))
        if len(different):
            _, h, w = part.shapes[different[0]]
            raise ValueError(
                f"{images[name].name(int(different[0]))} is {h}x{w} but the first is {height}x{width}; "
                f"pass --size {min(height, width)} or another, to resize and crop them all"
            )
    return channels, height, width


def _image_column(parts: Mapping[str, Dataset], given: str | None) -> str:
    features = next(iter(parts.values())).features
    columns = [name for name, feature in features.items() if tables.holds_bytes(feature)]
    named = [name for name in _IMAGE_COLUMNS if name in columns]
    column = given or next(iter(named or columns), None)
    if column is None:
        raise ValueError(f"no column holds encoded images but {', '.join(features)}; pass image data")
    tables.check_column(parts, column, "--image-column")
    if column not in columns:
        raise ValueError(
            f"column {column!r} holds no encoded images; pass one of {', '.join(columns)} as --image-column"
        )
    if not given and not named and len(columns) > 1:
        raise ValueError(f"the columns {', '.join(columns)} all hold images; pass one as --image-column")
    return column
