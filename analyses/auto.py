"""Picks made while a model trains: which of its own layers should teach which, from its own weights, without labels.

A short warm-up without alignment, a probe of the averaged model's layers, a pick, then alignment; the pick is looked at
again every so many steps. Every decision keeps the numbers it rests on and says in words why it was made.

The probe reads a few hundred training samples at three noise levels. Of a layer it takes the noise-LiDAR: in how many
directions samples differ more than noise moves them, which needs no labels and, unlike the effective rank, does not
count the directions of noise. Of a pair it takes CKA, the cosine that the regulariser would start from, and the
recoverability gap: the share of what the teacher adds to the student that a ridge regression from the student's own
tokens misses, on samples that it was not fitted on.

The rule: a pair is admissible by the rules of `selection` (no teacher in the tail, no student at the head, a least
distance, a student poorer than its teacher, not aligned already) and if its gap is above a least one with certainty;
of the admissible pairs the one with the largest gap is picked, and of those that cannot be told from it within the
uncertainty the one with the lowest CKA. In the RARE study (2026), over 14 branches of one checkpoint, the benefit of
alignment went with this gap (rank correlation +0.92) better than with CKA (-0.85), and not with what a probe finds in
the student (about -0.1). That was with external teachers and has not been shown for a network's own layers; the
thresholds here are not calibrated. A first atlas (SiT of 8 blocks x 64, CIFAR-10 at 16 x 16, branches from step 1000 to
1400, one seed) rather speaks against it this early: every pair raised the held-out loss, and the more so the less
similar its layers. What costs at first may pay later, which branches that short do not show. A pick is a hypothesis:
`atlas` and `confirm` test it.

A pair once picked stays until another one's gap is larger with 97.5 % certainty (bootstrap over samples). Alignment
itself closes the gap of its pair, so there the gap counts as it was when the pair was picked, if that was larger. Gaps
grow while a model trains, so for this comparison they are taken relative to the mean gap of all pairs.

A probe of 384 samples costs as much as about 30 steps at batch 64: 2.5 s for 8 blocks of width 64 on one core.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from layerprobe.analyses.arrays import Floats
from layerprobe.analyses.quality import MAX_RANK
from layerprobe.analyses.recoverability import TokenMoments, _whitening, recoverability, shared_basis
from layerprobe.analyses.runs import _alignable
from layerprobe.analyses.selection import Criteria, LayerQuality, _against, _Candidate
from layerprobe.analyses.similarity import cka_matrix
from layerprobe.analyses.spectrum import lidar
from layerprobe.backbones.base import Backbone
from layerprobe.data.base import Samples, Splits, Subset
from layerprobe.extract import extract
from layerprobe.features import SPLITS, ExtractionPlan, FeatureStore
from layerprobe.layersync import LayerPair
from layerprobe.noise import NoiseKey
from layerprobe.training import Decision

RICHNESS = "noise-LiDAR"
STATUS = "Without labels, by thresholds that are not calibrated: a hypothesis, as every pick."
DRAWS = 2
TOKENS_PER_SAMPLE = 8
RESAMPLES = 1000
LEAST_SAMPLES = 24

Tokens = NDArray[np.floating]


@dataclass(frozen=True)
class Rules:
    """What a pair must be to be picked; see `selection` for the reasons. Not calibrated.

    Attributes:
        exclude_tail: Fraction of the layers, rounded up, that may not teach.
        skip_first: Number of first layers that may not learn; a tenth of the depth, at least 1, if not given.
        min_distance: In layers; a quarter of the depth, at least 2, if not given.
        max_cka: Largest CKA, averaged over noise levels.
        min_gap: Least recoverability gap, averaged over noise levels; the lower end of its interval must reach it.
    """

    exclude_tail: float = 0.2
    skip_first: int | None = None
    min_distance: int | None = None
    max_cka: float = 0.98
    min_gap: float = 0.05


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a probe found; the pairs are all (student, later teacher), the samples those that no ridge was fitted on.

    Attributes:
        layers: L names, in execution order.
        noise_levels: V of them.
        richness: Noise-LiDAR less what noise alone gives, shape (V, L); nan where nothing is left.
        pairs: P of them.
        cka: Debiased, shape (V, P); nan where a layer is constant.
        cosine: Between the raw tokens, shape (V, P): what the regulariser would start from.
        missed: Of the increment, by sample, in whitened coordinates, shape (V, P, n); nan where there is no increment.
        increment: Its square, by sample, shape (V, P, n).
    """

    layers: tuple[str, ...]
    noise_levels: tuple[float, ...]
    richness: Floats
    pairs: tuple[LayerPair, ...]
    cka: Floats
    cosine: Floats
    missed: Floats = field(repr=False)
    increment: Floats = field(repr=False)

    @property
    def gaps(self) -> Floats:
        """Recoverability gap, shape (V, P)."""
        shares: Floats = self.missed.sum(-1) / self.increment.sum(-1)
        return shares

    def resampled(self, *, seed: int, resamples: int = RESAMPLES) -> Floats:
        """The gap averaged over noise levels, in as many bootstrap resamples of the samples, shape (P, resamples)."""
        n = self.missed.shape[-1]
        drawn = np.random.default_rng([seed, n]).integers(0, n, (resamples, n))
        weights = np.stack([np.bincount(row, minlength=n) for row in drawn], axis=1).astype(np.float64)
        means: Floats = np.mean(
            [m @ weights / (y @ weights) for m, y in zip(self.missed, self.increment, strict=True)], 0
        )
        return means


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
        num_samples: How many samples a probe reads, at most.
        noise_levels: At which, ascending.
        rules: What a pair must be.
        seed: Of the samples, the noise and the bootstrap.

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
        evidence = probe(
            model, self.samples, num_samples=self.num_samples, noise_levels=self.noise_levels, seed=self.seed
        )
        return decide(evidence, self.rules, held=held_pair(self.folder, before=step), seed=self.seed)


