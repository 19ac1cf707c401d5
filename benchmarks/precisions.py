"""The error of pooled features in tf32 and bfloat16 against those in float32, and on a GPU the time of each.

    python benchmarks/precisions.py                    # on a CPU: tf32 is imitated, by rounding what is multiplied
    python benchmarks/precisions.py --device cuda

The error is that of the worst layer and noise level, as a share of the features' spread over 64 samples. The precision
that `--precision auto` chooses must keep it below `FEATURE_TOLERANCE`; the exit code is 1 if it does not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from layerprobe.backbones import Backbone, SiTConfig, new_sit
from layerprobe.checkpoints import open_checkpoint
from layerprobe.data import Samples, Subset, TensorSamples, load
from layerprobe.extraction import ExtractionPlan, read_features
from layerprobe.precision import FEATURE_TOLERANCE

LEVELS, SAMPLES = (0.1, 0.5, 0.9), 64
_PRODUCTS = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.conv2d, F.conv2d)


class Imitation(TorchFunctionMode):
    """Rounds the factors of matrix products to the 11 bits of tf32, as the tensor cores do."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _PRODUCTS:
            args = (rounded(args[0]), rounded(args[1]), *args[2:])
        if function is F.scaled_dot_product_attention:
            q, k, v = map(rounded, args[:3])
            return rounded((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)) @ v
        return function(*args, **kwargs)


def rounded(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def networks(device: str, sizes: list[str]) -> Iterator[tuple[str, Backbone, Samples]]:
    digits = open_checkpoint("digits", device=device)
    yield "digits, trained", digits, Subset(load("digits").validation, range(SAMPLES), name="precisions")
    for size in sizes:
        generator = torch.Generator().manual_seed(0)
        backbone = new_sit(SiTConfig.preset(size, shape=(4, 16, 16), num_classes=10, patch_size=None), seed=0)
        for parameter in backbone.module.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        backbone.module.to(device)
        yield f"SiT-{size}, random", backbone, TensorSamples(torch.randn(SAMPLES, 4, 16, 16, generator=generator))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", default="S/2,B/2", help="presets of SiT with random weights")
    options = parser.parse_args()
    worst = 0.0
    for name, backbone, samples in networks(options.device, options.sizes.split(",")):
        plan = ExtractionPlan(backbone.layers, LEVELS, precision="float32")
        wanted, exact_s = features(backbone, samples, plan, nullcontext())
        for precision in ("tf32", "bfloat16"):
            imitated = precision == "tf32" and options.device == "cpu"
            each = plan if imitated else replace(plan, precision=precision)
            got, seconds = features(backbone, samples, each, Imitation() if imitated else nullcontext())
            error = max(
                float((got[key] - x).norm() / (x - x.mean(0)).norm().clamp(min=1e-30)) for key, x in wanted.items()
            )
            speed = "" if imitated else f", {exact_s / seconds:.2f} times as fast"
            print(f"{name}: {precision}{' (imitated)' if imitated else ''} {error:.3%}{speed}", flush=True)
            worst = max(worst, error if precision == "tf32" else 0.0)
    print(f"tf32 keeps {FEATURE_TOLERANCE:.0%}: {worst <= FEATURE_TOLERANCE}")
    sys.exit(worst > FEATURE_TOLERANCE)


def features(
    backbone: Backbone, samples: Samples, plan: ExtractionPlan, mode: AbstractContextManager[object]
) -> tuple[dict[tuple[str, float], Tensor], float]:
    """The features in float64, and the seconds of a second reading."""
    with mode:
        read_features(backbone, samples, plan)
        began = time.perf_counter()
        found = read_features(backbone, samples, plan)
    return {key: x.double() for key, x in found.items()}, time.perf_counter() - began


if __name__ == "__main__":
    main()
