"""What published trainings say about the layers of a pair: facts with their sources, read from `published.csv`.

Blocks are counted from 1, as in the papers; a depth is block / number of blocks, so block 8 of 28 is at 0.29. A row
without a teacher aligns the student with an external encoder; these rows tell about the student's depth only.

The **share** is the row's gain over the best gain of its study, a set of trainings that differ in the pair alone: 1 is
the study's best pair, 0 is no better than without alignment, below 0 is worse. A study of one row has no share. Most
values were read off figures or are quoted from secondary summaries, all are of one seed: a prior, and no law.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np

from layerprobe.analyses.tables import PRIOR_DEPTHS
from layerprobe.layersync import LayerPair

# Blocks and width of the smallest networks of which the published table has shares.
FEWEST_BLOCKS = 12
NARROWEST_TOKENS = 384
# Ranges of the student's and of the teacher's depth in which self-aligned pairs gain most.
PRIOR_RANGES = ((0.15, 0.40), (0.62, 0.80))


@dataclass(frozen=True)
class PublishedPair:
    """One published training with an aligned layer.

    Attributes:
        study: Name of the set of trainings that differ only in the pair.
        method: Method of the alignment.
        network: Name of the network, with the modality where it is not images.
        blocks: Number of blocks of the network.
        student: Block of the student, counted from 1.
        teacher: Block of the teacher; None for an external encoder.
        budget: Length of the training.
        steps: The same in optimizer steps since fresh weights, an epoch of ImageNet being 5000 steps of 256 samples;
            None where this is not known.
        metric: Metric of the samples.
        value: The metric with alignment.
        baseline: The metric of the same training without alignment.
        gain: Improvement over the baseline as a fraction of the baseline; of a baseline of 0, the value itself.
        share: Improvement over the largest one of the study; None if the study has one row.
        confidence: How the value is known, such as "figure, read off".
        source: Where it is published.
    """

    study: str
    method: str
    network: str
    blocks: int
    student: int
    teacher: int | None
    budget: str
    steps: int | None
    metric: str
    value: float
    baseline: float
    gain: float
    share: float | None
    confidence: str
    source: str

    @property
    def student_depth(self) -> float:
        """Depth of the student, in (0, 1]."""
        return self.student / self.blocks

    @property
    def teacher_depth(self) -> float | None:
        """Depth of the teacher, in (0, 1]; None for an external encoder."""
        return None if self.teacher is None else self.teacher / self.blocks


@cache
def published_pairs() -> tuple[PublishedPair, ...]:
    """Returns all rows, those of one study together."""
    text = files("layerprobe.analyses.selection").joinpath("published.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    best: dict[str, float] = {}
    counts: dict[str, int] = {}
    for row in rows:
        best[row["study"]] = max(_improvement(row), best.get(row["study"], -math.inf))
        counts[row["study"]] = counts.get(row["study"], 0) + 1
    return tuple(
        PublishedPair(
            study=row["study"],
            method=row["method"],
            network=row["network"],
            blocks=int(row["blocks"]),
            student=int(row["student"]),
            teacher=int(row["teacher"]) if row["teacher"] else None,
            budget=row["budget"],
            steps=int(row["steps"]) if row["steps"] else None,
            metric=row["metric"],
            value=float(row["value"]),
            baseline=float(row["baseline"]),
            gain=_improvement(row) / (float(row["baseline"]) or 1.0),
            share=_improvement(row) / best[row["study"]] if counts[row["study"]] > 1 else None,
            confidence=row["confidence"],
            source=row["source"],
        )
        for row in rows
    )


def published_lengths() -> tuple[PublishedPair, ...]:
    """Returns the trainings of the pair that was published at most lengths, the shortest first.

    They show how the relative gain changes while one network is trained.
    """
    groups: dict[tuple[str, str, int, int | None], list[PublishedPair]] = {}
    for pair in published_pairs():
        if pair.steps is not None and pair.teacher is not None:
            groups.setdefault((pair.method, pair.network, pair.student, pair.teacher), []).append(pair)
    longest = max(groups.values(), key=lambda pairs: len({pair.steps for pair in pairs}))
    return tuple(sorted(longest, key=lambda pair: pair.steps or 0))


def nearest_published(student_depth: float, teacher_depth: float, *, num: int = 3) -> tuple[PublishedPair, ...]:
    """Returns the self-aligned pairs with a share at the smallest distance in (student depth, teacher depth).

    Of pairs at the same distance those of more blocks come first.

    Args:
        student_depth: Depth of the student, in (0, 1].
        teacher_depth: Depth of the teacher, in (0, 1].
        num: Largest number of pairs.
    """

    def rank(pair: PublishedPair) -> tuple[float, int]:
        distance = math.hypot(pair.student_depth - student_depth, (pair.teacher_depth or 0.0) - teacher_depth)
        return round(distance, 6), -pair.blocks

    compared = [pair for pair in published_pairs() if pair.teacher is not None and pair.share is not None]
    return tuple(sorted(compared, key=rank)[:num])


def encoder_share(student_depth: float) -> float | None:
    """Returns which share of the best gain an external encoder brings at a depth of the student; None if unknown.

    It is the mean over the studies with an external encoder that tried depths on both sides, each interpolated between
    its trainings. Studies disagree: RARE gained less than half at 0.17 of the depth, SRA2 most.

    Args:
        student_depth: Depth of the student, in (0, 1].
    """
    studies: dict[str, list[tuple[float, float]]] = {}
    for pair in published_pairs():
        if pair.teacher is None and pair.share is not None:
            studies.setdefault(pair.study, []).append((pair.student_depth, pair.share))
    shares = []
    for points in studies.values():
        depths, values = zip(*sorted(points), strict=True)
        if depths[0] - 1e-9 <= student_depth <= depths[-1] + 1e-9:
            shares.append(float(np.interp(student_depth, depths, values)))
    return sum(shares) / len(shares) if shares else None


def prior_pair(layers: Sequence[str]) -> LayerPair:
    """Returns the pair that published trainings suggest: the layers nearest to the depths `PRIOR_DEPTHS`.

    Args:
        layers: Names of the layers, in the order of the network.

    Raises:
        ValueError: If there are fewer than two layers.
    """
    depth = len(layers)
    if depth < 2:
        raise ValueError(f"a pair needs two layers, got {depth}")
    student, teacher = (round(fraction * depth) for fraction in PRIOR_DEPTHS)
    student = max(student, 1)
    return LayerPair(layers[student - 1], layers[max(teacher, student + 1) - 1])


def _improvement(row: dict[str, str]) -> float:
    difference = float(row["baseline"]) - float(row["value"])
    return difference if row["better"] == "lower" else -difference
