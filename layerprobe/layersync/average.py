"""A moving average of a network's weights, kept in at least float32, that runs in the network's own dtype."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """The moving average of the weights of a network.

    Half precision has steps of 1/256 of a value, so an average in it would not move. The weights of such a network are
    averaged in float32, and the copy that runs gets the rounded values.

    Args:
        network: The network; its current weights are the first average.
        decay: Decay of the average, in [0, 1).

    Attributes:
        module: Copy of the network with the averaged weights, in evaluation mode and without gradients.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(network).eval().requires_grad_(False)
        self._decay = decay
        # Created at the first update, since `fully_shard` replaces the parameters of the copy before.
        self._float32: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Updates the average with the current weights; buffers are copied.

        Raises:
            ValueError: If the network has other parameters than the copy, or is on another device.
        """
        self.check_device(network)
        weights, copies = dict(network.named_parameters()), dict(self.module.named_parameters())
        if weights.keys() != copies.keys():
            name = min(weights.keys() ^ copies.keys())
            raise ValueError(
                f"{name} is not in both the network and its averaged teacher; create LayerSync after all changes of "
                "the network, such as adapters"
            )
        averages = [self._average(name, parameter) for name, parameter in copies.items()]
        torch._foreach_lerp_(
            averages, [weights[name].to(a.dtype) for name, a in zip(copies, averages, strict=True)], 1 - self._decay
        )
        for name, average in self._float32.items():
            copies[name].copy_(average)
        for buffer, current in zip(self.module.buffers(), network.buffers(), strict=True):
            buffer.copy_(current)

    def check_device(self, network: nn.Module) -> None:
        """Raises a ValueError if the network was moved to another device than its copy."""
        here, there = next(self.module.parameters()).device, next(network.parameters()).device
        if here != there:
            raise ValueError(f"the averaged teacher is on {here}, the network on {there}; move sync.teacher there too")

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the state of the copy, with the averages in the precision in which they are kept."""
        return {name: self._float32.get(name, tensor) for name, tensor in self.module.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores the result of `state_dict`."""
        self.module.load_state_dict(dict(state))
        copies = dict(self.module.named_parameters())
        self._float32 = {
            name: state[name].to(copies[name].device, torch.float32, copy=True)
            for name in copies
            if _is_half(copies[name]) and name in state
        }

    def _average(self, name: str, parameter: Tensor) -> Tensor:
        return self._float32.setdefault(name, parameter.float()) if _is_half(parameter) else parameter


def _is_half(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and torch.promote_types(parameter.dtype, torch.float32) != parameter.dtype
