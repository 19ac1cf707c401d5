"""Weights in the types of their file, which halves their memory where these are of 16 bits."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from layerprobe.backbones import Backbone

_HALF = (torch.bfloat16, torch.float16)


def in_own_types(backbone: Backbone) -> Backbone:
    """Returns a backbone whose weights are of 16 bits where these hold their values exactly, computed in bfloat16.

    A file is read as float32, and values that came from 16 bits fit into these again. What has one axis, such as
    biases and the scales of norms, stays in float32: it takes no memory, and norms are computed in float32.

    Raises:
        ValueError: If no weights fit, so that the file holds float32.
    """
    kept = 0
    for parameter in backbone.module.parameters():
        narrow = _narrowed(parameter.data) if parameter.dtype == torch.float32 and parameter.ndim > 1 else None
        if narrow is not None:
            parameter.data, kept = narrow, kept + 1
    if not kept:
        raise ValueError(f"the weights of {backbone.name} are float32 in their file; leave out --dtype")
    return replace(backbone, precision="bfloat16")


def _narrowed(values: Tensor) -> Tensor | None:
    copies = (values.to(dtype) for dtype in _HALF)
    return next((copy for copy in copies if torch.equal(copy.float(), values)), None)
