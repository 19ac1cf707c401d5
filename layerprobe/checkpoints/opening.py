"""Opens files and folders on disk as backbones, without ever running code from them.

layerprobe's own checkpoints are safetensors files whose header carries a JSON record: family, configuration,
schedule, prediction, classes and training. Diffusers folders also describe themselves. Files of published training
code are recognized by the names and shapes of their tensors; the user specifies what these leave open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from layerprobe.backbones import (
    FAMILIES,
    Backbone,
    SingleFileRefused,
    SiT,
    SiTConfig,
    build,
    is_diffusers,
    layer_shapes,
    open_diffusers,
    recognize,
    sit_backbone,
    snapshot_of,
    tried,
    unfilled,
)
from layerprobe.checkpoints.arguments import stated_arguments
from layerprobe.checkpoints.foreign import refuse_other_content
from layerprobe.checkpoints.networks import FoundNetwork, closest_part, find_network
from layerprobe.checkpoints.own_types import in_own_types
from layerprobe.checkpoints.saving import weights_hash
from layerprobe.checkpoints.user_models import refuse_other_options, user_backbone, with_layers
from layerprobe.checkpoints.weight_sets import Weights, read_weights, stripped
from layerprobe.files import EMBEDDED, one_line, refuse_memory
from layerprobe.memory import is_out_of_memory, pass_on
from layerprobe.messages import unknown
from layerprobe.noise import NoiseSchedule, Prediction, schedule_from_config
from layerprobe.parts import nameable
from layerprobe.precision import WeightType

# Options that have an effect on each kind of checkpoint.
_OWN_OPTIONS = ("weights", "layers", "dtype")
_EVERY_OPTIONS = ("dtype", "layers", "schedule", "prediction", "shape", "num_classes")
_FAMILY_OPTIONS = (*_EVERY_OPTIONS, "weights", "family", "num_heads")
_MODEL_OPTIONS = (*_EVERY_OPTIONS, "weights", "model")
# Entries of the record of a training that are read again, with their types; an integer stands for a float too.
_TRAINING: dict[str, type] = {
    "steps": int,
    "batch_size": int,
    "warmup_steps": int,
    "rendering": dict,
    "class_names": list,
}
_TRAINING |= dict.fromkeys(("learning_rate", "weight_decay", "clip_norm", "label_drop"), float)
_DIFFUSERS_OPTIONS = (*_EVERY_OPTIONS, "subfolder", "lora", "lora_alpha")
_SINGLE_FILE_OPTIONS = ("weights", "pipeline", *_DIFFUSERS_OPTIONS)


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
    pipeline: str | Path | None = None,
    lora: str | Path | None = None,
    lora_alpha: float | None = None,
    dtype: WeightType | None = None,
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
        pipeline: Diffusers folder of the model that a single file of the original code belongs to, as for
            `open_diffusers`; its configuration, scheduler and text encoders are read, and its weights are not.
        lora: Path of an adapter for a diffusers model, as for `open_diffusers`.
        lora_alpha: Alpha of an adapter that does not say it, as for `open_diffusers`.
        dtype: Type to hold the weights in, "float32" or "stored", see `CheckpointSource`.
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
        "pipeline": pipeline,
        "lora": lora,
        "lora_alpha": lora_alpha,
        "dtype": dtype,
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
        ValueError: If the device is not available, or does not compute in float64, as Apple's MPS.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = ""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        if is_out_of_memory(error):  # It is there, and full.
            raise
        problem = one_line(error)
    if problem:  # Not in the handler: "CUDA error: invalid device ordinal" is no failure here.
        raise ValueError(f"--device {device} is not available ({problem}); pass cpu or auto")
    try:
        torch.empty(0, device=device, dtype=torch.float64)
    except (TypeError, RuntimeError) as error:
        pass_on(error)
        raise ValueError(
            f"--device {device} does not compute in float64, as noise levels and measures do; pass cpu"
        ) from error
    return torch.device(device)


def describe_checkpoint(path: str | Path, **options: Any) -> dict[str, Any]:
    """Describes a checkpoint as JSON.

    `layers` holds (tokens, width) by name, `parts` what else can be named in its blocks. Options as in
    `open_checkpoint`.
    """
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
        "parts": {
            pattern: names
            for pattern, names in nameable(backbone.module).items()
            if pattern.split(".")[0] in {layer.split(".")[0] for layer in backbone.layers}
        },
    }


def training_record(path: str | Path) -> dict[str, Any]:
    """Returns how one of layerprobe's own checkpoints was trained; {} for other checkpoints."""
    if is_diffusers(path):
        return {}
    return _training(path, read_weights(_located(path)).record)


