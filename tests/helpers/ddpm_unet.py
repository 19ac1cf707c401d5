"""A user's own module: the convolutional DDPM of the checkpoints in ../shared/checkpoints, after their README."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, channels: int, size: int, out: int, *, normalize: bool) -> None:
        super().__init__()
        self.ln = nn.LayerNorm((channels, size, size))
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.normalize = normalize

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln(x) if self.normalize else x
        return nn.functional.silu(self.conv2(nn.functional.silu(self.conv1(x))))


def stage(size: int, widths: tuple[int, int, int, int], *, last_norm: bool = True) -> nn.Sequential:
    return nn.Sequential(
        *(Block(a, size, b, normalize=last_norm or i < 2) for i, (a, b) in enumerate(pairwise(widths)))
    )


def time_vector(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(100, width), nn.SiLU(), nn.Linear(width, width))


class DDPMUNet(nn.Module):
    """Gray 28x28 images and integer times (B,) in, eps out."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = nn.Embedding(1000, 100)
        self.te1, self.te2, self.te3, self.te_mid = (time_vector(width) for width in (1, 10, 20, 40))
        self.te4, self.te5, self.te_out = (time_vector(width) for width in (80, 40, 20))
        self.b1, self.b2, self.b3 = stage(28, (1, 10, 10, 10)), stage(14, (10, 20, 20, 20)), stage(7, (20, 40, 40, 40))
        self.b_mid = stage(3, (40, 20, 20, 40))
        self.b4, self.b5 = stage(7, (80, 40, 20, 20)), stage(14, (40, 20, 10, 10))
        self.b_out = stage(28, (20, 10, 10, 10), last_norm=False)
        self.down1, self.down2 = nn.Conv2d(10, 10, 4, 2, 1), nn.Conv2d(20, 20, 4, 2, 1)
        self.down3 = nn.Sequential(nn.Conv2d(40, 40, 2, 1), nn.SiLU(), nn.Conv2d(40, 40, 4, 2, 1))
        up_mid = (nn.ConvTranspose2d(40, 40, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(40, 40, 2, 1))
        self.up1 = nn.Sequential(*up_mid)
        self.up2, self.up3 = nn.ConvTranspose2d(20, 20, 4, 2, 1), nn.ConvTranspose2d(10, 10, 4, 2, 1)
        self.conv_out = nn.Conv2d(10, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time_embed(t)

        def at(vector: nn.Module) -> Tensor:
            return vector(time)[:, :, None, None]

        out1 = self.b1(x + at(self.te1))
        out2 = self.b2(self.down1(out1) + at(self.te2))
        out3 = self.b3(self.down2(out2) + at(self.te3))
        middle = self.b_mid(self.down3(out3) + at(self.te_mid))
        out4 = self.b4(torch.cat([out3, self.up1(middle)], 1) + at(self.te4))
        out5 = self.b5(torch.cat([out2, self.up2(out4)], 1) + at(self.te5))
        out = self.b_out(torch.cat([out1, self.up3(out5)], 1) + at(self.te_out))
        return self.conv_out(out)
