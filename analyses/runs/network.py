"""A network with fresh weights, as `layerprobe train` makes it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from layerprobe.messages import unknown
from layerprobe.noise import Prediction, ScheduleName
from layerprobe.options import NETWORK_PANEL, check_ranges, option

if TYPE_CHECKING:
    from layerprobe.backbones import Backbone, SiTConfig

# The paths of SiT and the names of their schedules.
SitPath = Literal["linear", "gvp", "vp"]
PATHS: dict[SitPath, ScheduleName] = {"linear": "sit", "gvp": "sit-gvp", "vp": "sit-vp"}


@dataclass(frozen=True)
class NewNetwork:
    """A SiT with fresh weights; sizes that are passed beside a preset replace those of the preset.

    Attributes:
        preset: Preset of the sizes: tiny or small, with patches that suit the data, or S/2 to XL/8.
        patch_size: Edge of a patch, or one per axis such as 1,4,4; 2, or the preset's, if not given.
        width: Width of a token; 128, or the preset's, if not given.
        depth: Number of blocks; 8, or the preset's, if not given.
        heads: Number of attention heads; 4, or the preset's, if not given.
        path: Path from data to noise: linear, gvp or vp; linear if not given.
        prediction: Prediction target: velocity, eps, x0, v or score; velocity if not given.

    Raises:
        ValueError: If the path is unknown.
    """

    preset: str | None = field(default=None, metadata=option(panel=NETWORK_PANEL))
    patch_size: tuple[int, ...] | None = field(default=None, metadata=option(panel=NETWORK_PANEL))
    width: int | None = field(default=None, metadata=option(panel=NETWORK_PANEL, minimum=2, maximum=2**16))
    depth: int | None = field(default=None, metadata=option(panel=NETWORK_PANEL, minimum=1, maximum=1000))
    heads: int | None = field(default=None, metadata=option(panel=NETWORK_PANEL, minimum=1, maximum=4096))
    path: SitPath | None = field(default=None, metadata=option(panel=NETWORK_PANEL))
    prediction: Prediction | None = field(default=None, metadata=option(panel=NETWORK_PANEL))

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.path not in (None, *PATHS):
            raise ValueError(unknown("path", self.path, PATHS))

    def config(self, shape: tuple[int, ...], num_classes: int) -> SiTConfig:
        """Returns the configuration of the network.

        Args:
            shape: Shape (C, *grid) of one sample.
            num_classes: Number of classes; 0 for an unconditional model.

        Raises:
            ValueError: If the sizes do not fit together or do not fit the shape.
        """
        from layerprobe.backbones import SiTConfig

        edges = self.patch_size
        patch_size = edges[0] if edges is not None and len(edges) == 1 else edges
        if self.preset is None:
            patch_size = 2 if patch_size is None else patch_size
            return SiTConfig(shape, patch_size, self.width or 128, self.depth or 8, self.heads or 4, num_classes)
        config = SiTConfig.preset(self.preset, shape=shape, num_classes=num_classes, patch_size=patch_size)
        return replace(
            config,
            hidden_size=self.width or config.hidden_size,
            depth=self.depth or config.depth,
            num_heads=self.heads or config.num_heads,
        )

    def build(self, shape: tuple[int, ...], num_classes: int, *, seed: int, device: str = "auto") -> Backbone:
        """Returns the network.

        Args:
            shape: Shape (C, *grid) of one sample.
            num_classes: Number of classes; 0 for an unconditional model.
            seed: Seed of the weights.
            device: Device of the network.

        Raises:
            ValueError: If the sizes do not fit together or do not fit the shape.
        """
        from layerprobe.backbones import new_sit
        from layerprobe.checkpoints import resolve_device
        from layerprobe.noise import schedule_from_name

        schedule = schedule_from_name(PATHS[self.path or "linear"])
        config = self.config(shape, num_classes)
        backbone = new_sit(config, seed=seed, schedule=schedule, prediction=self.prediction or "velocity")
        backbone.module.to(resolve_device(device))
        return backbone
