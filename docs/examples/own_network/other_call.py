"""A network that is called in another way: named arguments, a mask instead of a null label, a dictionary as output."""

from __future__ import annotations

import torch
from parts import Trunk, train, wave
from torch import Tensor, nn

from layerprobe.backbones import Backbone, wrap


class Denoiser(nn.Module):
    """Is called as `network(sample=..., log_snr=..., classes=..., has_class=...)["clean"]`; classes are one-hot."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Linear(64 + 10, 64)
        self.trunk = Trunk()

    def forward(self, *, sample: Tensor, log_snr: Tensor, classes: Tensor, has_class: Tensor) -> dict[str, Tensor]:
        time = torch.sigmoid(-log_snr / 2)
        condition = self.condition(torch.cat([wave(time), classes * has_class[:, None]], 1))
        return {"clean": self.trunk(sample, condition)}


def forward(module: nn.Module, x_t: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
    """Translates layerprobe's call: time is the noise level here (`flow`), label is in 0 ... 9, or 10 for none."""
    assert label is not None
    classes = nn.functional.one_hot(label, 11)[:, :10].float()
    log_snr = 2 * torch.log((1 - time) / time)
    clean: Tensor = module(sample=x_t, log_snr=log_snr, classes=classes, has_class=(label < 10).float())["clean"]
    return clean


def backbone() -> Backbone:
    """Returns all that layerprobe must know, so that the command needs no further options."""
    return wrap(
        Denoiser(),
        layers="trunk.blocks.*",
        schedule="flow",
        prediction="x0",
        shape=(1, 8, 8),
        num_classes=10,
        forward=forward,
    )


def loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Returns the training loss for images, shape (B, 1, 8, 8), and labels, shape (B,)."""
    t = torch.rand(len(x)).clamp(1e-3, 1 - 1e-3)
    x_t = torch.lerp(x, torch.randn_like(x), t.view(-1, 1, 1, 1))
    return (forward(network, x_t, t, y) - x).square().mean()


if __name__ == "__main__":
    train(Denoiser(), loss, "other.pt")
