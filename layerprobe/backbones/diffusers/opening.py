"""Folders that diffusers wrote -> Backbone.

A folder is a whole pipeline (`model_index.json` and a folder per component) or one model (`config.json` and weights).
The class is looked up by name among those that diffusers itself exports, weights are read as data, and nothing that a
file says is run. The scheduler's configuration tells the schedule and what is predicted; its samplers, time spacing and
shift say where one would sample and are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from layerprobe.backbones.base import Backbone
from layerprobe.backbones.diffusers.class_table import CLASSES, Config, DiffusersClass, Shape
from layerprobe.backbones.diffusers.folders import REMOTE, import_diffusers, is_repository, locate_model, read_json
from layerprobe.backbones.diffusers.forward import DiffusersForward
from layerprobe.backbones.diffusers.generic import guess_family, measure_layers
from layerprobe.backbones.diffusers.lora import with_lora
from layerprobe.backbones.diffusers.null_text import read_null_text
from layerprobe.backbones.diffusers.schedulers import read_convention
from layerprobe.backbones.diffusers.weights import load_denoiser
from layerprobe.capture import match_layers
from layerprobe.noise import NoiseSchedule, Prediction

MAX_VALUES = 2**31  # beyond it a configuration is damaged, or wants to exhaust the machine


def is_diffusers(path: str | Path) -> bool:
    """Whether this is a folder that diffusers wrote, or names a model on the Hub: "owner/name" or "hf://owner/name"."""
    folder = Path(path)
    if folder.is_dir():
        config = folder / "config.json"
        return (folder / "model_index.json").is_file() or (config.is_file() and "_class_name" in read_json(config))
    return str(path).startswith(REMOTE) or (not folder.exists() and is_repository(str(path)))


def open_diffusers(
    path: str | Path,
    *,
    subfolder: str | None = None,
    lora: str | Path | None = None,
    layers: str | Sequence[str] | None = None,
    schedule: str | NoiseSchedule | None = None,
    prediction: Prediction | None = None,
    shape: Sequence[int] | None = None,
    num_classes: int | None = None,
) -> Backbone:
    """Opens a model of diffusers as a backbone in evaluation mode, in float32, on the CPU.

    The null condition is the empty prompt, encoded by the pipeline's own text encoder where that is there, else zeros;
    the backbone's name says which.

    Args:
        path: A pipeline's or a model's folder; "owner/name" for what is in the Hub's cache on this machine;
            "hf://owner/name" to download what is not.
        subfolder: The component to open, where it is not the pipeline's transformer or unet.
        lora: A peft adapter's folder, or a LoRA `.safetensors` file of diffusers, merged into the weights.
        layers: Names or patterns of layers; the blocks where not given.
        schedule: A `NoiseSchedule` or its name, instead of the scheduler's.
        prediction: What the network gives, instead of what the scheduler says.
        shape: Shape (C, *grid) of one input in latent units, where the configuration does not tell it or another is
            wanted.
        num_classes: For class-conditional U-Nets, whose configuration does not tell whether their last class is the
            null label.

    Raises:
        ModuleNotFoundError: If diffusers is not installed.
        FileNotFoundError: If a folder or a weight file is missing.
        ValueError: If a file is damaged, wants code of its own to be run or lies outside of the folder; if the class is
            unknown; if size, schedule or prediction have to be told.
    """
    import_diffusers()
    place = locate_model(path, subfolder)
    module = load_denoiser(place)
    if lora is not None:
        module = with_lora(module, Path(lora), component=place.component)
    config, name = module.config, type(module).__name__
    family = CLASSES.get(name)
    if family is None:
        family = guess_family(module, config)
    sample_shape = _sample_shape(name, family, config, shape)
    convention = read_convention(place, name, family, schedule, prediction)
    classes = _num_classes(name, config, num_classes)
    text, said = read_null_text(place, family, module)
    forward = DiffusersForward(family, config, sample_shape, text, classes, convention.preconditioner)
    num_tokens = math.prod(e // p for e, p in zip(sample_shape[1:], family.patch(config), strict=True))
    tokens: Callable[[Any, str], Tensor] = partial(family.tokens, shape=sample_shape, num_tokens=num_tokens)
    if name not in CLASSES:
        found, tokens = measure_layers(module, forward, sample_shape, convention.schedule)
    else:
        found = _ordered_layers(module, family)
    chosen = found if layers is None else match_layers(module, layers)
    return Backbone(
        module=module,
        layers=chosen,
        schedule=convention.schedule,
        prediction=convention.prediction,
        shape=sample_shape,
        num_classes=classes,
        forward=forward,
        name=f"{name} of {len(found)} blocks{said}",
        tokens=tokens,
    )


# --- Sizes, classes and the null text


def _sample_shape(name: str, family: DiffusersClass, config: Config, given: Sequence[int] | None) -> Shape:
    channels, patch = family.channels(config), family.patch(config)
    grid = ("L",) if len(patch) == 1 else ("F", "H", "W")[-len(patch) :]
    shape = family.size(config) if given is None else tuple(given)
    outputs = config.get("out_channels") or config.in_channels
    if family.packed:  # Some count channels of patches on one side only.
        outputs *= math.prod(_tuple(config.get("patch_size") or 1))
    if config.in_channels > outputs:
        raise ValueError(
            f"{name} takes {config.in_channels - outputs} channels of a given image besides the {outputs} noisy ones, "
            "which no data here has; wrap the module yourself"
        )
    if shape is None:
        raise ValueError(f"{name} does not say its size; pass --shape {channels},{','.join(grid)} in latent units")
    if not all(isinstance(edge, int) for edge in shape) or math.prod(shape) > MAX_VALUES:
        raise ValueError(f"{name} would take samples of shape {shape}; pass the right --shape")
    if len(shape) != len(patch) + 1 or shape[0] != channels:
        raise ValueError(f"{name} takes shapes {channels},{','.join(grid)}, not {','.join(map(str, shape))}; pass one")
    for axis, edge, p in zip(grid, shape[1:], patch, strict=True):
        if edge < 1 or edge % p:
            raise ValueError(f"{name} takes multiples of {p} along {axis}, not {edge}; pass another --shape")
    return shape


def _tuple(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _num_classes(name: str, config: Config, given: int | None) -> int:
    """Number of classes where the null label is the row after the last one; 0 for an unconditional model."""
    if name == "DiTTransformer2DModel":
        count = int(config.num_embeds_ada_norm)
        if given not in (None, count):
            raise ValueError(f"{name} has {count} classes, not {given}; leave --num-classes out")
        return count
    rows = config.get("num_class_embeds")
    if config.get("class_embed_type") in ("timestep", "projection", "simple_projection", "identity"):
        raise ValueError(f"{name} is conditioned on {config['class_embed_type']} labels; wrap the module yourself")
    if rows is None:
        if given:
            raise ValueError(f"{name} has no classes; leave --num-classes out")
        return 0
    if given != rows - 1:
        raise ValueError(
            f"{name} has {rows} rows of classes; pass --num-classes {rows - 1} if the last is the null label, "
            "else wrap the module yourself"
        )
    return int(rows - 1)


# --- Layers


def _ordered_layers(module: nn.Module, family: DiffusersClass) -> tuple[str, ...]:
    """The family's blocks in the order in which they run."""
    names = {name for name, _ in module.named_modules()}
    lists = [match_layers(module, p) for p in family.layers if p.removesuffix(".*") in names and _filled(module, p)]
    if family.interleaved:
        return tuple(name for row in zip(*lists, strict=True) for name in row)
    return tuple(name for row in lists for name in row)


def _filled(module: nn.Module, pattern: str) -> bool:
    part = module.get_submodule(pattern.removesuffix(".*"))
    return not pattern.endswith(".*") or any(True for _ in part.children())
