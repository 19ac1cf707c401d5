"""Compares every class of diffusers with its own pipeline's call, and makes the table of classes in the docs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers_models import CASES, Case
from torch import Tensor, nn

from layerprobe.backbones.base import Backbone, layer_shapes
from layerprobe.backbones.diffusers.class_table import CLASSES
from layerprobe.backbones.diffusers.opening import is_diffusers, open_diffusers
from layerprobe.capture import capture, hook_layer
from layerprobe.noise.predictions import convert_prediction
from layerprobe.noise.schedules import DDPM, LinearPath
from layerprobe.parts import NAMES, find_part

BY_NAME = {case.id: case for case in CASES}
HEADER = (
    "| class | input | layers, in running order | the image in their outputs | parts of blocks | native time | "
    "configurations run |"
)
# Filled by the checks that pass; what the documentation may claim.
PASSED: dict[str, dict[str, Any]] = {}


def opened(case: Case, folder: Path, **options: Any) -> tuple[nn.Module, Backbone]:
    model = case.save(folder)
    told = {"shape": case.shape} if case.tell_shape else {}
    told |= {"num_classes": case.num_classes} if "num_classes" in case.options else {}
    assert is_diffusers(folder)
    return model, open_diffusers(folder, **told, **options)


def execution_order(backbone: Backbone, x: Tensor, level: Tensor) -> list[str]:
    """The names of all submodules in the order in which they give their outputs, by hooks of PyTorch alone."""
    order: list[str] = []
    handles = [
        part.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, part in backbone.module.named_modules()
    ]
    backbone.predict(x, level)
    for handle in handles:
        handle.remove()
    return order


def noisy(case: Case, rows: int = 2) -> Tensor:
    return torch.randn(rows, *case.shape, generator=torch.Generator().manual_seed(1))


def moment(case: Case) -> tuple[Any, float, float, float]:
    """The case's scheduler in the middle of sampling: (scheduler, its time, noise level there and after one step)."""
    scheduler: Any = type(case.scheduler).from_config(case.scheduler.config)
    if hasattr(scheduler.config, "use_dynamic_shifting") and scheduler.config.use_dynamic_shifting:
        scheduler.set_timesteps(10, mu=1.0)
    else:
        scheduler.set_timesteps(10)
    t = scheduler.timesteps[4]
    if isinstance(case.scheduler, (diffusers.DDIMScheduler, diffusers.CogVideoXDDIMScheduler)):
        stride = scheduler.config.num_train_timesteps // 10
        ends = [float(scheduler.alphas_cumprod[int(i)]) for i in (t, t - stride)]
        levels = [math.sqrt(1 - a) / (math.sqrt(a) + math.sqrt(1 - a)) for a in ends]
    else:
        levels = [float(s) for s in scheduler.sigmas[4:6]]
        if scheduler.config.get("use_flow_sigmas"):
            t = 1000 * scheduler.sigmas[4]  # This scheduler cuts its times down to whole numbers.
        levels = [1 - s for s in levels] if scheduler.config.get("invert_sigmas") else levels
        if scheduler.config.num_train_timesteps == 1:
            t = 1000 * (1 - t)  # OmniGen's counts from 0 at noise to 1 at data.
    return scheduler, float(t), levels[0], levels[1]


def check(case: Case, folder: Path) -> Backbone:
    """Everything that is claimed of a class; the table in the docs is made of what passes."""
    model, backbone = opened(case, folder)
    assert backbone.shape == case.shape
    assert backbone.num_classes == (case.num_classes or 0)
    x = noisy(case)
    with torch.inference_mode():
        if isinstance(case.scheduler, dict):
            check_edm(case, model, backbone, x)
        else:
            check_step(case, model, backbone, x)
        level = torch.full((2,), 0.4)
        order = execution_order(backbone, x, level)
        assert [name for name in order if name in backbone.layers] == list(backbone.layers)
        shapes = layer_shapes(backbone)
        assert list(shapes) == list(backbone.layers)
        assert len(shapes) == case.blocks
        assert next(iter(shapes.values())) == case.tokens
        inside = inner_layers(backbone, x[:1])
        if CLASSES[case.name].keeps_grid:
            assert inside
            assert {len(tokens[0]) for tokens in inside.values()} == {case.tokens[0]}
        check_places(case, backbone, x[:1], [name for name in inside if name.endswith((".q", ".mlp"))])
    PASSED[case.id] = verified(case, backbone, inside)
    return backbone


def verified(case: Case, backbone: Backbone, inside: Iterable[str]) -> dict[str, Any]:
    """What was checked of the class: its line of the table, and of the record in the package."""
    family, schedule = CLASSES[case.name], backbone.schedule
    if isinstance(schedule, LinearPath):
        time = f"{schedule.data_time:g} data, {schedule.noise_time:g} noise"
    else:
        time = "0, 1, … 999" if isinstance(schedule, DDPM) else "σ"
    grid = ("C, L", "C, H, W", "C, F, H, W")[len(case.shape) - 2]
    read = {name.split(".", 2)[2] for name in inside}
    return {
        "class": case.name,
        "input": f"{case.modality} ({grid})",
        "layers": list(family.layers),
        "in_turns": family.interleaved,
        "image": case.image,
        "parts": [part for part in NAMES if part in read],
        "time": time,
        "configurations": sum(other.name == case.name for other in CASES),
    }


