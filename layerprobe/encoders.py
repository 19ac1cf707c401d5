"""Outside encoders to compare layers with, as LayerSync and REPA compare them with DINOv2.

An encoder is an `Extractor`: it sees clean samples and gives one vector for each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layerprobe.checkpoints import import_object
from layerprobe.fidelity import Extractor
from layerprobe.files import MissingWeights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_encoder(spec: str | Path) -> Extractor:
    """An encoder by name.

    Args:
        spec: A folder of an image model that transformers saved, such as DINOv2, MAE or CLIP's image half: images are
            resized and normalised as its configuration says, and its patch tokens averaged. Or "file.py:function" or
            "package.module:function", a function from samples (B, C, *grid), about in [-1, 1], to features (B, D).

    Raises:
        FileNotFoundError: If there is no such folder, or it holds no weights.
        ModuleNotFoundError: If it is a folder and transformers is not installed.
        ValueError: If the folder asks for code of its own, or holds no image model.
    """
    folder = Path(spec)
    if folder.is_dir():
        return Extractor(folder.name, _ImageModel(folder).features)
    if ":" not in str(spec):
        raise FileNotFoundError(f"there is no folder {spec}; pass one that transformers saved, or file.py:function")
    function = import_object(str(spec), "--encoder")
    if not callable(function):
        raise ValueError(f"--encoder {spec} is no function; name one from samples (B, C, *grid) to features (B, D)")
    return Extractor(str(spec).rpartition(":")[2], function)


class _ImageModel:
    """A vision transformer of transformers, from pixels in [-1, 1] to the mean of its patch tokens."""

    def __init__(self, folder: Path) -> None:
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
        self.module = _load(folder)

    def features(self, x: Tensor) -> Tensor:
        """Pixels (B, 1 or 3, H, W) in [-1, 1] -> (B, D)."""
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(
                f"samples of shape {tuple(x.shape[1:])} are no images; pass a file.py:function as the encoder"
            )
        pixels = F.interpolate(x.expand(-1, 3, -1, -1), (self.size, self.size), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (self.mean, self.std))
        tokens: Tensor = self.module(pixel_values=((pixels + 1) / 2 - mean) / std).last_hidden_state
        # The class token and registers stand before the patches.
        return tokens[:, -min(self.num_patches, tokens.shape[1]) :].mean(1)


def _load(folder: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModuleNotFoundError(
            "transformers is not installed, and --encoder needs it; install layerprobe[diffusers]"
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # A damaged file can fail in any way.
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise ValueError(f"{folder} does not open as a model of transformers ({first}); check the folder") from error
    return getattr(model, "vision_model", model).eval()


def _read_json(place: Path) -> dict[str, Any]:
    if not place.is_file():
        raise FileNotFoundError(f"there is no {place}; pass a folder that transformers saved")
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{place} is not valid JSON ({error}); copy or download it again") from error
    return content if isinstance(content, dict) else {}