class Held(NamedTuple):
    """The pair that is aligned already, and its gap over the mean gap of all pairs when it was picked."""

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


def probe(
    model: Backbone,
    samples: Samples,
    *,
    num_samples: int = 384,
    noise_levels: tuple[float, ...] = (0.2, 0.5, 0.8),
    seed: int = 0,
) -> Evidence:
    """Reads the layers that can be aligned, and says what the rule has to know of them.

    A third of the samples fits the ridge regressions, a sixth chooses their penalties, the rest judges them. Features
    pass through a temporary folder: 40 MB for 8 layers of width 64, 2.5 GB for 28 of width 1152.

    Args:
        model: With averaged weights.
        samples: Some of them are drawn by the seed.
        num_samples: How many.
        noise_levels: Ascending.
        seed: Of samples and noise.

    Raises:
        ValueError: If no two layers have a shape in common, or as `extract`.
    """
    layers = _alignable(model)
    order = NoiseKey(seed, "order").permutation(len(samples))[:num_samples]
    third, half = len(order) // 3, len(order) // 2
    parts = (order[:third], order[third:half], order[half:])
    splits = Splits(*(Subset(samples, rows, name=name) for name, rows in zip(SPLITS, parts, strict=True)))
    plan = ExtractionPlan(
        layers, noise_levels, DRAWS, seed=seed, token_samples=len(order), tokens_per_sample=TOKENS_PER_SAMPLE
    )
    with tempfile.TemporaryDirectory() as folder:
        store = extract(model, splits, plan, folder)
        found = [_at_level(store, level) for level in store.noise_levels]
    places = list(zip(*np.triu_indices(len(layers), 1), strict=True))
    pairs = tuple(LayerPair(store.layers[s], store.layers[t]) for s, t in places)
    richness, *by_pair = (np.stack(values) for values in zip(*found, strict=True))
    return Evidence(store.layers, store.noise_levels, richness, pairs, *by_pair)


