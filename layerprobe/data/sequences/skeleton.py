"""A body found in its movements: which joints are joined by bones, which way is up, which limbs mirror each other.

Positions of joints come without their meaning. But a bone keeps its length while all other distances change, so the
bones are the spanning tree of the distances that change least.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

Floats = NDArray[np.float64]
Edge = tuple[int, int]
Limb = list[int]  # its joints, from the trunk outwards

# A bone's length varies by less than this share of it: soft markers do by a few percent, distances across a joint by
# far more.
RIGID = 0.1
# Between distances that vary alike, as within the pelvis, the shorter one is the bone.
SHORTNESS = 0.01
# Joints lie in one rigid part where their distances vary no more than so many times what a bone does.
STIFF = 1.3
# Bones of a limb and its mirror image differ in length by less than this share.
ALIKE = 0.1
MAX_CLIPS, MAX_FRAMES = 64, 64


@dataclass(frozen=True)
class Skeleton:
    """How to draw and to turn a body.

    Attributes:
        bones: Pairs of joints. Joints without a bone are no part of the body, such as a fixed origin.
        sides: For each joint 1 or -1 where it belongs to one of two limbs that mirror each other, 0 elsewhere. Where
            bodies walk forwards in right-handed coordinates, 1 is left.
        up: Unit vector, shape (3,).
        head: The highest joint at an end of the trunk, or None.
    """

    bones: tuple[Edge, ...]
    sides: tuple[int, ...]
    up: tuple[float, float, float]
    head: int | None

    @property
    def joints(self) -> list[int]:
        """Those of the body."""
        return sorted({joint for bone in self.bones for joint in bone})

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Skeleton:
        """What `to_dict` gave."""
        x, y, z = record["up"]
        bones = tuple((int(a), int(b)) for a, b in record["bones"])
        return cls(bones, tuple(record["sides"]), (x, y, z), record["head"])


def find_skeleton(clips: Sequence[Floats]) -> Skeleton | None:
    """The body that moves in these clips; None where nothing keeps its distance, as in what is no positions.

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
    """The bones of the largest rigid tree and their lengths."""
    mean = np.zeros((clips[0].shape[1],) * 2)
    spread = np.zeros_like(mean)
    for clip in clips:  # Within a clip: bodies of other clips may be larger.
        distance = np.linalg.norm(clip[:, :, None] - clip[:, None], axis=-1)
        mean, spread = mean + distance.mean(0) / len(clips), spread + distance.std(0) / len(clips)
    tree = minimum_spanning_tree(_weights(mean, spread)).toarray()
    rigid = np.where(spread <= RIGID * mean, tree, 0.0)
    _, part = connected_components(rigid, directed=False)
    largest = np.bincount(part).argmax()
    return {(int(a), int(b)): float(mean[a, b]) for a, b in np.argwhere(rigid) if part[a] == largest}


def _weights(mean: Floats, spread: Floats) -> Floats:
    """Low between joints that a bone may join.

    Within a rigid part any tree would do; bones go out from its middle, which keeps the halves of a body alike.
    """
    # No weight is 0, which to scipy is no edge.
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
    """Bodies are upright more than they lie, and what touches the floor is slower than what is on top."""
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
    """Pairs of limbs alike that begin at one joint, seen from where most joints belong to such limbs."""
    neighbors: dict[int, dict[int, float]] = {}
    for (a, b), length in lengths.items():
        neighbors.setdefault(a, {})[b] = length
        neighbors.setdefault(b, {})[a] = length

    def limb(joint: int, parent: int, depth: int = 0) -> list[tuple[int, float, int]]:
        """Depth, length and end of every bone from the parent onwards, sorted."""
        further = [bone for other in neighbors[joint] if other != parent for bone in limb(other, joint, depth + 1)]
        return sorted([(depth, neighbors[joint][parent], joint), *further])

    def pairs_from(joint: int, parent: int | None) -> list[tuple[Limb, Limb]]:
        limbs = [limb(other, joint) for other in neighbors[joint] if other != parent]
        alike = [(a, b) for a, b in itertools.combinations(limbs, 2) if _alike(a, b)]
        if len(alike) > 1:  # Fingers or the like, of which none mirrors another.
            alike = []
        found = [([end for *_, end in a], [end for *_, end in b]) for a, b in alike]
        taken = {joint for pair in found for joints in pair for joint in joints}
        children = [bones[0][2] for bones in limbs]
        return found + [pair for child in children if child not in taken for pair in pairs_from(child, joint)]

    return max((pairs_from(joint, None) for joint in neighbors), key=lambda found: sum(len(a) for a, _ in found))


def _alike(a: Sequence[tuple[int, float, int]], b: Sequence[tuple[int, float, int]]) -> bool:
    if [depth for depth, *_ in a] != [depth for depth, *_ in b]:
        return False
    return bool(np.allclose([bone[1] for bone in a], [bone[1] for bone in b], rtol=ALIKE, atol=0))


def _sides(clips: Sequence[Floats], limbs: Sequence[tuple[Limb, Limb]], up: Floats) -> NDArray[np.int64]:
    """For each joint 1, -1 or 0: arms and legs of a side alike, and 1 on the left of where bodies go."""
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
    """From the middle of one side to that of the other, shape (frames, 3), for a clip (frames, joints, 3)."""
    left: Floats = clip[:, np.asarray(sides) == 1].mean(1) - clip[:, np.asarray(sides) == -1].mean(1)
    return left
