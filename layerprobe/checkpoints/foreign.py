"""Names files, folders and tensors that are no checkpoint of a network in PyTorch, and says what to do with each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from layerprobe.checkpoints.unpickling import Refused

_EXPORT = "save the state dict of the PyTorch model that it was exported from"
_QUANTIZED = "open the unquantized file, or dequantize it first"
_UNPACK = "unpack it and pass the weight file in it"
_LORA = "a LoRA adapter, not a network; pass its base model, and this one as --lora"
# What a file is and what to do, by the end of its name. A file's first bytes count more.
_SUFFIXES = {
    (".gguf", ".ggml"): f"a GGUF file, whose weights are quantized; {_QUANTIZED}",
    (".onnx", ".onnx_data"): f"an ONNX graph; {_EXPORT}",
    (".engine", ".plan", ".trt"): f"a TensorRT engine; {_EXPORT}",
    (".mlmodel", ".mlpackage", ".tflite", ".nnef"): f"an exported graph; {_EXPORT}",
    (".msgpack",): "a checkpoint of Flax; save its weights as safetensors by the names of the PyTorch network",
    (
        ".h5",
        ".hdf5",
        ".keras",
    ): "a file of Keras or TensorFlow; save its weights as safetensors by the names of PyTorch",
    (".pb", ".index", ".meta"): "a checkpoint of TensorFlow; save its weights as safetensors by the names of PyTorch",
    (".pdparams",): "a checkpoint of Paddle; save its weights as safetensors by the names of PyTorch",
    (".npz", ".npy"): "arrays of NumPy; save them as safetensors by the names of the PyTorch network",
    (".nemo",): "an archive of NeMo; unpack it with tar and pass model_weights.ckpt",
    (".pt2",): "a program of torch.export; save torch.export.load(...).state_dict instead, if you trust it",
    (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp"): (
        "an unfinished download; finish it and pass the whole file"
    ),
}
_STARTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
    b"# xet version": "a Xet pointer, not the file itself; fetch it with `git xet checkout` or `hf download`",
    b"GGUF": _SUFFIXES[".gguf", ".ggml"],
    b"\x89HDF\r\n": _SUFFIXES[".h5", ".hdf5", ".keras"],
    b"\x1f\x8b": f"a gzip archive; {_UNPACK}",
    b"\x28\xb5\x2f\xfd": f"a zstd archive; {_UNPACK}",
    b"\xfd7zXZ": f"an xz archive; {_UNPACK}",
    b"BZh": f"a bzip2 archive; {_UNPACK}",
    b"7z\xbc\xaf": f"a 7z archive; {_UNPACK}",
    b"Rar!": f"a rar archive; {_UNPACK}",
    b"\x93NUMPY": _SUFFIXES[".npz", ".npy"],
    b"ftrt": _SUFFIXES[".engine", ".plan", ".trt"],
}
_PAGES = (b"<!doctype", b"<html", b"<?xml")
# Files below a folder that tell what the folder is.
_FOLDERS = {
    r"zero_to_fp32\.py|.*zero_pp_rank_\d+.*|mp_rank_\d+_model_states\.pt": (
        "a checkpoint of DeepSpeed, whose float32 weights are spread over its files; "
        "run `python zero_to_fp32.py . pytorch_model.bin` in it and pass that file"
    ),
    r"model_optim_rng\.pt|model_rng\.pt|distrib_optim\.pt": (
        "a checkpoint of Megatron, split over its ranks; convert it with Megatron's tools to one file"
    ),
    r"manifest\.ocdbt|_CHECKPOINT_METADATA": (
        "a checkpoint of Orbax, for JAX; save its weights as safetensors by the names of the PyTorch network"
    ),
    r"saved_model\.pb|.*\.data-\d+-of-\d+": _SUFFIXES[".pb", ".index", ".meta"],
    r"flax_model\.msgpack|diffusion_flax_model\.msgpack": _SUFFIXES[(".msgpack",)],
    r"adapter_config\.json|pytorch_lora_weights\.safetensors": _LORA,
    r".*\.onnx": _SUFFIXES[".onnx", ".onnx_data"],
    r".*\.gguf": _SUFFIXES[".gguf", ".ggml"],
}
# Ends of the names of tensors that only a quantized network has.
_SCHEMES = {
    "bitsandbytes": ("quant_map", "nested_absmax", "absmax", "SCB", "bitsandbytes__nf4", "bitsandbytes__fp4"),
    "scaled fp8": ("scaled_fp8", "scale_weight", "scale_input", "comfy_quant"),
    "SVDQuant": ("wscales", "smooth_factor", "wtscale"),
    "GPTQ or AWQ": ("qweight", "qzeros", "g_idx"),
    "quanto": ("_data", "input_scale", "weight._scale"),
    "HQQ": ("W_q",),
    "fp8": ("weight_scale", "weight_scale_inv"),
}
_ADAPTER = re.compile(
    r"(\.|_)(lora_(A|B|up|down|mid|magnitude_vector)|lora\.(up|down)|hada_w\d\w?|lokr_w\d\w?)(\.|_|$)"
)
# Frameworks in the headers of safetensors that keep matrices or convolutions in another order of axes.
_OTHER_ORDER = {"mlx": "MLX", "flax": "Flax", "tf": "TensorFlow"}


def refuse_foreign_file(file: Path, start: bytes) -> None:
    """Refuses what is no checkpoint of PyTorch, by its first bytes and its name.

    Args:
        file: The file.
        start: Its first bytes, at least 64 if it has them.

    Raises:
        Refused: If it is of a known other kind.
    """
    if file.with_name(f"{file.name}.aria2").exists():  # aria2 gives a file its full size first, filled with zeros.
        raise Refused(f"is an unfinished download ({file.name}.aria2 is beside it); finish it first")
    what = next((what for mark, what in _STARTS.items() if start.startswith(mark)), None)
    text = start.lstrip().lower()
    if text.startswith(_PAGES):
        what = "a web page, not a checkpoint; download the file itself"
    elif text.startswith(b"{") and file.suffix == ".json":
        what = "a JSON file, not weights; pass the weight file or the folder that it describes"
    what = what or next((what for ends, what in _SUFFIXES.items() if file.suffix.lower() in ends), None)
    if what is not None:
        raise Refused(f"is {what}")
    if re.fullmatch(r"mp_rank_\d+_model_states\.pt", file.name) and len(list(file.parent.glob("mp_rank_*"))) > 1:
        raise Refused("is one of several parts of a network that ran on several devices; convert them to one file")


def refuse_foreign_folder(names: Iterable[str]) -> None:
    """Refuses a folder without a checkpoint of PyTorch by the names of the files below it.

    Raises:
        Refused: If it is of a known other kind.
    """
    files = [name.rpartition("/")[2] for name in names]
    for pattern, what in _FOLDERS.items():
        if any(re.fullmatch(pattern, file) for file in files):
            raise Refused(f"is {what}")


def refuse_other_order(header: Mapping[str, str]) -> None:
    """Refuses a safetensors file of a framework that orders the axes of its weights in another way.

    Raises:
        Refused: If the header names such a framework.
    """
    framework = _OTHER_ORDER.get(header.get("format", ""))
    if framework is not None:
        raise Refused(
            f"was saved by {framework}, which orders the axes of weights in another way; convert it to PyTorch first"
        )


def refuse_other_content(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuses a set of tensors that is an adapter, or a network whose weights are quantized.

    Raises:
        ValueError: If it is one of them.
    """
    adapter = next((name for name in tensors if _ADAPTER.search(name)), None)
    if adapter is not None and len([name for name in tensors if _ADAPTER.search(name)]) * 2 >= len(tensors):
        raise ValueError(f"{path} is {_LORA} ({adapter})")
    for scheme, ends in _SCHEMES.items():
        name = next((name for name in tensors if name.endswith(tuple(f".{end}" for end in ends)) or name in ends), None)
        if name is not None:
            raise ValueError(f"{path} holds weights quantized by {scheme} ({name}); {_QUANTIZED}")
    for name in tensors:
        layer, _, end = name.rpartition(".")
        if end == "scales" and f"{layer}.biases" in tensors:
            raise ValueError(f"{path} holds weights quantized by MLX ({name}); {_QUANTIZED}")
