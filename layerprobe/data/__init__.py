"""Data sets as Samples: tensors in about [-1, 1], labels where known, and an id that never changes."""

from __future__ import annotations

from layerprobe.data.samples import Batch, Samples, Splits, Subset, TensorSamples
from layerprobe.data.sources import load

__all__ = ["Batch", "Samples", "Splits", "Subset", "TensorSamples", "load"]
