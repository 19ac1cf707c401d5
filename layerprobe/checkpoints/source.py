"""Which checkpoint is opened, and how."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from layerprobe.files import PASS_CHECKPOINT, absolute_source, check_there, is_no_path, refuse_memory
from layerprobe.noise import Prediction, ScheduleName
from layerprobe.options import CHECKPOINT_PANEL, check_ranges, option, to_record
from layerprobe.precision import WeightType

if TYPE_CHECKING:
    from layerprobe.backbones import Backbone


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint and how it is opened. Fields that are None are left to the checkpoint; see `open_checkpoint`.

    Attributes:
        path: Weight file or folder of them, diffusers folder, or 'digits' for the embedded checkpoint.
        weights: Set of weights of a file that has several, such as ema, model or state_dict.net; the averaged ones if
            not given.
        family: Family of a file that leaves it open: sit, layersync, disploss, dit, repa, sra, ...
        num_heads: Number of attention heads, for widths that belong to no preset.
        model: Network of your own: file.py:factory or package.module:Class.
        subfolder: Folder of the model in a diffusers pipeline, if it is not the usual one.
        pipeline: Diffusers folder of the model that a single file of the original code belongs to.
        lora: LoRA adapter on top of a diffusers model.
        lora_alpha: Alpha of a LoRA adapter that does not say it; its rank if not given.
        dtype: Type to hold the weights in: float32, or stored for the types of the file. Weights of 16 bits take half
            the memory, and the network is then computed in bfloat16. If not given, float32, but a diffusers model
            that is stored in bfloat16 throughout stays so.
        layers: Names or patterns of layers, separated by commas: 'blocks.*,mid'; 'blocks.*.attn:input' for the input
            of a module, 'blocks.*.attn.q' for queries, and so k, v, out, and 'blocks.*.mlp'.
        schedule: Noise schedule: sit, sit-gvp, sit-vp, flow, flow-1000, edm, ddpm-linear, ddpm-scaled_linear or
            ddpm-cosine.
        prediction: Prediction target: velocity, eps, x0, v or score.
        shape: Shape of one input, if the file does not contain it: 3,32,32.
        num_classes: Number of classes, if the file does not contain it; 0 for none.
        value_range: What the values -1 and 1 of the data are to the network: 0,1 if it was trained on pixels from 0 to
            1; a pair for each channel if they differ.
    """

    path: str = field(metadata=option("checkpoint", is_argument=True))
    weights: str | None = field(default=None, metadata=option(panel=CHECKPOINT_PANEL))
    family: str | None = field(default=None, metadata=option(panel=CHECKPOINT_PANEL))
    num_heads: int | None = field(default=None, metadata=option(panel=CHECKPOINT_PANEL, maximum=4096))
    model: str | None = field(default=None, metadata=option(panel=CHECKPOINT_PANEL))
    subfolder: str | None = field(default=None, metadata=option(panel=CHECKPOINT_PANEL))
    pipeline: str | None = field(default=None, metadata=option(panel=CHECKPOINT_PANEL))
    lora: str | None = field(default=None, metadata=option(panel=CHECKPOINT_PANEL))
    lora_alpha: float | None = field(default=None, metadata=option(panel=CHECKPOINT_PANEL))
    dtype: WeightType | None = field(default=None, metadata=option(panel=CHECKPOINT_PANEL))
    layers: tuple[str, ...] | None = field(default=None, metadata=option(panel=CHECKPOINT_PANEL))
    schedule: ScheduleName | None = field(default=None, metadata=option(panel=CHECKPOINT_PANEL))
    prediction: Prediction | None = field(default=None, metadata=option(panel=CHECKPOINT_PANEL))
    shape: tuple[int, ...] | None = field(default=None, metadata=option(panel=CHECKPOINT_PANEL))
    num_classes: int | None = field(default=None, metadata=option(panel=CHECKPOINT_PANEL, maximum=10**6))
    value_range: tuple[float, ...] | None = field(default=None, metadata=option(panel=CHECKPOINT_PANEL))

    def __post_init__(self) -> None:
        check_ranges(self)

    def options(self) -> dict[str, Any]:
        """Returns the options that `open_checkpoint` takes."""
        options = to_record(self)
        del options["path"]
        return options

    def absolute(self) -> CheckpointSource:
        """Returns the same source with absolute paths, so that it can be opened from any working directory."""
        model = self.model
        if model is not None:
            file, colon, name = model.rpartition(":")
            model = f"{absolute_source(file)}{colon}{name}"
        lora = None if self.lora is None else absolute_source(self.lora)
        pipeline = None if self.pipeline is None else absolute_source(self.pipeline)
        return replace(self, path=absolute_source(self.path), model=model, pipeline=pipeline, lora=lora)

    def check(self) -> None:
        """Checks that there is something to open, without importing what would open it.

        Raises:
            FileNotFoundError: If the path does not exist.
        """
        if not is_no_path(self.path):
            check_there(self.path, "checkpoint file", PASS_CHECKPOINT)

    def open(self, *, device: str = "auto") -> Backbone:
        """Opens the checkpoint; see `open_checkpoint`."""
        from layerprobe.checkpoints.opening import open_checkpoint

        refuse_memory(self.path, "network")
        return open_checkpoint(self.path, device=device, **self.options())

    def describe(self) -> dict[str, Any]:
        """Returns what the checkpoint is, as JSON; see `describe_checkpoint`."""
        from layerprobe.checkpoints.opening import describe_checkpoint

        return describe_checkpoint(self.path, **self.options())
