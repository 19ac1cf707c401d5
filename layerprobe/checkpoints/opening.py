"""Opens files and folders on disk as backbones, without ever running code from them.

layerprobe's own checkpoints are safetensors files whose header carries a JSON record: family, configuration,
schedule, prediction, classes and training. Diffusers folders also describe themselves. Files of published training
code are recognized by the names and shapes of their tensors; the user specifies what these leave open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.backbones import (
    FAMILIES,
    Backbone,
    SiT,
    SiTConfig,
    build,
    is_diffusers,
    layer_shapes,
    open_diffusers,
    recognize,
    sit_backbone,
)
from layerprobe.checkpoints.arguments import stated_arguments
from layerprobe.checkpoints.saving import weights_hash
from layerprobe.checkpoints.user_models import refuse_other_options, user_backbone, with_layers
from layerprobe.checkpoints.weight_sets import Weights, read_weights, stripped
from layerprobe.files import one_line
from layerprobe.noise import NoiseSchedule, Prediction, schedule_from_config

EMBEDDED = "digits"
# Options that have an effect on each kind of checkpoint.
_OWN_OPTIONS = ("weights", "layers")
_EVERY_OPTIONS = ("layers", "schedule", "prediction", "shape", "num_classes")
_FAMILY_OPTIONS = (*_EVERY_OPTIONS, "weights", "family", "num_heads")
_MODEL_OPTIONS = (*_EVERY_OPTIONS, "weights", "model")
_DIFFUSERS_OPTIONS = (*_EVERY_OPTIONS, "subfolder", "lora")


@dataclass(frozen=True, eq=False)
class _OpenedCheckpoint:
    backbone: Backbone
    source: dict[str, Any]  # where the weights come from, for `describe_checkpoint`


def embedded_checkpoint() -> Path:
    """Returns the path of the checkpoint in the package: a small SiT trained on scikit-learn's handwritten digits."""
    return Path(__file__).parents[1] / "assets" / "digits.safetensors"


def open_checkpoint(
    path: str | Path,
    *,
    weights: str | None = None,
    family: str | None = None,
    num_heads: int | None = None,
    model: str | Callable[[], Any] | None = None,
    subfolder: str | None = None,
    lora: str | Path | None = None,
    layers: str | Sequence[str] | None = None,
    schedule: str | NoiseSchedule | None = None,
    prediction: Prediction | None = None,
    shape: Sequence[int] | None = None,
    num_classes: int | None = None,
    value_range: Sequence[float] | None = None,
    device: str = "auto",
) -> Backbone:
    """Opens a checkpoint as a backbone in evaluation mode.

    Args:
        path: Path of a file or folder, as for `read_weights`; a diffusers model, as for `open_diffusers`; or "digits"
            for the embedded checkpoint.
        weights: Name of the set of weights, if a file has several; averaged weights are the default.
        family: Name of the family, one of `FAMILIES`, if the file leaves it open.
        num_heads: Number of attention heads, for transformers whose width is in no preset.
        model: A user's own network: "file.py:factory", "package.module:Class", a callable without arguments that
            returns a module or a complete `Backbone`, or one of these itself. A module also needs `layers`,
            `schedule`, `prediction` and `shape`.
        subfolder: Component of a diffusers pipeline, as for `open_diffusers`.
        lora: Path of an adapter for a diffusers model, as for `open_diffusers`.
        layers: Names or patterns of layers, as for `wrap`.
        schedule: Schedule or its name, as for `wrap`; for a `model`, or if a model was trained differently from its
            family.
        prediction: Prediction target, as for `wrap`; needed in the same cases as `schedule`.
        shape: Shape (C, *grid) of one input, if the file does not determine it.
        num_classes: Number of classes, if the file does not determine it; 0 for a `model` without classes.
        value_range: What the values -1 and 1 of the samples are to the network, as for `Backbone.with_value_range`:
            (0, 1) for a network that was trained on pixels in [0, 1].
        device: Device of the weights; "auto" is a GPU if one is available.

    Raises:
        FileNotFoundError: If the file does not exist.
        ModuleNotFoundError: If diffusers is needed and not installed.
        ValueError: If the file is damaged, does not fit the network, or holds values that are not finite; if an
            option has no effect on this checkpoint, or one is missing that the file leaves open.
    """
    target = resolve_device(device)
    options = {
        "weights": weights,
        "family": family,
        "num_heads": num_heads,
        "model": model,
        "subfolder": subfolder,
        "lora": lora,
        "layers": layers,
        "schedule": schedule,
        "prediction": prediction,
        "shape": shape,
        "num_classes": num_classes,
        "value_range": value_range,
    }
    backbone = _open(path, {name: value for name, value in options.items() if value is not None}).backbone
    backbone.module.eval().to(target)
    return backbone


