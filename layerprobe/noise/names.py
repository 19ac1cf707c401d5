"""The names of predictions and schedules, for options: without torch, which the rest of the room needs."""

from __future__ import annotations

from typing import Literal, get_args

Prediction = Literal["velocity", "eps", "x0", "v", "score"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
ScheduleName = Literal[
    "sit", "sit-gvp", "sit-vp", "flow", "flow-1000", "edm", "ddpm-linear", "ddpm-scaled_linear", "ddpm-cosine"
]
