"""Calls a diffusers denoiser, with the conditioning repeated for the batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from layerprobe.backbones.diffusers.diffusers_class import Config, DiffusersClass, Shape, Text, from_patches, to_patches
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
        """Calls the network without preconditioning."""
        family, patch = self.family, self.family.patch(self.config)
        # Constant arguments move to the device once.
        self.arguments = _moved(self.arguments, x_t)
        sample = to_patches(x_t, patch) if family.packed else x_t
        sample = sample.transpose(1, 2) if family.frames_before_channels else sample
        names = inspect.signature(module.forward).parameters
        arguments = {
            "sample" if "sample" in names else "hidden_states": sample,
            "timestep": native_time.to(x_t.dtype) if family.float_time else native_time,
            **_for_batch(self.arguments, x_t),
        }
        if self.num_classes:
            arguments["class_labels"] = condition
        output: Tensor = module(**arguments, return_dict=False)[0]
        output = output.transpose(1, 2) if family.frames_before_channels else output
        output = from_patches(output, patch, tuple(x_t.shape[2:])) if family.packed else output
        # Networks that also learn a variance return it in a second half of the channels.
        output = output[:, : x_t.shape[1]]
        if output.shape != x_t.shape:
            raise ValueError(
                f"{type(module).__name__} returns shape {tuple(output.shape[1:])} for {tuple(x_t.shape[1:])}; "
                "pass --shape with the proportions that it was trained on"
            )
        return output


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
