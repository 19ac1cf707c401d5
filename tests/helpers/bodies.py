"""A body that walks, planted: what is found in data can be compared with what was put in."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# name: parent and offset in meters; x is left, y is up, z is ahead. Left arm and leg end in 1, right ones in 2.
BODY = {
    "pelvis": ("", (0.0, 0.9, 0.0)),
    "chest": ("pelvis", (0.0, 0.45, 0.02)),
    "neck": ("chest", (0.0, 0.1, 0.0)),
    "head": ("neck", (0.0, 0.12, 0.03)),
    "shoulder1": ("chest", (0.13, 0.02, 0.0)),
    "elbow1": ("shoulder1", (0.05, -0.26, 0.0)),
    "hand1": ("elbow1", (0.0, -0.24, 0.03)),
    "shoulder2": ("chest", (-0.13, 0.02, 0.0)),
    "elbow2": ("shoulder2", (-0.05, -0.26, 0.0)),
    "hand2": ("elbow2", (0.0, -0.24, 0.03)),
    "hip1": ("pelvis", (0.1, -0.05, 0.0)),
    "knee1": ("hip1", (0.0, -0.42, 0.02)),
    "foot1": ("knee1", (0.0, -0.42, -0.02)),
    "hip2": ("pelvis", (-0.1, -0.05, 0.0)),
    "knee2": ("hip2", (0.0, -0.42, 0.02)),
    "foot2": ("knee2", (0.0, -0.42, -0.02)),
}
NAMES = tuple(BODY)
BONES = {frozenset((name, parent)) for name, (parent, _) in BODY.items() if parent}
SWING = {"shoulder1": 0.6, "shoulder2": -0.6, "hip1": -0.5, "hip2": 0.5, "elbow1": 0.3, "elbow2": -0.3}


def walk(frames: int = 40, *, seed: int = 0, speed: float = 0.14) -> Floats:
    """Joints in the order of `NAMES`, shape (frames, 16, 3): steps, swinging arms, a nodding head, no two alike.

    The foot on the floor stands about still, and the other is lifted.
    """
    random = np.random.default_rng(seed)
    time = np.arange(frames) * 0.35 + random.uniform(0, 6)
    place = {"": np.stack([np.zeros(frames), 0.01 * np.sin(2 * time), speed * np.arange(frames)], axis=-1)}
    turned = {"": np.broadcast_to(np.eye(3), (frames, 3, 3))}
    for name, (parent, offset) in BODY.items():
        place[name] = place[parent] + turned[parent] @ np.array(offset)
        swing = SWING.get(name, 0.0) * np.sin(time) + 0.15 * np.sin(
            random.uniform(0.5, 2) * time + random.uniform(0, 6)
        )
        if name.startswith("knee"):
            swing = swing + 0.8 * np.maximum(np.cos(time) * (1 if name[-1] == "1" else -1), 0)
        aside = 0.2 * np.sin(random.uniform(0.5, 2) * time + random.uniform(0, 6))
        turned[name] = turned[parent] @ _about(0, swing) @ _about(2, aside)
    return np.stack([place[name] for name in NAMES], axis=1)


def _about(axis: int, angle: Floats) -> Floats:
    i, j = (axis + 1) % 3, (axis + 2) % 3
    rotation = np.zeros((len(angle), 3, 3))
    rotation[:, axis, axis] = 1
    rotation[:, i, i] = rotation[:, j, j] = np.cos(angle)
    rotation[:, j, i], rotation[:, i, j] = np.sin(angle), -np.sin(angle)
    return rotation