def resolve_device(device: str) -> torch.device:
    """Returns a device by name; "auto" is the first GPU if one is available, otherwise the CPU.

    Raises:
        ValueError: If the device is not available.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} is not available ({one_line(error)}); pass cpu or auto") from error
    return torch.device(device)


def describe_checkpoint(path: str | Path, **options: Any) -> dict[str, Any]:
    """Describes a checkpoint as JSON; `layers` holds (tokens, width) by name. Options as in `open_checkpoint`."""
    opened = _open(path, {name: value for name, value in options.items() if name != "device" and value is not None})
    backbone = opened.backbone
    backbone.module.eval()
    ends = torch.tensor([0.0, backbone.schedule.level_range[1]], dtype=torch.float64)
    times = backbone.schedule.native_time(ends).tolist()
    return {
        "checkpoint": str(path),
        "model": backbone.name,
        **opened.source,
        "parameters": sum(parameter.numel() for parameter in backbone.module.parameters()),
        "shape": list(backbone.shape),
        "heads": backbone.num_heads,
        "classes": backbone.num_classes,
        "value_range": list(backbone.value_range),
        "schedule": backbone.schedule.own.name,
        "data_at_time": float(times[0]),
        "noise_at_time": float(times[1]),
        "prediction": backbone.prediction,
        "assumptions": list(backbone.assumptions),
        "weights_hash": weights_hash(backbone.module),
        "layers": {name: list(shape) for name, shape in layer_shapes(backbone).items()},
    }


def training_record(path: str | Path) -> dict[str, Any]:
    """Returns how one of layerprobe's own checkpoints was trained; {} for other checkpoints."""
    if is_diffusers(path):
        return {}
    record: dict[str, Any] = read_weights(_located(path)).record.get("training", {})
    return record


def _located(path: str | Path) -> Path:
    return embedded_checkpoint() if str(path) == EMBEDDED else Path(path)


def _open(path: str | Path, options: Mapping[str, Any]) -> _OpenedCheckpoint:
    opened = _open_in_own_range(path, {name: value for name, value in options.items() if name != "value_range"})
    if "value_range" not in options:
        return opened
    return replace(opened, backbone=opened.backbone.with_value_range(options["value_range"]))


def _open_in_own_range(path: str | Path, options: Mapping[str, Any]) -> _OpenedCheckpoint:
    if "model" not in options and is_diffusers(path):
        refuse_other_options(_DIFFUSERS_OPTIONS, options, f"{path} is a diffusers model")
        return _OpenedCheckpoint(open_diffusers(path, **options), {"format": "diffusers"})
    path = _located(path)
    weights = read_weights(path, weights=options.get("weights"))
    source = {"format": weights.format, "weights": weights.container, "other_weights": list(weights.containers[1:])}
    source |= {"left_unbuilt": list(weights.foreign)}
    model_options = {name: value for name, value in options.items() if name != "weights"}
    if "model" in options:
        refuse_other_options(_MODEL_OPTIONS, options, "with a model of your own")
        backbone = user_backbone(**model_options)
        _load(backbone.module, weights.tensors, path)
        return _OpenedCheckpoint(backbone, source)
    if "family" in weights.record:
        refuse_other_options(_OWN_OPTIONS, options, f"{path} records its own configuration")
        backbone = _own_backbone(path, weights.record)
        _load(backbone.module, weights.tensors, path)
        source |= {"training": weights.record.get("training", {})}
    else:
        refuse_other_options(_FAMILY_OPTIONS, options, "without a model of your own")
        model_options.pop("layers", None)
        backbone, family_source = _family_backbone(path, weights, **model_options)
        source |= family_source
    return _OpenedCheckpoint(with_layers(backbone, options["layers"]) if "layers" in options else backbone, source)


