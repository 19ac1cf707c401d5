"""Agreement of the gradients of alignment and of the prediction loss, compared with the gains of pairs.

A network is trained exactly as the baseline of `layerprobe atlas --from-scratch`. At some steps both gradients are
computed for its averaged weights, for every pair, with respect to the weights that the alignment changes. Their cosine
uses products between different batches, so that noise within a batch does not count. The rank correlation of
the cosines with the gains of a pair sweep is printed by step.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from layerprobe.analyses.runs import pair_sweep_start, wanted_pairs
from layerprobe.backbones import Backbone, fresh_sit
from layerprobe.capture import capture
from layerprobe.data import Samples, load
from layerprobe.layersync import LayerPair, mean_cosine
from layerprobe.training import TrainingBatch, prediction_loss, train

sys.path.append(str(Path(__file__).parent / "pair_rules"))
from sweep_cases import rank_correlation, read_case

STEPS = (50, 100, 250, 500, 1000, 2000, 4000, 8000)
BATCHES, BATCH_SIZE = 8, 256


def main() -> None:
    options = parsed()
    reading = {name: getattr(options, name) for name in ("size", "channels", "mels", "length", "hop", "stride")}
    start = pair_sweep_start(options.start, steps=options.steps, from_scratch=True)
    samples = load(options.data, **reading).train
    case = read_case(options.atlas, None)
    pairs = wanted_pairs(start.backbone, [(pair.student, pair.teacher) for pair in case.pairs])
    batches = random_batches(start.backbone, samples)

    def observe(step: int, model: Backbone) -> None:
        result = rank_correlation(agreements(model, batches, pairs), case.gain, case.ends)
        print(f"step {step}: {result.rho:+.2f} ({result.low:+.2f} to {result.high:+.2f})", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        steps = [step for step in STEPS if step <= options.steps]
        train(fresh_sit(start.backbone, 0), samples, start.plan.training, folder, observe=observe, observe_at=steps)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", help="start of the pair sweep")
    parser.add_argument("atlas", type=Path, help="atlas.csv of the pair sweep")
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=4000, help="training steps, as in the pair sweep")
    for name in ("size", "channels", "mels", "length", "hop", "stride"):
        parser.add_argument(f"--{name}", type=int, help="as in the pair sweep")
    return parser.parse_args()


def random_batches(backbone: Backbone, samples: Samples) -> list[TrainingBatch]:
    """Draws batches of samples and noise, with evenly spread noise levels."""
    indices = np.random.default_rng(0).permutation(len(samples))[: BATCHES * BATCH_SIZE]
    generator, batches = torch.Generator().manual_seed(0), []
    for part in np.array_split(indices, BATCHES):
        batch = samples.batch(part.tolist())
        uniform = torch.rand(len(part), generator=generator, dtype=torch.float64)
        level = (torch.arange(len(part), dtype=torch.float64) + uniform) / len(part)
        eps = torch.randn(batch.x.shape, generator=generator)
        batches.append(TrainingBatch(batch.x, eps, level, batch.labels if backbone.num_classes else None, batch.mask))
    return batches


def agreements(backbone: Backbone, batches: Sequence[TrainingBatch], pairs: Sequence[LayerPair]) -> np.ndarray:
    """Computes the cosine of both gradients for each pair; nan if one of them is only noise."""
    backbone = replace(backbone, module=copy.deepcopy(backbone.module).eval().requires_grad_())
    weights = list(backbone.module.parameters())

    def gradient(loss: Tensor) -> Tensor:
        parts = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(w) if part is None else part for w, part in zip(weights, parts, strict=True)]
        return torch.cat([part.flatten() for part in filled])

    predicted, aligned = [], []
    layers = sorted({layer for pair in pairs for layer in (pair.student, pair.teacher)})
    for batch in batches:
        with capture(backbone.module, layers) as tokens:
            loss = prediction_loss(backbone, batch).mean()
        predicted.append(gradient(loss))
        aligned.append(torch.stack([gradient(-mean_cosine(tokens[p.student], tokens[p.teacher])) for p in pairs]))
    prediction, alignment = torch.stack(predicted), torch.stack(aligned)
    return np.array([cosine(prediction, alignment[:, i]) for i in range(len(pairs))])


def cosine(a: Tensor, b: Tensor) -> float:
    """Computes the cosine of two mean gradients (batches, weights) where b is not 0, from products between batches."""
    a = a[:, (b != 0).any(0)]
    b = b[:, (b != 0).any(0)]

    def product(x: Tensor, y: Tensor) -> float:
        return float(x.sum(0) @ y.sum(0) - (x * y).sum())

    squares = product(a, a), product(b, b)
    return product(a, b) / float(np.sqrt(squares[0] * squares[1])) if min(squares) > 0 else float("nan")


if __name__ == "__main__":
    main()
