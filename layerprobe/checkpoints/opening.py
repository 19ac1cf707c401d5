"""Files and folders on disk -> Backbone, without ever running what they say.

layerprobe's own checkpoints are safetensors files whose header carries a JSON record: family, configuration,
schedule, prediction, classes and how it was trained. Folders of diffusers say what they are too. Other people's files
are recognized by the names and shapes of their tensors; what these leave open, the user has to tell.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from layerprobe.checkpoints.saving import weights_hash
from layerprobe.checkpoints.user_models import first_line, refuse_other_options, user_backbone, with_layers
from layerprobe.checkpoints.weight_sets import Weights, read_weights, stripped
from layerprobe.noise import NoiseSchedule, Prediction, schedule_from_config

EMBEDDED = "digits"
# What may be said of each kind of checkpoint besides its path; all else would have no effect.
_OF_OWN = ("weights", "layers")
_OF_FAMILIES = ("weights", "layers", "family", "num_heads", "schedule", "prediction", "shape", "num_classes")
_OF_MODELS = ("weights", "layers", "schedule", "prediction", "shape", "num_classes")
_OF_DIFFUSERS = ("subfolder", "lora", "layers", "schedule", "prediction", "shape", "num_classes")


@dataclass(frozen=True, eq=False)
class _Opened:
    backbone: Backbone
    source: dict[str, Any]  # what `inspect` says of where the weights come from


def embedded_checkpoint() -> Path:
    """The checkpoint that ships with the package: a small SiT trained on scikit-learn's handwritten digits."""
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
    device: str = "auto",
) -> Backbone:
    """Opens a checkpoint as a backbone in evaluation mode.

    Args:
        path: What `reading.read_weights` or `backbones.diffusers.open_diffusers` takes, or "digits" for the embedded
            checkpoint.
        weights: Which set of weights, where a file has several; the averaged ones where not given.
        family: One of `backbones.families.FAMILIES`, where the file leaves it open.
        num_heads: For transformers whose width is no preset's.
        model: A user's own network: "file.py:factory", "package.module:Class", or a callable without arguments that
            gives a module or a whole `Backbone`; one of these itself will also do. A module also needs `layers`,
            `schedule`, `prediction` and `shape`.
        subfolder: Of a diffusers pipeline, see `open_diffusers`; like `lora`.
        lora: An adapter on top of a diffusers model.
        layers: Names or patterns of layers, see `wrap`.
        schedule: See `wrap`; for `model`, and where a model was trained otherwise than its family.
        prediction: See `wrap`; like `schedule`.
        shape: Shape (C, *grid) of one input, where the file does not tell it.
        num_classes: Where the file does not tell it; 0 for a `model` without classes.
        device: Where the weights go; "auto" is a GPU if there is one.

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If diffusers is needed and not installed.
        ValueError: If the file is damaged, does not fit the network, or holds values that are not finite; if an
            option has no effect on this checkpoint, or one is missing that the file leaves open.
    """
    place = resolve_device(device)
    asked = {
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
    }
    backbone = _open(path, {name: value for name, value in asked.items() if value is not None}).backbone
    backbone.module.eval().to(place)
    return backbone


def resolve_device(device: str) -> torch.device:
    """A device by name; "auto" is the first GPU if there is one, else the CPU.

    Raises:
        ValueError: If there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} is not to be had here ({first_line(error)}); pass cpu or auto") from error
    return torch.device(device)


def describe_checkpoint(path: str | Path, **options: Any) -> dict[str, Any]:
    """What a checkpoint is, as JSON; `layers` gives (tokens, width) by name. Options as in `open_checkpoint`."""
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
        "classes": backbone.num_classes,
        "schedule": backbone.schedule.name,
        "data_at_time": float(times[0]),
        "noise_at_time": float(times[1]),
        "prediction": backbone.prediction,
        "weights_hash": weights_hash(backbone.module),
        "layers": {name: list(shape) for name, shape in layer_shapes(backbone).items()},
    }


def located(path: str | Path) -> Path:
    """The file that a checkpoint's name stands for."""
    return embedded_checkpoint() if str(path) == EMBEDDED else Path(path)


def training_record(path: str | Path) -> dict[str, Any]:
    """How one of layerprobe's own checkpoints was trained; {} for other people's."""
    if is_diffusers(path):
        return {}
    record: dict[str, Any] = read_weights(located(path)).record.get("training", {})
    return record


