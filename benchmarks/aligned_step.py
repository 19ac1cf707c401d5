"""A training step with LayerSync over the same step without, and our plain step over the official SiT's, interleaved.

A step is forward and backward pass, AdamW and the moving average. Ratios are medians over rounds in which every kind of
step runs once. Memory is the peak of a process of its own that makes three steps (on a GPU: of what torch allocates).

The official SiT is not part of the project: `--official` is a checkout of github.com/willisma/SiT; it imports timm and
torchdiffeq.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch._dynamo
from torch import Tensor, nn

from layerprobe.analyses.selection import prior_pair
from layerprobe.backbones import Backbone, SiTConfig, new_sit
from layerprobe.layersync import LayerSync
from layerprobe.training import TrainingBatch, prediction_loss

Step = Callable[[], None]


def main() -> None:
    options = parsed()
    if options.only:
        print(json.dumps(peak(options)))
        return
    if options.memory:
        plain, aligned = (child(kind) for kind in ("plain", "aligned"))
        print(f"peak memory: plain {plain / 2**20:.0f} MiB, aligned {aligned / 2**20:.0f} MiB, {aligned / plain:.3f}")
        return
    # Two networks of one class would share compiled graphs, though only one of them is aligned.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    kinds = ["plain", "aligned", *(["official"] if options.official else [])]
    steps = {kind: make_step(kind, options) for kind in kinds}
    times = rounds(steps, options)
    for ours, theirs in (("aligned", "plain"), *(("plain", kind) for kind in kinds[2:])):
        ratios = [a / b for a, b in zip(times[ours], times[theirs], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        seconds = ", ".join(f"{k} {statistics.median(times[k]):.3f} s" for k in (ours, theirs))
        print(f"{seconds}: {ours} / {theirs} {middle:.3f} (quartiles {low:.3f} to {high:.3f}, {len(ratios)} rounds)")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="S/2")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of ours")
    parser.add_argument("--compile", action="store_true", help="ours")
    parser.add_argument("--official", metavar="FOLDER", help="time the official SiT's step too: float32, not compiled")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--only", choices=("plain", "aligned"), help=argparse.SUPPRESS)
    return parser.parse_args()


def rounds(steps: dict[str, Step], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every step; the order turns from round to round, and the first two rounds do not count."""
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for number in range(options.rounds + 2):
        for kind in sorted(steps, reverse=number % 2 == 1):
            synchronize(options)
            began = time.perf_counter()
            steps[kind]()
            synchronize(options)
            times[kind].append(time.perf_counter() - began)
    return {kind: seconds[2:] for kind, seconds in times.items()}


def make_step(kind: str, options: argparse.Namespace) -> Step:
    if kind == "official":
        return official_step(options)
    shape = (options.channels, options.size, options.size)
    backbone = new_sit(SiTConfig.preset(options.preset, shape=shape, num_classes=1000), seed=0)
    backbone = replace(backbone, module=backbone.module.to(options.device).train())
    if options.compile:
        backbone.module.compile()
    sync = None
    if kind == "aligned":
        sync = LayerSync(backbone.module, [prior_pair(backbone.layers)], weight=0.3).__enter__()
    return our_step(backbone, make_batch(options), sync, options.precision)


def our_step(backbone: Backbone, batch: TrainingBatch, sync: LayerSync | None, precision: str) -> Step:
    parameters = [p for p in backbone.module.parameters() if p.requires_grad]
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, fused=backbone.device.type in ("cpu", "cuda"))

    def step() -> None:
        with torch.autocast(backbone.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = prediction_loss(backbone, batch).mean()
        loss = loss if sync is None else loss + sync.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1e-4)

    return step


def official_step(options: argparse.Namespace) -> Step:
    """As in its train.py, without the parts for several GPUs."""
    sys.path.insert(0, options.official)
    from models import SiT_models
    from transport import create_transport

    def made() -> nn.Module:
        network: nn.Module = SiT_models[f"SiT-{options.preset}"](input_size=options.size, in_channels=options.channels)
        return network.to(options.device)

    model, average, batch = made().train(), made().requires_grad_(False).eval(), make_batch(options)
    averages = dict(average.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    transport = create_transport("Linear", "velocity", None, None, None)

    def step() -> None:
        loss = transport.training_losses(model, batch.x, {"y": batch.condition})["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                averages[name].mul_(0.9999).add_(parameter.data, alpha=1 - 0.9999)

    return step


def make_batch(options: argparse.Namespace) -> TrainingBatch:
    size, shape = options.batch_size, (options.channels, options.size, options.size)

    def drawn() -> Tensor:
        return torch.randn(size, *shape, device=options.device)

    level = torch.rand(size, dtype=torch.float64, device=options.device)
    return TrainingBatch(drawn(), drawn(), level, torch.randint(1000, (size,), device=options.device))


def synchronize(options: argparse.Namespace) -> None:
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()


def child(kind: str) -> float:
    command = [sys.executable, *sys.argv, "--only", kind]
    return float(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def peak(options: argparse.Namespace) -> float:
    """Bytes, of three steps and what they start from."""
    step = make_step(options.only, options)
    for _ in range(3):
        step()
    if options.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
