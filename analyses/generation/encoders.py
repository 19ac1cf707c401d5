"""Outside encoders to compare layers and samples with, as LayerSync and REPA compare layers with DINOv2.

An encoder is an `Extractor`: it sees clean samples and gives one vector for each.

A TorchScript file is a program. PyTorch's interpreter runs it, which knows tensors and no Python; of what that can do,
reading and writing files, operators of other libraries and C++ classes are refused before anything is loaded. What
remains is arithmetic: a hostile file can give wrong features, print, and use up memory and time.
"""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layerprobe.analyses.generation.extractors import Extractor
from layerprobe.checkpoints import import_object
from layerprobe.files import MissingWeights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# In any place of a program, strings and comments included: who reads only names can be led to read them wrongly.
_REFUSED_CODE = {
    rb"\b(save|from_file)\b": "operators that touch files",
    rb"\bops\b(?!\.(aten|prim)\b)": "operators of other libraries",
    rb"\bclasses\b": "C++ classes",
}
# The name of an object's class stands in a pickle in full, with a line break before its last part.
_REFUSED_DATA = {rb"torch[.\n]classes\b": "C++ classes"}


def open_encoder(spec: str | Path, *, option: str = "--encoder", device: torch.device | str = "cpu") -> Extractor:
    """An encoder by name.

    Args:
        spec: A folder of an image model that transformers saved, such as DINOv2, MAE or CLIP's image half: images are
            resized and normalized as its configuration says, and its patch tokens averaged. Or a TorchScript file, or
            "file.py:function" or "package.module:function", a function from samples (B, C, *grid), about in [-1, 1],
            to features (B, D).
        option: What the caller calls it, for errors.
        device: Where a folder's or a file's weights go. A function gets its samples on the CPU.

    Raises:
        FileNotFoundError: If there is no such folder or file, or it holds no weights.
        ModuleNotFoundError: If it is a folder and transformers is not installed.
        ValueError: If the folder asks for code of its own, or holds no image model; if the file is no TorchScript, or
            one that does more than arithmetic.
    """
    place = Path(spec)
    if place.is_dir():
        return Extractor(place.name, _ImageModel(place, device, option).features, device)
    if place.is_file():
        return Extractor(place.name, _script(place, device), device)
    if ":" not in str(spec):
        raise FileNotFoundError(
            f"there is no {option} {spec}; pass a folder that transformers saved, a TorchScript file, "
            "or file.py:function"
        )
    function = import_object(str(spec), option)
    if not callable(function):
        raise ValueError(f"{option} {spec} is no function; name one from samples (B, C, *grid) to features (B, D)")
    return Extractor(str(spec).rpartition(":")[2], function)


class _ImageModel:
    """A vision transformer of transformers, from pixels in [-1, 1] to the mean of its patch tokens."""

    def __init__(self, folder: Path, device: torch.device | str, option: str) -> None:
        config = _read_json(folder / "config.json")
        config = config.get("vision_config", config)
        if "auto_map" in _read_json(folder / "config.json"):
            raise ValueError(f"{folder} wants code of its own to be run, which is refused; pass a file.py:function")
        if not isinstance(config.get("image_size"), int) or not isinstance(config.get("patch_size"), int):
            raise ValueError(f"{folder} says no image_size and patch_size; pass a file.py:function instead")
        if not any(folder.glob("*.safetensors")):
            raise MissingWeights(f"{folder} holds no safetensors weights; put them there")
        self.size, self.num_patches = config["image_size"], (config["image_size"] // config["patch_size"]) ** 2
        place = folder / "preprocessor_config.json"
        said = _read_json(place) if place.is_file() else {}
        self.mean, self.std = said.get("image_mean", IMAGENET_MEAN), said.get("image_std", IMAGENET_STD)
        self.module = _load(folder, option).to(device)

    def features(self, x: Tensor) -> Tensor:
        """Pixels (B, 1 or 3, H, W) in [-1, 1] -> (B, D)."""
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(
                f"samples of shape {tuple(x.shape[1:])} are no images; pass a file.py:function as the encoder"
            )
        pixels = F.interpolate(x.expand(-1, 3, -1, -1), (self.size, self.size), mode="bicubic", antialias=True)
        mean, std = (x.new_tensor(numbers).view(1, 3, 1, 1) for numbers in (self.mean, self.std))
        tokens: Tensor = self.module(pixel_values=((pixels + 1) / 2 - mean) / std).last_hidden_state
        # The class token and registers stand before the patches.
        return tokens[:, -min(self.num_patches, tokens.shape[1]) :].mean(1)


def _load(folder: Path, option: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModuleNotFoundError(
            f"transformers is not installed, and {option} needs it; install layerprobe[diffusers]"
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # A damaged file can fail in any way.
        raise ValueError(
            f"{folder} does not open as a model of transformers ({_first_line(error)}); check the folder"
        ) from error
    return getattr(model, "vision_model", model).eval()


def _script(path: Path, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    program = _checked_script(path)
    with warnings.catch_warnings():
        # Deprecated, and the format that published feature networks come in.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            module = torch.jit.load(program, map_location=device).eval()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise ValueError(f"{path} does not open as TorchScript ({_first_line(error)}); save it again") from error

    def features(x: Tensor) -> Tensor:
        try:
            result: Tensor = module(x)
        except RuntimeError as error:
            last = str(error).strip().splitlines()[-1][:160]
            raise ValueError(f"{path} does not take samples of shape {tuple(x.shape)} ({last})") from error
        return result

    return features


def _checked_script(path: Path) -> io.BytesIO:
    """The archive again, made of what was checked: another reader of zip files may see other things in the file.

    Raises:
        ValueError: If it is no TorchScript archive, or would do more than arithmetic.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
    except Exception as error:  # A damaged file can fail in any way.
        raise ValueError(f"{path} is no TorchScript file ({_first_line(error)}); pass one of torch.jit.save") from error
    code = {name for name in files if name.lower().endswith(".py")}
    if not code or not any(name.endswith("/constants.pkl") for name in files):
        raise ValueError(f"{path} is no TorchScript file; pass one of torch.jit.save")
    for name, content in files.items():
        for pattern, what in (_REFUSED_CODE if name in code else _REFUSED_DATA).items():
            if re.search(pattern, content):
                raise ValueError(f"{path} uses {what}, which is refused; pass a file.py:function that opens it")
    program = io.BytesIO()
    with zipfile.ZipFile(program, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    program.seek(0)
    return program


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _read_json(place: Path) -> dict[str, Any]:
    if not place.is_file():
        raise FileNotFoundError(f"there is no {place}; pass a folder that transformers saved")
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{place} is not valid JSON ({error}); copy or download it again") from error
    return content if isinstance(content, dict) else {}