def decide(evidence: Evidence, rules: Rules = Rules(), *, held: Held | None = None, seed: int = 0) -> Decision:
    """The pick, by the rule at the top of this module.

    Args:
        evidence: Of a probe.
        rules: What a pair must be.
        held: The pair that is aligned already.
        seed: Of the bootstrap.
    """
    gaps, draws = evidence.gaps.mean(0), evidence.resampled(seed=seed)
    lows, highs = np.quantile(draws, [0.025, 0.975], axis=1)
    against = _objections(evidence, rules, gaps, lows)
    admissible = [p for p, reasons in enumerate(against) if not reasons]
    ties = _first(admissible, gaps, draws)
    chosen = min(ties, key=lambda p: evidence.cka[:, p].mean(), default=None)
    if held is not None:
        chosen, verdict, reason = _reexamined(evidence, held, chosen, draws)
    elif chosen is not None:
        others = [p for p in ties if p != chosen]
        verdict, reason = "picked", _praise(evidence, chosen, lows, highs, len(admissible), others)
    else:
        verdict, reason = "none", _nothing(evidence, against, gaps)
    credit = None if chosen is None else _credit(evidence.pairs[chosen], gaps[chosen] / _common(gaps), held)
    record = {"decision": verdict, "reason": reason, "status": STATUS, "credit": credit}
    pairs = () if chosen is None else (evidence.pairs[chosen],)
    return Decision(pairs, record | _numbers(evidence, against, gaps, lows, highs))


def _numbers(
    evidence: Evidence, against: Sequence[tuple[str, ...]], gaps: Floats, lows: Floats, highs: Floats
) -> dict[str, Any]:
    """What was found of every layer and pair, as JSON."""
    layers = [{"layer": layer, RICHNESS: _rounded(evidence.richness[:, i])} for i, layer in enumerate(evidence.layers)]
    pairs = [
        {
            "student": pair.student,
            "teacher": pair.teacher,
            "distance": _distance(evidence, p),
            "gap": _rounded(gaps[p]),
            "interval": _rounded([lows[p], highs[p]]),
            "gap_by_level": _rounded(evidence.gaps[:, p]),
            "cka": _rounded(evidence.cka[:, p]),
            "cosine": _rounded(evidence.cosine[:, p]),
            "against": list(against[p]),
        }
        for p, pair in enumerate(evidence.pairs)
    ]
    levels, num_judged = list(evidence.noise_levels), evidence.missed.shape[-1]
    return {"noise_levels": levels, "num_judged": num_judged, "layers": layers, "pairs": pairs}


def _reexamined(evidence: Evidence, held: Held, best: int | None, draws: Floats) -> tuple[int, str, str]:
    """Whether the pair that is aligned stays: the pair from now on, what was decided, and why."""
    now = evidence.pairs.index(held.pair)
    if best is None:
        return now, "kept", f"{held.pair} stays: no pair is admissible at this step."
    if best == now:
        return now, "kept", f"{held.pair} stays: it has the largest gap of the admissible pairs."
    relative = draws / _common(draws)
    ahead = relative[best] - np.fmax(relative[now], held.credit)
    low, high = np.quantile(ahead, [0.025, 0.975])
    other = evidence.pairs[best]
    figures = f"by {np.mean(ahead):+.3f} of the mean gap (95 % interval {low:+.3f} to {high:+.3f})"
    if not low > 0:
        return now, "kept", f"{held.pair} stays: {other} is ahead {figures}, which is not beyond the uncertainty."
    return best, "changed", f"{other} takes the place of {held.pair}: it is ahead {figures}, beyond the uncertainty."


def _common(gaps: Floats) -> Any:
    """The mean gap of the pairs that have one; nan where none has."""
    known = gaps[np.isfinite(gaps.reshape(len(gaps), -1)).all(1)]
    return known.mean(0) if len(known) else np.nan


