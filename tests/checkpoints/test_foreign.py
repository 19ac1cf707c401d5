"""What is no checkpoint of a network in PyTorch is called by its name, with the way out, in one line."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import ONE_LINE, network, same, written
from safetensors.torch import save_file
from tiny_checkpoints import open_tiny, weights

from layerprobe.checkpoints.weight_sets import read_weights


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_weights(path)
    caught.match(ONE_LINE)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.gguf", b"GGUF\x03", "is a GGUF file, whose weights are quantized; open the unquantized file"),
        ("m.pt", b"GGUF\x03", "is a GGUF file"),
        ("m.onnx", b"\x08\x07", "is an ONNX graph; save the state dict of the PyTorch model"),
        ("m.engine", b"ftrt", "is a TensorRT engine; save the state dict"),
        ("flax_model.msgpack", b"\x81", "is a checkpoint of Flax; save its weights as safetensors"),
        ("m.h5", b"\x89HDF\r\n\x1a\n", "is a file of Keras or TensorFlow; save its weights as safetensors"),
        ("model.ckpt-5.index", b"abc", "is a checkpoint of TensorFlow; save its weights"),
        ("m.npz", b"PK", "is arrays of NumPy; save them as safetensors"),
        ("m.npy", b"\x93NUMPY", "is arrays of NumPy"),
        ("m.nemo", b"abc", "is an archive of NeMo; unpack it with tar and pass model_weights.ckpt"),
        ("m.pt.gz", gzip.compress(b"abc", mtime=0), "is a gzip archive; unpack it"),
        ("m.safetensors", b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer, .* `git lfs pull`"),
        ("m.safetensors", b"# xet version 0\n", "is a Xet pointer, not the file itself"),
        ("m.safetensors.incomplete", b"abc", "is an unfinished download; finish it"),
        ("m.pt.part", b"abc", "is an unfinished download; finish it"),
        ("config.json", b"{}", "is a JSON file, not weights; pass the weight file"),
        ("m.pt", b"<?xml version='1.0'?><Error>", "is a web page, not a checkpoint"),
    ],
)
def test_files_of_other_kinds_are_called_by_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, message)


def test_archives_of_other_kinds_are_called_by_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "repo.zip", "w") as archive:
        archive.writestr("repo/model.safetensors", b"abc")
    refused(tmp_path / "repo.zip", r"is a zip archive of files \(repo/model.safetensors\); unpack it and pass one")
    with zipfile.ZipFile(tmp_path / "program.pt", "w") as archive:
        archive.writestr("program/archive_format", b"pt2")
    refused(tmp_path / "program.pt", "is a program of torch.export; save torch.export.load")
    np.savez(tmp_path / "arrays", weight=np.ones(3))
    (tmp_path / "arrays.npz").rename(tmp_path / "arrays.pt")
    refused(tmp_path / "arrays.pt", "is arrays of NumPy; save them as safetensors")
    with tarfile.open(tmp_path / "model.ckpt", "w") as tar:
        tar.addfile(tarfile.TarInfo("model_weights.ckpt"), io.BytesIO(b""))
    refused(tmp_path / "model.ckpt", "is a tar archive; unpack it")


def test_a_file_that_aria2_has_not_finished_is_refused(tmp_path: Path) -> None:
    """It has its full size already, filled with zeros, and so reads as a network of zeros."""
    save_file(network(), tmp_path / "m.safetensors")
    read_weights(tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors.aria2").write_bytes(b"control")
    refused(tmp_path / "m.safetensors", r"is an unfinished download \(m.safetensors.aria2 is beside it\); finish it")


@pytest.mark.parametrize("framework", ["mlx", "flax", "tf"])
def test_weights_in_another_order_of_axes_are_refused(tmp_path: Path, framework: str) -> None:
    """Square matrices would fit, transposed."""
    save_file(network(), tmp_path / "m.safetensors", metadata={"format": framework})
    refused(tmp_path / "m.safetensors", "which orders the axes of weights in another way; convert it to PyTorch")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["latest", "zero_to_fp32.py", "global_step5/mp_rank_00_model_states.pt"], r"of DeepSpeed, .*zero_to_fp32.py"),
        (["global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt"], "is a checkpoint of DeepSpeed"),
        (["iter_0000100/mp_rank_00/model_optim_rng.pt"], "is a checkpoint of Megatron, split over its ranks"),
        (["manifest.ocdbt", "_CHECKPOINT_METADATA"], "is a checkpoint of Orbax, for JAX"),
        (["model.ckpt-5.data-00000-of-00001", "model.ckpt-5.index"], "is a checkpoint of TensorFlow"),
        (["flax_model.msgpack"], "is a checkpoint of Flax"),
        (["pytorch_lora_weights.safetensors", "optimizer.bin"], r"is a LoRA adapter, not a network"),
        (["adapter_config.json", "adapter_model.safetensors"], "is a LoRA adapter, not a network; .* as --lora"),
    ],
)
def test_folders_of_other_kinds_are_called_by_name(tmp_path: Path, files: list[str], message: str) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"abc")
    refused(tmp_path, message)


STATES = ["optimizer.bin", "scheduler.bin", "random_states_0.pkl", "rng_state_1.pth", "sampler.bin", "scaler.pt"]


def test_other_states_of_a_training_are_no_checkpoints(tmp_path: Path) -> None:
    written(tmp_path, "zip")
    for state in [*STATES, "training_args.bin", "lr_scheduler.pt", "optimizer_1.bin"]:
        (tmp_path / state).write_bytes(b"abc")
    same(read_weights(tmp_path).tensors, network(2))
    (tmp_path / "c.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"contains no checkpoint, only lr_scheduler.pt"):
        read_weights(tmp_path)


def test_settings_beside_a_distributed_checkpoint_are_no_checkpoints(tmp_path: Path) -> None:
    written(tmp_path, "dcp")
    torch.save({"epoch": 1}, tmp_path / "meta.pt")
    assert read_weights(tmp_path).format == "DCP folder"


def test_the_one_checkpoint_below_a_folder_of_a_run_is_found(tmp_path: Path) -> None:
    """As Hydra, accelerate's FSDP and the Hub's cache put them."""
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra/model.pt").write_bytes(b"abc")
    written(tmp_path / "checkpoints", "zip")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported/model.onnx").write_bytes(b"abc")
    found = read_weights(tmp_path)
    assert found.files == (tmp_path / "checkpoints/c.pt",)
    written(tmp_path / "checkpoints" / "optimizer_0", "dcp")
    assert read_weights(tmp_path).files == found.files
    written(tmp_path / "other", "safetensors")
    refused(tmp_path, r"contains several checkpoints \(checkpoints/c.pt, other/c.safetensors\); pass one of them")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"scaled_fp8": torch.zeros(2), "pos_embed.scale_weight": torch.ones(1)}, r"quantized by scaled fp8 \("),
        ({"blocks.0.attn.qkv.weight.absmax": torch.ones(4)}, "quantized by bitsandbytes"),
        ({"blocks.0.attn.qkv.SCB": torch.ones(4)}, "quantized by bitsandbytes"),
        ({"blocks.0.attn.qkv.qweight": torch.ones(4), "blocks.0.attn.qkv.wscales": torch.ones(4)}, "by SVDQuant"),
        ({"blocks.0.attn.qkv.qzeros": torch.ones(4)}, "quantized by GPTQ or AWQ"),
        ({"blocks.0.attn.scales": torch.ones(4), "blocks.0.attn.biases": torch.ones(4)}, "quantized by MLX"),
    ],
)
def test_quantized_weights_are_called_by_their_scheme(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    torch.save(weights() | more, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=rf"{message}.*open the unquantized file, or dequantize it first"):
        open_tiny(tmp_path / "m.pt")


def test_an_adapter_is_no_network(tmp_path: Path) -> None:
    state = {f"transformer.blocks.0.to_q.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=r"is a LoRA adapter, not a network; pass its base model, and this one as"):
        open_tiny(tmp_path / "pytorch_lora_weights.safetensors")


def test_a_part_of_a_network_that_ran_on_several_devices_is_refused(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({"module": network()}, tmp_path / f"mp_rank_0{rank}_model_states.pt")
    refused(tmp_path / "mp_rank_00_model_states.pt", "is one of several parts of a network that ran on several devices")
    (tmp_path / "mp_rank_01_model_states.pt").unlink()
    assert read_weights(tmp_path / "mp_rank_00_model_states.pt").container == "module"


def test_a_json_record_is_still_read(tmp_path: Path) -> None:
    written(tmp_path, "sharded safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert read_weights(tmp_path).format == "sharded safetensors"
