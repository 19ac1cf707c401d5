"""External encoders to compare layers and samples with, as LayerSync and REPA compare layers with DINOv2.

An encoder is an `Extractor`: it maps each clean sample to one vector.

A TorchScript file is a program, run by PyTorch's interpreter, which handles tensors and no Python. Programs that read
or write files, or use operators of other libraries or C++ classes, are refused before anything is loaded. What remains
is arithmetic: a hostile file can return wrong features, print, and use up memory and time.
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
from layerprobe.files import MissingWeights, one_line
from layerprobe.memory import pass_on
from layerprobe.precision import precision_on

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Searched in the whole program, strings and comments included, because a parser of names could be deceived.
_REFUSED_CODE = {
    rb"\b(save|from_file)\b": "operators that touch files",
    rb"\bops\b(?!\.(aten|prim)\b)": "operators of other libraries",
    rb"\bclasses\b": "C++ classes",
}
# A pickle holds the full name of an object's class, with a line break before its last part.
_REFUSED_DATA = {rb"torch[.\n]classes\b": "C++ classes"}


def open_encoder(
    spec: str | Path, *, option: str = "--encoder", device: torch.device | str = "cpu", precision: str = "auto"
) -> Extractor:
    """Opens an encoder.

    Args:
        spec: One of three kinds of encoder. A folder of an image model saved by transformers, such as DINOv2, MAE or
            the image encoder of CLIP: images are resized and normalized by its configuration, and its patch tokens are
            averaged. A TorchScript file. Or "file.py:function" or "package.module:function", a function from samples
            (B, C, *grid), roughly in [-1, 1], to features (B, D).
        option: Name of the option in error messages.
        device: Device of the weights of a folder or a file; a function gets its samples on the CPU.
        precision: Precision of the network of a folder or a file, see `precision_on`; a function chooses its own.

    Raises:
        FileNotFoundError: If the folder or file does not exist, or contains no weights.
        ModuleNotFoundError: If it is a folder and transformers is not installed.
        ValueError: If the folder requires custom code or holds no image model; if the file is not TorchScript, or does
            more than arithmetic; if the device does not have the precision, or one is asked of a function.
    """
    path, chosen = Path(spec), precision_on(precision, torch.device(device))
    if path.is_dir():
        return Extractor(path.name, _ImageModel(path, device, option).features, device, chosen)
    if path.is_file():
        return Extractor(path.name, _script(path, device), device, chosen)
    if ":" not in str(spec):
        raise FileNotFoundError(
            f"{option} {spec} does not exist; pass a folder saved by transformers, a TorchScript file or "
            "file.py:function"
        )
    function = import_object(str(spec), option)
    if not callable(function):
        raise ValueError(f"{option} {spec} is not a function; name one from samples (B, C, *grid) to features (B, D)")
    if precision != "auto":
        raise ValueError(f"{option} {spec} is a function, which chooses its own precision; leave out --precision")
    return Extractor(str(spec).rpartition(":")[2], function)


class _ImageModel:
    """A vision transformer from the transformers library, from pixels in [-1, 1] to the mean of its patch tokens."""

    def __init__(self, folder: Path, device: torch.device | str, option: str) -> None:
        config = _read_json(folder / "config.json")
        config = config.get("vision_config", config)
        if "auto_map" in _read_json(folder / "config.json"):
            raise ValueError(f"{folder} requires custom code, which is refused; pass a file.py:function instead")
        if not isinstance(config.get("image_size"), int) or not isinstance(config.get("patch_size"), int):
            raise ValueError(
                f"{folder} has a config.json without image_size and patch_size; pass a file.py:function instead"
            )
        if not any(folder.glob("*.safetensors")):
            raise MissingWeights(f"{folder} contains no safetensors weights; copy them there")
        self.size, self.num_patches = config["image_size"], (config["image_size"] // config["patch_size"]) ** 2
        path = folder / "preprocessor_config.json"
        preprocessing = _read_json(path) if path.is_file() else {}
        self.mean = preprocessing.get("image_mean", IMAGENET_MEAN)
        self.std = preprocessing.get("image_std", IMAGENET_STD)
        self.module = _load(folder, option).to(device)

    def features(self, x: Tensor) -> Tensor:
        """Maps pixels (B, 1 or 3, H, W) in [-1, 1] to features (B, D)."""
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(
                f"samples of shape {tuple(x.shape[1:])} are not images; pass a file.py:function as the encoder"
            )
        pixels = F.interpolate(x.expand(-1, 3, -1, -1), (self.size, self.size), mode="bicubic", antialias=True)
        mean, std = (x.new_tensor(numbers).view(1, 3, 1, 1) for numbers in (self.mean, self.std))
        tokens: Tensor = self.module(pixel_values=((pixels + 1) / 2 - mean) / std).last_hidden_state
        # The class token and the registers come before the patch tokens.
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
        pass_on(error)
        raise ValueError(
            f"transformers cannot open the model in {folder} ({one_line(error)}); check the folder"
        ) from error
    return getattr(model, "vision_model", model).eval()


def _script(path: Path, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    program = _checked_script(path)
    with warnings.catch_warnings():
        # The format is deprecated, but published feature networks come in it.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            module = torch.jit.load(program, map_location=device).eval()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            pass_on(error)
            raise ValueError(f"{path} cannot be opened as TorchScript ({one_line(error)}); save it again") from error

    def features(x: Tensor) -> Tensor:
        try:
            result: Tensor = module(x)
        except RuntimeError as error:
            pass_on(error)
            last = str(error).strip().splitlines()[-1][:160]
            raise ValueError(f"{path} does not accept samples of shape {tuple(x.shape)} ({last})") from error
        return result

    return features


def _checked_script(path: Path) -> io.BytesIO:
    """A new archive of the files that were checked, because another zip reader may see other files in the original.

    Raises:
        ValueError: If it is not a TorchScript archive, or does more than arithmetic.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
    except Exception as error:  # A damaged file can fail in any way.
        pass_on(error)
        raise ValueError(
            f"{path} is not a TorchScript file ({one_line(error)}); pass one saved by torch.jit.save"
        ) from error
    code = {name for name in files if name.lower().endswith(".py")}
    if not code or not any(name.endswith("/constants.pkl") for name in files):
        raise ValueError(f"{path} is not a TorchScript file; pass one saved by torch.jit.save")
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


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; pass a folder saved by transformers")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy or download it again") from error
    return content if isinstance(content, dict) else {}