def _training(path: str | Path, record: Mapping[str, Any]) -> dict[str, Any]:
    training = record.get("training", {})
    if not isinstance(training, dict) or any(
        not isinstance(training.get(name, kind()), (kind, int)) for name, kind in _TRAINING.items()
    ):
        raise ValueError(f"{path} has a damaged record (training is {str(training)[:40]!r}); copy or download it again")
    return training


def _located(path: str | Path) -> Path:
    refuse_memory(str(path), "network")
    return embedded_checkpoint() if str(path) == EMBEDDED else snapshot_of(Path(path))


def _open(path: str | Path, options: Mapping[str, Any]) -> _OpenedCheckpoint:
    if "dtype" in options and options["dtype"] not in get_args(WeightType):
        raise ValueError(unknown("dtype", options["dtype"], get_args(WeightType)))
    opened = _open_in_own_range(path, {name: value for name, value in options.items() if name != "value_range"})
    backbone = opened.backbone
    if "value_range" in options:
        backbone = backbone.with_value_range(options["value_range"])
    if options.get("dtype") == "stored" and not backbone.is_narrow:
        backbone = in_own_types(backbone)
    elif options.get("dtype") == "float32" and backbone.is_narrow:  # a network of the user's
        backbone = replace(backbone, module=backbone.module.float(), precision=None)
    return replace(opened, backbone=backbone)


