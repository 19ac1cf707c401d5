"""LayerSync in a plain PyTorch loop: flow matching on 8 x 8 digits, with gradient accumulation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerprobe.data import load
from layerprobe.layersync import LayerSync

PAIRS = [("blocks.1", "blocks.4")]  # (student, teacher), named as in the module
ACCUMULATE = 2


class Denoiser(nn.Module):
    """Stands for your network: six blocks on 16 patches of 2 x 2 pixels, conditioned on the noise level."""

    def __init__(self, width: int = 64, depth: int = 6) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 2, stride=2)
        self.place = nn.Parameter(0.1 * torch.randn(16, width))
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.head = nn.ConvTranspose2d(width, 1, 2, stride=2)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns the velocity, shape (B, 1, 8, 8) like x_t, at noise levels t, shape (B,)."""
        tokens = self.embed(x_t).flatten(2).transpose(1, 2) + self.place + self.time(t[:, None])[:, None]
        for block in self.blocks:
            tokens = block(tokens)
        velocity: Tensor = self.head(tokens.transpose(1, 2).unflatten(2, (4, 4)))
        return velocity


def flow_matching_loss(model: nn.Module, x: Tensor) -> Tensor:
    """Stands for your loss: a mean over the batch."""
    eps, t = torch.randn_like(x), torch.rand(len(x), device=x.device)
    x_t = torch.lerp(x, eps, t.view(-1, 1, 1, 1))
    return F.mse_loss(model(x_t, t), eps - x)


def digits() -> Tensor:
    """Returns the embedded images, shape (n, 1, 8, 8)."""
    samples = load("digits").train
    return samples.batch(range(len(samples))).x


def train(*, weight: float, steps: int = 30) -> tuple[Denoiser, list[float], list[float]]:
    """Trains and returns the network, and the loss and the cosine of each step."""
    torch.manual_seed(0)
    model, images = Denoiser(), digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, cosines = [], []
    with LayerSync(model, PAIRS, weight=weight) as sync:
        for step in range(steps):
            for _ in range(ACCUMULATE):
                x = images[torch.randint(len(images), (16,))]
                loss = flow_matching_loss(model, x)
                ((loss + sync.loss()) / ACCUMULATE).backward()
            if step % 10 == 0 or step == steps - 1:
                statistics = ", ".join(f"{name}: {value:.3g}" for name, value in sync.statistics().items())
                print(f"step {step:3}  loss {loss.item():.3f}  {statistics}")
            losses.append(loss.item())
            cosines.append(sync.cosines[sync.pairs[0]].item())
            optimizer.step()
            optimizer.zero_grad()
    return model, losses, cosines


if __name__ == "__main__":
    model, losses, cosines = train(weight=0.3)
