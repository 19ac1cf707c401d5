"""PyTorch's files keep types, strides and shared memory, and tensors are views of the file."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_files import (
    as_zip,
    network,
    same,
    saved,
    written,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from layerprobe.checkpoints.weight_sets import read_weights


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors", "pickle"])
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64],
)
def test_types_are_as_stored(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    state = {
        "odd": torch.tensor([1], dtype=torch.uint8),
        "w": torch.arange(5).to(dtype),
        "empty": torch.empty(0, 3).to(dtype),
    }
    path = tmp_path / ("c.safetensors" if form == "safetensors" else "c.pt")
    if form == "safetensors":
        save_file(state, path)
    elif form == "pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    found = read_weights(path).tensors
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: tensor.dtype for name, tensor in state.items()
    }
    assert found["empty"].shape == (0, 3)
    assert torch.equal(found["w"].to(torch.complex64), state["w"].to(torch.complex64))


def test_views_strides_and_shared_memory_survive(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    state = {"a": base.view(4, 6).T, "b": base[5:9], "c": torch.ones(1).expand(7), "tied": nn.Parameter(base[5:9])}
    found = saved(tmp_path, state).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert found["a"].stride() == (1, 6) and found["b"].data_ptr() == found["tied"].data_ptr()


@pytest.mark.parametrize("form", ["zip", "dcp"])
def test_values_are_views_of_the_file_that_cannot_change_it(tmp_path: Path, form: str) -> None:
    path = written(tmp_path / "files", form)
    before = {file: file.read_bytes() for file in (tmp_path / "files").iterdir()}
    read_weights(path).tensors["blocks.0.weight"].fill_(5)
    assert {file: file.read_bytes() for file in (tmp_path / "files").iterdir()} == before
    same(read_weights(path).tensors, network(2))


def test_a_tensor_that_several_ranks_wrote_is_put_together(tmp_path: Path) -> None:
    """As FSDP leaves it: each rank's rows in a file of its own."""
    whole = torch.arange(40.0).view(10, 4)
    folder = dcp_of_ranks(tmp_path, whole, [(0, 4), (4, 9), (9, 10)])
    same(read_weights(folder).tensors, {"weight": whole})
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks __1_0.distcp; copy or download it again$"):
        read_weights(folder)


def dcp_of_ranks(folder: Path, whole: Tensor, rows: list[tuple[int, int]]) -> Path:
    from torch.distributed.checkpoint import metadata as dcp_metadata
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    chunks, places = [], {}
    for rank, (start, stop) in enumerate(rows):
        buffer = io.BytesIO()
        torch.save(whole[start:stop].clone(), buffer)
        (folder / f"__{rank}_0.distcp").write_bytes(bytes(13) + buffer.getvalue())
        offset, size = torch.Size([start, 0]), torch.Size([stop - start, whole.shape[1]])
        chunks.append(dcp_metadata.ChunkStorageMetadata(offset, size))
        places[dcp_metadata.MetadataIndex("model.weight", offset)] = _StorageInfo(
            f"__{rank}_0.distcp", 13, len(buffer.getvalue())
        )
    properties = dcp_metadata.TensorProperties(dtype=whole.dtype)
    tensors = {"model.weight": dcp_metadata.TensorStorageMetadata(properties, whole.shape, chunks)}
    content = dcp_metadata.Metadata(tensors, planner_data=None, storage_data=places)
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    return folder


def test_tensors_larger_than_their_values_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "c.pt").read_bytes()
    assert whole.count(b"K\x03\x85q") == 1
    for claim, stride in ((b"J\xff\xff\xff\x7f", b"K\x01"), (b"J\xff\xff\xff\x7f", b"K\x00"), (b"K\x04", b"K\x01")):
        damaged = whole.replace(b"K\x03\x85q", claim + b"\x85q").replace(b"K\x01\x85q", stride + b"\x85q")
        (tmp_path / "c.pt").write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"c.pt has a tensor of shape .* with 3 values; copy or download it again$"
        ):
            read_weights(tmp_path / "c.pt")


def test_archives_that_are_code_or_compressed_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as archive:
        archive.writestr("c/data.pkl", b"N.")
        archive.writestr("c/constants.pkl", b"N.")
    with pytest.raises(ValueError, match=r"is a TorchScript archive, which is code; .* save .*state_dict\(\) instead$"):
        read_weights(tmp_path / "c.pt")
    written(tmp_path, "zip")
    with (
        zipfile.ZipFile(tmp_path / "c.pt") as old,
        zipfile.ZipFile(tmp_path / "d.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match=r"is a compressed or encrypted archive, .*; unpack and save it again$"):
        read_weights(tmp_path / "d.pt")


def test_quantized_tensors_are_refused(tmp_path: Path) -> None:
    raw = b"(U\x07storagectorch\nQInt8Storage\nU\x010U\x03cpuK\x01tQ."
    (tmp_path / "c.pt").write_bytes(as_zip(b"\x80\x02" + raw))
    with pytest.raises(ValueError, match=r"holds tensors in a torch.QInt8Storage, .*; save them dequantized$"):
        read_weights(tmp_path / "c.pt")
