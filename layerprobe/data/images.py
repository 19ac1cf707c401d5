"""Image data sets: rows are read by `tables` and decoded by Pillow to 8 bits per channel.

A pixel value p in 0 to 255 becomes p / 127.5 - 1. Channels come first, rows run from top to bottom.

Gray images have 1 channel and color images 3. Palette images count as color, transparent pixels are composited over
white, the EXIF orientation is applied, and only the first frame is read. Gray images of more than 8 bits per pixel are
refused, because their value range is not standardized.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerprobe.data import tables
from layerprobe.data.contents import npy_array, with_content
from layerprobe.data.kind import DataKind
from layerprobe.data.labels import further_columns, read_columns, read_labels, reading_of
from layerprobe.data.listing import list_files
from layerprobe.data.reading import Reading
from layerprobe.data.samples import (
    MEMORY_BUDGET_BYTES,
    Batch,
    LabelColumn,
    Samples,
    content_hash,
    digest_of,
    pixels_to_float,
)
from layerprobe.files import one_line
from layerprobe.memory import pass_on
from layerprobe.threads import each

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

Result = TypeVar("Result")
_IMAGE_COLUMNS = (tables.FILE, "image", "img", "images")
SUFFIXES = (".npy", ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")
# Not all formats of Pillow: some of them start other programs (EPS starts Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MODE_CHANNELS = {"1": 1, "L": 1, "LA": 1, "P": 3, "PA": 3, "RGB": 3, "RGBA": 3, "CMYK": 3, "YCbCr": 3}
_EXIF_ORIENTATION = 0x0112
_ROWS_AT_ONCE, _ROWS_PER_THREAD = 256, 16
_SKETCHED_BYTES = 24
MAX_PIXELS = 2**26  # a small file may claim more than memory holds


def load_images(
    source: str | Path,
    *,
    size: int | None = None,
    channels: int | None = None,
    data_root: str | Path | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    probe_labels: str = "",
    skip_bad: int = 0,
    memory_budget_bytes: int = MEMORY_BUDGET_BYTES,
) -> dict[str, Samples]:
    """Loads the parts of an image data set.

    The id of a sample is its row, counted per part from `tables.first_id`. Image files are sorted by path.

    Args:
        source: A .parquet or .arrow file; a folder of such files, of image files (one folder per class) or written by
            `save_to_disk`; or "owner/name" on the Hugging Face Hub, the only case that uses the network.
        size: Side of the square samples in pixels. The largest centered square is resized to it, bicubic with
            antialiasing. None keeps the size of the images.
        channels: Number of channels, 1 or 3; None keeps the channels of the images.
        data_root: Folder that links and tables of the data may name files in, beside that of the data.
        split: Name of the only part to read; None for all parts.
        image_column: Column of the images; None finds it by type and name.
        label_column: Column of the class labels; None finds it as in `labels.label_column`.
        probe_labels: Extra label columns, separated by commas.
        skip_bad: Maximum number of unreadable images per part, which are left out. If it is not 0, all images are
            decoded once in advance, because a damaged image may have a valid header.
        memory_budget_bytes: Memory budget. If the pixels of all images fit, decoded images are kept as uint8; otherwise
            images are decoded at every access. The values are the same.

    Returns:
        Samples by part name ("train", "test", ...).

    Raises:
        ValueError: If the source cannot be read, an item is not an image, or the images differ in shape.
    """
    if size is not None and size < 1:
        raise ValueError(f"--size is {size}; pass a positive number of pixels")
    if channels not in (None, 1, 3):
        raise ValueError(f"--channels is {channels}; pass 1 (gray) or 3 (color)")
    if skip_bad < 0:
        raise ValueError(f"--skip-bad is {skip_bad}; pass 0 or more")
    listing = list_files(source, SUFFIXES, data_root=data_root)
    parts = tables.read(listing, split=split)
    column = _image_column(parts, image_column)
    labels = read_labels(parts, label_column)
    columns = read_columns(parts, further_columns(probe_labels, labels.column))
    images = {name: EncodedImages(rows, column, part=name, folders=listing.folders) for name, rows in parts.items()}
    headers = {name: part.headers(skip_bad=skip_bad) for name, part in images.items()}
    shape = _common_shape(images, headers, size, channels)
    reading = replace(
        reading_of(listing, parts, labels, given=label_column),
        unreadable={name: len(part.bad) for name, part in images.items() if part.bad},
        several_frames=sum(part.num_animated for part in headers.values()),
    )
    num_bytes = sum(len(part) for part in images.values()) * int(np.prod(shape))
    return {
        name: ImageSamples(
            images[name],
            shape,
            labels=None if part_labels is None else part_labels[images[name].row_numbers],
            class_names=labels.class_names,
            first_id=tables.first_id(name),
            content=headers[name].content,
            sketches=headers[name].sketches,
            keep=num_bytes <= memory_budget_bytes,
            columns=tuple(column.at(images[name].row_numbers) for column in columns[name]),
            reading=reading,
        )
        for name, part_labels in labels.by_part.items()
    }


class ImageSamples(Samples):
    """Encoded images, decoded on access.

    Args:
        images: The encoded images.
        shape: Shape (C, H, W) of the decoded images.
        labels: Class labels, shape (n,), or None for unlabeled data.
        class_names: Class names, one per class.
        first_id: Id of row 0.
        content: Hash of the encoded images.
        sketches: Length of each encoded image and a few of its bytes.
        keep: Whether to keep decoded images in memory, as uint8.
        columns: Extra label columns.
        reading: What was read of the data set.
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
        sketches: Sequence[bytes],
        keep: bool,
        columns: tuple[LabelColumn, ...] = (),
        reading: Reading | None = None,
    ) -> None:
        self.shape, self.modality, self.columns, self.reading = shape, "image", columns, reading
        self.labels, self.class_names, self.num_classes = labels, class_names, len(class_names)
        self.ids = first_id + images.row_numbers
        self.fingerprint = content_hash("images, version 1", content, shape, labels, class_names, first_id)
        self.images, self._sketches = images, sketches
        # Memory that was never written costs nothing: the system allocates pages as images are decoded.
        self._pixels = torch.empty((len(images), *shape), dtype=torch.uint8) if keep else None
        self._decoded = torch.zeros(len(images), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int]) -> Batch:
        index = self._positions(indices)
        labels = None if self.labels is None else self.labels[index]
        return Batch(pixels_to_float(self._read(index)), labels, self.ids[index])

    def content(self, indices: Sequence[int]) -> Tensor:
        return self._read(self._positions(indices))

    def stored_digests(self) -> list[bytes]:
        return self.images.digests(self._sketches)

    def _positions(self, indices: Sequence[int]) -> Tensor:
        return torch.arange(len(self))[torch.as_tensor(indices, dtype=torch.long)]

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
    """What is read of all images before they are decoded.

    Attributes:
        shapes: Channels, height and width of the images as displayed, shape (n, 3).
        content: Hash of the bytes of all images.
        sketches: Length of each and a few of its bytes; images of different sketches are different.
        num_animated: Number of images of several frames.
    """

    shapes: NDArray[Any]
    content: str
    sketches: list[bytes]
    num_animated: int


