"""Layer pairs (student, teacher), and conversion of depths, which papers count from 1, to layer names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class LayerPair:
    """A student layer and the teacher layer that it is aligned to.

    Attributes:
        student: Name of the student layer in the module, such as "blocks.2".
        teacher: Name of the teacher layer, which comes later in the network.

    Raises:
        ValueError: If both are the same layer, or numbered layers are in the wrong order.
    """

    student: str
    teacher: str

    def __post_init__(self) -> None:
        if self.student == self.teacher:
            raise ValueError(f"{self.student} cannot be its own teacher: a layer aligned to itself learns nothing")
        student, teacher = _block_index(self.student), _block_index(self.teacher)
        if student and teacher and student[0] == teacher[0] and student[1] > teacher[1]:
            raise ValueError(f"student {self.student} comes after teacher {self.teacher}; swap them")

    def __str__(self) -> str:
        return f"{self.student} <- {self.teacher}"


def layer_of_depth(depth: int, *, prefix: str = "blocks") -> str:
    """Returns the name of the layer at a depth of the LayerSync paper, counted from 1: depth 8 is `blocks.7`.

    Raises:
        ValueError: If depth is below 1.
    """
    if depth < 1:
        raise ValueError(f"depth counts from 1, got {depth}; depth 1 is {prefix}.0")
    return f"{prefix}.{depth - 1}"


def _block_index(name: str) -> tuple[str, int] | None:
    prefix, _, index = name.rpartition(".")
    return (prefix, int(index)) if index.isdigit() else None
