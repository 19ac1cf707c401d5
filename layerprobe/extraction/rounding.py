"""What a precision costs: the error of pooled features against those in float32."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from layerprobe.backbones import Backbone
from layerprobe.data import Samples, Subset
from layerprobe.extraction.forward import read_features
from layerprobe.extraction.plan import ExtractionPlan

SAMPLES = 16


@dataclass(frozen=True)
class RoundingError:
    """The largest error of a layer's pooled features at a noise level against those in float32.

    Attributes:
        precision: Precision of the features.
        error: Root mean square error as a share of the features' spread over the samples, at least 0.
        layer: Layer that has it.
        noise_level: Noise level that has it.
        num_samples: Number of samples.
    """

    precision: str
    error: float
    layer: str
    noise_level: float
    num_samples: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return asdict(self)


def rounding_error(
    backbone: Backbone, samples: Samples, plan: ExtractionPlan, *, batch_size: int = 128
) -> RoundingError:
    """Reads the features of `SAMPLES` samples in the plan's precision and in float32, and compares them.

    A constant part of the features, which no probe sees, does not count: the spread is that round their mean.

    Args:
        backbone: The model.
        samples: Samples of which the first are read.
        plan: Layers, noise levels, condition, seed and precision.
        batch_size: Number of rows per forward pass.

    Raises:
        ValueError: As for `read_features`.
    """
    few = Subset(samples, range(min(SAMPLES, len(samples))), name="rounding")
    plan = replace(plan, draws=1, pool_cells=1, token_samples=0, tokens_per_sample=0)
    features, exact = (
        read_features(backbone, few, replace(plan, precision=precision), batch_size=batch_size)
        for precision in (plan.precision, "float32")
    )
    errors = {}
    for key, values in exact.items():
        spread = (values.double() - values.double().mean(0)).norm()
        errors[key] = float((features[key].double() - values.double()).norm() / spread.clamp(min=1e-30))
    layer, level = max(errors, key=lambda key: errors[key])
    return RoundingError(plan.precision, errors[layer, level], layer, level, len(few))
