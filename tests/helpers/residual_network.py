"""A small residual network, and LayerSync's loss written out plainly."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WEIGHT = 0.3
X = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """Residual blocks; with checkpointing, every two of them are run again in the backward pass."""

    def __init__(self, depth: int = 4, *, reentrant: bool | None = None, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList(Block() for _ in range(depth))
            self.head = nn.Linear(16, 3)
            self.unused = nn.Linear(16, 16)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for start in range(0, len(self.blocks), 2):
            segment = nn.Sequential(*self.blocks[start : start + 2])
            x = segment(x) if self.reentrant is None else checkpoint(segment, x, use_reentrant=self.reentrant)
        output: Tensor = self.head(x)
        return output


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + torch.tanh(self.fc(x))
        return output


def task(output: Tensor) -> Tensor:
    return (output - 1).square().mean()


# --- options


def residuals(network: Network, x: Tensor = X) -> dict[str, Tensor]:
    """What every block gives, from the formula."""
    tokens = {}
    for i, block in enumerate(network.blocks):
        x = tokens[f"blocks.{i}"] = x + torch.tanh(x @ block.fc.weight.T + block.fc.bias)
    return tokens


def cosines_of(student: Tensor, teacher: Tensor) -> Tensor:
    """Shape (B, T)."""
    return (student * teacher).sum(-1) / (student.norm(dim=-1) * teacher.norm(dim=-1))