def _own_backbone(path: Path, record: dict[str, Any]) -> Backbone:
    if record["family"] != "sit":
        raise ValueError(
            f"{path} is of family {record['family']!r}, which this version does not know; update layerprobe"
        )
    try:
        with torch.device("meta"):
            module = SiT(SiTConfig(**record["config"]))
        schedule = schedule_from_config(record["schedule"])
        backbone = sit_backbone(module, schedule=schedule, prediction=record["prediction"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} has a damaged record ({one_line(error)}); copy or download it again") from error
    notes: tuple[str, ...] = ()
    if module.config.num_classes and record.get("training", {}).get("label_drop") == 0:
        notes = (
            "the null label was never trained, since no label was dropped in training; pass --condition label to give "
            "the network the true labels",
        )
    return replace(backbone, possible_heads=(), assumptions=notes)  # The record states the heads.


def _family_backbone(
    path: Path, weights: Weights, family: str | None = None, **options: Any
) -> tuple[Backbone, dict[str, Any]]:
    """Opens a published network with its weights, and describes it."""
    args, places = stated_arguments(path, weights.files, weights.args)
    tensors = _without_common_prefix(weights.tensors, lambda tensors: bool(recognize(tensors, args)))
    possible = recognize(tensors, args)
    if not possible:
        names = ", ".join(list(weights.tensors)[:3])
        raise ValueError(
            f"{path} belongs to no known family (its first tensors are {names}); "
            "pass --model file.py:factory for your own network"
        )
    if family is None and len(possible) > 1:
        # Files of these families have the same names and shapes: nothing in them tells the convention of time.
        raise ValueError(
            f"{path} could belong to any of {', '.join(possible)}, which differ in their time convention; pass --family"
        )
    family = family or possible[0]
    opened = build(family, tensors, args=args, **options)
    _load(opened.backbone.module, opened.tensors, path)
    backbone = opened.backbone
    if len(possible) == 1 and family != possible[0]:
        note = f"names and arguments of the file are those of {possible[0]}; --family {family} is used"
        backbone = replace(backbone, assumptions=(note, *backbone.assumptions))
    source = {"family": family, "latents": FAMILIES[family].latents, "unused": list(opened.unused)}
    return backbone, source | {"arguments": places}


def _load(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Loads weights; a module on the "meta" device takes the file's tensors without a second copy in memory."""
    parameters = module.state_dict()
    # Stripped like the file's names, so that a network with a part called "module" fits its own file.
    expected = {stripped(name) for name in parameters}
    tensors = _without_common_prefix(tensors, lambda tensors: not expected.isdisjoint(tensors))
    missing, unexpected = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    if missing or unexpected:
        difference = f"lacks {missing[0]}" if missing else f"also has {unexpected[0]}"
        raise ValueError(
            f"{path} does not fit {type(module).__name__}: it {difference} ({len(missing)} missing, "
            f"{len(unexpected)} unexpected); pass the network that it was saved from"
        )
    weights = {
        name: _converted(tensors[stripped(name)], parameter, name, path, module)
        for name, parameter in parameters.items()
    }
    module.load_state_dict(weights, assign=any(parameter.is_meta for parameter in parameters.values()))


def _converted(tensor: Tensor, parameter: Tensor, name: str, path: Path, module: nn.Module) -> Tensor:
    """Checks that a tensor of the file fits the network's parameter, and converts it to the parameter's type."""
    mismatch = f"{path} does not fit {type(module).__name__}: {name}"
    if tensor.shape != parameter.shape:
        raise ValueError(
            f"{mismatch} has shape {tuple(tensor.shape)}, but the network expects {tuple(parameter.shape)}; "
            "pass the network that it was saved from"
        )
    # Eight-bit numbers are quantized, whatever torch calls them, and mean nothing without their scales.
    if tensor.is_floating_point() != parameter.is_floating_point() or (parameter.itemsize > 1 and tensor.itemsize == 1):
        raise ValueError(
            f"{mismatch} has type {tensor.dtype}, but the network expects {parameter.dtype}; "
            "convert or dequantize it first"
        )
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ValueError(f"{path} holds values that are not finite in {name}; use an earlier checkpoint")
    return tensor.to(parameter.dtype)


def _without_common_prefix(
    tensors: Mapping[str, Tensor], fits: Callable[[Mapping[str, Tensor]], bool]
) -> Mapping[str, Tensor]:
    """Drops a prefix that all names share, such as "network.", if the names fit only without it."""
    prefixes = {name.partition(".")[0] for name in tensors}
    if len(prefixes) != 1 or fits(tensors):
        return tensors
    (prefix,) = prefixes
    shorter = {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()}
    return shorter if fits(shorter) else tensors
