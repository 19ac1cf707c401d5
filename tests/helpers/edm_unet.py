"""A user's own module in the manner of EDM: a small convolutional denoiser that is told sigma and one-hot labels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from layerprobe.backbones.base import Backbone, wrap
from layerprobe.noise.schedules import EDM

CLASSES = 3


class EDMDenoiser(nn.Module):
    """D(x; sigma, labels) = c_skip x + c_out F(c_in x; log(sigma) / 4, labels): the denoised x itself.

    Labels are rows (B, 3), all zero for "no label".
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.sigma_data = sigma_data
        self.down = nn.Conv2d(2, 8, 3, stride=2, padding=1)
        self.noise = nn.Linear(1, 8)
        self.label = nn.Linear(CLASSES, 8, bias=False)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 2, 4, stride=2, padding=1)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        at = sigma.view(-1, 1, 1, 1)
        norm = (at**2 + self.sigma_data**2).sqrt()
        condition = F.silu(self.noise(sigma.log()[:, None] / 4) + self.label(labels))
        hidden = F.silu(self.middle(F.silu(self.down(x / norm)) + condition[:, :, None, None]))
        return (self.sigma_data / norm) ** 2 * x + at * self.sigma_data / norm * self.up(hidden)


def forward(module: nn.Module, x_t: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
    """Labels count from 0; layerprobe's null label is one past the last and becomes a row of zeros."""
    assert label is not None
    denoised: Tensor = module(x_t, sigma, F.one_hot(label, CLASSES + 1)[:, :CLASSES].to(x_t.dtype))
    return denoised


def backbone() -> Backbone:
    """The whole adapter: EDM's network is told sigma and gives x0."""
    return wrap(
        EDMDenoiser(),
        layers=["down", "middle", "up"],
        schedule=EDM(sigma_data=0.5, sigma_min=0.002, sigma_max=80),
        prediction="x0",
        shape=(2, 8, 8),
        num_classes=CLASSES,
        forward=forward,
    )