def record(folder: Path) -> list[dict[str, Any]]:
    """The covered classes, of the checks that passed; those that have not run yet run now."""
    for i, case in enumerate(CASES):
        if case.id not in PASSED:
            check(case, folder / str(i))
    first = {case.name: PASSED[case.id] for case in reversed(CASES)}
    return [first[name] for name in dict.fromkeys(case.name for case in CASES)]


def table(classes: Iterable[Mapping[str, Any]]) -> str:
    """The table of the documentation."""
    lines = []
    for one in classes:
        layers = (" and " if one["in_turns"] else ", ").join(f"`{name}`" for name in one["layers"])
        turns, parts = ", in turns" if one["in_turns"] else "", ", ".join(one["parts"]) or "—"
        cells = (f"`{one['class']}`", one["input"], layers + turns, one["image"], parts, one["time"])
        lines.append(f"| {' | '.join(cells)} | {one['configurations']} |")
    return "\n".join([HEADER, "|---" * 7 + "|", *lines])


def check_step(case: Case, model: Any, backbone: Backbone, x: Tensor) -> None:
    scheduler, time, level, next_level = moment(case)
    t = torch.full((2,), time)
    direct = case.direct(model, x, t.long() if backbone.schedule.integer_time else t)
    levels = torch.full((2,), level, dtype=torch.float64)
    # Mochi's scheduler counts from noise to data, so its network points that way.
    sign = -1 if scheduler.config.get("invert_sigmas") else 1
    torch.testing.assert_close(sign * backbone.predict(x, levels), direct, rtol=1e-5, atol=1e-5)
    assert float(direct.std()) > 0.01  # A network that gives zeros would agree with anything.
    following = scheduler.step(direct, scheduler.timesteps[4], x, return_dict=False)[0]
    # One deterministic step along the path: the same x_0 and noise, less of it.
    velocity = backbone(x, levels)
    clean = convert_prediction(velocity, x, levels, backbone.schedule, source="velocity", to="x0")
    noise = convert_prediction(velocity, x, levels, backbone.schedule, source="velocity", to="eps")
    after = backbone.schedule.corrupt(clean, noise, torch.full((2,), next_level, dtype=torch.float64))
    torch.testing.assert_close(after, following, rtol=1e-3, atol=1e-3)


def check_edm(case: Case, model: Any, backbone: Backbone, x: Tensor) -> None:
    """EDM with v and sigma_data 1 is the quarter circle of v-prediction: x_0 = cos(a) z - sin(a) v, z = cos(a) x."""
    angle = torch.tensor([0.5, 1.2])
    v = case.direct(model, torch.cos(angle)[:, None, None] * x, angle * 2 / math.pi)
    clean = torch.cos(angle)[:, None, None] ** 2 * x - torch.sin(angle)[:, None, None] * v
    levels = torch.tan(angle.double()) / (1 + torch.tan(angle.double()))
    torch.testing.assert_close(backbone.predict(x, levels), clean, rtol=1e-4, atol=1e-5)


def inner_layers(backbone: Backbone, x: Tensor) -> dict[str, Tensor]:
    """Tokens of the parts of the first block of each list that run once; what is not the image's is refused."""
    firsts = [layer for layer in backbone.layers if layer.endswith(".0")]
    names = [f"{block}.{part}" for block in firsts for part in NAMES]
    outputs: dict[str, list[Any]] = {name: [] for name in names if find_part(backbone.module, name)}
    hooks = [hook_layer(backbone.module, name, lambda name, out: outputs[name].append(out)) for name in outputs]
    backbone.predict(x, torch.full((1,), 0.4))
    for hook in hooks:
        hook.remove()
    readable = {}
    for name, found in outputs.items():
        if len(found) == 1:
            with suppress(ValueError):
                readable[name] = backbone.tokens(found[0], name)
    return readable


def check_places(case: Case, backbone: Backbone, x: Tensor, inside: list[str]) -> None:
    """What is changed at one place of the input changes most at the same place of every layer's tokens."""
    place = [edge - 1 if axis == 0 else edge // 4 for axis, edge in enumerate(case.shape[1:])]
    changed = x.clone()
    changed[(0, slice(None), *place)] += 5
    level = torch.full((1,), 0.4)
    layers = [*backbone.layers, *inside]
    with capture(backbone.module, layers, tokens=backbone.tokens, transform=torch.clone) as before:
        backbone.predict(x, level)
    with capture(backbone.module, layers, tokens=backbone.tokens, transform=torch.clone) as after:
        backbone.predict(changed, level)
    frames = case.shape[1] if len(case.shape) == 4 else 1
    image = case.shape[2:] if len(case.shape) == 4 else case.shape[1:]
    for name in layers:
        difference = (after[name] - before[name])[0].norm(dim=-1)
        stride = (frames * math.prod(image) / len(difference)) ** (1 / len(image))
        grid = [frames, *[round(edge / stride) for edge in image]]
        assert math.prod(grid) == len(difference), name
        found = [int(i) for i in torch.unravel_index(difference.argmax(), grid)]
        wanted = [place[0] if frames > 1 else 0, *[int(p / stride) for p in place[-len(image) :]]]
        # Convolutions spread over their neighbors; those of Sana's feed-forward in a video also over the frames.
        reach = [
            int("SanaVideo" in case.name),
            *[3 if "UNet" in case.name else 1 if "Sana" in case.name else 0] * len(image),
        ]
        assert all(abs(a - b) <= r for a, b, r in zip(found, wanted, reach, strict=True)), (name, found, wanted)
