"""Estimation of a skeleton from joint positions: the bones, the vertical axis and the mirrored limbs.

Joint positions come without names or bones. A bone keeps its length while other distances change, so the bones are the
minimum spanning tree of the distances that vary least.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from layerprobe.data.sequences.bvh import Floats

Edge = tuple[int, int]
Limb = list[int]  # joints, from the trunk outwards

# Maximum relative standard deviation of a bone's length. Markers on soft tissue vary by a few percent, distances across
# a joint by far more.
RIGID = 0.1
# Weight of the length of a bone: of distances that vary equally, as within the pelvis, the shorter one is the bone.
SHORTNESS = 0.01
# Joints belong to one rigid part if their distances vary at most this many times as much as a bone.
STIFF = 1.3
# Maximum relative difference in length between the bones of a limb and of its mirror image.
ALIKE = 0.1
MAX_CLIPS, MAX_FRAMES = 64, 64


@dataclass(frozen=True)
class Skeleton:
    """Skeleton of a body, for drawing and rotating it.

    Attributes:
        bones: Bones as pairs of joints. Joints without a bone, such as a fixed origin, do not belong to the body.
        sides: Side of each joint: 1 or -1 for joints of mirrored limbs, 0 for all others. For bodies that walk forwards
            in right-handed coordinates, 1 is left.
        up: Unit vector that points upwards, shape (3,).
        head: Highest end joint of the trunk, or None.
    """

    bones: tuple[Edge, ...]
    sides: tuple[int, ...]
    up: tuple[float, float, float]
    head: int | None

    @property
    def joints(self) -> list[int]:
        """The joints of the body, in ascending order."""
        return sorted({joint for bone in self.bones for joint in bone})

    def to_dict(self) -> dict[str, Any]:
        """Converts the skeleton to JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Skeleton:
        """Creates a skeleton from the result of `to_dict`."""
        x, y, z = record["up"]
        bones = tuple((int(a), int(b)) for a, b in record["bones"])
        return cls(bones, tuple(record["sides"]), (x, y, z), record["head"])


