"""LayerSync in a loop of accelerate, with gradient accumulation and a tracker; ends at a cosine of its own."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from plain_loop import Denoiser, digits, flow_matching_loss
from torch import nn
from torch.utils.data import DataLoader

from layerprobe.layersync import LayerSync


def train(*, weight: float, steps: int = 30, stop_cosine: float | None = None) -> tuple[nn.Module, list[Any]]:
    """Trains and returns the network, and the log of each step of the optimizer."""
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    network = Denoiser()
    model, optimizer, loader = accelerator.prepare(
        network, torch.optim.AdamW(network.parameters(), lr=1e-3), DataLoader(digits(), batch_size=16, shuffle=True)
    )
    log: list[dict[str, float]] = []
    with LayerSync(model, 1, 4, weight=weight, stop_cosine=stop_cosine) as sync:  # blocks.1 <- blocks.4
        while len(log) < steps:
            for x in loader:
                with accelerator.accumulate(model):
                    loss = flow_matching_loss(model, x)
                    accelerator.backward(loss + sync.loss())  # accelerate divides by the number of parts
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    log.append({"loss": loss.item()} | sync.logs())
                    accelerator.log(log[-1], step=len(log))
                if len(log) == steps:
                    break
    return accelerator.unwrap_model(model), log


if __name__ == "__main__":
    model, log = train(weight=0.3)
    print(*log[::10], sep="\n")
