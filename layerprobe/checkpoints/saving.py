"""Saving a backbone with everything that is needed to open it again, and hashing its weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from layerprobe.backbones import Backbone, SiT
from layerprobe.checkpoints.formats import METADATA_KEY


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


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names, types and values of a module's state, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
