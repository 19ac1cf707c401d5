"""Reading BVH motion files as joint positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
MAX_POSITIONS = 2**24


def bvh_positions(text: str) -> Floats:
    """Returns the world positions of all joints of a BVH file, shape (frames, joints, 3), in the unit of the file.

    End sites are left out.

    Raises:
        ValueError: If the text is not a BVH file.
    """
    words = text.split()
    if words[:1] != ["HIERARCHY"] or "MOTION" not in words:
        raise ValueError("it is not a BVH file: HIERARCHY or MOTION is missing")
    split = words.index("MOTION")
    joints = _skeleton(words[1:split])
    motion = words[split + 1 :]
    if len(motion) < 5 or motion[0] != "Frames:" or motion[2:4] != ["Frame", "Time:"]:
        raise ValueError("its MOTION does not begin with Frames and Frame Time")
    num_frames, num_values = _number(motion[1]), sum(len(joint.channels) for joint in joints)
    values = np.array(motion[5:], np.float64)
    if num_frames < 1 or values.size != num_frames * num_values:
        raise ValueError(f"it declares {num_frames} frames of {num_values} values but contains {values.size} values")
    if num_frames * len(joints) > MAX_POSITIONS:  # joints without channels take no values of the file
        raise ValueError(f"it has {num_frames} frames of {len(joints)} joints, more than {MAX_POSITIONS} in all")
    return _forward_kinematics(joints, values.reshape(num_frames, num_values))


@dataclass(frozen=True)
class _Joint:
    parent: int  # -1 for the root
    offset: Floats
    channels: tuple[str, ...]


def _skeleton(words: list[str]) -> list[_Joint]:
    joints: list[_Joint] = []
    open_joints: list[int] = []  # -1 stands for an end site
    position = 0
    while position < len(words):
        word = words[position]
        if (word == "OFFSET" and not open_joints) or (word == "CHANNELS" and open_joints[-1:] in ([], [-1])):
            raise ValueError(f"its HIERARCHY contains {word} outside of a joint")
        if word in ("ROOT", "JOINT", "End"):
            if word == "End":
                open_joints.append(-1)
            else:
                joints.append(_Joint(next((j for j in reversed(open_joints) if j >= 0), -1), np.zeros(3), ()))
                open_joints.append(len(joints) - 1)
            position += 3  # the word, the name, the brace
        elif word == "OFFSET":
            if open_joints[-1] >= 0:
                old = joints[open_joints[-1]]
                joints[open_joints[-1]] = _Joint(old.parent, np.array(words[position + 1 : position + 4], float), ())
            position += 4
        elif word == "CHANNELS":
            count = _number(words[position + 1])
            old = joints[open_joints[-1]]
            names = tuple(words[position + 2 : position + 2 + count])
            unknown = [name for name in names if name[1:] not in ("position", "rotation") or name[0] not in "XYZ"]
            if unknown:
                raise ValueError(f"channel {unknown[0]!r} is not a BVH channel")
            joints[open_joints[-1]] = _Joint(old.parent, old.offset, names)
            position += 2 + count
        elif word == "}":
            if not open_joints:
                raise ValueError("the braces of its HIERARCHY do not match")
            open_joints.pop()
            position += 1
        else:
            raise ValueError(f"its HIERARCHY contains {word!r} in the wrong place")
    if open_joints or not joints:
        raise ValueError("the braces of its HIERARCHY do not match")
    return joints


def _number(word: str) -> int:
    if not (word.isdecimal() and len(word) < 10):
        raise ValueError(f"it has {word[:20]!r} in place of a number")
    return int(word)


def _forward_kinematics(joints: list[_Joint], values: Floats) -> Floats:
    positions = np.zeros((len(values), len(joints), 3))
    rotations = np.zeros((len(joints), len(values), 3, 3))
    column = 0
    for index, joint in enumerate(joints):
        local, shift = np.broadcast_to(np.eye(3), (len(values), 3, 3)), np.broadcast_to(joint.offset, (len(values), 3))
        for channel in joint.channels:
            axis, value = "XYZ".index(channel[0]), values[:, column]
            if channel.endswith("position"):
                shift = shift + np.eye(3)[axis] * value[:, None]
            else:  # Rotations apply in the order in which they are listed, each about the axes as turned so far.
                local = local @ _rotation(axis, np.deg2rad(value))
            column += 1
        if joint.parent < 0:
            positions[:, index], rotations[index] = shift, local
        else:
            turned = np.einsum("fij,fj->fi", rotations[joint.parent], shift)
            positions[:, index] = positions[:, joint.parent] + turned
            rotations[index] = rotations[joint.parent] @ local
    return positions


def _rotation(axis: int, angle: Floats) -> Floats:
    """Rotations about one axis, shape (n, 3, 3)."""
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.zeros((len(angle), 3, 3))
    matrix[:, axis, axis] = 1
    matrix[:, i, i] = matrix[:, j, j] = np.cos(angle)
    matrix[:, j, i], matrix[:, i, j] = np.sin(angle), -np.sin(angle)
    return matrix
