"""Trains small SiTs under each convention and asks the convention check what they are.

python benchmarks/convention.py [--steps 150,600]
"""

from __future__ import annotations

import argparse
import tempfile

from layerprobe.backbones import SiTConfig, new_sit
from layerprobe.checkpoints import check_convention, convention_name
from layerprobe.data import digits
from layerprobe.noise import Prediction, schedule_from_name
from layerprobe.training import TrainingPlan, train

CONVENTIONS: tuple[tuple[str, Prediction], ...] = (
    ("sit", "velocity"),
    ("flow", "velocity"),
    ("flow-1000", "velocity"),
    ("ddpm-linear", "eps"),
    ("ddpm-cosine", "eps"),
    ("ddpm-linear", "v"),
    ("ddpm-cosine", "x0"),
    ("edm", "x0"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", default="150,600")
    steps = [int(part) for part in parser.parse_args().steps.split(",")]
    samples, config = digits().train, SiTConfig((1, 8, 8), 2, 64, 4, 2, num_classes=10)
    for name, prediction in CONVENTIONS:
        for count in steps:
            start = new_sit(config, seed=0, schedule=schedule_from_name(name), prediction=prediction)
            plan = TrainingPlan(steps=count, batch_size=64, learning_rate=2e-3, ema_decay=0.98, warmup_steps=20)
            with tempfile.TemporaryDirectory() as folder:
                found = check_convention(train(start, samples, plan, folder), samples)
            other = next(fit for fit in found.fits if fit is not found.declared)
            print(
                f"{name:<12} {prediction:<9} {count:>5} steps: {found.verdict}, declared {found.declared.score:+.3f}, "
                f"best other {other.score:+.3f} ({convention_name(other)})",
                flush=True,
            )


if __name__ == "__main__":
    main()
