"""Merges a LoRA adapter into a diffusers denoiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from layerprobe.backbones.diffusers.folders import read_json
from layerprobe.backbones.diffusers.weights import quiet_libraries
from layerprobe.files import import_optional, one_line


def with_lora(module: nn.Module, path: Path, *, component: str) -> nn.Module:
    """Merges an adapter into the module's weights, so that the layers keep the names of the base model.

    Args:
        module: Base model.
        path: Folder of a peft adapter, or a LoRA `.safetensors` file of diffusers.
        component: Name of the base model among the components of its pipeline.

    Raises:
        ModuleNotFoundError: If peft is not installed.
        FileNotFoundError: If the adapter is missing.
        ValueError: If the adapter is damaged, of another kind or of another model.
    """
    import_optional("peft", "diffusers")
    names = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
    file = next((path / name for name in names if (path / name).is_file()), path) if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        raise FileNotFoundError(
            f"there is no adapter at {path}; pass a folder with one of {', '.join(names)}, or a file"
        )
    if file.is_symlink() and not file.resolve().is_relative_to(path.resolve().parent):
        raise ValueError(f"{file} is a link out of the folder, which is not followed; replace it by the file")
    try:
        with quiet_libraries():
            merged = _merge_peft(module, file) if file.name == names[0] else _merge_lora(module, file, component)
    except _DoesNotFit:
        raise
    except Exception as error:  # A damaged file can fail in any way.
        raise ValueError(f"{file} cannot be applied to {type(module).__name__} ({one_line(error)})") from error
    return merged.eval().requires_grad_(True)


class _DoesNotFit(ValueError):
    """The adapter belongs to another model."""


def _merge_peft(module: nn.Module, file: Path) -> nn.Module:
    from peft import LoraConfig, PeftModel
    from peft.utils import get_peft_model_state_dict

    if not (file.parent / "adapter_config.json").is_file():
        raise _DoesNotFit(f"there is no adapter_config.json beside {file}; put it there")
    record = read_json(file.parent / "adapter_config.json")
    if record.get("peft_type") != "LORA":
        raise _DoesNotFit(f"{file.parent} holds a {record.get('peft_type')} adapter; only LORA is merged")
    config = LoraConfig.from_pretrained(str(file.parent))
    adapted: Any = PeftModel.from_pretrained(module, str(file.parent), config=config, local_files_only=True)
    with safe_open(file, framework="pt") as tensors:
        surplus = sorted(set(tensors.keys()) - set(get_peft_model_state_dict(adapted)))
    if surplus:
        raise _DoesNotFit(f"{file} does not fit {type(module).__name__}: it also has {surplus[0]}; pass its base model")
    merged: nn.Module = adapted.merge_and_unload()
    return merged


def _merge_lora(module: Any, file: Path, component: str) -> nn.Module:
    from safetensors.torch import load_file

    state = load_file(file)
    prefix = component if any(name.startswith(f"{component}.") for name in state) else None
    module.load_lora_adapter(state, prefix=prefix)
    num_matrices = sum(
        name.endswith(("lora_B.weight", "lora.up.weight")) for name in state if name.startswith(prefix or "")
    )
    num_loaded = sum(name.endswith("lora_B.default_0.weight") for name, _ in module.named_parameters())
    if not num_loaded or num_loaded != num_matrices:
        raise _DoesNotFit(
            f"{file} does not fit {type(module).__name__}: only {num_loaded} of its {num_matrices} matrices fit; "
            "pass its base model"
        )
    module.fuse_lora()
    module.unload_lora()
    merged: nn.Module = module
    return merged
