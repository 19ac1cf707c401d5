"""A training step with LayerSync over the same step without, interleaved."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch

from layerprobe.backbones.base import Backbone
from layerprobe.backbones.sit import SiTConfig, new_sit
from layerprobe.layersync import LayerSync, depth_heuristic
from layerprobe.training import TrainingBatch, prediction_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="S/2")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    shape = (options.channels, options.size, options.size)
    backbone = new_sit(SiTConfig.preset(options.preset, shape=shape, num_classes=1000), seed=0)
    backbone = replace(backbone, module=backbone.module.to(options.device).train())
    optimizer = torch.optim.AdamW(backbone.module.parameters(), fused=True)
    batch = make_batch(options.batch_size, shape)
    pair = depth_heuristic(backbone.layers)
    times: dict[bool, list[float]] = {False: [], True: []}
    for step in range(2 * options.steps):
        aligned = step % 2 == 1
        times[aligned].append(step_time(backbone, optimizer, batch, [pair] if aligned else []))
    plain, synced = (sorted(times[kind][1:])[(options.steps - 1) // 2] for kind in (False, True))
    print(f"plain {plain:.3f} s, aligned ({pair}) {synced:.3f} s, ratio of medians {synced / plain:.3f}")


def make_batch(size: int, shape: tuple[int, ...]) -> TrainingBatch:
    x, eps = torch.randn(size, *shape), torch.randn(size, *shape)
    return TrainingBatch(x, eps, torch.rand(size, dtype=torch.float64), torch.randint(1000, (size,)))


def step_time(backbone: Backbone, optimizer: torch.optim.Optimizer, batch: TrainingBatch, pairs: list) -> float:
    began = time.perf_counter()
    if pairs:
        with LayerSync(backbone.module, pairs, weight=0.3) as sync:
            (prediction_loss(backbone, batch).mean() + sync.loss()).backward()
    else:
        prediction_loss(backbone, batch).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if batch.x.is_cuda or backbone.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
