"""Reads PyTorch's file formats as the tree that was saved, with tensors that are read on demand.

Dictionaries, lists and plain values are kept, tensors become `LazyTensor`, and all other objects become `Inert`.
Files are mapped into memory copy-on-write: a tensor is a view of the file, its values are read from disk when they are
used, and writing to it changes nothing on disk.

Formats: archives of `torch.save` since PyTorch 1.6 (zip) and before (legacy); plain pickles of modules or state dicts,
as in EDM, whose tensors are legacy archives inside the pickle; and folders of torch.distributed.checkpoint.
"""

from __future__ import annotations

import io
import math
import mmap
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from layerprobe.checkpoints.unpickling import Global, Inert, Refused, printable, safe_key, state, unpickle

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LARGE_BYTES = 4096
_COPIED_BYTES = 1 << 20
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_STORAGES: dict[str, torch.dtype] = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
}
_STORAGE_DTYPES = {
    **{f"{module}.{name}Storage": dtype for name, dtype in _STORAGES.items() for module in ("torch", "torch.cuda")},
    **{f"torch.{module}UntypedStorage": torch.uint8 for module in ("", "storage.", "cuda.")},
}


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor of known shape whose values are read when `read` is called."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(eq=False)
class _Storage:
    """Bytes of one or more tensors; `data` is set once the bytes were located in the file."""

    dtype: torch.dtype
    data: memoryview | None = None
    bases: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def base(self, dtype: torch.dtype) -> Tensor:
        """Returns the storage as one vector, the same object for all tensors that share it."""
        if dtype not in self.bases:
            if self.data is None:
                raise Refused("lacks the values of some tensors; copy or download it again")
            self.bases[dtype] = _vector(self.data, dtype)
        return self.bases[dtype]


class _Window(io.BytesIO):
    """A file object over a part of another file; large reads return views instead of copies."""

    def __init__(self, view: memoryview) -> None:
        super().__init__()
        self.view, self._at = view, 0

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, len(self.view))[whence])
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        stop = len(self.view) if size is None or size < 0 else min(self._at + size, len(self.view))
        piece = self.view[self._at : stop]
        self._at += len(piece)
        # pickletools and io.BytesIO, the only readers, accept views in place of bytes.
        return cast(bytes, piece) if size is not None and size > _LARGE_BYTES else bytes(piece)

    def readline(self, size: int | None = -1) -> bytes:
        line = b""
        while not line.endswith(b"\n") and (piece := bytes(self.view[self._at : self._at + 256])):
            line += piece[: piece.find(b"\n") + 1] or piece
            self._at += piece.find(b"\n") + 1 or len(piece)
        return line


