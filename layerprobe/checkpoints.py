"""Files on disk -> Backbone, without ever running what a file says.

layerprobe's own checkpoints are safetensors files whose header carries a JSON record: family, configuration,
schedule, prediction, classes and how it was trained. Other people's `.pt` files are read by PyTorch's weights-only
unpickler, and who opens them has to tell their family.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from layerprobe.backbones.base import Backbone, layer_shapes, wrap
from layerprobe.backbones.sit import SiT, SiTConfig, config_from_state_dict, sit_backbone
from layerprobe.capture import match_layers
from layerprobe.noise import NoiseSchedule, Prediction, schedule_from_config, schedule_from_name

METADATA_KEY = "layerprobe"
EMBEDDED = "digits"
# A state dict in these containers is preferred in this order: averaged weights make the better samples.
CONTAINERS = ("ema", "model_ema", "ema_model", "model", "state_dict", "module", "network")
# What torch.compile, FSDP and checkpointing put into names, anywhere; data parallelism puts "module" in front.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# What the published training code of each family means; names as on the command line.
FAMILIES: dict[str, tuple[str, Prediction]] = {
    "sit": ("sit", "velocity"),
    "layersync": ("sit", "velocity"),
    "dit": ("ddpm-linear", "eps"),
}


def embedded_checkpoint() -> Path:
    """The checkpoint that ships with the package: a small SiT trained on scikit-learn's handwritten digits."""
    return Path(__file__).parent / "assets" / "digits.safetensors"


def open_checkpoint(
    path: str | Path,
    *,
    family: str | None = None,
    num_heads: int | None = None,
    model: str | Callable[[], Any] | None = None,
    layers: str | Sequence[str] | None = None,
    schedule: str | NoiseSchedule | None = None,
    prediction: Prediction | None = None,
    shape: Sequence[int] | None = None,
    num_classes: int | None = None,
    device: str = "auto",
) -> Backbone:
    """Opens a checkpoint as a backbone in evaluation mode.

    Args:
        path: A `.safetensors` or `.pt` file, or "digits" for the embedded one.
        family: "sit", "layersync" or "dit", for files that do not say it themselves.
        num_heads: For SiT and DiT files whose width is no preset's.
        model: A user's own network: "file.py:factory", "package.module:Class", or a callable without arguments that
            gives a module or a whole `Backbone`; one of these itself will also do. A module also needs `layers`,
            `schedule`, `prediction` and `shape`.
        layers: Names or patterns of layers, see `wrap`.
        schedule: See `wrap`; for `model`, and for a `family` that was trained otherwise than the published one.
        prediction: See `wrap`; like `schedule`.
        shape: Shape (C, *grid) of one input, for `model`.
        num_classes: For `model`; 0 where not given.
        device: Where the weights go; "auto" is a GPU if there is one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, wants to run code, does not fit the network, or holds values that are not
            finite; if an option has no effect on this file.
    """
    path, place = located(path), resolve_device(device)
    tensors, record = read_checkpoint(path)
    if model is not None:
        _refuse("with a model of your own", family=family, num_heads=num_heads)
        backbone = _user_backbone(model, layers, schedule, prediction, shape, num_classes)
    elif "family" in record:
        says = {"family": family, "schedule": schedule, "prediction": prediction}
        _refuse(f"{path} says itself what it is", **says, num_heads=num_heads, shape=shape, num_classes=num_classes)
        backbone = _own_backbone(path, record)
    else:
        _refuse("without a model of your own", shape=shape, num_classes=num_classes)
        backbone = _family_backbone(path, tensors, family, num_heads, schedule, prediction)
    _load(backbone.module, tensors, path)
    if layers is not None and model is None:
        backbone = _with_layers(backbone, layers)
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
        raise ValueError(f"--device {device} is not to be had here ({_first_line(error)}); pass cpu or auto") from error
    return torch.device(device)


def describe_checkpoint(path: str | Path, **options: Any) -> dict[str, Any]:
    """What a checkpoint is, as JSON; `layers` gives (tokens, width) by name. Options as in `open_checkpoint`."""
    backbone = open_checkpoint(path, device="cpu", **options)
    record = read_checkpoint(located(path))[1]
    return {
        "checkpoint": str(path),
        "model": backbone.name,
        "parameters": sum(parameter.numel() for parameter in backbone.module.parameters()),
        "shape": list(backbone.shape),
        "classes": backbone.num_classes,
        "schedule": backbone.schedule.name,
        "data_at_time": float(backbone.schedule.native_time(torch.zeros(1, dtype=torch.float64))),
        "noise_at_time": float(
            backbone.schedule.native_time(torch.full((1,), backbone.schedule.level_range[1], dtype=torch.float64))
        ),
        "prediction": backbone.prediction,
        "weights_hash": weights_hash(backbone.module),
        "layers": {name: list(shape) for name, shape in layer_shapes(backbone).items()},
        "training": record.get("training", {}),
    }