class EncodedImages:
    """A column of encoded images.

    Args:
        rows: Rows of the data set.
        column: Column of the images.
        part: Name of the part, for error messages.
        folders: Folders that files of the images may lie in.

    Attributes:
        rows: Rows that are kept.
        row_numbers: Positions of these rows in the data set, shape (n,).
        bad: Errors of the images that were left out, by name of the image.
    """

    def __init__(self, rows: Dataset, column: str, *, part: str, folders: Sequence[Path]) -> None:
        from datasets import Image

        rows = rows.select_columns(column)
        is_image = isinstance(rows.features[column], Image)
        self.rows = rows.cast_column(column, Image(decode=False)) if is_image else rows
        self.column, self.part, self._folders = column, part, folders
        self.row_numbers = torch.arange(len(self.rows))
        self.bad: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def headers(self, *, skip_bad: int = 0) -> _Headers:
        """Reads the headers of all images, after leaving out up to `skip_bad` unreadable images.

        Raises:
            ValueError: If more images are unreadable, or all of them.
        """
        if skip_bad:
            self._leave_out_bad(skip_bad)
        shapes, digest, sketches, num_animated = np.empty((len(self), 3), np.int64), hashlib.sha256(), [], 0

        def header(row: int, item: Any) -> tuple[bytes, tuple[int, int, int], bool]:
            encoded = self._content(row, item)
            with self._errors(row):
                image = _open(encoded)
                return encoded, _shape(image), getattr(image, "is_animated", False)

        for row, (encoded, shape, is_animated) in enumerate(self._mapped(range(len(self)), header)):
            length = len(encoded).to_bytes(8, "little")
            digest.update(length)
            digest.update(encoded)
            sketches.append(length + encoded[:: len(encoded) // _SKETCHED_BYTES + 1])
            shapes[row] = shape
            num_animated += is_animated
        return _Headers(shapes, digest.hexdigest(), sketches, num_animated)

    def digests(self, sketches: Sequence[bytes]) -> list[bytes]:
        """Returns bytes for every image that are equal for equal images only: the hash of those of equal sketches."""
        counts = Counter(sketches)
        alike = [row for row, sketch in enumerate(sketches) if counts[sketch] > 1]
        hashes = self._mapped(alike, lambda row, item: digest_of(self._content(row, item)))
        return [*(dict(enumerate(sketches)) | dict(zip(alike, hashes, strict=True))).values()]

    def _leave_out_bad(self, skip_bad: int) -> None:
        kept = []

        def problem(row: int, item: Any) -> ValueError | None:
            try:
                encoded = self._content(row, item)
                with self._errors(row):
                    decode_image(encoded, _shape(_open(encoded)))
            except ValueError as error:
                return error
            return None

        for row, error in enumerate(self._mapped(range(len(self)), problem)):
            if error:
                self.bad[self.name(row)] = one_line(error.__cause__ or error)
                if len(self.bad) > skip_bad:
                    counts = f"{len(self.bad)} images cannot be read, --skip-bad allows {skip_bad}"
                    raise ValueError(f"{counts}; the last: {error}") from error
            else:
                kept.append(row)
        if not kept:
            first = next(f"{name}: {error}" for name, error in self.bad.items())
            raise ValueError(f"{self.part} has no readable image; the first is {first}; pass other data")
        self.rows, self.row_numbers = self.rows.select(kept), self.row_numbers[kept]

    def decode(self, index: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Decodes the images in these rows to uint8, shape (B, *shape)."""
        pixels = np.empty((len(index), *shape), np.uint8)

        def decoded(row: int, item: Any) -> NDArray[Any]:
            encoded = self._content(row, item)
            with self._errors(row):
                return np.ascontiguousarray(decode_image(encoded, shape))

        for out, values in zip(pixels, self._mapped(index.tolist(), decoded), strict=True):
            out[:] = values
        return torch.from_numpy(pixels)

    def name(self, row: int) -> str:
        """Returns the position and path of an image, for messages."""
        item = self.rows[row][self.column]
        path = item.get("path") if isinstance(item, dict) else None
        return f"image {int(self.row_numbers[row])} of {self.part}" + (f" ({path})" if path else "")

    def _mapped(self, index: Sequence[int], function: Callable[[int, Any], Result]) -> Iterator[Result]:
        """Yields a function of these rows and what the column stores of each, computed in threads, some at a time."""
        ignore_pillow_warnings()
        for start in range(0, len(index), _ROWS_AT_ONCE):
            rows = index[start : start + _ROWS_AT_ONCE]
            yield from each(function, rows, self.rows[rows][self.column], least=_ROWS_PER_THREAD)

    def _content(self, row: int, item: Any) -> bytes:
        """Returns the encoded image of a row, of which the column stores the bytes or the name of a file."""
        if isinstance(item, dict):
            with self._errors(row):
                item = with_content(item, self._folders)
        encoded: bytes | None = item["bytes"] if isinstance(item, dict) else item
        if encoded is None:
            raise ValueError(
                f"{self.name(row)} is empty in column {self.column!r}; remove it, or write all in one format"
            )
        return encoded

    @contextmanager
    def _errors(self, row: int) -> Iterator[None]:
        # Decoders raise almost any exception on damaged data: OSError, SyntaxError, struct.error, IndexError, ...
        try:
            yield
        except Exception as error:
            pass_on(error)
            problem = f"{self.name(row)} cannot be read: {one_line(error)}"
            raise ValueError(f"{problem}; repair or remove it, or pass --skip-bad 1 or more") from error


def ignore_pillow_warnings() -> None:
    """Ignores what Pillow warns of, for example an image's size, which is checked here.

    It stays so: `catch_warnings` in threads can leave the filters of one thread to all others.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _open(encoded: bytes) -> Image:
    from PIL import Image, UnidentifiedImageError

    if encoded.startswith(b"\x93NUMPY"):
        return Image.fromarray(_pixels(npy_array(encoded)))
    try:
        image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
    except UnidentifiedImageError:  # its message names an object in memory
        raise ValueError(f"it is not a {', '.join(_FORMATS)} image") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS:.3g}")
    if image.mode not in _MODE_CHANNELS:
        raise ValueError(f"its pixels are {image.mode}, not 8-bit gray or color")
    return image


def _pixels(array: NDArray[Any]) -> NDArray[Any]:
    """An image in an array as Pillow takes it, shape (H, W) or (H, W, C)."""
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(f"it is {array.dtype} of shape {array.shape}, not uint8 of (H, W, C), (C, H, W) or (H, W)")
    return np.ascontiguousarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _orientation(image: Image) -> int:
    return int(image.getexif().get(_EXIF_ORIENTATION, 1)) if "exif" in image.info else 1


def _shape(image: Image) -> tuple[int, int, int]:
    """Channels, height and width according to the header."""
    width, height = image.size
    if _orientation(image) >= 5:  # rotated by 90 degrees
        width, height = height, width
    return _MODE_CHANNELS[image.mode], height, width


def decode_image(encoded: bytes, shape: tuple[int, ...]) -> NDArray[Any]:
    """Decodes an image to uint8 of shape (C, H, W), by the conventions of this module.

    Args:
        encoded: Content of an image file.
        shape: Shape (C, H, W) to crop and resize to.
    """
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
        values, counts = np.unique(shapes[:, 0], return_counts=True)
        if len(values) > 1:
            raise ValueError(
                f"{counts[0]} images are gray and {counts[1]} are in color; pass --channels 1 or --channels 3"
            )
        channels = int(values[0])
    if size is not None:
        return channels, size, size
    height, width = (int(side) for side in shapes[0, 1:])
    for name, part in headers.items():
        different = np.flatnonzero((part.shapes[:, 1:] != (height, width)).any(1))
        if len(different):
            _, h, w = part.shapes[different[0]]
            raise ValueError(
                f"{images[name].name(int(different[0]))} is {h}x{w} but the first is {height}x{width}; "
                f"pass --size {min(height, width)} or another size to crop and resize all images"
            )
    return channels, height, width


def _image_column(parts: Mapping[str, Dataset], given: str | None) -> str:
    features = next(iter(parts.values())).features
    columns = [name for name, feature in features.items() if tables.holds_bytes(feature)]
    named = [name for name in _IMAGE_COLUMNS if name in columns]
    column = given or next(iter(named or columns), None)
    if column is None:
        raise ValueError(f"none of the columns {', '.join(features)} contains encoded images; pass image data")
    tables.check_column(parts, column, "--image-column")
    if column not in columns:
        raise ValueError(
            f"column {column!r} contains no encoded images; pass one of {', '.join(columns)} as --image-column"
        )
    if not given and not named and len(columns) > 1:
        raise ValueError(f"the columns {', '.join(columns)} all contain images; pass one as --image-column")
    return column


KIND = DataKind(load_images, SUFFIXES)
