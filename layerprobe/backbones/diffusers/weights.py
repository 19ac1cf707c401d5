"""Builds a diffusers denoiser and loads its weights."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from layerprobe.backbones.diffusers.folders import ModelFolder, exported_class, read_files, weight_files
from layerprobe.files import import_optional, one_line
from layerprobe.memory import pass_on
from layerprobe.precision import WeightType

_ORIGINAL_PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of the denoiser in single files
_EIGHT_BITS = {"F8_E4M3": "fp8", "F8_E5M2": "fp8", "I8": "int8", "U8": "int8 or packed 4 bits"}
_UNQUANTIZED = "open the original weights, or dequantize them in diffusers and save that"
FLOATS, INTEGERS = {"F64", "F32", "F16", "BF16"}, {"I64", "I32", "BOOL"}  # as safetensors calls them


# Largest numbers in a configuration, by words in their keys: each layer is built, and positions fill tables.
_MOST = {
    ("layers", "depth", "blocks"): 1000,
    ("sample_", "max_size"): 2048,
    ("patch_size", "heads"): 1024,
    ("head_dim", "channels"): 2**13,
}
_MOST_OTHERWISE = 2**24


class SingleFileRefused(ValueError):
    """A single file cannot be opened; the message gives the reason and what to do, without the file as its subject."""


def _check_sizes(folder: ModelFolder) -> None:
    """Checks that a denoiser of this configuration can be built: diffusers would build any."""
    for key, value in folder.config.items():
        most = next((most for words, most in _MOST.items() if any(word in key for word in words)), _MOST_OTHERWISE)
        if key == "sample_size" and "1D" in str(folder.config.get("_class_name")):
            most = _MOST_OTHERWISE  # sound, without a table of positions
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, int) and abs(number) > most:
                raise ValueError(
                    f"{folder.model / 'config.json'} has {key} = {str(value)[:40]}, more than {most}; repair it or "
                    "copy it again"
                )


def weight_type(types: Iterable[str], told: WeightType | None) -> torch.dtype:
    """Returns the type to read weights in: bfloat16 if all are stored in it, unless float32 is asked for; else float32.

    Args:
        types: Types of the stored weights, as safetensors calls them.
        told: The caller's choice.
    """
    return torch.bfloat16 if told != "float32" and {*types} & FLOATS == {"BF16"} else torch.float32


def stored_types(folder: ModelFolder) -> set[str]:
    """Returns the types of the weights that `load_denoiser` reads, as safetensors calls them; none of other files."""
    files, _ = read_files(folder.model)
    types: set[str] = set()
    for file in files if files[0].suffix == ".safetensors" else ():
        try:
            with safe_open(file, framework="pt") as weights:
                types |= {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118  (as below)
        except (SafetensorError, OSError) as error:  # Loading reports damaged files.
            pass_on(error)
    return types


def load_denoiser(folder: ModelFolder, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Opens a denoiser in evaluation mode, with weights of this type, on the CPU.

    Raises:
        FileNotFoundError: If a weight file is missing.
        ValueError: If the class is unknown, or the weights are damaged, quantized, not finite or of another model.
    """
    model_class = _model_class(folder)
    _check_sizes(folder)
    options = weight_files(folder.model)
    _refuse_quantized(folder.model)
    try:
        with quiet_libraries():
            module, info = model_class.from_pretrained(
                folder.model, local_files_only=True, output_loading_info=True, torch_dtype=dtype, **options
            )
    except Exception as error:  # A damaged file can fail in any way.
        pass_on(error)
        raise ValueError(
            f"{folder.model} cannot be opened as {model_class.__name__} ({one_line(error)}); copy or download it again"
        ) from error
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(str(n[0] if isinstance(n, (tuple, list)) else n) for n in info[f"{kind}_keys"])
        if names:
            raise ValueError(
                f"{folder.model} does not fit {model_class.__name__}: {kind} {names[0]} ({len(names)} in all); "
                "pass weights and configuration that were saved together"
            )
    bad = [n for n, weight in module.named_parameters() if not bool(weight.isfinite().all())]
    if bad:
        raise ValueError(f"{folder.model} holds values that are not finite in {bad[0]}; use an earlier checkpoint")
    opened: nn.Module = module.eval()
    return opened


def convert_denoiser(
    folder: ModelFolder, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, dict[str, int]]:
    """Builds the denoiser that a folder configures, with the weights of a single file.

    Args:
        folder: Folder with the configuration; its weights are not read.
        tensors: Tensors of the file, by the names of the original code or of diffusers; other networks may be among
            them.
        dtype: Type of the weights.

    Returns:
        The denoiser, and the numbers of tensors left out by the first part of their names.

    Raises:
        SingleFileRefused: If diffusers cannot convert files of this class, or the weights are of another model,
            quantized or not finite.
    """
    model_class = _model_class(folder)
    _check_sizes(folder)
    title = model_class.__name__
    with quiet_libraries():
        try:
            module = model_class.from_config(dict(folder.config)).to(dtype)
        except Exception as error:  # A damaged configuration can fail in any way.
            pass_on(error)
            raise SingleFileRefused(
                f"needs a whole configuration, but {folder.model} cannot be built as {title} ({one_line(error)}); "
                "copy or download that folder again"
            ) from error
        wanted = module.state_dict()
        prefix = _prefix(wanted, tensors)
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        converted = own if wanted.keys() <= own.keys() else _converted(folder, title, own)
    missing, unexpected = sorted(wanted.keys() - converted.keys()), sorted(converted.keys() - wanted.keys())
    shapes = [name for name in wanted if name in converted and wanted[name].shape != converted[name].shape]
    if missing or unexpected or shapes:
        raise SingleFileRefused(
            f"does not fit {title} as {folder.model} configures it: {len(missing)} tensors are missing, "
            f"{len(unexpected)} unexpected and {len(shapes)} of another shape, the first "
            f"{(missing + unexpected + shapes)[0]}; pass --pipeline with the folder of its own model"
        )
    for name, tensor in converted.items():
        if tensor.itemsize == 1 and wanted[name].is_floating_point():
            raise SingleFileRefused(f"is quantized ({name}); dequantize it first")
        if not bool(tensor.isfinite().all()):
            raise SingleFileRefused(f"holds values that are not finite in {name}; use an earlier checkpoint")
    module.load_state_dict(converted)
    left_out = Counter(name.partition(".")[0] for name in tensors if not name.startswith(prefix))
    return module.eval(), dict(left_out)