def _open_in_own_range(path: str | Path, options: Mapping[str, Any]) -> _OpenedCheckpoint:
    if "model" not in options and is_diffusers(path):
        refuse_other_options(_DIFFUSERS_OPTIONS, options, f"{path} is a diffusers model")
        backbone = open_diffusers(path, **options)
        return _OpenedCheckpoint(backbone, {"format": "diffusers", **backbone.origin})
    path = _located(path)
    weights = read_weights(path, weights=options.get("weights"))
    source: dict[str, Any] = {
        "format": weights.format,
        "files": [str(file) for file in weights.files],
        "weights": weights.container,
    }
    source |= {"other_weights": list(weights.containers[1:]), "left_unbuilt": list(weights.foreign)}
    model_options = {name: value for name, value in options.items() if name != "weights"}
    if "pipeline" in options:
        refuse_other_options(_SINGLE_FILE_OPTIONS, options, "with --pipeline")
        return _single_file(path, weights, source, **model_options)
    model_options.pop("dtype", None)
    if "model" in options:
        refuse_other_options(_MODEL_OPTIONS, options, "with a model of your own")
        backbone = user_backbone(**model_options)
        source |= _load(backbone.module, weights.tensors, path, weights.container)
        return _OpenedCheckpoint(tried(backbone), source)
    if "family" in weights.record:
        refuse_other_options(_OWN_OPTIONS, options, f"{path} records its own configuration")
        backbone = _own_backbone(path, weights.record)
        source |= _load(backbone.module, weights.tensors, path)
        source |= {"training": _training(path, weights.record)}
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
        with unfilled():
            module = SiT(SiTConfig(**record["config"]))
        schedule = schedule_from_config(record["schedule"])
        backbone = sit_backbone(module, schedule=schedule, prediction=record["prediction"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        pass_on(error)
        raise ValueError(f"{path} has a damaged record ({one_line(error)}); copy or download it again") from error
    notes: tuple[str, ...] = ()
    if module.config.num_classes and _training(path, record).get("label_drop") == 0:
        notes = (
            "the null label was never trained, since no label was dropped in training; pass --condition label to give "
            "the network the true labels",
        )
    return replace(backbone, possible_heads=(), assumptions=notes)  # The record states the heads.


def _family_backbone(
    path: Path, weights: Weights, family: str | None = None, **options: Any
) -> tuple[Backbone, dict[str, Any]]:
    """Opens a published network with its weights, and describes it."""
    refuse_other_content(path, weights.tensors)
    args, places = stated_arguments(path, weights.files, weights.args)
    found = _found(path, weights.tensors, lambda tensors: bool(recognize(tensors, args)), weights.container)
    if found is None:
        names = ", ".join(list(weights.tensors)[:3])
        raise ValueError(
            f"{path} belongs to no known family (its first tensors are {names}); pass --model file.py:factory for your "
            "own network, or --pipeline FOLDER for a single file of a model that diffusers knows"
        )
    possible = recognize(found.tensors, args)
    if family is None and len(possible) > 1:
        # Files of these families have the same names and shapes: nothing in them tells the convention of time.
        raise ValueError(
            f"{path} could belong to any of {', '.join(possible)}, which differ in their time convention; pass --family"
        )
    family = family or possible[0]
    opened = build(family, found.tensors, args=args, **options)
    record = {"family": family, "latents": opened.latents or FAMILIES[family].latents, "unused": list(opened.unused)}
    record |= _placed(found) | _load(opened.backbone.module, opened.tensors, path)
    backbone = opened.backbone
    if len(possible) == 1 and family != possible[0]:
        note = f"names and arguments of the file are those of {possible[0]}; --family {family} is used"
        backbone = replace(backbone, assumptions=(note, *backbone.assumptions))
    return backbone, record | {"arguments": places}


def _single_file(
    path: Path, weights: Weights, source: dict[str, Any], *, pipeline: str | Path, **options: Any
) -> _OpenedCheckpoint:
    """Opens a single file of original names with the configuration of a diffusers folder."""
    refuse_other_content(path, weights.tensors)
    if not is_diffusers(pipeline):
        raise ValueError(
            f"--pipeline {pipeline} is no folder that diffusers saved; pass the folder of the file's model"
        )
    try:
        backbone = open_diffusers(pipeline, tensors=weights.tensors, **options)
    except SingleFileRefused as error:
        raise ValueError(f"{path} {error}") from error
    types = {_type(tensor, torch.empty(0)) for tensor in weights.tensors.values() if tensor.is_floating_point()}
    return _OpenedCheckpoint(backbone, source | {"stored_types": sorted(types)} | dict(backbone.origin))


def _found(
    path: Path, tensors: Mapping[str, Tensor], fits: Callable[[Mapping[str, Tensor]], bool], container: str
) -> FoundNetwork | None:
    try:
        return find_network(tensors, fits, container=container)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def _placed(found: FoundNetwork) -> dict[str, Any]:
    """Returns where the network was found, if it is not all that the file holds."""
    record: dict[str, Any] = {"prefix": found.prefix} if found.prefix else {}
    return record | ({"left_out": dict(found.left_out)} if found.left_out else {})


def _load(module: nn.Module, tensors: Mapping[str, Tensor], path: Path, container: str = "") -> dict[str, Any]:
    """Loads weights; a module on the "meta" device takes the file's tensors without a second copy in memory.

    Returns:
        Where the network was found in the file, and the types of its weights there.
    """
    parameters = module.state_dict(keep_vars=True)
    # Stripped like the file's names, so that a network with a part called "module" fits its own file. Tied parameters
    # have several names, of which a file may have one.
    tied: dict[int, set[str]] = {}
    for name, parameter in parameters.items():
        tied.setdefault(id(parameter), set()).add(stripped(name))
    expected = {stripped(name) for name in parameters}

    def fits(part: Mapping[str, Tensor]) -> bool:
        return part.keys() <= expected and not any(names.isdisjoint(part) for names in tied.values())

    found = _found(path, tensors, fits, container)
    if found is None:
        refuse_other_content(path, tensors)  # Not before: a user's network may have such names.
        tensors = closest_part(tensors, expected)
        missing = sorted(min(names) for names in tied.values() if names.isdisjoint(tensors))
        unexpected = sorted(tensors.keys() - expected)
        difference = f"lacks {missing[0]}" if missing else f"also has {unexpected[0]}"
        raise ValueError(
            f"{path} does not fit {type(module).__name__}: it {difference} ({len(missing)} missing, "
            f"{len(unexpected)} unexpected); {_other_part(expected, set(tensors))}"
        )
    same_name = {name: _stored_name(names, found.tensors, path) for names in tied.values() for name in names}
    weights, types = {}, set()
    for name, parameter in parameters.items():
        stored = found.tensors[same_name[stripped(name)]]
        weights[name] = _converted(stored, parameter, name, path, module)
        types.add(_type(stored, parameter))
    module.load_state_dict(weights, assign=any(parameter.is_meta for parameter in parameters.values()))
    return _placed(found) | {"stored_types": sorted(types)}


def _stored_name(names: set[str], tensors: Mapping[str, Tensor], path: Path) -> str:
    """Returns the name of a parameter in a file, of the names that it has in the network."""
    first, *others = sorted(names & tensors.keys())
    for other in others:
        if not torch.equal(tensors[first], tensors[other]):
            raise ValueError(
                f"{path} has other values in {other} than in {first}, which are one parameter in the network; "
                "pass the network that it was saved from"
            )
    return first


def _type(stored: Tensor, parameter: Tensor) -> str:
    name, target = (str(tensor.dtype).removeprefix("torch.") for tensor in (stored, parameter))
    return name if name == target else f"{name}, read as {target}"


def _other_part(expected: set[str], found: set[str]) -> str:
    """Says which network fits the names, if the file's is a part of this one."""
    if part := _prefix(found, expected):
        return f"the file has all of the network below {part!r}: return that part"
    return "pass the network that it was saved from"


def _prefix(names: set[str], longer: set[str]) -> str:
    """Returns the prefix with which all names are among the longer ones; "" if there is none."""
    name = min(names, default="")
    prefixes = sorted(other.removesuffix(name) for other in longer if other.endswith(f".{name}"))
    return next((prefix for prefix in prefixes if all(f"{prefix}{name}" in longer for name in names)), "")


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
