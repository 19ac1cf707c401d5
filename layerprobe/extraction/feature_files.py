"""Arrays in files that other programs have written: sizes first, and the values of one array at a time.

| file | content |
|---|---|
| `.npz` | arrays as from `numpy.savez`, compressed or not |
| `.safetensors` | tensors, also bfloat16 |
| `.h5`, `.hdf5` | data sets, also in groups, whose names become GROUP/NAME; needs h5py |

Nothing is unpickled, and no other file is read, whatever a file links to.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from layerprobe.data import check_npy
from layerprobe.files import import_optional, one_line
from layerprobe.memory import pass_on

# What the readers raise about a file that is cut, encrypted or of another kind.
_DAMAGE = (
    zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, SafetensorError, OSError, EOFError, RuntimeError, KeyError,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class StoredArray:
    """An array that is read when it is needed.

    Attributes:
        shape: Shape.
        dtype: Name of the type, as NumPy's or "bfloat16".
        read: Function that reads it; bfloat16 as float32, texts as NumPy's.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], NDArray[Any]]


def stored_arrays(path: Path) -> dict[str, StoredArray]:
    """Returns the arrays of a file by name, in its order.

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If h5py is needed and not installed.
        ValueError: If the file is damaged or of another kind, names an array twice, or holds Python objects or links.
    """
    readers = {".npz": _in_npz, ".safetensors": _in_safetensors, ".h5": _in_h5, ".hdf5": _in_h5}
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; pass features as {', '.join(readers)}")
    if path.suffix not in readers:
        raise ValueError(f"{path} is none of {', '.join(readers)}; save the features as one of them")
    with _damage_in_one_line(path):
        return readers[path.suffix](path)


def held(values: Any) -> StoredArray:
    """Returns an array or tensor that is in memory."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    array = np.asarray(values)
    return StoredArray(array.shape, str(array.dtype), lambda: array)


def _in_npz(path: Path) -> dict[str, StoredArray]:
    arrays: dict[str, StoredArray] = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in arrays:
                raise ValueError(f"{path} has {name[:80]} twice; keep one of them")
            with archive.open(member) as file:
                try:
                    shape, _, dtype = check_npy(cast("BinaryIO", file), member.file_size)
                except ValueError as error:
                    raise ValueError(f"{name[:80]} of {path} cannot be read: {error}; save numbers or texts") from error
            arrays[name] = StoredArray(shape, str(dtype), _member(path, member))
    return arrays


def _member(path: Path, member: zipfile.ZipInfo) -> Callable[[], NDArray[Any]]:
    def read() -> NDArray[Any]:
        with _damage_in_one_line(path), zipfile.ZipFile(path) as archive, archive.open(member) as file:
            shape, fortran, dtype = check_npy(cast("BinaryIO", file), member.file_size)
            return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran else "C")

    return read


def _in_safetensors(path: Path) -> dict[str, StoredArray]:
    arrays = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # it is no mapping
            part = file.get_slice(name)
            dtype = re.sub(r"^(BF|F|I|U)(?=\d)", _long_name, part.get_dtype())
            arrays[name] = StoredArray(tuple(part.get_shape()), dtype, _tensor(path, name))
    return arrays


def _long_name(kind: re.Match[str]) -> str:
    return {"F": "float", "BF": "bfloat", "I": "int", "U": "uint"}[kind[1]]


def _tensor(path: Path, name: str) -> Callable[[], NDArray[Any]]:
    def read() -> NDArray[Any]:
        with _damage_in_one_line(path), safe_open(path, framework="pt") as file:
            return held(file.get_tensor(name)).read()

    return read


def _in_h5(path: Path) -> dict[str, StoredArray]:
    h5py = import_optional("h5py", "h5")
    arrays: dict[str, StoredArray] = {}

    def visit(group: Any, prefix: str) -> None:
        for name in group:
            # Links, virtual and external data lead to other files of this machine.
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"{prefix}{name} of {path} is a link; store the data themselves")
            item = group[name]
            if isinstance(item, h5py.Group):
                visit(item, f"{prefix}{name}/")
                continue
            if item.is_virtual or item.external:
                raise ValueError(f"{prefix}{name} of {path} is kept in another file; store the data themselves")
            is_text = h5py.check_string_dtype(item.dtype) is not None
            dtype = "str" if is_text else str(item.dtype)
            arrays[prefix + name] = StoredArray(item.shape or (), dtype, _dataset(path, prefix + name, is_text=is_text))

    with h5py.File(path, "r") as file:
        visit(file, "")
    return arrays


def _dataset(path: Path, name: str, *, is_text: bool) -> Callable[[], NDArray[Any]]:
    def read() -> NDArray[Any]:
        with _damage_in_one_line(path), import_optional("h5py", "h5").File(path, "r") as file:
            data = file[name]
            return np.asarray(data.asstr()[()], dtype=str) if is_text else np.asarray(data[()])

    return read


@contextmanager
def _damage_in_one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        pass_on(error)
        raise ValueError(f"{path} cannot be read as {path.suffix} ({one_line(error)}); write it again") from error
