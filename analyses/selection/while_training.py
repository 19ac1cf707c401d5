"""Picks during a training: the layer pair to align, chosen from the weights so far, without labels.

After a warm-up without alignment the averaged model's layers are measured, a pair is picked and aligned, and the pick
is examined again every so many steps. Every decision records the numbers that it rests on.

Measuring reads a few hundred training samples at three noise levels, with two noise draws and a few tokens of each, and
skips every layer once for a few samples. The result is the evidence of `layerprobe.analyses.tables`, and the rule is
that of `rank_pairs` without labels. A decision may find that no pair is admissible yet. A pick is a hypothesis, which
`layerprobe atlas` and `layerprobe confirm` test.

A picked pair stays until another one's score is larger beyond the uncertainty. Alignment itself lowers the score,
because it brings the two layers closer. So an aligned pair counts with the largest score that it has had since it was
picked. Scores are relative to those of all pairs of the network, so they can be compared over a training.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import pandas as pd

from layerprobe.analyses.selection.limits import DEFAULT_LIMITS, PairLimits
from layerprobe.analyses.selection.ranking import rank_pairs
from layerprobe.analyses.selection.records import RankedPair, Selection
from layerprobe.analyses.tables import PairEvidence, Quantity, measure_evidence
from layerprobe.backbones import Backbone, alignable_layers
from layerprobe.data import Samples, Splits, Subset
from layerprobe.extraction import ExtractionPlan, ablate_layers, extract_evidence
from layerprobe.layersync import LayerPair
from layerprobe.noise import RandomStream
from layerprobe.records import read_lines, typed
from layerprobe.training import Decision

LEAST_SAMPLES = 24
ABLATION_SAMPLES = 64  # samples that layers are skipped for


@dataclass(frozen=True)
class AutoPick:
    """Decides during a training which layers are aligned; pass `direct` and `direct_at(steps)` to `train`.

        auto = AutoPick(samples, folder, warmup_steps=1000, every=5000)
        train(backbone, samples, plan, folder, direct=auto.direct, direct_at=auto.direct_at(plan.steps))

    A decision depends on the weights, the samples (never their labels), the seed and the decisions before it, which are
    read from `decisions.jsonl` in the training's folder.

    Attributes:
        samples: Training samples.
        folder: Folder of the training.
        warmup_steps: Steps before the first decision.
        every: Steps from one decision to the next; 0 decides once.
        num_samples: Number of samples to measure with, at most.
        noise_levels: Noise levels to measure at, ascending.
        limits: Limits that an admissible pair must keep.
        seed: Seed of the samples and of the noise.

    Raises:
        ValueError: If a number is out of range, or there are too few samples.
    """

    samples: Samples = field(repr=False)
    folder: str | Path
    warmup_steps: int = 1000
    every: int = 5000
    num_samples: int = 384
    noise_levels: tuple[float, ...] = (0.2, 0.5, 0.8)
    limits: PairLimits = DEFAULT_LIMITS
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if min(self.num_samples, len(self.samples)) < LEAST_SAMPLES:
            counts = f"{self.num_samples} samples of {len(self.samples)}"
            raise ValueError(f"{counts} are too few to measure layers; pass {LEAST_SAMPLES} or more")

    def direct_at(self, steps: int) -> tuple[int, ...]:
        """Returns the steps of a training at which to decide; its last step is not among them.

        Args:
            steps: Number of steps of the training.
        """
        return tuple(range(self.warmup_steps, steps, self.every or max(steps, 1)))

    def direct(self, step: int, model: Backbone) -> Decision:
        """Makes the decision at a step.

        Args:
            step: Number of steps done.
            model: Model with averaged weights.
        """
        evidence = measure_layers(
            model, self.samples, num_samples=self.num_samples, noise_levels=self.noise_levels, seed=self.seed
        )
        return decide(evidence, self.limits, held=held_pair(self.folder, before=step))


class DecisionRow(TypedDict):
    """A line of `decisions.jsonl`.

    Attributes:
        step: Number of steps done.
        pairs: Student and teacher of each pair that is aligned from then on.
        record: Record of the decision, see `decide`.
    """

    step: int
    pairs: list[tuple[str, str]]
    record: dict[str, Any]


def read_decisions(folder: Path) -> list[DecisionRow]:
    """Reads the decisions of a training; [] without any.

    Raises:
        Damaged: If the file is damaged.
    """
    remedy = "repeat the `layerprobe train` that made it, which makes it again from its last checkpoint"
    return read_lines(folder / "decisions.jsonl", typed(DecisionRow), remedy=remedy)


class Held(NamedTuple):
    """The pair that is aligned already.

    Attributes:
        pair: Student and teacher.
        credit: Largest score that it has had since it was picked.
    """

    pair: LayerPair
    credit: float


def held_pair(folder: str | Path, *, before: int) -> Held | None:
    """Returns the pair that is aligned before a step by the decisions of a training; None if there is none.

    Args:
        folder: Folder of the training.
        before: Step; only earlier decisions count.
    """
    rows = [row for row in read_decisions(Path(folder)) if row["step"] < before]
    if not rows or not rows[-1]["pairs"]:
        return None
    return Held(LayerPair(*rows[-1]["pairs"][0]), rows[-1]["record"]["credit"])


def measure_layers(
    model: Backbone,
    samples: Samples,
    *,
    num_samples: int = 384,
    noise_levels: tuple[float, ...] = (0.2, 0.5, 0.8),
    seed: int = 0,
) -> PairEvidence:
    """Measures the layers that can be aligned, without labels.

    The ridge regressions are fitted on one half of the samples and scored on the other. Features pass through a
    temporary folder: 40 MB for 8 layers of width 64, 2.5 GB for 28 layers of width 1152.

    Args:
        model: Model with averaged weights.
        samples: Samples, some of which are drawn by the seed.
        num_samples: Number of samples to draw, at most.
        noise_levels: Noise levels, ascending.
        seed: Seed of the samples and of the noise.

    Raises:
        ValueError: If no two layers have a shape in common, or as `extract` does.
    """
    order = RandomStream(seed, "order").permutation(len(samples))[:num_samples]
    half = len(order) // 2
    train, validation = Subset(samples, order[:half], name="train"), Subset(samples, order[half:], name="validation")
    plan = ExtractionPlan(alignable_layers(model), noise_levels, seed=seed)
    ablation = ablate_layers(
        model,
        validation,
        noise_levels,
        split="validation",
        layers=plan.layers,
        num_samples=ABLATION_SAMPLES,
        seed=seed,
        batch_size=128,
    )
    with tempfile.TemporaryDirectory() as folder:
        splits = Splits(train, validation, validation)
        store = extract_evidence(model, splits, plan, folder, num_samples=len(order))
        return measure_evidence(store, ablation=pd.DataFrame(ablation.rows(seed=seed)))


def decide(evidence: PairEvidence, limits: PairLimits = DEFAULT_LIMITS, *, held: Held | None = None) -> Decision:
    """Picks a pair by the rule of `rank_pairs` without labels, or keeps the pair that is aligned already.

    The record of the decision holds its kind ("picked", "kept", "changed" or "none"), the lead of the best pair over
    the one held (value and 95 % interval), the credit of the pair from now on, the selection and the evidence.

    Args:
        evidence: Evidence of the layers, from `measure_layers`.
        limits: Limits that an admissible pair must keep.
        held: Pair that is aligned already; None for no pair.
    """
    selection = rank_pairs(evidence, label_free=True, limits=limits)
    best = selection.ranked[0] if selection.ranked else None
    lead = None if held is None or best is None or best.pair == held.pair else _lead(selection, held, best)
    if held is None:
        pair, decision = (None, "none") if best is None else (best.pair, "picked")
    elif best is not None and lead is not None and lead[1] > 0:
        pair, decision = best.pair, "changed"
    else:
        pair, decision = held.pair, "kept"
    record = {
        "decision": decision,
        "held": None if held is None else [held.pair.student, held.pair.teacher],
        "best": None if best is None else [best.student, best.teacher],
        "lead": lead,
        "credit": None if pair is None else _credit(selection, pair, held),
        "selection": selection.to_dict(),
        "evidence": _evidence_record(evidence),
    }
    return Decision(() if pair is None else (pair,), record)


def _lead(selection: Selection, held: Held, best: RankedPair) -> tuple[float, float, float]:
    """By how much the best pair's score is ahead of the one held, with its 95 % interval."""
    now = next((pair for pair in selection.ranked if pair.pair == held.pair), None)
    rival = now if now is not None and now.score > held.credit else None
    ahead = best.score - (held.credit if rival is None else rival.score)
    # As if independent, which is on the side of the pair that is held.
    error = math.hypot(*((pair.score_high - pair.score_low) / 2 for pair in (best, rival) if pair is not None))
    return ahead, ahead - error, ahead + error


def _credit(selection: Selection, pair: LayerPair, held: Held | None) -> float:
    """The largest score that the pair has had since it was picked."""
    now = [ranked.score for ranked in selection.ranked if ranked.pair == pair]
    before = [held.credit] if held is not None and held.pair == pair else []
    return max([*now, *before])


def _evidence_record(evidence: PairEvidence) -> dict[str, Any]:
    """The means over noise levels of all quantities, [value, low, high], as JSON values."""
    pairs = [f"{student} <- {teacher}" for student, teacher in evidence.pairs]
    return {
        "by_layer": {name: _means(evidence.layers, of) for name, of in evidence.by_layer.items()},
        "by_pair": {name: _means(pairs, of) for name, of in evidence.by_pair.items()},
    }


def _means(names: Any, quantity: Quantity) -> dict[str, list[float | None]]:
    columns = zip(quantity.mean, quantity.mean_low, quantity.mean_high, strict=True)
    return {name: [_rounded(number) for number in numbers] for name, numbers in zip(names, columns, strict=True)}


def _rounded(value: float) -> float | None:
    """To five decimals; a missing value is null in JSON."""
    return round(float(value), 5) if math.isfinite(value) else None
