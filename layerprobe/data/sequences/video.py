"""Video: clips of shape (C, frames, height, width), from files or columns.

A column contains lists of encoded images or encoded video files, which PyAV decodes. Pixels are in [-1, 1], as for
images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from layerprobe.data import tables
from layerprobe.data.images import MAX_PIXELS, decode_image, ignore_pillow_warnings
from layerprobe.data.kind import DataKind
from layerprobe.data.listing import list_files
from layerprobe.data.samples import Samples, pixels_to_float
from layerprobe.data.sequences.items import MAX_VALUES, Decoder, file_bytes, load_media
from layerprobe.data.sequences.whole import check_end
from layerprobe.files import import_optional

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif")
COLUMNS = ("video", "videos", "frames", "clip")


@dataclass(frozen=True)
class VideoDecoder(Decoder):
    """Decoder of clips to (C, frames, size, size).

    Attributes:
        size: Side of the square frames in pixels; the largest centered square of a frame is resized to it.
        channels: Number of channels, 1 or 3.
        stride: Stride between the frames that are kept.
    """

    size: int
    channels: Literal[1, 3] = 3
    stride: int = 1
    modality = "video"
    normalized = False

    def __call__(self, item: Any) -> Tensor:
        """Decodes a clip, shape (channels, frames, size, size)."""
        ignore_pillow_warnings()
        if isinstance(item, list):
            shape = (self.channels, self.size, self.size)
            frames = [decode_image(file_bytes(frame).getvalue(), shape) for frame in item[:: self.stride]]
        else:
            frames = []
            for frame in self._file_frames(item):  # one after the other: all of them in full size may exceed memory
                frames.append(self._pixels(frame))
                if len(frames) * frames[0].size > MAX_VALUES:
                    raise ValueError(f"it has more than {MAX_VALUES:.3g} values; pass a smaller --size or a --stride")
        if len(frames) < 2:
            raise ValueError(f"it has {'one frame' if frames else 'no frames'}, but a video needs at least two")
        return pixels_to_float(torch.from_numpy(np.stack(frames, axis=1)))

    def _file_frames(self, item: Any) -> Iterator[Image]:
        content = file_bytes(item)
        check_end(content.getvalue())
        if content.getvalue().startswith(b"GIF8"):
            from PIL import Image, ImageSequence

            # Not by PyAV, which drops frames that are shown for no time.
            image = Image.open(content, formats=["GIF"])
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS:.3g}")
            for index, frame in enumerate(ImageSequence.Iterator(image)):
                if index % self.stride == 0:
                    yield frame.convert("RGB")
            return
        av = import_optional("av", "video")
        with av.open(content) as container:
            if not container.streams.video:
                raise ValueError("it has no video stream")
            stream, count = container.streams.video[0], 0
            if stream.width * stream.height > MAX_PIXELS:
                raise ValueError(f"it has {stream.width} x {stream.height} pixels, more than {MAX_PIXELS:.3g}")
            for count, frame in enumerate(container.decode(stream), 1):
                if (count - 1) % self.stride == 0:
                    yield frame.to_image()
            if count < stream.frames:
                raise ValueError(f"it has {count} of the {stream.frames} frames that it declares: it is cut")

    def _pixels(self, frame: Image) -> Any:
        from PIL import Image, ImageOps

        fitted = ImageOps.fit(
            frame.convert("L" if self.channels == 1 else "RGB"), (self.size, self.size), Image.Resampling.BICUBIC
        )
        return np.asarray(fitted).reshape(self.size, self.size, self.channels).transpose(2, 0, 1)


def load_video(
    source: str | Path,
    *,
    size: int,
    channels: Literal[1, 3] = 3,
    length: int | None = None,
    stride: int = 1,
    data_root: str | Path | None = None,
    split: str | None = None,
    column: str | None = None,
    label_column: str | None = None,
    probe_labels: str = "",
    skip_bad: int = 0,
) -> dict[str, Samples]:
    """Loads the parts of a video data set.

    Args:
        source: Source as in `list_files`: video files with a folder per class, or rows with a column of encoded
            files or of lists of images.
        size: Side of the square frames in pixels.
        channels: Number of channels, 1 or 3.
        length: Number of frames of a sample, after the stride; None for the longest clip.
        stride: Stride between the frames that are kept.
        data_root: Folder that links and tables of the data may name files in, beside that of the data.
        split: Name of the only part to read; None for all parts.
        column: Column of the clips; None finds it by name and type.
        label_column: Column of the class labels; None finds it as in `labels.label_column`.
        probe_labels: Extra label columns, as in `load_media`.
        skip_bad: Maximum number of unreadable clips per part, which are left out.

    Returns:
        Samples by part name.

    Raises:
        ValueError: If the data cannot be read.
        ModuleNotFoundError: If PyAV is needed and not installed.
    """
    if size < 1 or stride < 1 or channels not in (1, 3):
        raise ValueError(
            f"--size and --stride must be at least 1 and --channels 1 or 3, got {size}, {stride} and {channels}"
        )
    listing = list_files(source, SUFFIXES, data_root=data_root)
    parts = tables.read(listing, split=split)
    item_column = tables.item_column(parts, column, usual=COLUMNS, what="video", fits=holds_video)
    if item_column == tables.FILE:
        import_optional("av", "video")
    decoder = VideoDecoder(size, channels, stride)
    return load_media(
        listing,
        parts,
        item_column,
        decoder,
        label_column=label_column,
        probe_labels=probe_labels,
        length=length,
        skip_bad=skip_bad,
    )


def holds_video(feature: Any) -> bool:
    """Returns whether a column of this type contains lists of encoded images, or encoded files."""
    inner = getattr(feature, "feature", None)
    return tables.holds_bytes(feature) or (inner is not None and tables.holds_bytes(inner))


# A GIF may be a picture.
_TELLING = tuple(suffix for suffix in SUFFIXES if suffix != ".gif")


def _holds_video(name: str, feature: Any) -> bool:
    if tables.holds_bytes(feature):
        return f".{name}" in _TELLING or type(feature).__name__ == "Video"
    return holds_video(feature)


KIND = DataKind(load_video, SUFFIXES, telling=_TELLING, holds=_holds_video)
