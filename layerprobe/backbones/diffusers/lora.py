"""Merges a LoRA adapter into a diffusers denoiser: W + factor * up @ down for every module that it names.

Source: Hu et al. 2021 (arXiv:2106.09685), factor alpha / rank; rsLoRA, Kalajdzievski 2023 (arXiv:2312.03732), factor
alpha / sqrt(rank); DoRA, Liu et al. 2024 (arXiv:2402.09353), which also sets the norm of every row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from layerprobe.backbones.diffusers.lora_names import Names, adapter_kind, converted_names, read_names, text_encoder
from layerprobe.backbones.diffusers.lora_scale import AdapterRefused, Alpha, read_alpha
from layerprobe.backbones.diffusers.weights import quiet_libraries
from layerprobe.files import one_line
from layerprobe.memory import pass_on

# Some converters of names in diffusers multiply alpha / rank into the matrices.
_FOLDED = "in the matrices since their names were converted"
_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


@dataclass(frozen=True)
class MergedLora:
    """What was merged.

    Attributes:
        record: File, number of modules, ranks, alphas, factors, what says alpha, and what was left out, as JSON.
        assumptions: What no file said, as in `Backbone`.
    """

    record: dict[str, Any]
    assumptions: tuple[str, ...]


def merge_lora(module: nn.Module, path: Path, *, component: str, alpha: float | None = None) -> MergedLora:
    """Merges an adapter into the module's weights, so that the layers keep the names of the base model.

    Args:
        module: Base model.
        path: Folder of a peft adapter, or a LoRA `.safetensors` file of diffusers, peft, kohya's scripts or ComfyUI.
        component: Name of the base model among the components of its pipeline.
        alpha: Alpha of an adapter that does not say it; its rank by default.

    Raises:
        FileNotFoundError: If the adapter is missing.
        ValueError: If the adapter is damaged, of another kind or of another model, or says another alpha.
    """
    file = _adapter_file(path)
    try:
        with quiet_libraries():
            return _merged(module, file, component, alpha)
    except AdapterRefused as error:
        raise ValueError(f"{file} {error}") from error
    except Exception as error:  # A damaged file can fail in any way.
        pass_on(error)
        raise ValueError(f"{file} cannot be applied to {type(module).__name__} ({one_line(error)})") from error


def _adapter_file(path: Path) -> Path:
    file = next((path / name for name in _FILES if (path / name).is_file()), path) if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        raise FileNotFoundError(
            f"there is no adapter at {path}; pass a folder with one of {', '.join(_FILES)}, or a .safetensors file"
        )
    if file.is_symlink() and not file.resolve().is_relative_to(path.resolve().parent):
        raise ValueError(f"{file} is a link out of the folder, which is not followed; replace it by the file")
    return file


def _merged(module: nn.Module, file: Path, component: str, given: float | None) -> MergedLora:
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata() or {})
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dictionary)
    if other := adapter_kind(tensors):
        raise AdapterRefused(f"is {other[0]}, not a plain LoRA ({other[1]}); merge it with the program that trained it")
    source = read_alpha(file, metadata, tensors, component, given=given)
    names = _names(tensors, module, component)
    if names.replaced and not source.replaces:
        raise AdapterRefused(f"has {next(iter(names.replaced))} beside its matrices; merge it with its own program")
    if names.converted and source.patterns:
        raise AdapterRefused(
            f"has an alpha_pattern in {source.source} for names of the original code; merge it yourself"
        )
    absent = [end for end in source.targets if not any(f".{name}".endswith(f".{end}") for name in names.parts)]
    if absent and not names.converted:  # The list has the names of the original code too.
        raise AdapterRefused(f"has no matrices of {absent[0]}, which {source.source} lists; download it again")
    counts = [_merge(module.get_submodule(name), name, parts, source) for name, parts in names.parts.items()]
    with torch.no_grad():
        for name, value in names.replaced.items():
            parameter = module.get_parameter(name)
            parameter.copy_(_fit(parameter, value, name))
    folded = names.converted and source.in_tensors and not any("alpha" in parts for parts in names.parts.values())
    record = {
        "file": str(file),
        "modules": len(counts),
        **{key: sorted({count[key] for count in counts}) for key in ("rank", "alpha", "factor")},
        "alpha_from": (source.source or "nothing") + (f" ({_FOLDED})" if folded else ""),
        "replaced": sorted(names.replaced),
        "left_out": dict(Counter(map(text_encoder, names.text_encoders))),
    }
    return MergedLora(record, _assumptions(file, source, names))


def _names(tensors: Mapping[str, Tensor], module: nn.Module, component: str) -> Names:
    """Reads the names as those of diffusers, else as those of the original code."""
    names = read_names(tensors, module, component)
    if names.unknown:
        try:
            converted = converted_names(tensors, module)
            other = read_names(converted, module, component) if converted else names
        except Exception as error:  # The converters of diffusers fail in any way on names of other models.
            pass_on(error)
        else:
            if not other.unknown:
                names = replace(other, text_encoders=names.text_encoders, converted=True)
    title = type(module).__name__
    if names.unknown:
        raise AdapterRefused(
            f"does not fit {title}, which has no place for {names.unknown[0]} ({len(names.unknown)} of the adapter's "
            f"{len(tensors)} tensors); pass its base model"
        )
    if not names.parts:
        raise AdapterRefused(f"has nothing for {title}, only text encoders; leave --lora out")
    return names


def _merge(module: nn.Module, name: str, parts: Mapping[str, Tensor], source: Alpha) -> dict[str, float]:
    """Merges one pair of matrices, and returns its rank, alpha and factor."""
    if "down" not in parts or "up" not in parts:
        raise AdapterRefused(f"lacks one of the two matrices of {name}; copy or download it again")
    weight, down, up = getattr(module, "weight", None), parts["down"].float(), parts["up"].float()
    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or not isinstance(weight, Tensor):
        raise AdapterRefused(f"adapts {name}, which is a {type(module).__name__}; only linear layers and convolutions")
    rank = len(down)
    alpha = float(parts["alpha"]) if "alpha" in parts else source.of(name, rank)
    factor = source.factor(alpha, rank)
    # Those of convolutions may be matrices, and those of linear layers kernels of size 1.
    if up.flatten(1).shape != (len(weight), rank) or down[0].numel() != weight[0].numel():
        raise AdapterRefused(
            f"does not fit: {name} has shape {tuple(weight.shape)}, its matrices {tuple(up.shape)} and "
            f"{tuple(down.shape)}; pass its base model"
        )
    with torch.no_grad():
        changed = weight + factor * (up.flatten(1) @ down.flatten(1)).view_as(weight)
        if "magnitude" in parts or source.sets_norm:
            changed = _with_norm(changed, name, parts)
        if not bool(changed.isfinite().all()):
            raise AdapterRefused(f"makes {name} not finite; use an earlier adapter")
        weight.copy_(changed)
        if "up_bias" in parts:
            bias = module.bias
            if bias is None:
                raise AdapterRefused(f"has a bias for {name}, which has none; pass its base model")
            bias.add_(factor * _fit(bias, parts["up_bias"], name))
    return {"rank": rank, "alpha": alpha, "factor": factor}


def _with_norm(weight: Tensor, name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """Gives every row the norm that DoRA learned."""
    magnitude = parts.get("magnitude")
    if magnitude is None or weight.ndim != 2 or magnitude.shape != weight.shape[:1]:
        raise AdapterRefused(f"has no magnitude of DoRA that fits {name}; merge it with peft and pass the result")
    factors: Tensor = magnitude.float() / weight.norm(dim=1)
    return weight * factors[:, None]


def _fit(parameter: Tensor, value: Tensor, name: str) -> Tensor:
    if parameter.shape != value.shape:
        raise AdapterRefused(
            f"does not fit: {name} has shape {tuple(parameter.shape)}, not {tuple(value.shape)}; pass its base model"
        )
    return value


def _assumptions(file: Path, source: Alpha, names: Names) -> tuple[str, ...]:
    if source.source:
        return ()
    return (
        f"alpha of the LoRA {file.name} is its rank, so the factor is 1, for nothing says it in {len(names.parts)} "
        "modules (--lora-alpha)",
    )
