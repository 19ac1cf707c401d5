"""A network with integer times and class labels that predicts the noise; `parts` is the file beside this one."""

from __future__ import annotations

import torch
from parts import Trunk, train, wave
from torch import Tensor, nn


class DDPM(nn.Module):
    """Is called as `network(x, t, y)`: t is int64 in 0 ... 999, y is int64 in 0 ... 9, or 10 for no label."""

    def __init__(self) -> None:
        super().__init__()
        self.times = nn.Embedding.from_pretrained(wave(torch.arange(1000) / 1000))
        self.labels = nn.Embedding(11, 64)  # row 10 is the null label
        self.trunk = Trunk()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        eps: Tensor = self.trunk(x, self.times(t) + self.labels(y))
        return eps


ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)  # ddpm-linear


def loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Returns the training loss for images, shape (B, 1, 8, 8), and labels, shape (B,)."""
    t, eps = torch.randint(1000, (len(x),)), torch.randn_like(x)
    abar = ABAR[t].view(-1, 1, 1, 1)
    return (network(abar.sqrt() * x + (1 - abar).sqrt() * eps, t, y) - eps).square().mean()


if __name__ == "__main__":
    train(DDPM(), loss, "ddpm.pt")
