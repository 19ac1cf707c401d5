"""Encodes the empty prompt with the pipeline's own text encoders, as the null condition."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.backbones.diffusers.diffusers_class import DiffusersClass, Text
from layerprobe.backbones.diffusers.folders import ENCODERS, MAX_STEPS, ModelFolder, exported_class, read_json
from layerprobe.backbones.diffusers.weights import missing_weights, quiet_libraries
from layerprobe.files import one_line
from layerprobe.memory import pass_on


def read_null_text(folder: ModelFolder, family: DiffusersClass, module: nn.Module) -> tuple[Text, str]:
    """Returns the null condition, and a note for the backbone's name that says how it was made."""
    if family.text is None:
        return Text.zeros(0, 0, 0), ""
    text = Text.zeros(*family.text(module.config))
    if folder.pipeline is None or family.zeros_as_text:
        return text, ", zeros as text"
    if folder.index.get("force_zeros_for_empty_prompt"):
        return text, ", zeros as text, as in its pipeline"
    try:
        return _encode_empty(folder, module, text), ", empty prompt as text"
    except Exception as error:  # An encoder may fail for any reason; the model itself can still be read.
        pass_on(error)
        return text, f", zeros as text ({one_line(error)})"


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yields what a pipeline encodes the one prompt to; some return a list with a text (L, D) for each prompt."""
    for part in output if isinstance(output, tuple) else (output,):
        if isinstance(part, list) and len(part) == 1 and isinstance(part[0], Tensor):
            yield part[0][None]
        elif isinstance(part, Tensor):
            yield part


def _encode_empty(folder: ModelFolder, module: nn.Module, zeros: Text) -> Text:
    """Encodes the empty prompt with the pipeline's own tokenizers, encoders and template."""
    assert folder.pipeline is not None
    pipeline_class = exported_class(folder.index["_class_name"], "DiffusionPipeline")
    if pipeline_class is None:
        raise ValueError("its pipeline is not a class of diffusers")
    parts = {name: value for name, value in folder.index.items() if isinstance(value, list)}
    encoders = [name for name, value in parts.items() if name.startswith(ENCODERS) and any(value)]
    if not any(name.startswith("text_encoder") for name in encoders):
        raise ValueError("its pipeline has no text encoder")
    for name in encoders:
        configs = [read_json(path) for path in sorted((folder.pipeline / name).glob("*config.json"))]
        if parts[name][0] not in ("transformers", "diffusers", None) or any("auto_map" in c for c in configs):
            raise ValueError(f"{name} needs code of its own")
    for tokenizer in parts:
        config_path = folder.pipeline / tokenizer / "tokenizer_config.json"
        max_length = read_json(config_path).get("model_max_length") if config_path.is_file() else None
        # Tokenizers write 1e30 for "no limit"; a pipeline pads to any smaller number.
        if isinstance(max_length, (int, float)) and MAX_STEPS < max_length < 1e12:
            raise ValueError(f"{tokenizer} has prompts of {max_length:g} tokens")
    with quiet_libraries(), missing_weights() as warnings:
        pipeline = pipeline_class.from_pretrained(
            folder.pipeline,
            # Some pipelines look up widths in the network's configuration.
            **{name: module if name == folder.component else None for name in parts if name not in encoders},
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=torch.float32,
        )
        modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        if warnings or not all(bool(p.isfinite().all()) for part in modules for p in part.parameters()):
            raise ValueError("its text encoder lacks weights, or has some that are not finite")
        parameters = inspect.signature(pipeline.encode_prompt).parameters
        options = {
            "prompt_2": None,
            "prompt_3": None,
            "device": torch.device("cpu"),
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": False,
        }
        with torch.inference_mode():
            output = pipeline.encode_prompt("", **{name: v for name, v in options.items() if name in parameters})
    tensors = [*_tensors(output)]
    width = zeros.tokens.shape[2]
    tokens = next((t for t in tensors if t.ndim == 3 and t.shape[2] == width), None)
    if tokens is None:
        raise ValueError(f"its pipeline gives no text of width {width}")
    tokens = tokens.float().clone()
    length, pooled_width = tokens.shape[1], zeros.pooled.shape[1]
    masks = [t != 0 for t in tensors if t.shape == (1, length) and length != pooled_width]
    pooled = [t.float().clone() for t in tensors if pooled_width and t.shape == (1, pooled_width)]
    mask = masks[0] if masks else torch.ones(1, length, dtype=torch.bool)
    return Text(tokens, mask, pooled[0] if pooled else zeros.pooled)
