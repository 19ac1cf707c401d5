"""A recording or film that is cut anywhere is told from a whole one."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from layerprobe.data.sequences.whole import check_end


def sound(kind: str) -> bytes:
    soundfile = pytest.importorskip("soundfile")
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).uniform(-0.5, 0.5, 40000), 8000, format=kind)
    return file.getvalue()


def film(kind: str) -> bytes:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 16
        for pixels in np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    return file.getvalue()


def gif() -> bytes:
    frames = [Image.new("L", (8, 8), value) for value in (0, 100, 200)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


WRITERS = dict.fromkeys(("WAV", "OGG", "MP3"), sound) | dict.fromkeys(("mp4", "matroska", "avi"), film)


@pytest.mark.parametrize("kind", [*WRITERS, "GIF"])
def test_a_cut_file_is_told(kind: str) -> None:
    content = gif() if kind == "GIF" else WRITERS[kind](kind)
    check_end(content)
    check_end(content + bytes(16))  # padded by a tool
    for share in (0.5, 0.9, 0.99):
        with pytest.raises(ValueError, match="is cut"):
            check_end(content[: int(len(content) * share)])


def test_sizes_that_a_writer_left_open_pass() -> None:
    content = sound("WAV")
    at = content.index(b"data") + 4
    for size in (0, 0xFFFFFFFF):
        check_end(content[:at] + struct.pack("<I", size) + content[at + 4 :])
    with pytest.raises(ValueError, match=r"it has .* bytes but says that it has .*: it is cut, or its header lies"):
        check_end(content[:at] + struct.pack("<I", 10**9) + content[at + 4 :])


def test_other_bytes_pass() -> None:
    for content in (b"", b"RIFFxxxxWAVE", b"\x1a\x45\xdf\xa3", b"ID3", bytes(40), bytes(4) + b"ftyp" + bytes(8)):
        check_end(content)
