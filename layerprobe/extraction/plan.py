"""The plan of an extraction: what is read from a model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from layerprobe.messages import unknown
from layerprobe.options import PROBING_PANEL, check_ranges, option
from layerprobe.precision import Precision, check_precision


@dataclass(frozen=True)
class ExtractionPlan:
    """The settings of an extraction. Together with the model and the data they determine every number.

    Attributes:
        layers: Names of the layers; the store has them in the order in which they run. Empty until a backbone is
            chosen.
        noise_levels: Noise levels in [0, 1], ascending; 0 is clean, 1 is pure noise.
        draws: Number of noise draws per sample and noise level; draw d is the same noise at every level.
        pool_cells: Number of cells per grid axis over which tokens are averaged; 1 averages over all tokens, 2
            concatenates the means of 2 x 2 cells of an image, which preserves coarse positions.
        condition: Condition of the model: null for no label; label leaks the labels to the probes, for study only.
        precision: Precision of the network: float32, tf32 or bfloat16; auto is tf32 on GPUs that have it, otherwise
            float32. Features are stored in float32.
        seed: Seed of the noise.
        shard_size: Number of samples per shard.
        token_samples: Number of samples per split whose tokens are kept beside the pooled features, for spatial
            analyses and labels of frames.
        tokens_per_sample: Number of tokens kept per sample, at positions drawn once with the seed. Padded samples keep
            tokens that are not padding, repeated if there are fewer. 0 keeps the whole grid, which spatial analyses
            need.

    Raises:
        ValueError: If a value is out of its range, or a layer is named twice.
    """

    PANEL: ClassVar[str] = PROBING_PANEL

    layers: tuple[str, ...] = ()
    noise_levels: tuple[float, ...] = field(default=(0.1, 0.2, 0.3, 0.5, 0.7, 0.9), metadata=option())
    draws: int = field(default=1, metadata=option(minimum=1, maximum=10_000))
    pool_cells: int = field(default=1, metadata=option(minimum=1, maximum=1024))
    condition: Literal["null", "label"] = field(
        default="null",
        metadata=option(
            "true_labels", value="label", help="Condition the model on the true labels, which leaks them to the probes."
        ),
    )
    precision: Precision = field(default="auto", metadata=option())
    seed: int = 0
    shard_size: int = 512
    token_samples: int = field(default=0, metadata=option(minimum=0, maximum=10**8))
    tokens_per_sample: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "noise_levels", tuple(float(level) for level in self.noise_levels))
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"a layer is named twice in {', '.join(self.layers)}; name each layer once")
        if not all(0 <= level <= 1 for level in self.noise_levels):  # NaN also fails this
            raise ValueError(
                f"noise levels must lie between 0 (clean) and 1 (pure noise), got {list(self.noise_levels)}"
            )
        if not self.noise_levels or list(self.noise_levels) != sorted(set(self.noise_levels)):
            raise ValueError(f"noise levels must be distinct and ascending, got {list(self.noise_levels)}")
        check_ranges(self)
        for name, least in (("shard_size", 1), ("tokens_per_sample", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.tokens_per_sample and not self.token_samples:
            raise ValueError(
                f"tokens_per_sample is {self.tokens_per_sample} but no tokens are kept; pass token_samples"
            )
        if self.condition not in ("null", "label"):
            raise ValueError(unknown("condition", self.condition, ("null", "label")))
        check_precision(self.precision)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be between 0 and 2**63 - 1, got {self.seed}")

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a JSON-compatible dict, without the token fields if no tokens are kept."""
        # Plans without tokens keep the hash of versions without these fields, so their stores stay valid.
        unused = () if self.token_samples else ("token_samples", "tokens_per_sample")
        return {name: value for name, value in asdict(self).items() if name not in unused}

    def hash(self) -> str:
        """Returns a hash of the fields, 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]
