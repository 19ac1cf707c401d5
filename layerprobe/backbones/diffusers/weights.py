"""Building a diffusers denoiser and loading its weights."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from layerprobe.backbones.diffusers.folders import (
    ModelFolder,
    exported_class,
    first_line,
    import_diffusers,
    weight_files,
)

# --- Weights

FLOATS, INTEGERS = {"F64", "F32", "F16", "BF16"}, {"I64", "I32", "BOOL"}  # as safetensors calls them


def load_denoiser(place: ModelFolder) -> nn.Module:
    known = _model_class(place)
    options = weight_files(place.model)
    _refuse_quantized(place.model)
    try:
        with quiet_libraries():
            module, info = known.from_pretrained(
                place.model, local_files_only=True, output_loading_info=True, torch_dtype=torch.float32, **options
            )
    except Exception as error:  # A damaged file can fail in any way.
        raise ValueError(
            f"{place.model} cannot be opened as {known.__name__} ({first_line(error)}); copy or download it again"
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


def _refuse_quantized(folder: Path) -> None:
    """Eight-bit weights would be taken for numbers; a damaged file is left to the loading."""
    for file in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(SafetensorError), safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (it is no dictionary)
                if weights.get_slice(name).get_dtype() not in FLOATS | INTEGERS:
                    raise ValueError(f"{file} is quantized ({name}), so its features are not the model's; open another")


def _model_class(place: ModelFolder) -> Any:
    """The class that the configuration names, if diffusers exports it; nothing else is ever looked up or run."""
    config, name = place.config, place.config.get("_class_name")
    listed = place.index.get(place.component) if place.pipeline else None
    library = listed[0] if isinstance(listed, list) and listed else "diffusers"
    if library != "diffusers" or {"auto_map", "trust_remote_code", "custom_code"} & set(config):
        what = library if library != "diffusers" else "auto_map"
        raise ValueError(f"{place.model} needs code of its own ({what}), which is not run; wrap the module yourself")
    if config.get("quantization_config"):
        raise ValueError(f"{place.model} is quantized, so its features are not the model's; open the unquantized one")
    found = exported_class(name, "ModelMixin")
    if found is None:
        raise ValueError(
            f"{place.model} is a {name!r}, which is no model of diffusers {import_diffusers().__version__}; update it, "
            "or wrap the module yourself"
        )
    return found


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
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
def whole_encoders() -> Iterator[list[str]]:
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