def _prefix(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Returns what stands before the names of the denoiser, either those of diffusers or of the original code."""
    first = next(iter(wanted))
    own = [name.removesuffix(first) for name in tensors if name.endswith(first)]
    own = [prefix for prefix in own if all(f"{prefix}{name}" in tensors for name in wanted)]
    if len(own) > 1:
        names = ", ".join(prefix.strip(".") or "''" for prefix in own)
        raise SingleFileRefused(f"holds several networks that fit ({names}); pass --weights with one of them")
    original = (prefix for prefix in _ORIGINAL_PREFIXES if any(name.startswith(prefix) for name in tensors))
    return own[0] if own else next(original, "")


def _converted(folder: ModelFolder, title: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts the names of the original code to those of diffusers."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    if title not in SINGLE_FILE_LOADABLE_CLASSES:
        raise SingleFileRefused(f"cannot be converted: diffusers knows no single files of {title}; pass its folder")
    if title == "UNet2DConditionModel":  # This converter looks for the prefix, and some others do not know it.
        tensors = {f"{_ORIGINAL_PREFIXES[0]}{name}": tensor for name, tensor in tensors.items()}
    convert = SINGLE_FILE_LOADABLE_CLASSES[title]["checkpoint_mapping_fn"]
    try:
        # Some converters take entries out of the dictionary that they are given.
        return dict(convert(checkpoint=dict(tensors), config=dict(folder.config)))
    except Exception as error:  # On another model's names they fail in any way.
        pass_on(error)
        raise SingleFileRefused(
            f"is not a file of {title} as {folder.model} configures it ({one_line(error)}); "
            "pass --pipeline with the folder of its own model"
        ) from error


def weights_origin(folder: ModelFolder, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Returns which weights `load_denoiser` reads, as JSON: files, stored types, and what else is there."""
    files, variants = read_files(folder.model)
    record: dict[str, Any] = {"files": [str(file) for file in files]}
    read = "F32" if dtype == torch.float32 else "BF16"
    if types := stored_types(folder):
        record["stored_types"] = sorted(
            f"{kind}, read as {read}" if kind in FLOATS - {read} else kind for kind in types
        )
    return record | {"other_weights": [*folder.others, *variants]}


def _refuse_quantized(folder: Path) -> None:
    """Refuses eight-bit weights, which would be read as numbers; loading reports damaged files."""
    for file in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(SafetensorError), safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (not a dictionary)
                kind = weights.get_slice(name).get_dtype()
                if kind not in FLOATS | INTEGERS:
                    raise ValueError(
                        f"{file} is quantized to {_EIGHT_BITS.get(kind, kind)} ({name}), so its features are not the "
                        f"model's; {_UNQUANTIZED}"
                    )


def _scheme(quantization: Any) -> str:
    """Returns how a configuration says that the weights were quantized, such as " by bitsandbytes to 4 bits"."""
    if not isinstance(quantization, Mapping):
        return ""
    method, kind = quantization.get("quant_method"), quantization.get("quant_type")
    bits = next((f" to {n} bits" for n in (4, 8) if quantization.get(f"load_in_{n}bit")), "")
    named = kind if isinstance(kind, str) else next(iter(kind.values()), "") if isinstance(kind, Mapping) else ""
    named = named.get("_type", "") if isinstance(named, Mapping) else named
    return (f" by {method}" if isinstance(method, str) else "") + (bits or (f" ({named})" if named else ""))


def _model_class(folder: ModelFolder) -> Any:
    """Returns the class in the configuration if diffusers exports it; nothing else is ever looked up or run."""
    config, name = folder.config, folder.config.get("_class_name")
    entry = folder.index.get(folder.component) if folder.pipeline else None
    library = entry[0] if isinstance(entry, list) and entry else "diffusers"
    if library != "diffusers" or {"auto_map", "trust_remote_code", "custom_code"} & set(config):
        source = library if library != "diffusers" else "auto_map"
        raise ValueError(
            f"{folder.model} needs code of its own ({source}), which is never run; wrap the module yourself"
        )
    if quantization := config.get("quantization_config"):
        raise ValueError(
            f"{folder.model} is quantized{_scheme(quantization)}, so its features are not the model's; {_UNQUANTIZED}"
        )
    model_class = exported_class(name, "ModelMixin")
    if model_class is None:
        version = import_optional("diffusers", "diffusers").__version__
        raise ValueError(
            f"{folder.model} is a {name!r}, which is not a model of diffusers {version}; "
            "update diffusers, or wrap the module yourself"
        )
    return model_class


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences diffusers: its warnings concern only itself or become errors here."""
    from diffusers.utils import logging as diffusers_logging

    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.set_verbosity(level)


@contextlib.contextmanager
def missing_weights() -> Iterator[list[str]]:
    """Collects the warnings of transformers about weights that a file lacks and that were initialized at random."""
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if any(word in message for word in ("MISSING", "MISMATCH", "newly initialized")):
                messages.append(message)

    logger = logging.getLogger("transformers")
    handlers, logger.handlers = logger.handlers, [Listener()]
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