def mapped(path: Path) -> memoryview:
    """Maps a file into memory; its bytes are read when they are used.

    Raises:
        Refused: If the file is empty.
    """
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise Refused("is empty; copy or download it again")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def read_zip(view: memoryview) -> tuple[Any, tuple[str, ...]]:
    """Reads a zip archive of `torch.save`.

    Returns:
        The content, and the unknown names in it, as in `unpickle`.

    Raises:
        Refused: If it is an archive of another kind.
        Exception: Of any kind, if it is damaged.
    """
    records = {record.filename: record for record in zipfile.ZipFile(_Window(view)).infolist()}
    roots = [name.removesuffix("data.pkl") for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if not roots:
        raise Refused(f"is {_other_archive(list(records))}")
    root = roots[0]
    if f"{root}constants.pkl" in records:
        raise Refused(
            "is a TorchScript archive, which is code; if you trust it, save torch.jit.load(...).state_dict() instead"
        )
    if f"{root}byteorder" in records and bytes(_record(view, records[f"{root}byteorder"])) != b"little":
        raise Refused("was saved on a big-endian machine; save it again on this one")
    storages: dict[str, _Storage] = {}

    def persistent(identity: Any) -> _Storage:
        dtype, key, length = _storage_identity(identity)
        if key not in storages:
            data = _record(view, records[f"{root}data/{key}"])
            if len(data) < length * dtype.itemsize:
                raise Refused(f"has {len(data)} of the {length * dtype.itemsize} bytes of a tensor; copy it again")
            storages[key] = _Storage(dtype, data[: length * dtype.itemsize])
        return storages[key]

    return unpickle(_Window(_record(view, records[f"{root}data.pkl"])), known=_KNOWN, persistent=persistent)


def _other_archive(names: Sequence[str]) -> str:
    """Returns what a zip archive without the pickle of torch.save is, and what to do."""
    parts = {part for name in names for part in name.split("/")}
    if {"archive_format", "serialized_exported_program.json"} & parts:
        return "a program of torch.export; save torch.export.load(...).state_dict instead, if you trust it"
    if names and all(name.endswith(".npy") for name in names):
        return "arrays of NumPy; save them as safetensors by the names of the PyTorch network"
    weights = [name for name in names if name.endswith((".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl"))]
    if weights:
        return f"a zip archive of files ({', '.join(map(printable, weights[:3]))}); unpack it and pass one of them"
    return "a zip archive without data.pkl, so not from torch.save; pass the file that holds the weights"


def read_stream(view: memoryview) -> tuple[str, Any, tuple[str, ...]]:
    """Reads an archive of PyTorch before 1.6, or a plain pickle.

    Returns:
        The format, the content, and the unknown names in it, as in `unpickle`.

    Raises:
        Refused: If it is a file of another kind.
        Exception: Of any kind, if it is damaged.
    """
    file = _Window(view)
    content, foreign = unpickle(file, known=_KNOWN)
    if content != _LEGACY_MAGIC:
        edm = any(name.endswith("._reconstruct_persistent_obj") for name in foreign)
        return ("EDM pickle" if edm else "pickle"), content, foreign
    _, system = unpickle(file, known={})[0], unpickle(file, known={})[0]
    if not system["little_endian"]:
        raise Refused("was saved on a big-endian machine; save it again on this one")
    storages: dict[str, tuple[_Storage, int]] = {}

    def persistent(identity: Any) -> _Storage:
        dtype, key, length = _storage_identity(identity)
        return storages.setdefault(key, (_Storage(dtype), length))[0]

    content, foreign = unpickle(file, known=_KNOWN, persistent=persistent)
    for key in unpickle(file, known={})[0]:
        storage, length = storages[key]
        (there,) = struct.unpack("<q", file.read(8))
        start, size = file.tell(), length * storage.dtype.itemsize
        if there != length or start + size > len(view):
            raise Refused("ends before the values of its tensors; copy or download it again")
        storage.data = view[start : start + size]
        file.seek(start + size)
    return "PyTorch legacy", content, foreign


def read_distributed(
    metadata: memoryview, part: Callable[[str], memoryview], selected: Callable[[str], bool]
) -> tuple[Any, tuple[str, ...]]:
    """Reads a folder of torch.distributed.checkpoint, as FSDP writes it.

    Args:
        metadata: Bytes of `.metadata`.
        part: Function that returns the bytes of another file of the folder, by the name in the metadata.
        selected: Function that returns whether to read values other than tensors, by the first part of their name.

    Returns:
        A tree of dictionaries, and the unknown names in it, as in `unpickle`.

    Raises:
        Refused: If it is written in an unknown way.
        FileNotFoundError: If a file is missing.
        Exception: Of any kind, if it is damaged.
    """
    content, foreign = unpickle(_Window(metadata), known=_KNOWN | _KNOWN_METADATA)
    metadata_state = state(content)
    locations: dict[str, dict[tuple[int, ...], dict[str, Any]]] = {}
    for index, location in metadata_state["storage_data"].items():
        chunk = state(index)
        locations.setdefault(chunk["fqn"], {})[tuple(chunk.get("offset") or ())] = state(location)
    tree: dict[str, Any] = {}
    for name, entry in metadata_state["state_dict_metadata"].items():
        path = (metadata_state.get("planner_data") or {}).get(name) or name.partition(".")[::2]
        *parents, last = [str(key) for key in path if key != ""]
        chunks = {offset: _chunk(location, part) for offset, location in locations[name].items()}
        if "chunks" in state(entry):
            value: Any = _joined(name, state(entry), chunks)
        elif selected(str(path[0])):
            value, more = read_zip(next(iter(chunks.values()))())
            foreign += tuple(other for other in more if other not in foreign)
        else:
            continue
        folder = tree
        for key in parents:
            folder = folder.setdefault(key, {})
        folder[last] = value
    return tree, foreign


def _chunk(location: Mapping[str, Any], part: Callable[[str], memoryview]) -> Callable[[], memoryview]:
    """Checks that one stored chunk is complete, and returns a function that returns its bytes."""
    file, start, length = part(location["relative_path"]), location["offset"], location["length"]
    if location.get("transform_descriptors"):
        raise Refused(f"is compressed ({location['transform_descriptors']!r:.40}); save it without compression")
    if start < 0 or length <= 0 or start + length > len(file):
        raise Refused(f"has a half-written shard, {printable(location['relative_path'])}; copy or download it again")
    return lambda: file[start : start + length]


def _joined(
    name: str, entry: Mapping[str, Any], chunks: Mapping[tuple[int, ...], Callable[[], memoryview]]
) -> LazyTensor:
    """Joins the chunks of a tensor that the ranks of a run wrote."""
    shape = _natural(entry["size"])
    pieces = {tuple(state(chunk)["offsets"]): _natural(state(chunk)["sizes"]) for chunk in entry["chunks"]}
    if set(pieces) - set(chunks):
        raise Refused(f"lacks a part of {printable(name)}; copy or download it again")
    if sum(math.prod(size) for size in pieces.values()) != math.prod(shape):
        raise Refused(f"has parts of {printable(name)} that do not add up to {shape}; copy or download it again")

    def read() -> Tensor:
        parts = {offset: _only_tensor(name, chunks[offset](), size) for offset, size in pieces.items()}
        if len(parts) == 1:
            return next(iter(parts.values())).read()
        joined: Tensor | None = None
        for offset, piece in parts.items():
            values = piece.read()
            joined = torch.empty(shape, dtype=values.dtype) if joined is None else joined
            joined[tuple(slice(at, at + n) for at, n in zip(offset, values.shape, strict=True))] = values
            _release(chunks[offset]())  # Otherwise the file would stay in memory beside the copy.
        assert joined is not None
        return joined

    return LazyTensor(shape, read)


def _only_tensor(name: str, view: memoryview, shape: tuple[int, ...]) -> LazyTensor:
    value, _ = read_zip(view)
    if not isinstance(value, LazyTensor) or value.shape != shape:
        raise Refused(f"has no tensor of shape {shape} where {printable(name)} should be; copy or download it again")
    return value


def _record(view: memoryview, record: zipfile.ZipInfo) -> memoryview:
    """Returns the bytes of a file in an archive."""
    if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
        raise Refused("is a compressed or encrypted archive, which torch.save does not write; unpack and save it again")
    header = view[record.header_offset : record.header_offset + 30]
    if bytes(header[:4]) != b"PK\x03\x04":
        raise Refused(f"has no {printable(record.filename)} at the place in its index; copy or download it again")
    start = record.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + record.file_size > len(view):
        raise Refused("ends before the values of its tensors; copy or download it again")
    return view[start : start + record.file_size]


def _storage_identity(identity: Any) -> tuple[torch.dtype, str, int]:
    """Returns the type, key and number of elements of a storage."""
    _, kind, key, _, length, *view = identity
    if view and view[0] is not None:
        raise Refused("was saved by PyTorch before 0.4; save it again with a newer version")
    if kind.name not in _STORAGE_DTYPES:
        raise Refused(
            f"holds tensors in a {printable(kind.name)}, which does not hold plain numbers; save them dequantized"
        )
    (length,) = _natural([length])
    return _STORAGE_DTYPES[kind.name], str(key), length


def _vector(view: memoryview, dtype: torch.dtype) -> Tensor:
    """Returns bytes as a vector, as a view if their alignment in memory allows it."""
    if len(view) == 0:
        return torch.empty(0, dtype=dtype)
    if not view.readonly and torch.frombuffer(view, dtype=torch.uint8).data_ptr() % dtype.itemsize == 0:
        return torch.frombuffer(view, dtype=dtype)
    copy = torch.empty(len(view) // dtype.itemsize, dtype=dtype)
    target = copy.view(torch.uint8).numpy().data
    for start in range(0, len(target), _COPIED_BYTES):
        piece = view[start : min(start + _COPIED_BYTES, len(target))]
        target[start : start + len(piece)] = piece
        _release(piece)
    return copy


def _release(view: memoryview) -> None:
    """Releases the memory of a copied part of a mapped file; it is read from disk again if it is used again."""
    file = view.obj
    if isinstance(file, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        first = torch.frombuffer(file, dtype=torch.uint8).data_ptr()
        start = torch.frombuffer(view, dtype=torch.uint8).data_ptr() - first
        # Only pages that lie completely inside the part: others may be in use.
        begin, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + len(view)) // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end:
            file.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _natural(numbers: Sequence[Any]) -> tuple[int, ...]:
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise Refused(f"has a tensor of invalid size {str(list(numbers))[:60]}; copy or download it again")
    return tuple(numbers)


def _tensor(storage: _Storage, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> LazyTensor:
    return _typed_tensor(storage, offset, size, stride, storage.dtype)


def _tensor_v3(storage: _Storage, offset: int, size: Sequence[int], stride: Sequence[int], *rest: Any) -> LazyTensor:
    _, _, dtype, *_ = rest
    return _typed_tensor(storage, offset, size, stride, _DTYPES[dtype.name])


def _typed_tensor(
    storage: _Storage, offset: int, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype
) -> LazyTensor:
    assert isinstance(storage, _Storage)
    (offset,), shape, steps = _natural([offset]), _natural(size), _natural(stride)

    def read() -> Tensor:
        base = storage.base(dtype)
        last = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) if math.prod(shape) else 0
        # A stride of 0 repeats values: harmless for a few, but a small file could claim more than memory holds.
        if (math.prod(shape) and last >= len(base)) or math.prod(shape) > max(len(base), 1 << 20):
            raise Refused(f"has a tensor of shape {shape} with {len(base)} values; copy or download it again")
        return base.as_strided(shape, steps, offset)

    return LazyTensor(shape, read)


def _storage_in(data: bytes | memoryview) -> _Storage:
    storage = read_stream(memoryview(data))[1]
    assert isinstance(storage, _Storage)
    return storage


def _as_encoded(text: str, encoding: str) -> bytes:
    return text.encode({"latin1": "latin1", "latin-1": "latin1"}[encoding])


def _rebuilt(function: Global, _: Any, arguments: Sequence[Any], *__: Any) -> Any:
    builder = _KNOWN.get(function.name)
    return builder(*arguments) if builder is not None else Inert(function.name, tuple(arguments))


def _first(value: Any, *_: Any) -> Any:
    return value


# The only functions that a file may call; names with None become `Inert` and are not reported as unknown.
_KNOWN: dict[str, Callable[..., Any] | None] = {
    "collections.OrderedDict": lambda pairs=(): {safe_key(key): value for key, value in pairs},
    "builtins.set": lambda values=(): set(map(safe_key, values)),
    "builtins.frozenset": lambda values=(): frozenset(map(safe_key, values)),
    "_codecs.encode": _as_encoded,
    "copyreg._reconstructor": lambda kind, *_: Inert(kind.name),
    "torch.Size": tuple,
    "torch.device": lambda *parts: ":".join(map(str, parts)),
    "torch.serialization._get_layout": _first,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type": _rebuilt,
    "torch._tensor._rebuild_from_type_v2": _rebuilt,
    "torch.storage._load_from_bytes": _storage_in,
    **dict.fromkeys(["argparse.Namespace", "builtins.object", "torch.Tensor", "torch.nn.parameter.Parameter"]),
    **dict.fromkeys([*_DTYPES, *_STORAGE_DTYPES]),
}
# Classes in `.metadata`; the others there only say how tensors were laid out in the memory of the run.
_DCP = "torch.distributed.checkpoint"
_KNOWN_METADATA: dict[str, Callable[..., Any] | None] = dict.fromkeys(
    [
        *(f"{_DCP}.metadata.{name}" for name in ("Metadata", "MetadataIndex", "TensorProperties", "StorageMeta")),
        *(f"{_DCP}.metadata.{name}StorageMetadata" for name in ("Chunk", "Tensor", "Bytes")),
        f"{_DCP}.metadata._MEM_FORMAT_ENCODING",
        f"{_DCP}.filesystem._StorageInfo",
    ]
)