def _first(admissible: Sequence[int], gaps: Floats, draws: Floats) -> list[int]:
    """The pair with the largest gap, and those that cannot be told from it."""
    if not admissible:
        return []
    top = max(admissible, key=lambda p: gaps[p])
    return [p for p in admissible if p == top or np.quantile(draws[top] - draws[p], 0.025) <= 0]


def _credit(pair: LayerPair, gap: float, held: Held | None) -> float:
    return float(np.fmax(gap, held.credit)) if held is not None and held.pair == pair else float(gap)


def _praise(
    evidence: Evidence, best: int, lows: Floats, highs: Floats, num_admissible: int, ties: Sequence[int]
) -> str:
    pair, cka, cosine = evidence.pairs[best], evidence.cka[:, best].mean(), evidence.cosine[:, best].mean()
    student, teacher = (
        evidence.richness[:, evidence.layers.index(name)].mean() for name in (pair.student, pair.teacher)
    )
    interval = f"{evidence.gaps[:, best].mean():.1%} (95 % interval {lows[best]:.1%} to {highs[best]:.1%})"
    others = ", ".join(str(evidence.pairs[p]) for p in ties)
    first = f"{pair} has the largest gap of {num_admissible} admissible pairs:"
    shared = f"{pair} has the lowest CKA of the {len(ties) + 1} pairs that share the largest gap (with {others}):"
    return " ".join(
        [
            shared if ties else first,
            f"a ridge regression from {pair.student} misses {interval} of what {pair.teacher} adds.",
            f"{RICHNESS} is {student:.2f} in the student and {teacher:.2f} in the teacher, their CKA {cka:.3f},",
            f"the cosine that alignment starts from {cosine:.3f},",
            f"and they are {_distance(evidence, best)} layers apart.",
        ]
    )


def _nothing(evidence: Evidence, against: Sequence[tuple[str, ...]], gaps: Floats) -> str:
    order = sorted(range(len(against)), key=lambda p: (len(against[p]), -np.nan_to_num(gaps[p])))
    closest = order[0]
    return f"No pair is worth it yet. Closest to one is {evidence.pairs[closest]}: {'; '.join(against[closest])}."


def _objections(evidence: Evidence, rules: Rules, gaps: Floats, lows: Floats) -> list[tuple[str, ...]]:
    """All that speaks against each pair."""
    criteria = _criteria(evidence, rules)
    # Relative to the richest at each level, so that levels count alike.
    relative = evidence.richness / np.fmax.reduce(evidence.richness, axis=1)[:, None]
    known = [_layer_quality(layer, relative[:, i]) for i, layer in enumerate(evidence.layers)]
    found = []
    for p, pair in enumerate(evidence.pairs):
        student, teacher = (known[evidence.layers.index(name)] for name in (pair.student, pair.teacher))
        candidate = _Candidate(student, teacher, float(evidence.cka[:, p].mean()), _distance(evidence, p))
        reasons = _against(candidate, criteria)
        if np.isnan(gaps[p]):
            reasons = (*reasons, "one adds nothing but a constant to the other at a noise level")
        elif lows[p] < rules.min_gap:
            figures = f"the gap is {gaps[p]:.3f}, its interval begins at {lows[p]:.3f}"
            reasons = (*reasons, f"what the teacher adds is within the student's linear reach: {figures}")
        found.append(reasons)
    return found


def _criteria(evidence: Evidence, rules: Rules) -> Criteria:
    layers, depth = evidence.layers, len(evidence.layers)
    head = max(1, round(0.1 * depth)) if rules.skip_first is None else rules.skip_first
    return Criteria(
        metric=RICHNESS,
        split="fit",
        noise_levels=evidence.noise_levels,
        layers=layers,
        tail=layers[depth - math.ceil(rules.exclude_tail * depth - 1e-9) :],
        head=layers[:head],
        min_distance=max(2, round(0.25 * depth)) if rules.min_distance is None else rules.min_distance,
        max_cka=rules.max_cka,
    )