def find_skeleton(clips: Sequence[Floats]) -> Skeleton | None:
    """Estimates the skeleton of the body in clips; None if no distances are constant, as in data other than positions.

    Args:
        clips: Positions of the same joints, shape (frames, joints, 3) each; the first `MAX_CLIPS` are used.
    """
    clips = [np.asarray(clip, np.float64)[:: -(-len(clip) // MAX_FRAMES)] for clip in clips[:MAX_CLIPS]]
    lengths = _bones(clips)
    if len(lengths) < 2:
        return None
    bones = tuple(lengths)
    joints = sorted({joint for bone in bones for joint in bone})
    up = _up(clips, joints)
    sides = _sides(clips, _mirrored_limbs(lengths), up)
    heights = np.mean([(clip @ up).mean(0) for clip in clips], axis=0)
    ends = [joint for joint in joints if sum(joint in bone for bone in bones) == 1 and sides[joint] == 0]
    head = max(ends, key=lambda joint: heights[joint], default=None)
    return Skeleton(bones, tuple(sides.tolist()), (float(up[0]), float(up[1]), float(up[2])), head)


def _bones(clips: Sequence[Floats]) -> dict[Edge, float]:
    """Bones of the largest connected tree of rigid distances, with their lengths."""
    mean = np.zeros((clips[0].shape[1],) * 2)
    spread = np.zeros_like(mean)
    for clip in clips:  # variation is measured within a clip, because bodies differ between clips
        distance = np.linalg.norm(clip[:, :, None] - clip[:, None], axis=-1)
        mean, spread = mean + distance.mean(0) / len(clips), spread + distance.std(0) / len(clips)
    tree = minimum_spanning_tree(_weights(mean, spread)).toarray()
    rigid = np.where(spread <= RIGID * mean, tree, 0.0)
    _, part = connected_components(rigid, directed=False)
    largest = np.bincount(part).argmax()
    return {(int(a), int(b)): float(mean[a, b]) for a, b in np.argwhere(rigid) if part[a] == largest}


def _weights(mean: Floats, spread: Floats) -> Floats:
    """Edge weights of the spanning tree, low between joints that may share a bone.

    Within a rigid part every tree is valid; bones start at its center, which keeps the two sides of the body symmetric.
    """
    # Weights must not be 0, which scipy treats as a missing edge.
    weights = spread + SHORTNESS * mean + 1e-9 * max(float(mean.max()), 1e-9)
    tree = minimum_spanning_tree(weights).nonzero()
    stiff = spread <= STIFF * (np.median(spread[tree]) if len(tree[0]) else 0.0) + 1e-9 * mean
    for joint in range(len(mean)):
        part = [joint]
        for other in mean[joint].argsort().tolist():
            if other != joint and stiff[other, part].all():
                part.append(other)
        inside = mean[np.ix_(part, part)]
        rest = [other for other in part if other != part[int(inside.sum(1).argmin())]]
        weights[np.ix_(rest, rest)] += SHORTNESS * inside.max()
    return weights


def _up(clips: Sequence[Floats], joints: list[int]) -> Floats:
    """The vertical direction: bodies are mostly upright, and joints near the floor move slower than high ones."""
    axis = int(np.mean([np.ptp(clip[:, joints], axis=1).mean(0) for clip in clips], axis=0).argmax())
    faster_on_top = 0.0
    for clip in clips:
        body = clip[:, joints]
        speed, heights = np.linalg.norm(np.diff(body, axis=0), axis=-1), body[:-1, :, axis]
        rows = np.arange(len(speed))
        faster_on_top += float((speed[rows, heights.argmax(1)] - speed[rows, heights.argmin(1)]).sum())
    up = np.zeros(3)
    up[axis] = 1.0 if faster_on_top >= 0 else -1.0
    return up


def _mirrored_limbs(lengths: Mapping[Edge, float]) -> list[tuple[Limb, Limb]]:
    """Pairs of similar limbs that start at the same joint, from the root joint that gives the most paired joints."""
    neighbors: dict[int, dict[int, float]] = {}
    for (a, b), length in lengths.items():
        neighbors.setdefault(a, {})[b] = length
        neighbors.setdefault(b, {})[a] = length

    def limb(joint: int, parent: int, depth: int = 0) -> list[tuple[int, float, int]]:
        """Depth, length and end joint of every bone from the parent outwards, sorted."""
        further = [bone for other in neighbors[joint] if other != parent for bone in limb(other, joint, depth + 1)]
        return sorted([(depth, neighbors[joint][parent], joint), *further])

    def pairs_from(joint: int, parent: int | None) -> list[tuple[Limb, Limb]]:
        limbs = [limb(other, joint) for other in neighbors[joint] if other != parent]
        alike = [(a, b) for a, b in itertools.combinations(limbs, 2) if _alike(a, b)]
        if len(alike) > 1:  # more than two similar limbs, such as fingers, are not mirrored
            alike = []
        pairs = [([end for *_, end in a], [end for *_, end in b]) for a, b in alike]
        paired = {joint for pair in pairs for joints in pair for joint in joints}
        children = [bones[0][2] for bones in limbs]
        return pairs + [pair for child in children if child not in paired for pair in pairs_from(child, joint)]

    return max((pairs_from(joint, None) for joint in neighbors), key=lambda pairs: sum(len(a) for a, _ in pairs))


def _alike(a: Sequence[tuple[int, float, int]], b: Sequence[tuple[int, float, int]]) -> bool:
    if [depth for depth, *_ in a] != [depth for depth, *_ in b]:
        return False
    return bool(np.allclose([bone[1] for bone in a], [bone[1] for bone in b], rtol=ALIKE, atol=0))


def _sides(clips: Sequence[Floats], limbs: Sequence[tuple[Limb, Limb]], up: Floats) -> NDArray[np.int64]:
    """Side of each joint, 1, -1 or 0: consistent between arms and legs, and 1 on the left of the walking direction."""
    sides = np.zeros(clips[0].shape[1], np.int64)
    across = [np.concatenate([clip[:, a[0]] - clip[:, b[0]] for clip in clips]) for a, b in limbs]
    for (a, b), vectors in zip(limbs, across, strict=True):
        sign = 1 if float((vectors * across[0]).sum()) >= 0 else -1
        sides[a], sides[b] = sign, -sign
    if not limbs:
        return sides
    ahead = sum(
        float((np.cross(leftwards(clip, sides)[:-1], up) * np.diff(clip[:, sides != 0].mean(1), axis=0)).sum())
        for clip in clips
    )
    return sides if ahead >= 0 else -sides


def leftwards(clip: Floats, sides: Sequence[int] | NDArray[np.int64]) -> Floats:
    """Returns the vectors from the center of the right side to that of the left side, shape (frames, 3).

    Args:
        clip: Joint positions, shape (frames, joints, 3).
        sides: Side of each joint, as in `Skeleton`.
    """
    left: Floats = clip[:, np.asarray(sides) == 1].mean(1) - clip[:, np.asarray(sides) == -1].mean(1)
    return left
