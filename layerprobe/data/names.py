"""The names of kinds and forms of data, for options: without torch, which the rest of the room needs."""

from __future__ import annotations

from typing import Literal

Modality = Literal["image", "audio", "motion", "video"]
AudioForm = Literal["log-mel", "waveform"]
