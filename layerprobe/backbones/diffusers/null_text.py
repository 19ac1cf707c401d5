"""The conditioning of an empty prompt, encoded by the pipeline's own text encoders."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from torch import Tensor, nn

from layerprobe.backbones.diffusers.class_table import DiffusersClass, Text
from layerprobe.backbones.diffusers.folders import (
    ENCODERS,
    MAX_STEPS,
    ModelFolder,
    exported_class,
    first_line,
    read_json,
)
from layerprobe.backbones.diffusers.weights import quiet_libraries, whole_encoders


def read_null_text(place: ModelFolder, family: DiffusersClass, module: nn.Module) -> tuple[Text, str]:
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
        return text, f", zeros as text ({first_line(error)})"


def _encode_empty(place: ModelFolder, module: nn.Module, like: Text) -> Text:
    """The empty prompt through the pipeline's own tokenizers, encoders and template."""
    assert place.pipeline is not None
    pipeline_class = exported_class(place.index["_class_name"], "DiffusionPipeline")
    if pipeline_class is None:
        raise ValueError("its pipeline is none of diffusers")
    parts = {name: value for name, value in place.index.items() if isinstance(value, list)}
    encoders = [name for name, value in parts.items() if name.startswith(ENCODERS) and any(value)]
    if not any(name.startswith("text_encoder") for name in encoders):
        raise ValueError("no text encoder beside it")
    for name in encoders:
        configs = [read_json(path) for path in sorted((place.pipeline / name).glob("*config.json"))]
        if parts[name][0] not in ("transformers", "diffusers", None) or any("auto_map" in c for c in configs):
            raise ValueError(f"{name} needs code of its own")
    for tokenizer in parts if isinstance(place.pipeline, Path) else ():
        limits = place.pipeline / tokenizer / "tokenizer_config.json"
        longest = read_json(limits).get("model_max_length") if limits.is_file() else None
        # Tokenizers say 1e30 for "no limit"; a pipeline pads to anything less.
        if isinstance(longest, (int, float)) and MAX_STEPS < longest < 1e12:
            raise ValueError(f"{tokenizer} has prompts of {longest:g} tokens")
    with quiet_libraries(), whole_encoders() as incomplete:
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
