"""Opens folders that diffusers wrote as backbones.

A folder is a complete pipeline (`model_index.json` and a folder per component) or one model (`config.json` and
weights). The class is looked up by name among those that diffusers exports, weights are read as data, and no code from
a file is run. The scheduler's configuration defines the schedule and the prediction target; its sampler, time spacing
and shift only concern sampling and are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.backbones.base import Backbone
from layerprobe.backbones.diffusers.class_table import CLASSES
from layerprobe.backbones.diffusers.diffusers_class import Config, DiffusersClass, Shape
from layerprobe.backbones.diffusers.folders import (
    ModelFolder,
    denoiser_folders,
    locate_model,
    read_json,
    snapshot_of,
    weight_files,
)
from layerprobe.backbones.diffusers.forward import DiffusersForward
from layerprobe.backbones.diffusers.generic import guess_family, measure_layers
from layerprobe.backbones.diffusers.lora import merge_lora
from layerprobe.backbones.diffusers.null_text import read_null_text
from layerprobe.backbones.diffusers.schedulers import read_convention
from layerprobe.backbones.diffusers.weights import (
    convert_denoiser,
    load_denoiser,
    stored_types,
    weight_type,
    weights_origin,
)
from layerprobe.capture import match_layers
from layerprobe.files import REMOTE, import_optional, is_hub_name, one_line
from layerprobe.noise import NoiseSchedule, Prediction
from layerprobe.precision import WeightType

_SAFETENSORS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
_EDITING = ("Edit", "Kontext")  # pipelines whose networks also take the tokens of an image to edit
MAX_VALUES = 2**31  # a larger sample means a damaged configuration, or one that would exhaust the memory


def is_diffusers(path: str | Path) -> bool:
    """Returns whether a path is a folder of diffusers or a model on the Hub, "owner/name" or "hf://owner/name"."""
    folder = Path(path)
    if folder.is_dir():
        folder = snapshot_of(folder)
        config = folder / "config.json"
        single = config.is_file() and "_class_name" in read_json(config)
        return (folder / "model_index.json").is_file() or single or bool(denoiser_folders(folder))
    return str(path).startswith(REMOTE) or (not folder.exists() and is_hub_name(str(path)))


def open_diffusers(
    path: str | Path,
    *,
    subfolder: str | None = None,
    lora: str | Path | None = None,
    lora_alpha: float | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    layers: str | Sequence[str] | None = None,
    schedule: str | NoiseSchedule | None = None,
    prediction: Prediction | None = None,
    shape: Sequence[int] | None = None,
    num_classes: int | None = None,
    dtype: WeightType | None = None,
) -> Backbone:
    """Opens a model of diffusers as a backbone in evaluation mode, on the CPU.

    Weights that are all stored in bfloat16 stay so, and the network computes in it; others are read in float32.

    The null condition is the empty prompt, encoded by the pipeline's own text encoder if there is one, otherwise zeros;
    the backbone's name says which.

    Args:
        path: Folder of a pipeline or a model; "owner/name" for a model in this machine's cache of the Hub;
            "hf://owner/name" to download a model that is not in the cache.
        subfolder: Name of the component to open, if it is not the pipeline's transformer or unet.
        lora: Folder of a peft adapter, or a LoRA `.safetensors` file of diffusers, peft, kohya's scripts or ComfyUI,
            merged into the weights.
        lora_alpha: Alpha of an adapter that does not say it; its rank by default.
        tensors: Weights of a single file, by the names of the original code or of diffusers, instead of the folder's.
        layers: Names or patterns of layers; the blocks by default.
        schedule: `NoiseSchedule` or its name, instead of the scheduler's.
        prediction: Prediction target, instead of the scheduler's.
        shape: Shape (C, *grid) of one input in latent units, if the configuration lacks it or another one is wanted.
        num_classes: Number of classes of a class-conditional U-Net, whose configuration does not say whether the last
            class is the null label.
        dtype: "float32" reads the weights in it; otherwise those that are all stored in bfloat16 stay so. With an
            adapter it is float32 by default, in which small changes of weights are not rounded away.

    Raises:
        ModuleNotFoundError: If diffusers is not installed.
        FileNotFoundError: If a folder or a weight file is missing.
        ValueError: If a file is damaged, needs code of its own or lies outside of the folder; if the class is
            unknown; if the size, schedule or prediction has to be passed.
    """
    import_optional("diffusers", "diffusers")
    folder = locate_model(path, subfolder)
    module, origin, assumptions = _weighted(folder, tensors, "float32" if dtype is None and lora is not None else dtype)
    if lora is not None:
        merged = merge_lora(module, Path(lora), component=folder.component, alpha=lora_alpha)
        origin |= {"lora": merged.record}
        assumptions += merged.assumptions
    elif lora_alpha is not None:
        raise ValueError("--lora-alpha has no effect without --lora; leave it out")
    config, name = module.config, type(module).__name__
    family = CLASSES.get(name)
    if family is None:
        family = guess_family(module, config)
    assumptions += _assumed(family, config, folder)
    sample_shape = _sample_shape(name, family, config, shape)
    convention = read_convention(folder, name, family, schedule, prediction)
    classes = _num_classes(name, config, num_classes)
    text, text_note = read_null_text(folder, family, module)
    forward = DiffusersForward(family, config, sample_shape, text, classes, convention.preconditioner)
    grid = tuple(e // p for e, p in zip(sample_shape[1:], family.patch(config), strict=True))
    tokens: Callable[[Any, str], Tensor] = partial(
        family.tokens, shape=sample_shape, grid=grid, num_text=text.tokens.shape[1]
    )
    if name not in CLASSES:
        blocks, tokens = measure_layers(module, forward, sample_shape, convention.schedule)
    else:
        blocks = _ordered_layers(module, family)
    return Backbone(
        module=module,
        layers=blocks if layers is None else match_layers(module, layers),
        schedule=convention.schedule,
        prediction=convention.prediction,
        shape=sample_shape,
        num_classes=classes,
        forward=forward,
        name=f"{name} of {len(blocks)} blocks{text_note}",
        tokens=tokens,
        assumptions=assumptions,
        origin=origin,
        precision="bfloat16" if module.dtype == torch.bfloat16 else None,
    )


def _weighted(
    folder: ModelFolder, tensors: Mapping[str, Tensor] | None, told: WeightType | None
) -> tuple[nn.Module, dict[str, Any], tuple[str, ...]]:
    """Returns the denoiser with its weights, where they come from, and what was assumed about them."""
    if tensors is not None:
        kinds = {_SAFETENSORS.get(tensor.dtype, "") for tensor in tensors.values()}
        module, left_out = convert_denoiser(folder, tensors, weight_type(kinds, told))
        origin = {"configuration": str(folder.model)} | ({"left_out": left_out} if left_out else {})
        return module, origin, ()
    parts = [name for name in folder.others if name in folder.index]
    assumption = (
        f"{folder.model.name} works at every noise level, although there is also {', '.join(parts)} (--subfolder)"
    )
    weight_files(folder.model)  # tells what is missing
    dtype = weight_type(stored_types(folder), told)
    return load_denoiser(folder, dtype), weights_origin(folder, dtype), (assumption,) if parts else ()


def _assumed(family: DiffusersClass, config: Config, folder: ModelFolder) -> tuple[str, ...]:
    """Returns what the call of a class assumes about its condition."""
    found = [family.assumes(config)]
    if blank := family.blank(config):
        found.append(f"no conditioning image: its {blank} channels are 0, as its pipeline sets them without one")
    if any(word in str(folder.index.get("_class_name")) for word in _EDITING):
        found.append("no image to edit is given, only the noisy one, as for a model that makes images from text")
    return tuple(text for text in found if text)


def _sample_shape(name: str, family: DiffusersClass, config: Config, shape: Sequence[int] | None) -> Shape:
    try:
        channels, patch = family.channels(config), family.patch(config)
        shape = family.size(config) if shape is None else tuple(shape)
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{name} has a damaged configuration ({one_line(error)}); copy it again") from error
    grid = ("L",) if len(patch) == 1 else ("F", "H", "W")[-len(patch) :]
    if family.noisy is None:
        _refuse_conditioning(name, family, config)
    if shape is None:
        raise ValueError(
            f"the configuration of {name} has no size; pass --shape {channels},{','.join(grid)} in latent units"
        )
    if not all(isinstance(edge, int) for edge in shape) or math.prod(shape) > MAX_VALUES:
        raise ValueError(f"{name} would take samples of shape {shape}; pass the right --shape")
    if len(shape) != len(patch) + 1 or shape[0] != channels:
        raise ValueError(
            f"{name} takes shapes {channels},{','.join(grid)}, not {','.join(map(str, shape))}; pass another --shape"
        )
    for axis, edge, p in zip(grid, shape[1:], patch, strict=True):
        if edge < 1 or edge % p:
            raise ValueError(f"{name} takes multiples of {p} along {axis}, not {edge}; pass another --shape")
    return shape


def _refuse_conditioning(name: str, family: DiffusersClass, config: Config) -> None:
    """Refuses networks whose input also holds an image that the call would have to give."""
    outputs = config.get("out_channels") or config.in_channels
    if family.packed:  # Some classes count the channels of a patch only in `in_channels`.
        outputs *= math.prod(_tuple(config.get("patch_size") or 1))
    if config.in_channels > outputs:
        raise ValueError(
            f"{name} takes {config.in_channels - outputs} channels of a conditioning image besides the {outputs} noisy "
            "ones, which is not supported; wrap the module yourself"
        )


def _tuple(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _num_classes(name: str, config: Config, num_classes: int | None) -> int:
    """Returns the number of classes, if the row after the last class is the null label; 0 if unconditional."""
    if name == "DiTTransformer2DModel":
        count = int(config.num_embeds_ada_norm)
        if num_classes not in (None, count):
            raise ValueError(f"{name} has {count} classes, not {num_classes}; leave --num-classes out")
        return count
    rows = config.get("num_class_embeds")
    if config.get("class_embed_type") in ("timestep", "projection", "simple_projection", "identity"):
        raise ValueError(f"{name} is conditioned on {config['class_embed_type']} labels; wrap the module yourself")
    if rows is None:
        if num_classes:
            raise ValueError(f"{name} has no classes; leave --num-classes out")
        return 0
    if num_classes != rows - 1:
        raise ValueError(
            f"{name} has {rows} rows of classes; pass --num-classes {rows - 1} if the last one is the null label, "
            "otherwise wrap the module yourself"
        )
    return int(rows - 1)


def _ordered_layers(module: nn.Module, family: DiffusersClass) -> tuple[str, ...]:
    """Returns the family's blocks in the order in which they run."""
    names = {name for name, _ in module.named_modules()}
    lists = [match_layers(module, p) for p in family.layers if p.removesuffix(".*") in names and _filled(module, p)]
    if family.interleaved:
        return tuple(name for row in zip(*lists, strict=True) for name in row)
    return tuple(name for row in lists for name in row)


def _filled(module: nn.Module, pattern: str) -> bool:
    part = module.get_submodule(pattern.removesuffix(".*"))
    return not pattern.endswith(".*") or any(True for _ in part.children())
