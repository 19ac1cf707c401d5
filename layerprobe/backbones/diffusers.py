"""Folders that diffusers wrote -> Backbone.

A folder is a whole pipeline (`model_index.json` and a folder per component) or one model (`config.json` and weights).
The class is looked up by name among those that diffusers itself exports, weights are read as data, and nothing that a
file says is run. The scheduler's configuration tells the schedule and what is predicted; its samplers, time spacing and
shift say where one would sample and are left alone.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from layerprobe.backbones.base import Backbone
from layerprobe.backbones.diffusers_families import FAMILIES, Config, Family, Shape, Text, from_patches, to_patches
from layerprobe.capture import as_tokens, match_layers
from layerprobe.files import MissingWeights
from layerprobe.noise import DDPM, EDM, LinearPath, NoiseSchedule, Prediction, schedule_from_name

REMOTE = "hf://"
WEIGHTS = "diffusion_pytorch_model"
# `*` also stands for slashes. Weights in the top folder are other programs' copies, or a bare model's.
DOWNLOADED = ["*/*.safetensors", f"{WEIGHTS}*.safetensors", "*.json", "*.txt", "*.model"]
NOT_DOWNLOADED = ["vae*/*", "safety_checker/*", "image_encoder/*", "*.fp16.safetensors", "*.non_ema.safetensors"]
MAX_STEPS, MAX_VALUES = 100_000, 2**31  # beyond them a configuration is damaged, or wants to exhaust the machine
# What pipelines call the network that denoises.
DENOISERS = ("transformer", "unet", "dit", "prior", "decoder")
# What `encode_prompt` of a pipeline needs, by the beginning of the component's name.
ENCODERS = ("text_encoder", "tokenizer", "projection_model", "language_model")
PREDICTION_TYPES: dict[str, Prediction] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "velocity",
}
FLOW_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LTXEulerAncestralRFScheduler",
)
# What these take where a file does not say it.
_EDM_DEFAULTS = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0, "prediction_type": "epsilon"}
EDM_SCHEDULERS: dict[str, dict[str, Any]] = {
    "EDMEulerScheduler": _EDM_DEFAULTS,
    "EDMDPMSolverMultistepScheduler": _EDM_DEFAULTS,
    "CosineDPMSolverMultistepScheduler": {
        "sigma_data": 1.0,
        "sigma_min": 0.3,
        "sigma_max": 500.0,
        "prediction_type": "v_prediction",
    },
}


def is_diffusers(path: str | Path) -> bool:
    """Whether this is a folder that diffusers wrote, or names a model on the Hub: "owner/name" or "hf://owner/name"."""
    folder = Path(path)
    if folder.is_dir():
        config = folder / "config.json"
        return (folder / "model_index.json").is_file() or (config.is_file() and "_class_name" in _read_json(config))
    return str(path).startswith(REMOTE) or (not folder.exists() and _is_repository(str(path)))


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
    _diffusers()
    place = _locate(path, subfolder)
    module = _load(place)
    if lora is not None:
        module = _with_lora(module, Path(lora), component=place.component)
    config, name = module.config, type(module).__name__
    family = FAMILIES.get(name)
    if family is None:
        family = _guessed_family(module, config)
    sample_shape = _sample_shape(name, family, config, shape)
    convention = _convention(place, name, family, schedule, prediction)
    classes = _num_classes(name, config, num_classes)
    text, said = _null_text(place, family, module)
    forward = _Forward(family, config, sample_shape, text, classes, convention.preconditioner)
    num_tokens = math.prod(e // p for e, p in zip(sample_shape[1:], family.patch(config), strict=True))
    tokens: Callable[[Any, str], Tensor] = partial(family.tokens, shape=sample_shape, num_tokens=num_tokens)
    if name not in FAMILIES:
        found, tokens = _measured_layers(module, forward, sample_shape, convention.schedule)
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


@dataclass(frozen=True)
class _Place:
    """Where things are: the pipeline's folder and index if there is one, the model's folder and its configuration."""

    pipeline: Path | None
    index: Mapping[str, Any]
    model: Path
    config: Mapping[str, Any]

    @property
    def component(self) -> str:
        return self.model.name if self.pipeline else "transformer"

    @property
    def scheduler(self) -> Path | None:
        folders = [self.pipeline] if self.pipeline else [self.model, self.model.parent]
        names = ("scheduler/scheduler_config.json", "scheduler_config.json")
        return next((f / n for f in folders for n in names if (f / n).is_file()), None)


@dataclass(frozen=True)
class _Preconditioner:
    """What stands around an EDM network: inputs of unit variance, and outputs that are mostly x_t at low noise.

    Attributes:
        sigma_data: The data's standard deviation.
        sign: Of the network's part of the output: -1 where it predicts v.
        angle: The network is told 2/pi atan(sigma) instead of log(sigma) / 4.

    Source: Karras et al. 2022 (arXiv:2206.00364), eq. 7 and table 1.
    """

    sigma_data: float
    sign: int
    angle: bool

    def input(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        return x_t / (sigma**2 + self.sigma_data**2).sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        return sigma.atan() * (2 / math.pi) if self.angle else sigma.log() / 4

    def denoised(self, x_t: Tensor, output: Tensor, sigma: Tensor) -> Tensor:
        total = sigma**2 + self.sigma_data**2
        return x_t * self.sigma_data**2 / total + self.sign * output * sigma * self.sigma_data / total.sqrt()


@dataclass(frozen=True)
class _Convention:
    schedule: NoiseSchedule
    prediction: Prediction
    preconditioner: _Preconditioner | None = None


class _Forward:
    """Calls the module as its pipeline does, for a sample of the backbone's shape under the null text."""

    def __init__(
        self,
        family: Family,
        config: Config,
        shape: Shape,
        text: Text,
        num_classes: int,
        preconditioner: _Preconditioner | None,
    ) -> None:
        self.family, self.config, self.num_classes, self.preconditioner = family, config, num_classes, preconditioner
        self.arguments = dict(family.arguments(config, shape, text))

    def __call__(self, module: nn.Module, x_t: Tensor, native_time: Tensor, condition: Tensor | None) -> Tensor:
        if self.preconditioner is None:
            return self.network(module, x_t, native_time, condition)
        sigma = native_time.view(-1, *[1] * (x_t.ndim - 1))
        scaled, time = self.preconditioner.input(x_t, sigma), self.preconditioner.time(native_time)
        return self.preconditioner.denoised(x_t, self.network(module, scaled, time, condition), sigma)

    def network(self, module: nn.Module, x_t: Tensor, native_time: Tensor, condition: Tensor | None) -> Tensor:
        family, patch = self.family, self.family.patch(self.config)
        # What stays the same from call to call moves to the device once.
        self.arguments = _moved(self.arguments, x_t)
        sample = to_patches(x_t, patch) if family.packed else x_t
        sample = sample.transpose(1, 2) if family.frames_before_channels else sample
        names = inspect.signature(module.forward).parameters
        arguments = {
            "sample" if "sample" in names else "hidden_states": sample,
            "timestep": native_time.to(x_t.dtype) if family.float_time else native_time,
            **_for_batch(self.arguments, x_t),
        }
        if self.num_classes:
            arguments["class_labels"] = condition
        output: Tensor = module(**arguments, return_dict=False)[0]
        output = output.transpose(1, 2) if family.frames_before_channels else output
        output = from_patches(output, patch, tuple(x_t.shape[2:])) if family.packed else output
        # Networks that also learn a variance give it in a second half of the channels.
        output = output[:, : x_t.shape[1]]
        if output.shape != x_t.shape:
            raise ValueError(
                f"{type(module).__name__} gives {tuple(output.shape[1:])} for {tuple(x_t.shape[1:])}; "
                "pass --shape with the proportions that it was trained at"
            )
        return output


