"""Calls a diffusers denoiser, with the conditioning repeated for the batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.backbones.diffusers.diffusers_class import (
    SAMPLES,
    TIMES,
    Config,
    DiffusersClass,
    Shape,
    Text,
    from_patches,
    to_patches,
)
from layerprobe.backbones.diffusers.schedulers import Preconditioner


class DiffusersForward:
    """Calls the module as its pipeline does, for samples of the backbone's shape with the null text."""

    def __init__(
        self,
        family: DiffusersClass,
        config: Config,
        shape: Shape,
        text: Text,
        num_classes: int,
        preconditioner: Preconditioner | None,
    ) -> None:
        self.family, self.config, self.num_classes, self.preconditioner = family, config, num_classes, preconditioner
        self.arguments = dict(family.arguments(config, shape, text))

    def __call__(self, module: nn.Module, x_t: Tensor, native_time: Tensor, condition: Tensor | None) -> Tensor:
        if self.preconditioner is None:
            return self.network(module, x_t, native_time, condition)
        sigma = native_time.view(-1, *[1] * (x_t.ndim - 1))
        scaled, time = self.preconditioner.input(x_t, sigma), self.preconditioner.time(native_time)
        return self.preconditioner.denoised(x_t, self.network(module, scaled, time, condition), sigma)

    def network(self, module: nn.Module, x_t: Tensor, native_time: Tensor, condition: Tensor | None) -> Tensor:
        """Calls the network without preconditioning, in the type of its weights."""
        values, x_t = x_t, x_t.to(getattr(module, "dtype", x_t.dtype))
        family, patch = self.family, self.family.patch(self.config)
        # Constant arguments move to the device once.
        self.arguments = _moved(self.arguments, x_t)
        sample = x_t
        if blank := family.blank(self.config):
            sample = torch.cat([x_t, x_t.new_zeros(len(x_t), blank, *x_t.shape[2:])], 1)
        names = inspect.signature(module.forward).parameters
        # Times stay in float32, in which the networks embed them; bfloat16 would round them.
        time = native_time.to(values.dtype) if family.float_time else native_time
        arguments = {
            next(name for name in SAMPLES if name in names): (
                to_patches(sample, patch) if family.packed else family.layout.enter(sample)
            ),
            **dict.fromkeys((next(name for name in TIMES if name in names), *family.more_times(self.config)), time),
            **_for_batch(self.arguments, x_t),
        }
        if self.num_classes:
            arguments["class_labels"] = condition
        # Weights of 16 bits compute as their class does, without autocast.
        native = x_t.dtype != torch.float32
        with torch.autocast(x_t.device.type, enabled=False) if native else nullcontext():
            output = module(**arguments, return_dict=False)
        # Kandinsky 5 returns no tuple.
        output = output if isinstance(output, Tensor) else output[0]
        output = from_patches(output, patch, tuple(x_t.shape[2:])) if family.packed else family.layout.leave(output)
        output = -output if family.negated else output
        # Networks that also learn a variance return it in a second half of the channels.
        output = output[:, : x_t.shape[1]]
        if output.shape != x_t.shape:
            raise ValueError(
                f"{type(module).__name__} returns shape {tuple(output.shape[1:])} for {tuple(x_t.shape[1:])}; "
                "pass --shape with the proportions that it was trained on"
            )
        return output.to(values.dtype)


def _moved(value: Any, x: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.to(x.device, x.dtype if value.is_floating_point() else None)
    return {k: _moved(v, x) for k, v in value.items()} if isinstance(value, Mapping) else value


def _for_batch(value: Any, x: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.expand(len(x), *value.shape[1:])
    if isinstance(value, Mapping):
        return {k: _for_batch(v, x) for k, v in value.items()}
    return value(x) if callable(value) else value
