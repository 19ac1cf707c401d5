"""Saves a backbone with everything that is needed to open it again, and hashes its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from layerprobe.backbones import Backbone, SiT
from layerprobe.checkpoints.formats import METADATA_KEY
from layerprobe.checksums import recorded_write


def save_checkpoint(
    path: str | Path, backbone: Backbone, tensors: Mapping[str, Tensor], *, training: dict[str, Any]
) -> None:
    """Writes weights and, for a SiT, how to open them; the file appears whole or not at all.

    Args:
        path: Path of the `.safetensors` file.
        backbone: Backbone whose configuration, schedule and prediction are recorded. A user's own network is not
            recorded; it is opened again with `model`.
        tensors: Weights to write, by the names of the backbone's module.
        training: JSON record of how the weights were trained.
    """
    record: dict[str, Any] = {"training": training}
    if isinstance(backbone.module, SiT):
        record |= {
            "family": "sit",
            "config": backbone.module.config.to_dict(),
            "schedule": backbone.schedule.to_config(),
            "prediction": backbone.prediction,
        }
    # Copies, since safetensors refuses tensors that share memory, such as tied weights.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with recorded_write(Path(path), durable=True) as partial:
        save_file(copies, partial, metadata={METADATA_KEY: json.dumps(record, sort_keys=True)})


def weights_hash(module: nn.Module) -> str:
    """Returns a SHA-256 over the names, types and values of a module's state, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