def _moved(value: Any, x: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.to(x.device, x.dtype if value.is_floating_point() else None)
    return {k: _moved(v, x) for k, v in value.items()} if isinstance(value, Mapping) else value


def _for_batch(value: Any, x: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.expand(len(x), *value.shape[1:])
    if isinstance(value, Mapping):
        return {k: _for_batch(v, x) for k, v in value.items()}
    return value(x) if callable(value) else value


def _diffusers() -> Any:
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "diffusers is not installed, and this checkpoint needs it; install layerprobe[diffusers]"
        ) from error
    return diffusers


def _exported(name: Any, kind: str) -> Any:
    """The class of this name that diffusers itself exports, if it is of this kind; None for anything else."""
    diffusers = _diffusers()
    found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    return found if inspect.isclass(found) and issubclass(found, getattr(diffusers, kind)) else None


# --- Where things are


def _is_repository(name: str) -> bool:
    """Whether this can be "owner/name" of the Hub, and not the path of a file that is not there."""
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None
    return named and Path(name).suffix not in (".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".pkl", ".npz")


def _locate(path: str | Path, subfolder: str | None) -> _Place:
    folder = Path(path) if Path(path).is_dir() else _snapshot(str(path), subfolder)
    if subfolder is None and not (folder / "model_index.json").is_file() and folder.name:
        # A component inside its pipeline: the neighbours tell schedule and text.
        parent = folder.resolve().parent
        if (parent / "model_index.json").is_file() and folder.name in _read_json(parent / "model_index.json"):
            folder, subfolder = parent, folder.resolve().name
    _refuse_links_outside(folder)
    index: Mapping[str, Any] = {}
    if (folder / "model_index.json").is_file():
        index = _read_json(folder / "model_index.json")
        if not isinstance(index.get("_class_name"), str):
            raise ValueError(f"{folder} needs code of its own ({index.get('_class_name')}), which is not run; wrap it")
        subfolder = subfolder or _denoiser(folder, index)
    model = folder / subfolder if subfolder else folder
    if not (model / "config.json").is_file():
        raise FileNotFoundError(f"there is no {model / 'config.json'}; pass a folder that diffusers saved")
    return _Place(folder if index else None, index, model, _read_json(model / "config.json"))


def _denoiser(folder: Path, index: Mapping[str, Any]) -> str:
    components = [name for name, value in index.items() if isinstance(value, list) and any(value)]
    found = next((name for name in DENOISERS if name in components), None)
    if found is None:
        raise ValueError(f"{folder} has no transformer and no unet; pass --subfolder, one of {', '.join(components)}")
    return found


def _snapshot(name: str, subfolder: str | None) -> Path:
    """The folder of a model of the Hub: cached, or downloaded where the user says so."""
    remote, name = name.startswith(REMOTE), name.removeprefix(REMOTE)
    if not _is_repository(name):
        raise FileNotFoundError(f"there is no folder {name}; pass one that diffusers saved, or owner/name of the Hub")
    import huggingface_hub

    wanted = DOWNLOADED if subfolder is None else [f"{subfolder}/*.safetensors", *DOWNLOADED[1:]]
    try:
        folder = huggingface_hub.snapshot_download(
            name, local_files_only=not remote, allow_patterns=wanted, ignore_patterns=NOT_DOWNLOADED
        )
        return Path(folder)
    except Exception as error:  # The Hub's client fails in many ways.
        how = "check name and connection" if remote else f"pass {REMOTE}{name} to download it"
        raise FileNotFoundError(
            f"{name} is no folder and not in the Hub's cache ({_first_line(error)}); {how}"
        ) from error


def _refuse_links_outside(folder: Path) -> None:
    root = folder.resolve()
    # The Hub's cache links its snapshots to blobs beside them.
    root = root.parents[1] if root.parent.name == "snapshots" and len(root.parents) > 1 else root
    for link in (folder, *folder.rglob("*")):
        if link.is_symlink() and link != folder and not link.resolve().is_relative_to(root):
            raise ValueError(f"{link} is a link out of the folder, which is not followed; copy the file in its place")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({_first_line(error)}); copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (it holds no dictionary); copy or download it again")
    return content


# --- Weights

_FLOATS, _INTEGERS = {"F64", "F32", "F16", "BF16"}, {"I64", "I32", "BOOL"}  # as safetensors calls them


def _load(place: _Place) -> nn.Module:
    known = _model_class(place)
    options = _weight_files(place.model)
    _refuse_quantised(place.model)
    try:
        with _quiet():
            module, info = known.from_pretrained(
                place.model, local_files_only=True, output_loading_info=True, torch_dtype=torch.float32, **options
            )
    except Exception as error:  # A damaged file can fail in any way.
        raise ValueError(
            f"{place.model} cannot be opened as {known.__name__} ({_first_line(error)}); copy or download it again"
        ) from error
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(str(n[0] if isinstance(n, (tuple, list)) else n) for n in info[f"{kind}_keys"])
        if names:
            raise ValueError(
                f"{place.model} does not fit {known.__name__}: {kind} {names[0]} ({len(names)} in all); "
                "pass weights and configuration that were saved together"
            )
    bad = [n for n, weight in module.named_parameters() if not bool(weight.isfinite().all())]
    if bad:
        raise ValueError(f"{place.model} holds values that are not finite in {bad[0]}; use an earlier checkpoint")
    opened: nn.Module = module.eval()
    return opened


def _refuse_quantised(folder: Path) -> None:
    """Eight-bit weights would be taken for numbers; a damaged file is left to the loading."""
    for file in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(SafetensorError), safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (it is no dictionary)
                if weights.get_slice(name).get_dtype() not in _FLOATS | _INTEGERS:
                    raise ValueError(f"{file} is quantized ({name}), so its features are not the model's; open another")


def _model_class(place: _Place) -> Any:
    """The class that the configuration names, if diffusers exports it; nothing else is ever looked up or run."""
    config, name = place.config, place.config.get("_class_name")
    listed = place.index.get(place.component) if place.pipeline else None
    library = listed[0] if isinstance(listed, list) and listed else "diffusers"
    if library != "diffusers" or {"auto_map", "trust_remote_code", "custom_code"} & set(config):
        what = library if library != "diffusers" else "auto_map"
        raise ValueError(f"{place.model} needs code of its own ({what}), which is not run; wrap the module yourself")
    if config.get("quantization_config"):
        raise ValueError(f"{place.model} is quantized, so its features are not the model's; open the unquantized one")
    found = _exported(name, "ModelMixin")
    if found is None:
        raise ValueError(
            f"{place.model} is a {name!r}, which is no model of diffusers {_diffusers().__version__}; update it, "
            "or wrap the module yourself"
        )
    return found


def _weight_files(folder: Path) -> dict[str, Any]:
    """How `from_pretrained` is told what to read; every file must be there and lie in the folder."""
    files = {p.name for p in folder.iterdir()}
    for suffix, safe in (("safetensors", True), ("bin", False)):
        single = re.compile(rf"{WEIGHTS}(?:\.(\w+))?\.{suffix}")
        index = re.compile(rf"{WEIGHTS}\.{suffix}\.index(?:\.(\w+))?\.json")
        # Sorting puts the plain file before its variants such as fp16.
        found = sorted((m for name in files if (m := single.fullmatch(name) or index.fullmatch(name))), key=_variant)
        if found:
            for shard in _shards(folder, found[0].string):
                if shard not in files:
                    raise MissingWeights(f"there is no weight file {folder / shard}; put it there")
            return {"use_safetensors": safe, "variant": found[0][1]}
    raise MissingWeights(f"there is no weight file {folder / f'{WEIGHTS}.safetensors'}; put it there")


def _variant(match: re.Match[str]) -> str:
    return match[1] or ""


def _shards(folder: Path, name: str) -> list[str]:
    if not name.endswith(".json"):
        return [name]
    shards = _read_json(folder / name).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
        raise ValueError(f"{folder / name} is damaged (no map of weights to files beside it); download it again")
    return sorted(set(shards.values()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences diffusers: its warnings are about itself or become errors here."""
    from diffusers.utils import logging as told

    level = told.get_verbosity()
    told.set_verbosity_error()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        told.set_verbosity(level)


@contextlib.contextmanager
def _whole_encoders() -> Iterator[list[str]]:
    """Collects what transformers says, and only says, of weights that it made up because the file lacks them."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if any(word in message for word in ("MISSING", "MISMATCH", "newly initialized")):
                said.append(message)

    logger = logging.getLogger("transformers")
    handlers, logger.handlers = logger.handlers, [Listener()]
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield said
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def _with_lora(module: nn.Module, path: Path, *, component: str) -> nn.Module:
    """The module with an adapter merged into its weights, so that its layers are the base model's."""
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "peft is not installed, and --lora needs it; install layerprobe[diffusers]"
        ) from error
    names = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
    file = next((path / name for name in names if (path / name).is_file()), path) if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        raise FileNotFoundError(
            f"there is no adapter at {path}; pass a folder with one of {', '.join(names)}, or a file"
        )
    if file.is_symlink() and not file.resolve().is_relative_to(path.resolve().parent):
        raise ValueError(f"{file} is a link out of the folder, which is not followed; copy the file in its place")
    try:
        with _quiet():
            merged = _merge_peft(module, file) if file.name == names[0] else _merge_lora(module, file, component)
    except _DoesNotFit:
        raise
    except Exception as error:  # A damaged file can fail in any way.
        raise ValueError(f"{file} cannot be applied to {type(module).__name__} ({_first_line(error)})") from error
    return merged.eval().requires_grad_(True)


class _DoesNotFit(ValueError):
    """An adapter of another model."""


def _merge_peft(module: nn.Module, file: Path) -> nn.Module:
    from peft import LoraConfig, PeftModel
    from peft.utils import get_peft_model_state_dict
    from safetensors import safe_open

    if not (file.parent / "adapter_config.json").is_file():
        raise _DoesNotFit(f"there is no adapter_config.json beside {file}; put it there")
    record = _read_json(file.parent / "adapter_config.json")
    if record.get("peft_type") != "LORA":
        raise _DoesNotFit(f"{file.parent} holds a {record.get('peft_type')} adapter; only LORA is merged")
    config = LoraConfig.from_pretrained(str(file.parent))
    adapted: Any = PeftModel.from_pretrained(module, str(file.parent), config=config, local_files_only=True)
    with safe_open(file, framework="pt") as tensors:
        surplus = sorted(set(tensors.keys()) - set(get_peft_model_state_dict(adapted)))
    if surplus:
        raise _DoesNotFit(
            f"{file} does not fit {type(module).__name__}: it has {surplus[0]} besides; pass its base model"
        )
    merged: nn.Module = adapted.merge_and_unload()
    return merged


def _merge_lora(module: Any, file: Path, component: str) -> nn.Module:
    from safetensors.torch import load_file

    state = load_file(file)
    prefix = component if any(name.startswith(f"{component}.") for name in state) else None
    module.load_lora_adapter(state, prefix=prefix)
    wanted = sum(name.endswith(("lora_B.weight", "lora.up.weight")) for name in state if name.startswith(prefix or ""))
    given = sum(name.endswith("lora_B.default_0.weight") for name, _ in module.named_parameters())
    if not given or given != wanted:
        raise _DoesNotFit(
            f"{file} does not fit {type(module).__name__}: {given} of its {wanted} matrices have a place; "
            "pass its base model"
        )
    module.fuse_lora()
    module.unload_lora()
    merged: nn.Module = module
    return merged


# --- Schedule and prediction


def _convention(
    place: _Place,
    name: str,
    family: Family,
    schedule: str | NoiseSchedule | None,
    prediction: Prediction | None,
) -> _Convention:
    if schedule is not None and prediction is not None:
        return _Convention(schedule_from_name(schedule) if isinstance(schedule, str) else schedule, prediction)
    if place.scheduler is not None:
        told = _read_scheduler(place.scheduler, family)
    elif family.trained is not None:
        told = _Convention(_named(family.trained[0], family), family.trained[1])
    else:
        raise ValueError(
            f"{place.model} has no scheduler_config.json, and {name} was trained in several ways; "
            "pass --schedule and --prediction"
        )
    if told.preconditioner is not None and (schedule is not None or prediction is not None):
        raise ValueError("the scheduler's preconditioning decides both; pass --schedule and --prediction, or neither")
    if schedule is not None:
        told = _Convention(schedule_from_name(schedule) if isinstance(schedule, str) else schedule, told.prediction)
    return told if prediction is None else _Convention(told.schedule, prediction)


def _named(name: str, family: Family) -> NoiseSchedule:
    return LinearPath(*family.times) if name == "flow" and family.times else schedule_from_name(name)


def _read_scheduler(path: Path, family: Family) -> _Convention:
    """Schedule and prediction of a scheduler's configuration.

    Raises:
        ValueError: If it is damaged, or of a kind that has no schedule of ours.
    """
    config = _read_json(path)
    name = str(config.get("_class_name"))
    steps = config.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or not 0 < steps <= MAX_STEPS:
        raise ValueError(f"{path} counts {steps!r} times; pass --schedule, or mend it: at most {MAX_STEPS}")
    if name in EDM_SCHEDULERS:
        return _read_edm(path, {**EDM_SCHEDULERS[name], **config})
    found = _exported(name, "SchedulerMixin")
    if found is None:
        raise ValueError(f"{path} names {name!r}, no scheduler of diffusers; pass --schedule and --prediction")
    try:
        with _quiet():
            scheduler = found.from_config(config)
    except Exception as error:  # Wrong values fail in any way.
        raise ValueError(f"{path} is no configuration of {name} ({_first_line(error)}); pass --schedule") from error
    kind = str(scheduler.config.get("prediction_type"))
    if name in FLOW_SCHEDULERS or scheduler.config.get("use_flow_sigmas") or kind == "flow_prediction":
        if family.times is None:
            raise ValueError(
                "what this class takes as time is not known; pass --schedule flow-1000, flow or sit, whichever its "
                "pipeline does, and --prediction velocity"
            )
        if scheduler.config.num_train_timesteps != 1000:
            raise ValueError(f"{path} counts {scheduler.config.num_train_timesteps} times; pass --schedule")
        return _Convention(LinearPath(*family.times), "velocity")
    continuous = scheduler.config.get("timestep_type") == "continuous"
    if hasattr(scheduler, "alphas_cumprod") and kind in PREDICTION_TYPES and not continuous:
        if family.times not in (None, (0, 1000)):
            raise ValueError(f"{path} has integer times, which this class does not take; pass --schedule")
        named = scheduler.config.get("beta_schedule", "custom").replace("squaredcos_cap_v2", "cosine")
        return _Convention(DDPM(_betas(scheduler), name=f"ddpm-{named}"), PREDICTION_TYPES[kind])
    raise ValueError(f"{path}: the noise of {name} is none of layerprobe's schedules; pass --schedule and --prediction")


def _read_edm(path: Path, config: Mapping[str, Any]) -> _Convention:
    signs = {"epsilon": 1, "v_prediction": -1}
    try:
        sign, data = signs[config["prediction_type"]], float(config["sigma_data"])
        schedule = EDM(data, float(config["sigma_min"]), float(config["sigma_max"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({_first_line(error)}); copy or download it again") from error
    angle = config["_class_name"] == "CosineDPMSolverMultistepScheduler"
    return _Convention(schedule, "x0", _Preconditioner(data, sign, angle))


def _betas(scheduler: Any) -> Tensor:
    """The betas behind the chain that the scheduler really uses, which may be shifted or rescaled."""
    abar: Tensor = scheduler.alphas_cumprod.double()
    betas: Tensor = scheduler.betas.double()
    if bool((betas < 1).all()) and torch.allclose(torch.cumprod(1 - betas, 0), abar, rtol=1e-3, atol=1e-7):
        return betas
    # A chain rescaled to end in pure noise has no finite log-SNR there; diffusers itself stops at 2**-24.
    abar = abar.clamp(min=2.0**-24)
    return 1 - abar / torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])


# --- Sizes, classes and the null text


def _sample_shape(name: str, family: Family, config: Config, given: Sequence[int] | None) -> Shape:
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


def _null_text(place: _Place, family: Family, module: nn.Module) -> tuple[Text, str]:
    """The condition that says nothing, and how it was made, for the backbone's name."""
    if family.text is None:
        return Text.zeros(0, 0, 0), ""
    text = Text.zeros(*family.text(module.config))
    if place.pipeline is None or family.arguments.__name__ in ("_audioldm2", "_hunyuan_dit", "_stable_audio"):
        return text, ", zeros as text"
    if place.index.get("force_zeros_for_empty_prompt"):
        return text, ", zeros as text, as in its pipeline"
    try:
        return _encode_empty(place, module, text), ", empty prompt as text"
    except Exception as error:  # Whatever an encoder fails of, the model itself can be read.
        return text, f", zeros as text ({_first_line(error)})"


def _encode_empty(place: _Place, module: nn.Module, like: Text) -> Text:
    """The empty prompt through the pipeline's own tokenizers, encoders and template."""
    assert place.pipeline is not None
    pipeline_class = _exported(place.index["_class_name"], "DiffusionPipeline")
    if pipeline_class is None:
        raise ValueError("its pipeline is none of diffusers")
    parts = {name: value for name, value in place.index.items() if isinstance(value, list)}
    encoders = [name for name, value in parts.items() if name.startswith(ENCODERS) and any(value)]
    if not any(name.startswith("text_encoder") for name in encoders):
        raise ValueError("no text encoder beside it")
    for name in encoders:
        configs = [_read_json(path) for path in sorted((place.pipeline / name).glob("*config.json"))]
        if parts[name][0] not in ("transformers", "diffusers", None) or any("auto_map" in c for c in configs):
            raise ValueError(f"{name} needs code of its own")
    for tokenizer in parts if isinstance(place.pipeline, Path) else ():
        limits = place.pipeline / tokenizer / "tokenizer_config.json"
        longest = _read_json(limits).get("model_max_length") if limits.is_file() else None
        # Tokenizers say 1e30 for "no limit"; a pipeline pads to anything less.
        if isinstance(longest, (int, float)) and MAX_STEPS < longest < 1e12:
            raise ValueError(f"{tokenizer} has prompts of {longest:g} tokens")
    with _quiet(), _whole_encoders() as incomplete:
        pipeline = pipeline_class.from_pretrained(
            place.pipeline,
            # Some look up widths in the network's configuration.
            **{name: module if name == place.component else None for name in parts if name not in encoders},
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=torch.float32,
        )
        encoders_read = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        if incomplete or not all(bool(p.isfinite().all()) for part in encoders_read for p in part.parameters()):
            raise ValueError("its text encoder lacks weights, or has some that are not finite")
        takes = inspect.signature(pipeline.encode_prompt).parameters
        wanted = {"prompt_2": None, "prompt_3": None, "device": torch.device("cpu"), "num_images_per_prompt": 1}
        options = {k: v for k, v in wanted.items() if k in takes} | (
            {"do_classifier_free_guidance": False} if "do_classifier_free_guidance" in takes else {}
        )
        with torch.inference_mode():
            given = pipeline.encode_prompt("", **options)
    tensors = [t for t in (given if isinstance(given, tuple) else (given,)) if isinstance(t, Tensor)]
    tokens = next(t for t in tensors if t.ndim == 3 and t.shape[2] == like.tokens.shape[2]).float().clone()
    length, pooled = tokens.shape[1], like.pooled.shape[1]
    masks = [t != 0 for t in tensors if t.shape == (1, length) and length != pooled]
    summaries = [t.float().clone() for t in tensors if pooled and t.shape == (1, pooled)]
    mask = masks[0] if masks else torch.ones(1, length, dtype=torch.bool)
    return Text(tokens, mask, summaries[0] if summaries else like.pooled)


# --- Layers


def _ordered_layers(module: nn.Module, family: Family) -> tuple[str, ...]:
    """The family's blocks in the order in which they run."""
    names = {name for name, _ in module.named_modules()}
    lists = [match_layers(module, p) for p in family.layers if p.removesuffix(".*") in names and _filled(module, p)]
    if family.interleaved:
        return tuple(name for row in zip(*lists, strict=True) for name in row)
    return tuple(name for row in lists for name in row)


def _filled(module: nn.Module, pattern: str) -> bool:
    part = module.get_submodule(pattern.removesuffix(".*"))
    return not pattern.endswith(".*") or any(True for _ in part.children())


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


# --- Classes without an entry of their own

# Under which names configurations keep the width of the text, and the number of tokens that stands for an empty one.
TEXT_WIDTHS = (
    "encoder_hid_dim",
    "caption_channels",
    "text_embed_dim",
    "text_dim",
    "context_in_dim",
    "cap_feat_dim",
    "text_in_channels",
    "joint_attention_dim",
    "cross_attention_input_dim",
    "cross_attention_dim",
)
GUESSED_LENGTH = 77


def _guessed_family(module: nn.Module, config: Config) -> Family:
    """How to call a class that has no entry, from the names of its arguments; ValueError where they say too little."""
    name, takes = type(module).__name__, inspect.signature(module.forward).parameters
    width = next((config[key] for key in TEXT_WIDTHS if isinstance(config.get(key), int)), 0)
    pooled = config.get("pooled_projection_dim") or 0
    known: dict[str, Callable[[Text], Any]] = {}
    if width:
        known["encoder_hidden_states"] = lambda text: text.tokens
        known["encoder_attention_mask"] = lambda text: text.mask
    if pooled:
        known["pooled_projections"] = lambda text: text.pooled
    needed = [key for key, value in takes.items() if value.default is value.empty and value.kind != value.VAR_KEYWORD]
    strange = [key for key in needed if key not in (*known, "sample", "hidden_states", "timestep")]
    strange += ["guidance"] if config.get("guidance_embeds") else []
    # Sequences (B, T, D) and (B, C, L) cannot be told apart by their shapes.
    denoises = {"sample", "hidden_states"} & set(takes) and "timestep" in takes and "1D" not in name
    if strange or not denoises or "in_channels" not in config:
        what = f"wants {strange[0]}" if strange else "is no denoiser of one sample"
        raise ValueError(f"{name} {what}, which layerprobe cannot give; wrap the module yourself")
    given = [key for key in known if key in takes]
    edges = config.get("patch_size") or 1
    axes = 3 if "3D" in name else 2
    patch = tuple(edges) if isinstance(edges, (tuple, list)) else (edges,) * axes
    if axes == 3 and isinstance(edges, int):
        patch = (config.get("patch_size_t") or 1, edges, edges)
    size = config.get("sample_size")
    return Family(
        layers=(),
        patch=lambda c: patch,
        size=lambda c: (c.in_channels, *(size,) * axes) if isinstance(size, int) and axes < 3 else None,
        text=(lambda c: (GUESSED_LENGTH, width, pooled)) if width else None,
        arguments=lambda c, shape, text: {key: known[key](text) for key in given},
        times=None,
    )


@torch.inference_mode()
def _measured_layers(
    module: nn.Module, forward: _Forward, shape: Shape, schedule: NoiseSchedule
) -> tuple[tuple[str, ...], Callable[[Any, str], Tensor]]:
    """The blocks that run, in that order, and the part of their outputs whose length does not follow the text's.

    Raises:
        ValueError: If the class cannot be called as guessed, or a block's output holds image and text in one sequence.
    """
    family, config, name = forward.family, forward.config, type(module).__name__
    widths = family.text(config) if family.text else (0, 0, 0)
    time = schedule.native_time(torch.full((1,), 0.5))
    runs = []
    for extra in (0, 1):
        text = Text.zeros(widths[0] + extra, *widths[1:])
        longer = _Forward(family, config, shape, text, forward.num_classes, forward.preconditioner)
        with _lengths(module) as lengths:
            try:
                longer(module, torch.zeros(1, *shape), time, None)
            except Exception as error:  # Whatever a class without an entry fails of.
                raise ValueError(
                    f"{name} does not run as guessed ({_first_line(error)}); wrap the module yourself"
                ) from error
        runs.append(lengths)
    parts: dict[str, int] = {}
    for block, before in runs[0].items():
        same = [i for i, (a, b) in enumerate(zip(before, runs[1][block], strict=True)) if a == b and a is not None]
        if same:
            parts[block] = same[0]
        elif any(length != widths[0] for length in before if length is not None):
            raise ValueError(f"{block} of {name} holds image and text in one sequence; wrap the module yourself")
    if not parts:
        raise ValueError(f"{name} has no list of blocks; wrap the module yourself")

    def tokens(output: Any, layer: str) -> Tensor:
        part = parts.get(layer, 0)
        return as_tokens(output[part] if isinstance(output, (tuple, list)) else output, layer)

    return tuple(parts), tokens


@contextlib.contextmanager
def _lengths(module: nn.Module) -> Iterator[dict[str, list[int | None]]]:
    """Records, in order, the token counts of what the blocks of the outermost lists give."""
    found: dict[str, list[int | None]] = {}

    def recorder(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(_: nn.Module, __: Any, output: Any) -> None:
            outputs = output if isinstance(output, (tuple, list)) else (output,)
            found[name] = [
                as_tokens(o, name).shape[1] if isinstance(o, Tensor) and o.ndim > 2 and len(o) == 1 else None
                for o in outputs
            ]

        return record

    lists = [name for name, part in module.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    outer = [*lists, "mid_block"]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in outer)]
    blocks = [f"{name}.{i}" for name in outermost for i in range(len(module.get_submodule(name)))]  # type: ignore[arg-type]
    blocks += ["mid_block"] if isinstance(getattr(module, "mid_block", None), nn.Module) else []
    handles = [module.get_submodule(name).register_forward_hook(recorder(name)) for name in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for name in [name for name, lengths in found.items() if not any(lengths)]:
        del found[name]
