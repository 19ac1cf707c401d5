"""Picks made while a model trains: which of its own layers should teach which, from its own weights, without labels.

A short warm-up without alignment, a look at the averaged model's layers, a pick, then alignment; the pick is looked at
again every so many steps. Every decision keeps the numbers it rests on and says in words why it was made.

The look reads a few hundred training samples at three noise levels, two noise draws each, and a few tokens of each, and
skips every layer once for a few of them. What it finds is the evidence table of `evidence`, and the rule is that of
`selection` without labels; labels are never looked at. "No pair is worth it yet" is an answer. A pick is a hypothesis:
`atlas` and `confirm` test it.

A pair once picked stays until another one's score is larger beyond the uncertainty. Alignment itself changes what the
score rests on: it brings the two layers closer, so there the score counts as it was when the pair was picked, if that
was larger. Scores are relative to those of all pairs of the network, so they compare over a training.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from layerprobe.analyses.selection.ranking import HYPOTHESIS, RankedPair, Selection, rank_pairs
from layerprobe.analyses.tables import pair_evidence
from layerprobe.backbones import Backbone, alignable_layers
from layerprobe.data import Samples, Splits, Subset
from layerprobe.extraction import ExtractionPlan, ablate_layers, extract_evidence
from layerprobe.layersync import LayerPair
from layerprobe.noise import RandomStream
from layerprobe.training import Decision

LEAST_SAMPLES = 24
SKIPPING_SAMPLES = 64  # that layers are skipped for


@dataclass(frozen=True)
class Rules:
    """What a pair must be to be picked; see `selection` for the reasons.

    Attributes:
        exclude_tail: Fraction of the layers, rounded down to whole ones, that may not teach.
        skip_first: Number of first layers that may not learn; the whole ones of a tenth of the depth if not given.
        min_distance: In layers; a quarter of the depth, at least 2, if not given.
        max_cka: Largest CKA, averaged over noise levels.
        min_gap: Least recoverability gap, averaged over noise levels; the lower end of its interval must reach it.
    """

    exclude_tail: float = 0.2
    skip_first: int | None = None
    min_distance: int | None = None
    max_cka: float = 0.9
    min_gap: float = 0.05


@dataclass(frozen=True)
class AutoPick:
    """Decides in a training which layers it aligns; pass `direct` and `direct_at(steps)` to `train`.

        auto = AutoPick(samples, folder, warmup_steps=1000, every=5000)
        train(backbone, samples, plan, folder, direct=auto.direct, direct_at=auto.direct_at(plan.steps))

    A decision depends on the weights, the samples (never their labels), the seed and the decisions before it, which are
    read from `decisions.jsonl` in the training's folder.

    Attributes:
        samples: What the training learns from.
        folder: Of the training.
        warmup_steps: Steps before the first decision.
        every: Steps from one decision to the next; 0 decides once.
        num_samples: How many samples a look reads, at most.
        noise_levels: At which, ascending.
        rules: What a pair must be.
        seed: Of the samples and the noise.

    Raises:
        ValueError: If a number is out of range, or there are too few samples.
    """

    samples: Samples = field(repr=False)
    folder: str | Path
    warmup_steps: int = 1000
    every: int = 5000
    num_samples: int = 384
    noise_levels: tuple[float, ...] = (0.2, 0.5, 0.8)
    rules: Rules = Rules()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if min(self.num_samples, len(self.samples)) < LEAST_SAMPLES:
            seen = f"{self.num_samples} samples of {len(self.samples)}"
            raise ValueError(f"a probe of {seen} says nothing; it needs {LEAST_SAMPLES} or more")

    def direct_at(self, steps: int) -> tuple[int, ...]:
        """The steps of a training at which to decide; none at its end, where nothing would follow."""
        return tuple(range(self.warmup_steps, steps, self.every or max(steps, 1)))

    def direct(self, step: int, model: Backbone) -> Decision:
        """The decision at a step, and its evidence.

        Args:
            step: Steps done.
            model: The averaged model.
        """
        evidence = look(
            model, self.samples, num_samples=self.num_samples, noise_levels=self.noise_levels, seed=self.seed
        )
        return decide(evidence, self.rules, held=held_pair(self.folder, before=step))


class Held(NamedTuple):
    """The pair that is aligned already, and its score when it was picked."""

    pair: LayerPair
    credit: float


def held_pair(folder: str | Path, *, before: int) -> Held | None:
    """What the last decision of a training before a step picked; None if that was nothing, or there was none."""
    place = Path(folder) / "decisions.jsonl"
    rows = [json.loads(line) for line in place.read_text().splitlines()] if place.is_file() else []
    rows = [row for row in rows if row["step"] < before]
    if not rows or not rows[-1]["pairs"]:
        return None
    return Held(LayerPair(*rows[-1]["pairs"][0]), rows[-1]["record"]["credit"])


def look(
    model: Backbone,
    samples: Samples,
    *,
    num_samples: int = 384,
    noise_levels: tuple[float, ...] = (0.2, 0.5, 0.8),
    seed: int = 0,
) -> pd.DataFrame:
    """The evidence of the layers that can be aligned, as `pair_evidence` returns it, without what needs labels.

    Half of the samples fit the ridge regressions, the other half judges them. Features pass through a temporary folder:
    40 MB for 8 layers of width 64, 2.5 GB for 28 of width 1152.

    Args:
        model: With averaged weights.
        samples: Some of them are drawn by the seed.
        num_samples: How many.
        noise_levels: Ascending.
        seed: Of samples and noise.

    Raises:
        ValueError: If no two layers have a shape in common, or as `extract`.
    """
    order = RandomStream(seed, "order").permutation(len(samples))[:num_samples]
    half = len(order) // 2
    fit, choose = (
        Subset(samples, rows, name=name) for name, rows in (("train", order[:half]), ("validation", order[half:]))
    )
    plan = ExtractionPlan(alignable_layers(model), noise_levels, seed=seed)
    skipped = ablate_layers(
        model,
        choose,
        noise_levels,
        split="validation",
        layers=plan.layers,
        num_samples=SKIPPING_SAMPLES,
        seed=seed,
        batch_size=128,
    )
    with tempfile.TemporaryDirectory() as folder:
        store = extract_evidence(model, Splits(fit, choose, choose), plan, folder, num_samples=len(order))
        return pair_evidence(store, quality=pd.DataFrame(skipped.rows(seed=seed)))


def decide(evidence: pd.DataFrame, rules: Rules = Rules(), *, held: Held | None = None) -> Decision:
    """The pick, by the rule of `selection` without labels.

    Args:
        evidence: Of a look.
        rules: What a pair must be.
        held: The pair that is aligned already.
    """
    selection = rank_pairs(
        evidence,
        label_free=True,
        exclude_tail=rules.exclude_tail,
        skip_first=rules.skip_first,
        min_distance=rules.min_distance,
        max_cka=rules.max_cka,
        min_gap=rules.min_gap,
    )
    best = selection.ranked[0] if selection.pick else None
    if held is not None:
        chosen, verdict, reason = _reexamined(selection, held, best)
    elif best is not None:
        chosen, verdict, reason = best.pair, "picked", f"{best.pair} is picked. {selection.reason}"
    else:
        chosen, verdict, reason = None, "none", f"No pair is worth it yet. {selection.reason}"
    credit = None if chosen is None else _credit(selection, chosen, held)
    record = {"decision": verdict, "reason": reason, "status": HYPOTHESIS, "credit": credit}
    return Decision(() if chosen is None else (chosen,), record | _numbers(selection, evidence))


def _reexamined(selection: Selection, held: Held, best: RankedPair | None) -> tuple[LayerPair, str, str]:
    """The pair from now on, what was decided, and why."""
    if best is None:
        return held.pair, "kept", f"{held.pair} stays: no pair is admissible at this step."
    if best.pair == held.pair:
        return held.pair, "kept", f"{held.pair} stays: it has the largest score of the admissible pairs."
    now = next((pair for pair in selection.ranked if pair.pair == held.pair), None)
    counts_now = now is not None and now.score > held.credit
    ahead = best.score - (now.score if now is not None and counts_now else held.credit)
    # As if independent, which is on the side of the pair that is held.
    error = math.hypot(*(_half_width(pair) for pair in (best, now if counts_now else None) if pair is not None))
    figures = f"by {ahead:+.2f} (95 % interval {ahead - error:+.2f} to {ahead + error:+.2f})"
    if not ahead - error > 0:
        reason = f"{held.pair} stays: {best.pair} is ahead {figures}, which is not beyond the uncertainty."
        return held.pair, "kept", reason
    reason = f"{best.pair} takes the place of {held.pair}: it is ahead {figures}, beyond the uncertainty."
    return best.pair, "changed", reason


def _half_width(pair: RankedPair) -> float:
    assert pair.score_low is not None
    assert pair.score_high is not None
    return (pair.score_high - pair.score_low) / 2


def _credit(selection: Selection, chosen: LayerPair, held: Held | None) -> float:
    """The largest score that the pair has had since it was picked."""
    now = [pair.score for pair in selection.ranked if pair.pair == chosen]
    before = [held.credit] if held is not None and held.pair == chosen else []
    return max([*now, *before])


def _numbers(selection: Selection, evidence: pd.DataFrame) -> dict[str, Any]:
    """What was found of every layer and pair, as JSON."""
    scores = {pair.pair: pair.score for pair in selection.ranked}
    against = {LayerPair(pair.student, pair.teacher): list(pair.reasons) for pair in selection.rejected}
    means = evidence[evidence["noise_level"].isna()]
    pairs = []
    for names, rows in means.groupby(["student", "teacher"], sort=False):
        student, teacher = map(str, names)
        pair = LayerPair(student, teacher)
        ends = zip(rows["criterion"], rows["value"], rows["low"], rows["high"], strict=True)
        found = {str(name): [_rounded(end) for end in of] for name, *of in ends}
        ends_of = {"student": student, "teacher": teacher}
        pairs.append(ends_of | {"score": _rounded(scores.get(pair)), "against": against.get(pair, [])} | found)
    layers = [{"layer": layer.layer, selection.criteria.metric: _rounded(layer.quality)} for layer in selection.layers]
    return {"noise_levels": list(selection.criteria.noise_levels), "layers": layers, "pairs": pairs}


def _rounded(value: float | None) -> float | None:
    """To five decimals; what does not exist is null in JSON."""
    return None if value is None or not math.isfinite(value) else round(float(value), 5)
