"""The end of an alignment during a training: when the student no longer comes closer to its teacher.

At fixed steps the cosine between the tokens of student and teacher is measured, on the same samples under the same
noise, with the averaged weights. The alignment ends when the cosine of every pair has reached a plateau. The decisions
before are read from `decisions.jsonl`, so a resumed training ends its alignment at the same step.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from layerprobe.analyses.tables import mean_cosine
from layerprobe.backbones import Backbone
from layerprobe.data import Samples, Splits, Subset
from layerprobe.extraction import extract_tokens
from layerprobe.layersync import LayerPair
from layerprobe.noise import RandomStream
from layerprobe.training import Decision

PATIENCE = 3  # measurements without a gain
LEAST_GAIN = 0.005  # of the cosine; sampling noise is far smaller, as samples and noise are the same at every step


@dataclass(frozen=True)
class AutoStop:
    """Decides during a training when the alignment ends; pass `direct` and `direct_at(steps)` to `train`.

    The cosine has reached a plateau when none of the last `patience` measurements is higher by `least_gain` than the
    highest one before them.

    Attributes:
        pairs: Pairs that are aligned.
        samples: Samples to measure with; a few of them are drawn by the seed.
        folder: Folder of the training.
        every: Steps from one measurement to the next.
        begin: First step to measure; the weight of the alignment should have risen by then.
        patience: Number of measurements without a gain after which the alignment ends.
        least_gain: Gain of the cosine that counts.
        noise_levels: Noise levels to measure at, ascending.
        num_samples: Number of samples to measure with, at most.
        seed: Seed of the samples and of the noise.

    Raises:
        ValueError: If there is no pair, or a number is out of its range.
    """

    pairs: tuple[LayerPair, ...]
    samples: Samples = field(repr=False)
    folder: str | Path
    every: int = 1000
    begin: int = 0
    patience: int = PATIENCE
    least_gain: float = LEAST_GAIN
    noise_levels: tuple[float, ...] = (0.2, 0.5, 0.8)
    num_samples: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError("there is no alignment to end; pass the pairs that are aligned")
        for name in ("every", "patience", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def direct_at(self, steps: int) -> tuple[int, ...]:
        """Returns the steps of a training at which to measure; its last step is not among them.

        Args:
            steps: Number of steps of the training.
        """
        return tuple(range(self.begin, steps, self.every))

    def direct(self, step: int, model: Backbone) -> Decision | None:
        """Measures and decides; None once the alignment has ended.

        The record of the decision holds its kind ("aligned" or "ended"), the cosine of each pair so far, the patience
        and the least gain.

        Args:
            step: Number of steps done.
            model: Model with averaged weights.
        """
        path = Path(self.folder) / "decisions.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
        rows = [row for row in rows if row["step"] < step]
        if rows and rows[-1]["record"]["decision"] == "ended":
            return None
        now = self.measure(model)
        before = rows[-1]["record"]["cosines"] if rows else {}
        cosines = {name: [*before.get(name, []), value] for name, value in now.items()}
        ended = all(on_plateau(values, self.patience, self.least_gain) for values in cosines.values())
        record = {
            "decision": "ended" if ended else "aligned",
            "cosines": cosines,
            "patience": self.patience,
            "least_gain": self.least_gain,
        }
        return Decision(() if ended else self.pairs, record)

    def measure(self, model: Backbone) -> dict[str, float]:
        """Measures the mean cosine of each pair over noise levels, samples and tokens.

        Args:
            model: Model with averaged weights.
        """
        drawn = RandomStream(self.seed, "order").permutation(len(self.samples))[: self.num_samples]
        few = Subset(self.samples, drawn, name="alignment")
        layers = tuple(dict.fromkeys(layer for pair in self.pairs for layer in (pair.student, pair.teacher)))
        with tempfile.TemporaryDirectory() as folder:
            tokens = extract_tokens(
                model,
                Splits(few, few, few),
                layers,
                self.noise_levels,
                folder,
                num_samples=self.num_samples,
                seed=self.seed,
            )
            return {
                str(pair): round(
                    float(np.mean([mean_cosine(tokens, (pair.student, pair.teacher), v) for v in self.noise_levels])), 5
                )
                for pair in self.pairs
            }


def on_plateau(values: Sequence[float], patience: int = PATIENCE, least_gain: float = LEAST_GAIN) -> bool:
    """Whether none of the last values is higher by `least_gain` than the highest one before them.

    Args:
        values: Values in their order.
        patience: Number of last values.
        least_gain: Gain that counts.
    """
    return len(values) > patience and max(values[-patience:]) < max(values[:-patience]) + least_gain