def save_checkpoint(
    path: str | Path, backbone: Backbone, tensors: Mapping[str, Tensor], *, training: dict[str, Any]
) -> None:
    """Writes weights, and for a SiT how to open them; the file appears whole or not at all.

    Args:
        path: A `.safetensors` file.
        backbone: Gives configuration, schedule and prediction. A network of the user's own is opened again with
            `model`.
        tensors: The weights to write, by the names of the backbone's module.
        training: What a reader should know of how the weights came about; JSON.
    """
    record: dict[str, Any] = {"training": training}
    if isinstance(backbone.module, SiT):
        record |= {
            "family": "sit",
            "config": backbone.module.config.to_dict(),
            "schedule": backbone.schedule.to_config(),
            "prediction": backbone.prediction,
        }
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    # Copies, since safetensors refuses tensors that share memory, such as tied weights.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    partial.touch()
    mode = partial.stat().st_mode
    save_file(copies, partial, metadata={METADATA_KEY: json.dumps(record, sort_keys=True)})
    partial.chmod(mode)  # safetensors makes files that nobody but their owner can read.
    os.replace(partial, path)


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights by name, and layerprobe's record of them, or {} for other people's files.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read safely.
    """
    path = Path(path)
    if not path.is_file():
        seen = f"{path} is a folder and no checkpoint file" if path.is_dir() else f"there is no checkpoint file {path}"
        raise FileNotFoundError(f"{seen}; pass the path of a .safetensors or .pt file, or {EMBEDDED!r}")
    tensors, record = _read_safetensors(path) if path.suffix == ".safetensors" else (_read_pickle(path), {})
    unprintable = [name for name in tensors if not name.isprintable()]
    if unprintable:  # Names are shown in messages, and a terminal would obey them.
        raise ValueError(f"{path} is damaged: it has a tensor called {unprintable[0]!r}; copy or download it again")
    stripped = {_strip(name): tensor for name, tensor in tensors.items()}
    if len(stripped) < len(tensors):
        twice = next(name for name in tensors if _strip(name) != name and _strip(name) in tensors)
        raise ValueError(f"{path} holds both {twice} and {_strip(twice)}; save one of the two networks by itself")
    return stripped, record


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names, types and values of a module's state, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def located(path: str | Path) -> Path:
    """The file that a checkpoint's name stands for."""
    return embedded_checkpoint() if str(path) == EMBEDDED else Path(path)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
    except Exception as error:  # A damaged file can fail in any way.
        raise ValueError(
            f"{path} is not a whole safetensors file ({_first_line(error)}); copy or download it again"
        ) from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} has a damaged record ({str(record)[:40]!r}); copy or download it again")
    return tensors, record


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Such as of a newer pickle protocol: it either opens or does not.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it asks to run {asked[1]}" if asked else "it is damaged or no PyTorch checkpoint"
        raise ValueError(
            f"{path} was refused and nothing in it was run: {why}; save its state dict as safetensors"
        ) from error
    except Exception as error:  # A damaged file can fail in any way.
        raise ValueError(
            f"{path} is not a whole PyTorch checkpoint ({_first_line(error)}); copy or download it again"
        ) from error
    tensors = _state_dict(content)
    if tensors is None:
        raise ValueError(f"{path} holds no state dict; expected tensors by name, also under {', '.join(CONTAINERS)}")
    return tensors


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _state_dict(content: Any) -> dict[str, Tensor] | None:
    if not isinstance(content, Mapping):
        return None
    for key in CONTAINERS:
        inner = content.get(key)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            return _state_dict(inner)
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return tensors or None


