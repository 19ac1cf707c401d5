"""A flow-matching network with float times and no labels: 0 is data, 1 is noise, and it predicts noise - data."""

from __future__ import annotations

import torch
from parts import Trunk, train, wave
from torch import Tensor, nn


class Flow(nn.Module):
    """Is called as `network(x, t)`: t is float32 in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(64, 64)
        self.trunk = Trunk()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        velocity: Tensor = self.trunk(x, self.time(wave(t)))
        return velocity


def loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Returns the training loss for images, shape (B, 1, 8, 8); the labels are not used."""
    t, eps = torch.rand(len(x)), torch.randn_like(x)
    x_t = torch.lerp(x, eps, t.view(-1, 1, 1, 1))
    return (network(x_t, t) - (eps - x)).square().mean()


if __name__ == "__main__":
    train(Flow(), loss, "flow.pt")
