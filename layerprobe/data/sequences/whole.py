"""Whether a recording or film has its end, by the sizes that the file itself declares.

Decoders return what there is of a cut file without a word, so that a sample would silently be shorter.

Source: the specifications of RIFF, Ogg (RFC 3533), the Xing header of MP3, ISO base media (ISO/IEC 14496-12), Matroska
(RFC 9559) and GIF89a.
"""

from __future__ import annotations

import struct

_UNKNOWN = (0, 0xFFFFFFFF)  # sizes of writers that could not go back to the header
_MATROSKA, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def check_end(content: bytes) -> None:
    """Checks that a file is not cut; formats that declare no size pass.

    Raises:
        ValueError: If it ends before the end that it declares.
    """
    declared = _declared_length(content)
    if declared > len(content):
        raise ValueError(f"it has {len(content)} bytes but says that it has {declared}: it is cut, or its header lies")
    if content[:4] == b"OggS" and not _ends_ogg(content):
        raise ValueError("it ends before its last page: it is cut")
    if content[:4] == b"GIF8" and not content.rstrip(b"\0").endswith(b";"):
        raise ValueError("it ends before its trailer: it is cut")


def _declared_length(content: bytes) -> int:
    """The length in bytes that a file needs at least, by its own words; 0 if it does not tell."""
    if content[:4] == b"RIFF":
        return _wave_length(content) if content[8:12] == b"WAVE" else _riff_length(content)
    if content[4:8] == b"ftyp":
        return _boxes_length(content)
    if content[:4] == _MATROSKA:
        return _segment_length(content)
    if content[:3] == b"ID3" or content[:1] == b"\xff":
        return _xing_length(content)
    return 0


def _riff_length(content: bytes) -> int:
    if len(content) < 12:
        return 0
    (size,) = struct.unpack_from("<I", content, 4)
    return 0 if size in _UNKNOWN else 8 + size


def _wave_length(content: bytes) -> int:
    """The end of the sound, as there are files with a wrong length of the whole."""
    at = 12
    while at + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, at)
        if name == b"data":
            return 0 if size in _UNKNOWN else at + 8 + size
        at += 8 + size + size % 2
    return 0


def _boxes_length(content: bytes) -> int:
    at = 0
    while at + 16 <= len(content):
        (size,) = struct.unpack_from(">I", content, at)
        if size == 1:
            (size,) = struct.unpack_from(">Q", content, at + 8)
        if size < 8:  # up to the end of the file, or damaged
            return 0
        at += size
    return at


def _segment_length(content: bytes) -> int:
    at = content.find(_SEGMENT, 0, 4096)
    if at < 0 or at + 12 > len(content):
        return 0
    first = content[at + 4]
    length = 9 - first.bit_length()  # a number has as many bytes as zeros before its first bit, and one
    if not 1 <= length <= 8:
        return 0
    size = int.from_bytes(content[at + 4 : at + 4 + length], "big") - (1 << 7 * length)
    return 0 if size == (1 << 7 * length) - 1 else at + 4 + length + size


def _xing_length(content: bytes) -> int:
    at = max(content.find(b"Xing", 0, 2**20), content.find(b"Info", 0, 2**20))
    if at < 0 or at + 16 > len(content):
        return 0
    (flags,) = struct.unpack_from(">I", content, at + 4)
    (size,) = struct.unpack_from(">I", content, at + 8 + 4 * (flags & 1))
    return size if flags & 2 else 0


def _ends_ogg(content: bytes) -> bool:
    """Whether the last page has the mark of the end of the stream and all of its bytes."""
    at = content.rfind(b"OggS")
    if at + 27 > len(content):
        return False
    segments = content[at + 27 : at + 27 + content[at + 26]]
    return bool(content[at + 5] & 4) and at + 27 + len(segments) + sum(segments) <= len(content)