def _layer_quality(layer: str, richness: Floats) -> LayerQuality:
    if np.isnan(richness).any():
        return LayerQuality(layer, None, None, None, note=f"{layer} tells no sample from another at a noise level")
    return LayerQuality(layer, float(richness.mean()), None, None)


def _at_level(store: FeatureStore, level: float) -> tuple[Floats, ...]:
    """Richness (L,), then CKA and cosine (P,), missed and increment (P, n) at one noise level."""
    draws = [np.stack([store.features(layer, level, draw=d) for d in range(DRAWS)], 1) for layer in store.layers]
    richness = np.array([lidar(x).debiased_rank for x in draws])
    upper = np.triu_indices(len(store.layers), 1)
    cka = cka_matrix([x[:, 0] for x in draws]).values[upper]
    tokens = {split: [store.tokens(layer, level, split=split) for layer in store.layers] for split in SPLITS}
    cosine = np.array([_cosine(tokens["report"][s], tokens["report"][t]) for s, t in zip(*upper, strict=True)])
    missed, increment = missed_by_sample(store.layers, tokens)
    return richness, cka, cosine, missed[upper], increment[upper]


def missed_by_sample(layers: Sequence[str], tokens: dict[str, list[Tokens]]) -> tuple[Floats, Floats]:
    """What each judged sample adds to the recoverability gap: their sums' ratio is the gap of `recoverability`.

    Args:
        layers: L names.
        tokens: Of each split, one array (n, T, D) per layer.

    Returns:
        For each student, teacher and sample of the report split the squared error of the ridge regression and the
        square of the increment, both in whitened coordinates, shape (L, L, n); nan where there is no answer.
    """
    if tokens["fit"][0].shape[2] > MAX_RANK:
        basis = shared_basis(tokens["fit"], rank=MAX_RANK)
        tokens = {split: [x @ basis for x in parts] for split, parts in tokens.items()}
    moments = TokenMoments(layers)
    for split, parts in tokens.items():
        moments.update(split, parts)
    penalty = recoverability(moments).penalty
    maps = _whitening(moments.moments("fit")[1])
    centres = [x.mean((0, 1), dtype=np.float64) for x in tokens["fit"]]
    fitted, judged = (
        [(x - centre) @ maps for x, centre in zip(tokens[split], centres, strict=True)] for split in ("fit", "report")
    )
    num, n = len(layers), len(judged[0])
    missed, increment = np.full((2, num, num, n), np.nan)
    for s in range(num):
        x = fitted[s].reshape(-1, maps.shape[1])
        covariance = x.T @ x / len(x)
        ridge = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        for t in np.flatnonzero(np.isfinite(penalty[s])):
            cross = x.T @ (fitted[t] - fitted[s]).reshape(x.shape) / len(x)
            wanted = judged[t] - judged[s]
            error = wanted - judged[s] @ np.linalg.solve(covariance + penalty[s, t] * ridge, cross)
            missed[s, t], increment[s, t] = (np.square(y).sum((1, 2)) for y in (error, wanted))
    return missed, increment


def _cosine(student: Tokens, teacher: Tokens) -> float:
    """Mean over samples and tokens of the cosine over channels."""
    lengths = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
    return float(((student * teacher).sum(-1) / np.maximum(lengths, 1e-12)).mean())


def _distance(evidence: Evidence, p: int) -> int:
    pair = evidence.pairs[p]
    return evidence.layers.index(pair.teacher) - evidence.layers.index(pair.student)


def _rounded(values: Any) -> Any:
    """JSON, to five decimals; what does not exist is null."""
    found = np.round(np.asarray(values, np.float64), 5)
    return np.where(np.isfinite(found), found, None).tolist()  # type: ignore[call-overload]