def _strip(name: str) -> str:
    """A tensor's name without what wrappers of the network add to it."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def _refuse(why: str, **options: Any) -> None:
    """Nothing that was asked for is passed over in silence."""
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{why}: {given[0]} has no effect; leave it out")


def _own_backbone(path: Path, record: dict[str, Any]) -> Backbone:
    if record["family"] != "sit":
        raise ValueError(
            f"{path} says its family is {record['family']!r}, which this version does not know; update layerprobe"
        )
    try:
        module = SiT(SiTConfig(**record["config"]))
        return sit_backbone(module, schedule=schedule_from_config(record["schedule"]), prediction=record["prediction"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} has a damaged record ({_first_line(error)}); copy or download it again") from error


def _family_backbone(
    path: Path,
    tensors: dict[str, Tensor],
    family: str | None,
    num_heads: int | None,
    schedule: str | NoiseSchedule | None,
    prediction: Prediction | None,
) -> Backbone:
    if family is not None and family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; use one of {', '.join(FAMILIES)}")
    if "x_embedder.proj.weight" not in tensors or "final_layer.linear.weight" not in tensors:
        names = ", ".join(list(tensors)[:3])
        raise ValueError(
            f"{path} is no SiT or DiT (it begins with {names}); pass --model file.py:factory for your own network"
        )
    if family is None:
        # SiT and DiT files have the same names and shapes: nothing in them tells the convention of time.
        raise ValueError(
            f"{path} could be of any of {', '.join(FAMILIES)}, which differ in what time means; pass --family"
        )
    default_schedule, default_prediction = FAMILIES[family]
    module = SiT(config_from_state_dict(tensors, num_heads=num_heads))
    return sit_backbone(
        module, schedule=_schedule(schedule or default_schedule), prediction=prediction or default_prediction
    )


def _schedule(schedule: str | NoiseSchedule) -> NoiseSchedule:
    return schedule_from_name(schedule) if isinstance(schedule, str) else schedule


def _user_backbone(
    model: str | Callable[[], Any],
    layers: str | Sequence[str] | None,
    schedule: str | NoiseSchedule | None,
    prediction: Prediction | None,
    shape: Sequence[int] | None,
    num_classes: int | None,
) -> Backbone:
    made = _make(model)
    if isinstance(made, Backbone):
        options = {"schedule": schedule, "prediction": prediction, "shape": shape, "num_classes": num_classes}
        _refuse(f"{model} gives a whole Backbone", **options)
        return made if layers is None else _with_layers(made, layers)
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"{model} gives a {type(made).__name__}; it must give a torch.nn.Module or a layerprobe Backbone"
        )
    needed = {"layers": layers, "schedule": schedule, "prediction": prediction, "shape": shape}
    missing = [f"--{name}" for name, value in needed.items() if value is None]
    if missing:
        raise ValueError(f"{type(made).__name__} is not a known family; pass {', '.join(missing)}")
    assert layers is not None and schedule is not None and prediction is not None and shape is not None
    return wrap(
        made, layers=layers, schedule=schedule, prediction=prediction, shape=shape, num_classes=num_classes or 0
    )


def _make(model: str | Callable[[], Any]) -> Any:
    """What a factory gives; a module or backbone is what it is."""
    factory = _import_factory(model) if isinstance(model, str) else model
    if isinstance(factory, (nn.Module, Backbone)) or not callable(factory):
        return factory
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ValueError(f"{model} wants arguments ({error}); pass a function without any that makes it") from error
    return factory()


def _import_factory(spec: str) -> Any:
    """ "file.py:name" or "package.module:name"; the user's own code, named by the user, is the only code that runs."""
    place, _, name = spec.rpartition(":")
    if not place:
        raise ValueError(f"--model {spec} names no factory; pass file.py:name or package.module:name")
    try:
        if place.endswith(".py"):
            # A name of its own: a user's `random.py` must not stand for the library's. Dataclasses look it up.
            alias = f"layerprobe_model_{Path(place).stem}"
            loader = importlib.util.spec_from_file_location(alias, place)
            assert loader is not None and loader.loader is not None
            module = sys.modules[alias] = importlib.util.module_from_spec(loader)
            loader.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        return getattr(module, name)
    except (ImportError, OSError, AttributeError) as error:
        raise ValueError(
            f"--model {spec} cannot be imported ({_first_line(error)}); pass file.py:name or package.module:name"
        ) from error


def _with_layers(backbone: Backbone, layers: str | Sequence[str]) -> Backbone:
    return replace(backbone, layers=match_layers(backbone.module, layers))


def _load(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    own = module.state_dict()
    # Stripped like the file's names, so that a network with a part called "module" fits its own file.
    wanted = {_strip(name): tensor for name, tensor in own.items()}
    tensors = _without_common_prefix(tensors, set(wanted))
    missing, surplus = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or surplus:
        seen = f"lacks {missing[0]}" if missing else f"has {surplus[0]} besides"
        raise ValueError(
            f"{path} does not fit {type(module).__name__}: it {seen} ({len(missing)} missing, {len(surplus)} surplus); "
            "pass the network that it was saved from"
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"{path} does not fit {type(module).__name__}: {name} has shape {tuple(tensor.shape)}, "
                f"the network {tuple(wanted[name].shape)}; pass the network that it was saved from"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{path} holds values that are not finite in {name}; use an earlier checkpoint")
    module.load_state_dict({name: tensors[_strip(name)] for name in own})


def _without_common_prefix(tensors: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Drops a leading "network." or the like if that is what it takes to fit."""
    heads = {name.partition(".")[0] for name in tensors}
    if len(heads) != 1 or set(tensors) & wanted:
        return tensors
    (head,) = heads
    shorter = {name.removeprefix(f"{head}."): tensor for name, tensor in tensors.items()}
    return shorter if set(shorter) & wanted else tensors


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
