"""How other trainers write a layer pair: a table of facts, one entry for each trainer, and lines made from it.

What was read, with its date, is in each entry. Trainers differ in the number of the first block, in what an option that
is left out means, and in what a 0 means. FLUX-like networks have two lists of blocks, which all these trainers count
through, the first list first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from layerprobe.messages import unknown


@dataclass(frozen=True)
class Trainer:
    """How one trainer writes a layer pair. Options are written as in its configuration, without leading dashes.

    Attributes:
        key: Name for `--for`.
        name: Name of the trainer and its method.
        read: Version or commit that was read, with its date.
        source: Repository and the files that were read.
        form: Form in which its users write options.
        first: Number of the first block.
        student: Option of the student.
        teacher: Option of the teacher; "" if an external encoder teaches.
        weight: Option of the weight; "" if there is none.
        default_student: Number where the option is left out; None if it is required.
        default_teacher: Number where the option is left out; None if it is required, or the student itself is meant.
        student_by_default: Whether a teacher that is left out means the student itself.
        default_weight: Weight where the option is left out; None if it has no single number.
        on: Settings that alignment needs: (option, accepted values, value where it is left out).
        marks: Options by which a configuration is recognized.
        zero_is_first: Whether a 0 also means the first block, in a trainer that counts from 1.
        zero_weight_is_default: Whether a weight of 0 means the default.
        stop_gradient: Option that can let the gradient into the teacher; "" if there is none.
        unread: Options that decide in another way what is aligned, (name, what to write instead); they are refused.
        aliases: Other names of options that the trainer also reads.
        unknown_block: What the trainer does with a block that does not exist.
        runs: Whether this version aligns at all, rather than only declaring the options.
    """

    key: str
    name: str
    read: str
    source: str
    form: Literal["json", "toml", "command"]
    first: Literal[0, 1]
    student: str
    teacher: str = ""
    weight: str = ""
    default_student: int | None = None
    default_teacher: int | None = None
    student_by_default: bool = False
    default_weight: float | None = None
    on: tuple[tuple[str, tuple[bool | str, ...], bool | str], ...] = ()
    marks: tuple[str, ...] = ()
    zero_is_first: bool = False
    zero_weight_is_default: bool = False
    stop_gradient: str = ""
    unread: tuple[tuple[str, str], ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    unknown_block: Literal["stops", "trains without"] = "stops"
    runs: bool = True

    @property
    def options(self) -> tuple[str, ...]:
        """Names of all options that concern the pair."""
        names = (self.student, self.teacher, self.weight, self.stop_gradient, *(name for name, _, _ in self.on))
        return tuple(name for name in dict.fromkeys((*names, *(name for name, _ in self.unread))) if name)


TRAINERS: Mapping[str, Trainer] = {
    one.key: one
    for one in (
        Trainer(
            key="simpletuner",
            name="SimpleTuner, LayerSync",
            read="commit bc8e6ab (after v4.7.0), 2026-08-22",
            source="bghira/SimpleTuner: helpers/training/layersync.py, helpers/models/common.py",
            form="json",
            first=1,
            student="layersync_student_block",
            teacher="layersync_teacher_block",
            weight="layersync_lambda",
            student_by_default=True,
            default_weight=0.2,
            on=(("layersync_enabled", (True,), False),),
            marks=("layersync_student_block", "layersync_teacher_block", "layersync_lambda", "layersync_enabled"),
            zero_is_first=True,
            zero_weight_is_default=True,
        ),
        Trainer(
            key="simpletuner-crepa",
            name="SimpleTuner, CREPA with a layer of the model as teacher",
            read="commit bc8e6ab (after v4.7.0), 2026-08-22",
            source="bghira/SimpleTuner: helpers/training/crepa.py, helpers/models/common.py",
            form="json",
            first=0,
            student="crepa_block_index",
            teacher="crepa_teacher_block_index",
            weight="crepa_lambda",
            student_by_default=True,
            default_weight=0.5,
            on=(("crepa_enabled", (True,), False), ("crepa_feature_source", ("backbone", "self_flow"), "encoder")),
            marks=("crepa_feature_source",),
            unread=(
                ("crepa_self_flow", "crepa_feature_source"),
                ("crepa_use_backbone_features", "crepa_feature_source"),
            ),
        ),
        Trainer(
            key="musubi",
            name="musubi-tuner, Self-Flow for FLUX.2",
            read="v0.3.4 (commit 30c658c), 2026-06-24",
            source="kohya-ss/musubi-tuner: flux_2_train_network_self_flow.py",
            form="toml",
            first=0,
            student="student_feature_layer",
            teacher="teacher_feature_layer",
            weight="self_flow_gamma",
            default_weight=0.8,
            on=(("self_flow", (True,), False),),
            marks=("student_feature_layer", "teacher_feature_layer"),
            runs=False,
        ),
        Trainer(
            key="musubi-ltx2",
            name="musubi-tuner fork for LTX-2, Self-Flow",
            read="branch ltx-2, commit e0e570f, 2026-08-01",
            source="AkaneTendo25/musubi-tuner: self_flow.py, docs/ltx_2.md",
            form="command",
            first=0,
            student="self_flow_args.student_block_idx",
            teacher="self_flow_args.teacher_block_idx",
            weight="self_flow_args.lambda_self_flow",
            default_student=16,
            default_teacher=32,
            default_weight=0.1,
            on=(("self_flow", (True,), False),),
            marks=("self_flow_args", "self_flow_args.student_block_idx", "self_flow_args.teacher_block_idx"),
            unread=(
                ("self_flow_args.student_block_ratio", "student_block_idx"),
                ("self_flow_args.teacher_block_ratio", "teacher_block_idx"),
            ),
        ),
        Trainer(
            key="takenoko",
            name="Takenoko, LayerSync for Wan",
            read="commit 72c42ad, 2026-05-16",
            source="seruva19/takenoko: src/enhancements/layer_sync/config.py and helper.py",
            form="toml",
            first=1,
            student="layer_sync_source_block",
            teacher="layer_sync_target_block",
            weight="layer_sync_weight",
            default_student=8,
            student_by_default=True,
            default_weight=0.2,
            on=(("enable_layer_sync", (True,), False),),
            marks=("layer_sync_source_block", "layer_sync_target_block", "layer_sync_weight", "enable_layer_sync"),
            zero_is_first=True,
            stop_gradient="layer_sync_detach_guidance",
            unread=(("layer_sync_pairs", "layer_sync_source_block and layer_sync_target_block"),),
            aliases=(
                ("layersync_enabled", "enable_layer_sync"),
                ("layersync_student_block", "layer_sync_source_block"),
                ("layersync_teacher_block", "layer_sync_target_block"),
                ("layersync_lambda", "layer_sync_weight"),
                ("layersync_detach_guidance", "layer_sync_detach_guidance"),
            ),
            unknown_block="trains without",
        ),
        Trainer(
            key="layersync",
            name="LayerSync, code of the paper (SiT)",
            read="commit 4001d6d, 2026-02-12",
            source="vita-epfl/LayerSync: train.py, models.py, transport/transport.py",
            form="command",
            first=1,
            student="encoder-depth",
            teacher="gt-encoder-depth",
            weight="reg-weight",
            default_student=8,
            default_teacher=8,
            default_weight=0.2,
            on=(("loss-type", ("layer_sync",), "layer_sync"),),
            marks=("gt-encoder-depth", "reg-weight"),
        ),
        Trainer(
            key="sra",
            name="SRA, code of the paper (SiT and DiT)",
            read="commit 1723f85, 2026-07-29",
            source="vvvvvjdy/SRA: SiT-SRA and DiT-SRA, train.py and models",
            form="command",
            first=1,
            student="block-out-s",
            teacher="block-out-t",
            default_student=4,
            default_teacher=8,
            marks=("block-out-s", "block-out-t"),
        ),
        Trainer(
            key="sra-dts",
            name="SRA with mixed noise levels, code of the paper (SiT)",
            read="commit 1723f85, 2026-07-29",
            source="vvvvvjdy/SRA: SiT-SRA_DTS_AS, arguments.py, model.py and loss.py",
            form="command",
            first=1,
            student="block-out-s",
            teacher="block-out-t",
            weight="align-weight",
            default_student=4,
            default_teacher=8,
            default_weight=0.5,
            on=(("use-alignment-loss", (True,), False),),
            marks=("use-alignment-loss", "align-weight", "dual-time-scheduling", "teacher-t"),
        ),
        Trainer(
            key="self-flow",
            name="Self-Flow, self-flow-torch (SiT; the authors published no training code)",
            read="commit 34bf89b, 2026-08-17",
            source="gregoiremrr/self-flow-torch: train.py, training/networks.py; authors' model: commit 53db4f0",
            form="command",
            first=1,
            student="student-layer",
            teacher="teacher-layer",
            weight="self-flow-weight",
            default_student=4,
            default_teacher=8,
            default_weight=0.8,
            on=(("preset", ("cifar10-self-flow",), "cifar10-self-flow"), ("self-flow", (True,), True)),
            marks=("student-layer", "teacher-layer", "self-flow-weight"),
        ),
        Trainer(
            key="repa",
            name="REPA, code of the paper (SiT)",
            read="commit 67f7145, 2025-01-23",
            source="sihyun-yu/REPA: train.py, models/sit.py",
            form="command",
            first=1,
            student="encoder-depth",
            weight="proj-coeff",
            default_student=8,
            default_weight=0.5,
            marks=("proj-coeff", "enc-type"),
        ),
    )
}


def trainer_named(key: str) -> Trainer:
    """Returns the entry of a trainer.

    Raises:
        ValueError: If there is none of this name.
    """
    if key not in TRAINERS:
        raise ValueError(unknown("trainer", key, TRAINERS))
    return TRAINERS[key]


def lines_for(
    trainer: Trainer, student: int, teacher: int | None, num_blocks: int, *, weight: float | None = None
) -> str:
    """Returns the options of a pair as users of a trainer write them, ready to paste.

    Args:
        trainer: Trainer that is to align the pair.
        student: Block that learns, counted from 0 through all blocks.
        teacher: Block that teaches; None for a trainer with an external encoder, and only then.
        num_blocks: Number of blocks of the network.
        weight: Weight of the alignment; by default the trainer's own default, since weights do not compare across
            methods.

    Raises:
        ValueError: If a block does not exist, or the trainer has no option for the teacher or the weight.
    """
    for block in (student, teacher):
        if block is not None and not 0 <= block < num_blocks:
            raise ValueError(f"there is no block {block} among {num_blocks} blocks; use 0 to {num_blocks - 1}")
    if (teacher is None) != (not trainer.teacher):
        takes = "takes a teacher layer" if trainer.teacher else "aligns with an external encoder and takes no teacher"
        raise ValueError(f"{trainer.name} {takes}, got {teacher}")
    if weight is not None and not trainer.weight:
        raise ValueError(f"{trainer.name} has no option for the weight; leave out the weight {weight:g}")
    settings: dict[str, bool | str | float] = {name: accepted[0] for name, accepted, _ in trainer.on}
    settings[trainer.student] = student + trainer.first
    if teacher is not None:
        settings[trainer.teacher] = teacher + trainer.first
    if trainer.weight and (weight is not None or trainer.default_weight is not None):
        settings[trainer.weight] = weight if weight is not None else trainer.default_weight or 0.0
    return _written(settings, trainer)


def _written(settings: Mapping[str, bool | str | float], trainer: Trainer) -> str:
    if trainer.form == "json":
        return json.dumps(settings, indent=2)
    if trainer.form == "toml":
        return "\n".join(f"{name} = {json.dumps(value)}" for name, value in settings.items())
    words = []
    for name, value in settings.items():
        group, _, inner = name.rpartition(".")
        if group:
            words += [f"{inner}={value}"] if f"--{group}" in words else [f"--{group}", f"{inner}={value}"]
        else:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return " ".join(words)
