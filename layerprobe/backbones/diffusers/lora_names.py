"""Reads the names in a LoRA file: which module each matrix belongs to, and what kind of adapter it is.

Trainers write four kinds of names: those of diffusers and peft (`lora_A`, `lora_B`), of older diffusers (`lora.down`),
of kohya's scripts (`lora_unet_..._to_q.lora_down.weight`, dots written as underscores), and of ComfyUI
(`diffusion_model.` before the names of the original code). Names of the original code are converted by diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# Marks of adapters that are not a product of two matrices, and of parts that change what the product means.
_OTHER_KINDS = {
    "LoHa": ".hada_",
    "LoKr": ".lokr_",
    "GLoRA": (".a1.weight", ".b1.weight"),
    "LoCon with a core tensor": (".lora_mid.weight", ".lora_mid"),
    "DoRA of kohya's scripts": ".dora_scale",
    "OFT": (".oft_", ".oft_blocks", ".oft_diag"),
    "IA3": (".on_input", ".ia3_"),
    "full differences of LyCORIS": (".diff", ".diff_b"),
    "VeRA": ".vera_lambda",
}
_ROLES = {
    "down": re.compile(r"\.(lora_A|lora_down|lora\.down)(\.default)?(\.weight)?$"),
    "up": re.compile(r"\.(lora_B|lora_up|lora\.up)(\.default)?(\.weight)?$"),
    "up_bias": re.compile(r"\.(lora_B|lora_up|lora\.up)(\.default)?\.bias$"),
    "magnitude": re.compile(r"\.lora_magnitude_vector(\.default)?(\.weight)?$"),
}
# Attention processors of early diffusers: "attn1.processor.to_q_lora.down.weight".
_PROCESSOR = re.compile(r"\.processor\.(to_\w+)_lora\.(down|up)\.weight$")
_HEADS = ("base_model.model.", "transformer.", "unet.", "model.diffusion_model.", "diffusion_model.")
_UNDERSCORED = re.compile(r"^lora_(unet|transformer|dit)_")
_TEXT_ENCODERS = re.compile(r"^(base_model\.model\.)?(lora_te\d?_|(text_encoder|text_model|te|clip|t5)(_?\d)?\.)")
# Classes whose LoRA loader in diffusers is not named after them.
_LOADERS = {
    "UNet2DConditionModel": "StableDiffusionXL",
    "MochiTransformer3DModel": "Mochi1",
    "ChromaTransformer2DModel": "Flux",
}


@dataclass
class Names:
    """What the names of an adapter's tensors mean.

    Attributes:
        parts: Tensors by the module they belong to and their role: down, up, up_bias, alpha or magnitude.
        replaced: Tensors that replace a parameter of the network, by its name.
        unknown: Names that belong to no module of the network.
        text_encoders: Names of tensors for text encoders.
        converted: Whether diffusers converted the names from those of the original code.
    """

    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    text_encoders: list[str] = field(default_factory=list)
    converted: bool = False


def adapter_kind(names: Iterable[str]) -> tuple[str, str] | None:
    """Returns the kind of an adapter that is not a plain LoRA, and a name that tells it; None for a LoRA."""
    names = list(names)
    for kind, marks in _OTHER_KINDS.items():
        for mark in (marks,) if isinstance(marks, str) else marks:
            found = next((n for n in names if (mark in n if mark.endswith("_") else n.endswith(mark))), None)
            if found is not None:
                return kind, found
    return None


def read_names(tensors: Mapping[str, Tensor], module: nn.Module, component: str) -> Names:
    """Finds the module of every tensor.

    Args:
        tensors: Tensors of the adapter by name.
        module: Base model.
        component: Name of the base model among the components of its pipeline.
    """
    modules = dict(module.named_modules())
    underscored = {name.replace(".", "_"): name for name in modules}
    parameters = dict(module.named_parameters())

    def target(path: str) -> str | None:
        shorter = _UNDERSCORED.sub("", path)
        if shorter != path:
            return underscored.get(shorter)
        return next((p for p in _beheaded(path, component) if p in modules), None)

    names = Names()
    for stored, tensor in tensors.items():
        name = stored.replace(".base_layer.", ".")  # peft's name of the module that it wraps
        if _TEXT_ENCODERS.match(name):
            names.text_encoders.append(stored)
            continue
        path, role = _role(name)
        if role and (found := target(path)) is not None:
            names.parts.setdefault(found, {})[role] = tensor
        elif not role and (parameter := next((p for p in _beheaded(name, component) if p in parameters), None)):
            names.replaced[parameter] = tensor
        else:
            names.unknown.append(stored)
    return names


def converted_names(tensors: Mapping[str, Tensor], module: Any) -> dict[str, Tensor] | None:
    """Converts names of the original code of a network to those of diffusers; None if diffusers cannot.

    Some converters of diffusers multiply alpha over rank into the matrices.

    Raises:
        Exception: Of any kind, if the names are those of another network, or a converter leaves something out.
    """
    from diffusers.loaders import lora_pipeline

    tensors = {stored: tensor for stored, tensor in tensors.items() if not _TEXT_ENCODERS.match(stored)}
    name = type(module).__name__
    loader = _LOADERS.get(name) or re.sub(r"Transformer\dDModel$", "", name)
    mixin = getattr(lora_pipeline, f"{loader}LoraLoaderMixin", None)
    if mixin is None:
        return None
    options = {"unet_config": module.config} if name == "UNet2DConditionModel" else {}
    # Some converters take entries out of the dictionary that they are given.
    result = mixin.lora_state_dict(dict(tensors), **options)
    state, alphas = (*result, None)[:2] if isinstance(result, tuple) else (result, None)
    converted = {**state, **{name: torch.as_tensor(alpha) for name, alpha in (alphas or {}).items()}}
    if _num_rows(tensors) != _num_rows(converted):
        raise ValueError("diffusers leaves out some matrices when it converts their names")
    return converted


def _num_rows(tensors: Mapping[str, Tensor]) -> int:
    """Returns the rows of all second matrices, which stay the same when a converter splits fused projections."""
    return sum(len(tensor) for name, tensor in tensors.items() if _role(name)[1] == "up")


def text_encoder(name: str) -> str:
    """Returns the name of the text encoder in the name of a tensor for it, such as "text_encoder_2" or "lora_te1"."""
    match = _TEXT_ENCODERS.match(name)
    assert match is not None
    return match[0].strip("._")


def _role(name: str) -> tuple[str, str]:
    """Returns the path of the module and the role of a tensor; the name itself and "" for other tensors."""
    if name.endswith(".alpha"):  # Also after the name of the first matrix, as diffusers writes it.
        return _role(name.removesuffix(".alpha"))[0], "alpha"
    processor = _PROCESSOR.search(name)
    if processor:
        part = "to_out.0" if processor[1] == "to_out" else processor[1]
        return f"{name[: processor.start()]}.{part}", processor[2]
    for role, pattern in _ROLES.items():
        if match := pattern.search(name):
            return name[: match.start()], role
    return name, ""


def _beheaded(path: str, component: str) -> list[str]:
    """Returns a path and the same path without what files put before the names of the network, longest first."""
    paths = [path]
    while head := next((h for h in (f"{component}.", *_HEADS) if paths[-1].startswith(h)), None):
        paths.append(paths[-1].removeprefix(head))
    return paths
