"""What the networks of this folder share: their layers, and a short training on 8 x 8 digits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from layerprobe.data import load

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Trunk(nn.Module):
    """Four residual blocks on an image as one vector, with a vector (B, 64) that conditions them."""

    def __init__(self, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(64, width), nn.Linear(width, 64)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        hidden = self.embed(x.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, condition)
        output: Tensor = x + self.head(hidden).view_as(x)
        return output


class Block(nn.Module):
    """A modulated MLP that is added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.modulation = nn.LayerNorm(width), nn.Linear(64, 2 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition).chunk(2, 1)
        output: Tensor = hidden + self.mlp(self.norm(hidden) * (1 + scale) + shift)
        return output


def wave(time: Tensor, width: int = 64) -> Tensor:
    """Returns cosines of times between 0 and 1, shape (B, width)."""
    return torch.cos(torch.pi * time[:, None] * torch.arange(width))


def train(network: nn.Module, loss: Loss, path: str, *, steps: int = 1000) -> None:
    """Trains on digits of values in [-1, 1] and saves the weights; a tenth of the labels become the null label, 10."""
    torch.manual_seed(0)
    samples = load("digits").train
    batch = samples.batch(range(len(samples)))
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(samples), (64,))
        labels = torch.where(torch.rand(64) < 0.1, 10, batch.labels[rows])
        optimizer.zero_grad()
        loss(network, batch.x[rows], labels).backward()
        optimizer.step()
        decay.step()
    torch.save(network.state_dict(), path)