def _open(path: str | Path, asked: Mapping[str, Any]) -> _Opened:
    if "model" not in asked and is_diffusers(path):
        refuse_other_options(_OF_DIFFUSERS, asked, f"{path} is a diffusers model")
        return _Opened(open_diffusers(path, **asked), {"format": "diffusers"})
    place = located(path)
    read = read_weights(place, weights=asked.get("weights"))
    source = {"format": read.format, "weights": read.container, "other_weights": list(read.containers[1:])}
    source |= {"left_unbuilt": list(read.foreign)}
    given = {name: value for name, value in asked.items() if name != "weights"}
    if "model" in asked:
        refuse_other_options(_OF_MODELS, {k: v for k, v in asked.items() if k != "model"}, "with a model of your own")
        backbone = user_backbone(**given)
        _load(backbone.module, read.tensors, place)
        return _Opened(backbone, source)
    if "family" in read.record:
        refuse_other_options(_OF_OWN, asked, f"{path} says itself what it is")
        backbone = _own_backbone(place, read.record)
        _load(backbone.module, read.tensors, place)
        source |= {"training": read.record.get("training", {})}
    else:
        refuse_other_options(_OF_FAMILIES, asked, "without a model of your own")
        backbone, found = _family_backbone(place, read, **{k: v for k, v in given.items() if k != "layers"})
        source |= found
    return _Opened(with_layers(backbone, asked["layers"]) if "layers" in asked else backbone, source)


def _own_backbone(path: Path, record: dict[str, Any]) -> Backbone:
    if record["family"] != "sit":
        raise ValueError(
            f"{path} says its family is {record['family']!r}, which this version does not know; update layerprobe"
        )
    try:
        with torch.device("meta"):
            module = SiT(SiTConfig(**record["config"]))
        return sit_backbone(module, schedule=schedule_from_config(record["schedule"]), prediction=record["prediction"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} has a damaged record ({first_line(error)}); copy or download it again") from error


def _family_backbone(
    path: Path, read: Weights, family: str | None = None, **options: Any
) -> tuple[Backbone, dict[str, Any]]:
    """A published network with its weights, and what there is to say of it."""
    args = read.args | _arguments_beside(path)
    tensors = _without_common_prefix(read.tensors, lambda tensors: bool(recognize(tensors, args)))
    possible = recognize(tensors, args)
    if not possible:
        names = ", ".join(list(read.tensors)[:3])
        raise ValueError(
            f"{path} is of no known family (it begins with {names}); pass --model file.py:factory for your own network"
        )
    if family is None and len(possible) > 1:
        # Such files have the same names and shapes: nothing in them tells the convention of time.
        raise ValueError(
            f"{path} could be of any of {', '.join(possible)}, which differ in what time means; pass --family"
        )
    family = family or possible[0]
    opened = build(family, tensors, args=args, **options)
    _load(opened.backbone.module, opened.tensors, path)
    return opened.backbone, {"family": family, "latents": FAMILIES[family].latents, "unused": list(opened.unused)}


def _arguments_beside(path: Path) -> dict[str, Any]:
    """What training code wrote into `args.json` next to its checkpoints."""
    place = (path if path.is_dir() else path.parent) / "args.json"
    if not place.is_file():
        return {}
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON ({first_line(error)}); mend or remove it") from error
    return content if isinstance(content, dict) else {}


def _load(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Fills a network. One on the "meta" device takes the file's own tensors, which then need no second memory."""
    own = module.state_dict()
    # Stripped like the file's names, so that a network with a part called "module" fits its own file.
    wanted = {stripped(name): tensor for name, tensor in own.items()}
    tensors = _without_common_prefix(tensors, lambda tensors: not wanted.keys().isdisjoint(tensors))
    missing, surplus = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or surplus:
        seen = f"lacks {missing[0]}" if missing else f"has {surplus[0]} besides"
        raise ValueError(
            f"{path} does not fit {type(module).__name__}: it {seen} ({len(missing)} missing, {len(surplus)} surplus); "
            "pass the network that it was saved from"
        )
    fitting = {name: _fitting(tensors[stripped(name)], tensor, name, path, module) for name, tensor in own.items()}
    module.load_state_dict(fitting, assign=any(tensor.is_meta for tensor in own.values()))


def _fitting(tensor: Tensor, wanted: Tensor, name: str, path: Path, module: nn.Module) -> Tensor:
    """A tensor of the file as the network wants it."""
    what = f"{path} does not fit {type(module).__name__}: {name}"
    if tensor.shape != wanted.shape:
        shapes = f"has shape {tuple(tensor.shape)}, the network {tuple(wanted.shape)}"
        raise ValueError(f"{what} {shapes}; pass the network that it was saved from")
    # Eight-bit numbers are quantized, whatever torch calls them, and mean nothing without their scales.
    if tensor.is_floating_point() != wanted.is_floating_point() or (wanted.itemsize > 1 and tensor.itemsize == 1):
        raise ValueError(
            f"{what} is of type {tensor.dtype}, the network's {wanted.dtype}; convert or dequantize it first"
        )
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ValueError(f"{path} holds values that are not finite in {name}; use an earlier checkpoint")
    return tensor.to(wanted.dtype)


def _without_common_prefix(
    tensors: Mapping[str, Tensor], fits: Callable[[Mapping[str, Tensor]], bool]
) -> Mapping[str, Tensor]:
    """Drops a leading "network." or the like if that is what it takes to fit."""
    heads = {name.partition(".")[0] for name in tensors}
    if len(heads) != 1 or fits(tensors):
        return tensors
    (head,) = heads
    shorter = {name.removeprefix(f"{head}."): tensor for name, tensor in tensors.items()}
    return shorter if fits(shorter) else tensors
