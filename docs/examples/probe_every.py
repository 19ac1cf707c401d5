"""Layer quality during a plain loop: every layer is probed every 20 steps; a table, a figure, and what has changed."""

from __future__ import annotations

import torch
from plain_loop import Denoiser, digits, flow_matching_loss

import layerprobe as lp
from layerprobe.data import load

model, images = Denoiser(), digits()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
network = {"layers": "blocks.*", "schedule": "flow", "prediction": "velocity", "shape": (1, 8, 8)}

with lp.ProbeEvery(
    model, load("digits"), every=20, num_samples=256, max_share=1, out="runs/curves", **network
) as probe:
    probe(0)
    for step in range(1, 41):
        flow_matching_loss(model, images[torch.randint(len(images), (32,))]).backward()
        optimizer.step()
        optimizer.zero_grad()
        probe(step, last=step == 40)
