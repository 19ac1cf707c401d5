"""A tiny SiT, and files of its weights as training scripts write them."""

from __future__ import annotations

import argparse
import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.backbones.base import Backbone
from layerprobe.backbones.sit import SiTConfig, new_sit
from layerprobe.checkpoints.opening import (
    open_checkpoint,
)

TINY = SiTConfig(shape=(1, 4, 4), patch_size=2, hidden_size=8, depth=2, num_heads=2, num_classes=3)


def tiny(seed: int = 0, **options: Any) -> Backbone:
    return new_sit(TINY, seed=seed, **options)


def weights(seed: int = 0) -> dict[str, Tensor]:
    return tiny(seed).module.state_dict()


def open_tiny(path: Path, **options: Any) -> Backbone:
    return open_checkpoint(path, **({"family": "sit", "num_heads": 2, "device": "cpu"} | options))


def assert_same_weights(module: nn.Module, wanted: Mapping[str, Tensor]) -> None:
    got = module.state_dict()
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


def official(path: Path, *, prefix: str = "", seed: int = 0, **more: Any) -> Path:
    """A file as the training scripts of SiT, DiT and LayerSync write it; the averaged weights are those of `seed`."""
    model = {prefix + name: tensor for name, tensor in weights(seed + 100).items()}
    ema = collections.OrderedDict((prefix + name, tensor) for name, tensor in weights(seed).items())
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    args = argparse.Namespace(model="SiT-XL/2", global_batch_size=256, cfg_scale=1.5, ckpt=None)
    torch.save({"model": model, "ema": ema, "opt": optimizer.state_dict(), "args": args, **more}, path)
    return path
