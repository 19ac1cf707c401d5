"""The conditions that a layer pair must meet before it is ranked, and their limits.

- **No teacher in the tail**, the last 20 % of the layers and at least the last one: these layers decode content back to
  pixels, and the teachers of all pairs published for LayerSync come before them.
- **No student in the head**, before 0.14 of the depth: no published pair has an earlier one (docs/published-pairs.md).
- **No student beyond half of the depth**: later students kept at most two thirds of the published gain, and the latest
  none (docs/published-pairs.md).
- **The student comes before its teacher and is weaker.** Strength is probe accuracy, or the effective rank without
  labels.
- **The teacher knows something**: its probe accuracy is above that of the network with random weights, not surely below
  that of the raw input, and surely above the share of the most frequent class.
- **Distance**: about 0.3 of the depth. Close pairs gained least wherever distances were compared.
- **Not copies**: CKA between the two at equal noise levels, averaged, is at most 0.99. Pairs above 0.9 are ranked, with
  a caution; a network in which all pairs are above it has no pick. In one such network alignment cost quality
  (docs/picking.md).
- **Out of linear reach**: where tokens were kept, a ridge regression from the student's tokens misses at least 5 % of
  what the teacher adds (the recoverability gap), beyond the uncertainty.
- **The network needs its teacher**: when the layer is skipped the loss rises, beyond the uncertainty. A layer that does
  nothing, repeats another one or was damaged has nothing to teach, whatever a probe reads from the stream that passes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from layerprobe.options import RANKING_PANEL, option

_FIRST_DEPTH = 0.14  # of the earliest student of a published pair, 4 of 28


@dataclass(frozen=True)
class PairLimits:
    """Limits that an admissible pair must keep.

    Attributes:
        exclude_tail: Fraction of the layers at the end, rounded down to whole layers but at least one, that may not
            teach; 0 for none.
        skip_first: Number of first layers that may not learn; by default those before 0.14 of the depth.
        max_student: Largest depth of a student, as a fraction of the layers.
        min_distance: Least number of layers between student and teacher; by default 0.3 of the depth, at least 2.
        max_cka: Largest mean CKA of a pair; 1 also admits pairs of a network in which all layers are alike.
        min_gap: Least recoverability gap; the lower end of the pair's interval must reach it.

    Raises:
        ValueError: If a number is out of its range.
    """

    PANEL: ClassVar[str] = RANKING_PANEL

    exclude_tail: float = field(default=0.2, metadata=option(minimum=0, maximum=1))
    skip_first: int | None = field(default=None, metadata=option(minimum=0))
    max_student: float = field(default=0.5, metadata=option(minimum=0, maximum=1))
    min_distance: int | None = field(default=None, metadata=option(minimum=1))
    max_cka: float = field(default=0.99, metadata=option(minimum=-1, maximum=1))
    min_gap: float = field(default=0.05, metadata=option())

    def __post_init__(self) -> None:
        if not 0 <= self.exclude_tail < 1:
            raise ValueError(
                f"exclude_tail is {self.exclude_tail}; pass a fraction of the layers, at least 0 and below 1"
            )
        for name, least in (("skip_first", 0), ("min_distance", 1)):
            count = getattr(self, name)
            if count is not None and count < least:
                raise ValueError(f"{name} is {count}; pass {least} or more, or None for the default")

    def tail(self, layers: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the layers that may not teach."""
        count = max(int(self.exclude_tail * len(layers) + 1e-9), int(self.exclude_tail > 0))
        return layers[max(len(layers) - count, 0) :]

    def head(self, layers: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the layers that may not learn."""
        return layers[: int(_FIRST_DEPTH * len(layers) - 1e-9) if self.skip_first is None else self.skip_first]

    def late(self, layers: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the layers that are too deep to learn."""
        return layers[int(self.max_student * len(layers) + 1e-9) :]

    def distance(self, layers: tuple[str, ...]) -> int:
        """Returns the least distance in a network of these layers."""
        return max(2, round(0.3 * len(layers))) if self.min_distance is None else self.min_distance


DEFAULT_LIMITS = PairLimits()
