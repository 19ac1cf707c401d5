"""Published families: what a file tells, what its time and output mean, and how it becomes a backbone.

The networks are compared with the forward pass written by hand in test_sit.py.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_sit import official_shapes, plain_sit
from torch import Tensor

from layerprobe.backbones import families
from layerprobe.backbones.base import Backbone
from layerprobe.backbones.families import FAMILIES, build, recognize
from layerprobe.backbones.family import Family, Opened, _convention
from layerprobe.backbones.sit import SiTConfig, sincos_position
from layerprobe.capture import capture
from layerprobe.noise.predictions import convert_prediction
from layerprobe.noise.schedules import DDPM, GVP, LinearPath

KIN = [name for name in FAMILIES if name != "mdm"]  # those with the names of SiT
CONFIG = SiTConfig(shape=(3, 8, 8), patch_size=2, hidden_size=32, depth=4, num_heads=4, num_classes=5)
WIDE = official_shapes(depth=1, d=384, patch=2, edge=8, c=3, classes=5, sigma=False)
TWICE = ("sit", "layersync", "disploss", "dit", "sra-dit")
ONCE = ("sit", "layersync", "disploss", "dit", "repa", "sra")
HEAD = {"repa": "projectors.0.2.weight", "sra": "ap_head.linear1.weight", "sra-dit": "ap_head.linear1.weight"}
# What each family's script writes, and no other family's does.
ARGS: dict[str, dict[str, Any]] = {
    "sit": {"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity"},
    "layersync": {"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity", "gt_encoder_depth": 16},
    "disploss": {"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity", "disp": True},
    "dit": {"model": "DiT-XL/2"},
    "repa": {"model": "SiT-XL/2", "path_type": "linear", "prediction": "v", "proj_coeff": 0.5},
    "sra": {"model": "SiT-XL/2", "path_type": "linear", "prediction": "v", "block_out_s": 8},
    "sra-dit": {"model": "DiT-XL/2", "block_out_s": 8},
}


def state(
    *, sigma: bool = False, qk_norm: bool = False, extra: Mapping[str, tuple[int, ...]] = {}
) -> dict[str, Tensor]:
    """A file's tensors, every one of them random."""
    shapes = official_shapes(depth=4, d=32, patch=2, edge=8, c=3, classes=5, sigma=sigma) | dict(extra)
    if qk_norm:
        names = ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias")
        shapes |= {f"blocks.{i}.attn.{name}": (8,) for i in range(4) for name in names}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def file_of(family: str, **options: Any) -> dict[str, Tensor]:
    """What the family's script leaves: with the heads that it trains, and as many channels as it has."""
    extra = {HEAD[family]: (7, 32)} if family in HEAD else {}
    return state(sigma=family not in ("repa", "sra"), extra=extra, **options)


def filled(opened: Opened) -> Backbone:
    opened.backbone.module.load_state_dict(opened.tensors, assign=True)
    opened.backbone.module.eval()
    return opened.backbone


# --- which family


@pytest.mark.parametrize(
    ("tensors", "families"),
    [
        (state(sigma=True), TWICE),
        (state(sigma=False), ONCE),
        (state(sigma=True, qk_norm=True), ("sra-dit",)),
        (state(sigma=False, qk_norm=True), ("repa", "sra")),
        (file_of("repa"), ("repa",)),
        (state(extra={"decoder_blocks.0.attn.qkv.bias": (96,)}), ("repa",)),
        (file_of("sra"), ("sra",)),
        (file_of("sra-dit"), ("sra-dit",)),
        (state(extra={"feat_rope.freqs_cos": (16, 8)}), ("lightningdit",)),
        (state(extra={"blocks.0.mlp.w3.weight": (32, 80)}), ("lightningdit",)),
        (state(extra={"blocks.0.norm1.weight": (32,)}), ("lightningdit",)),
        (state(extra={"blocks.0.adaLN_modulation.1.bias": (128,)}), ("lightningdit",)),
        ({"b1.weight": torch.zeros(3)}, ()),
        ({}, ()),
    ],
)
def test_names_and_shapes_tell_the_family_as_far_as_they_can(
    tensors: dict[str, Tensor], families: tuple[str, ...]
) -> None:
    assert recognize(tensors) == families


@pytest.mark.parametrize("family", ARGS)
def test_training_arguments_tell_families_apart_that_names_do_not(family: str) -> None:
    assert recognize(state(sigma=family not in ("repa", "sra")), ARGS[family]) == (family,)


def test_arguments_of_a_script_like_repas_leave_its_time_direction_only() -> None:
    assert recognize(state(), {"model": "SiT-B/2", "path_type": "linear"}) == ("repa", "sra")
    assert recognize(state(), {"lr": 1e-4}) == ONCE


def test_names_win_over_arguments_that_contradict_them() -> None:
    assert recognize(file_of("repa"), ARGS["sra"]) == ("repa",)
    assert recognize(state(sigma=True), ARGS["repa"]) == TWICE


# --- what it becomes


@pytest.mark.parametrize("family", ARGS)
@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_blocks_and_output_equal_a_forward_pass_written_by_hand(family: str, qk_norm: bool) -> None:
    tensors = file_of(family, qk_norm=qk_norm)
    opened = build(family, tensors, args=ARGS[family], num_heads=4)
    backbone = filled(opened)
    assert opened.unused == ((HEAD[family],) if family in HEAD else ())
    assert (backbone.shape, backbone.num_classes) == ((3, 8, 8), 5)
    assert backbone.layers == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")
    x, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 4, 2])
    level = torch.tensor([0.1, 0.5, 0.9])
    time = backbone.schedule.native_time(level).float()
    for condition, row in ((labels, labels), (None, torch.full((3,), 5))):
        with capture(backbone.module, backbone.layers) as outputs:
            prediction = backbone.predict(x, level, condition)
        *blocks, expected = plain_sit(tensors, CONFIG, x, time, row)
        sign = -1 if FAMILIES[family].schedule == "sit" else 1
        # Times up to 999 lose three digits in the angles, differently in the two.
        close = {"rtol": 1e-3, "atol": 1e-3} if FAMILIES[family].prediction == "eps" else {"rtol": 1e-5, "atol": 1e-5}
        for got, wanted in zip(outputs.values(), blocks, strict=True):
            torch.testing.assert_close(got, wanted, **close)
        torch.testing.assert_close(prediction, sign * expected, **close)


@pytest.mark.parametrize("family", ["sit", "layersync", "disploss", "repa", "sra"])
@torch.no_grad()
def test_flow_families_differ_in_the_direction_of_time(family: str) -> None:
    """At noise level 0.2 the network is told 0.8 and gives data - noise, or is told 0.2 and gives noise - data."""
    tensors = file_of(family)
    backbone = filled(build(family, tensors, num_heads=4))
    x, label = torch.randn(2, 3, 8, 8), torch.tensor([1, 3])
    data_is_one = family in ("sit", "layersync", "disploss")
    told = plain_sit(tensors, CONFIG, x, torch.full((2,), 0.8 if data_is_one else 0.2), label)[-1]
    torch.testing.assert_close(backbone(x, torch.full((2,), 0.2), label), -told if data_is_one else told)


@pytest.mark.parametrize("family", ["dit", "sra-dit"])
@torch.no_grad()
def test_dit_families_give_the_noise_of_a_thousand_linear_betas(family: str) -> None:
    tensors = file_of(family)
    backbone = filled(build(family, tensors, num_heads=4))
    x, label = torch.randn(2, 3, 8, 8), torch.tensor([1, 3])
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[300]
    level = (1 / (1 + (abar / (1 - abar)).sqrt())).repeat(2)
    eps = plain_sit(tensors, CONFIG, x, torch.full((2,), 300.0), label)[-1]
    x0 = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
    velocity = backbone(x, level, label)
    for kind, wanted in (("eps", eps), ("x0", x0)):
        got = convert_prediction(velocity, x, level, backbone.schedule, source="velocity", to=kind)
        torch.testing.assert_close(got, wanted.float(), rtol=1e-3, atol=1e-3)  # the angles' digits, see above


@torch.no_grad()
def test_repas_early_names_are_those_of_the_later_blocks() -> None:
    """`decoder_blocks.0` follows the last of `blocks`, where the projectors stood."""
    tensors = file_of("repa")
    early = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        index, _, rest = rest.partition(".")
        early[f"decoder_blocks.{int(index) - 3}.{rest}" if part == "blocks" and int(index) >= 3 else name] = tensor
    assert "decoder_blocks.0.attn.qkv.weight" in early
    assert recognize(early) == ("repa",)
    opened = build("repa", early, num_heads=4)
    assert {name: id(tensor) for name, tensor in opened.tensors.items()} == {
        name: id(tensor) for name, tensor in tensors.items() if name != HEAD["repa"]
    }
    assert opened.unused == (HEAD["repa"],)
    assert len(filled(opened).layers) == 4


def test_repa_e_tells_the_normalization_in_front_of_its_network() -> None:
    """Its network takes latents that are normalized by running statistics, not those of Stable Diffusion's VAE."""
    statistics = {"bn.running_mean": torch.tensor([0.5, -1.0, 2.0]), "bn.running_var": torch.tensor([4.0, 1.0, 0.25])}
    tensors = state(extra={"projectors.0.2.weight": (7, 32)}) | statistics | {"bn.num_batches_tracked": torch.tensor(9)}
    assert recognize(tensors) == ("repa",)
    opened = build("repa", tensors, num_heads=4)
    assert set(statistics) < set(opened.unused)
    assert "(z - 0.5, -1, 2) * 0.5, 1, 2 per channel" in opened.latents
    assert build("repa", file_of("repa"), num_heads=4).latents == ""


def test_repa_with_twice_the_channels_gives_the_first_half() -> None:
    tensors = state(sigma=True, extra={HEAD["repa"]: (7, 32)})
    assert recognize(tensors) == ("repa",)
    backbone = filled(build("repa", tensors, num_heads=4))
    assert backbone(torch.zeros(1, 3, 8, 8), torch.tensor([0.5])).shape == (1, 3, 8, 8)


def test_heads_of_another_family_are_not_passed_over() -> None:
    opened = build("sit", file_of("repa"), num_heads=4)
    assert opened.unused == ()
    with pytest.raises(RuntimeError, match="projectors"):
        opened.backbone.module.load_state_dict(opened.tensors, assign=True)


@pytest.mark.parametrize("family", KIN)
def test_building_costs_no_memory_and_works_wherever_the_caller_makes_networks(family: str) -> None:
    shapes = official_shapes(depth=28, d=1152, patch=2, edge=32, c=4, classes=1000)
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
        backbone = build(family, tensors).backbone
    assert all(parameter.is_meta for name, parameter in backbone.module.named_parameters() if name != "pos_embed")
    assert backbone.module.blocks[27].attn.num_heads == 16
    assert float(backbone.schedule.native_time(torch.tensor([0.5], dtype=torch.float64))) in (0.5, 258)


def test_a_file_as_the_training_scripts_write_it(tmp_path: Path) -> None:
    tensors = file_of("layersync")
    args = argparse.Namespace(**ARGS["layersync"], num_classes=5)
    torch.save({"model": {}, "ema": tensors, "opt": {}, "args": args}, tmp_path / "0100000.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(tmp_path / "0100000.pt", weights_only=True, mmap=True)
    found = recognize(content["ema"], vars(content["args"]))
    assert found == ("layersync",)
    backbone = filled(build(*found, content["ema"], args=vars(content["args"]), num_heads=4))
    assert backbone.name == "LayerSync with 4 blocks of width 32, patch 2"
    assert backbone(torch.zeros(1, 3, 8, 8), torch.tensor([0.5])).shape == (1, 3, 8, 8)


# --- what arguments say, and the caller


def test_arguments_say_what_was_predicted() -> None:
    assert build("sit", state(), args={"prediction": "noise"}, num_heads=4).backbone.prediction == "eps"
    assert build("sit", state(), args={"prediction": "score"}, num_heads=4).backbone.prediction == "score"
    assert build("repa", state(), args={"prediction": "v"}, num_heads=4).backbone.prediction == "velocity"
    with pytest.raises(
        ValueError, match=r"^this model was trained to predict 'x1'; only velocity, v, noise, score are known"
    ):
        build("sit", state(), args={"prediction": "x1"}, num_heads=4)


def sit_path(path: str, t: float) -> tuple[float, float, float, float]:
    """alpha, sigma and their derivatives by t of the official paths, t = 1 at data; REPA's counts 1 - t."""
    s, half = 1 - t, math.pi / 2
    if path != "VP":
        return math.cos(half * s), math.sin(half * s), half * math.sin(half * s), -half * math.cos(half * s)
    alpha, beta = math.exp(-19.9 * s**2 / 4 - 0.1 * s / 2), 0.1 + 19.9 * s
    sigma = math.sqrt(1 - alpha**2)
    return alpha, sigma, alpha * beta / 2, -(alpha**2) * beta / 2 / sigma


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
@pytest.mark.parametrize(
    ("family", "path"), [("sit", "GVP"), ("sit", "VP"), ("layersync", "GVP"), ("disploss", "VP"), ("repa", "cosine")]
)
@torch.no_grad()
def test_curved_paths_open_with_their_own_time_and_output(family: str, path: str, prediction: str) -> None:
    """At the mixture of t = 0.3 the network is told its time, and its output is its own velocity, noise or score."""
    tensors = file_of(family)
    args = ARGS[family] | {"path_type": path, "prediction": "v" if family == "repa" else prediction}
    assert recognize(tensors, args) == (family,)
    backbone = filled(build(family, tensors, args=args, num_heads=4))
    alpha, sigma, alpha_rate, sigma_rate = sit_path(path, 0.3)
    x_t, label = torch.randn(2, 3, 8, 8), torch.tensor([1, 3])
    told = 0.7 if family == "repa" else 0.3
    out = plain_sit(tensors, CONFIG, x_t, torch.full((2,), told), label)[-1].double()
    level = torch.full((2,), sigma / (alpha + sigma), dtype=torch.float64)
    got = convert_prediction(backbone(x_t, level, label), x_t, level, backbone.schedule, source="velocity", to="eps")
    if family == "repa":  # points to noise
        out, prediction = -out, "velocity"
    if prediction == "velocity":  # two equations: x_t = alpha x + sigma eps, out = alpha' x + sigma' eps
        eps = (alpha * out - alpha_rate * x_t) / (alpha * sigma_rate - sigma * alpha_rate)
    else:
        eps = out if prediction == "noise" else -sigma * out
    torch.testing.assert_close(got.double(), eps, rtol=1e-4, atol=1e-4)  # float32 through four blocks


def test_lightningdits_configuration_names_its_path() -> None:
    known = FAMILIES["lightningdit"]
    told = _convention(known, {"path_type": "GVP", "prediction": "score"}, None, None)
    assert (told[0].to_config(), told[1]) == (GVP().to_config(), "score")


@pytest.mark.parametrize(
    ("family", "path"), [("sit", "cosine"), ("repa", "GVP"), ("dit", "VP"), ("sit", "gvp"), ("sra", "VP")]
)
def test_paths_that_a_family_does_not_have_are_refused(family: str, path: str) -> None:
    title = FAMILIES[family].title
    with pytest.raises(
        ValueError,
        match=rf"^this model was trained on the path '{path}', which is unknown for {title}; pass --schedule",
    ):
        build(family, state(sigma=family == "dit"), args={"path_type": path}, num_heads=4)


def test_the_caller_has_the_last_word() -> None:
    args = {"path_type": "VP", "prediction": "score", "num_classes": 7}
    schedule = DDPM.from_name("cosine")
    opened = build("sit", state(), args=args, num_heads=4, num_classes=5, schedule=schedule, prediction="x0")
    assert (opened.backbone.schedule, opened.backbone.prediction) == (schedule, "x0")
    assert build("dit", state(), num_heads=4, schedule="ddpm-cosine").backbone.schedule.name == "ddpm-cosine"


def test_wrong_numbers_of_classes_are_refused() -> None:
    assert build("sit", state(), args={"num_classes": 5}, num_heads=4).backbone.num_classes == 5
    with pytest.raises(ValueError, match=r"^the label table has 5 classes and a null label, not 1000 classes; pass"):
        build("sit", state(), args={"num_classes": 1000}, num_heads=4)
    one_row = state() | {"y_embedder.embedding_table.weight": torch.zeros(1, 32)}
    assert build("sit", one_row, num_heads=4, num_classes=1).backbone.num_classes == 0


def assumed(family: str = "sit", tensors: dict[str, Tensor] | None = None, **options: Any) -> tuple[str, ...]:
    return build(family, state() if tensors is None else tensors, **({"num_heads": 4} | options)).backbone.assumptions


@pytest.mark.parametrize(
    "told",
    [
        {"num_classes": 6},
        {"args": {"num_classes": 6}},
        {"args": {"class_dropout_prob": 0}},
        {"args": {"cfg_prob": 0.0}},
    ],
)
@torch.no_grad()
def test_without_label_dropout_the_mean_of_the_classes_stands_for_no_label(told: dict[str, Any]) -> None:
    """Silently, the last class would be taken for "no label"."""
    tensors = state()
    opened = build("sit", tensors, num_heads=4, **told)
    assert opened.backbone.num_classes == 6
    table = opened.tensors["y_embedder.embedding_table.weight"]
    torch.testing.assert_close(table[:6], tensors["y_embedder.embedding_table.weight"])
    x, level = torch.randn(1, 3, 8, 8), torch.tensor([0.5])
    backbone = filled(opened)
    expected = plain_sit(tensors | {"y_embedder.embedding_table.weight": table}, CONFIG, x, level, torch.tensor([6]))
    torch.testing.assert_close(table[6], table[:6].mean(0))
    torch.testing.assert_close(backbone(x, level), -expected[-1], rtol=1e-4, atol=1e-5)
    assert opened.backbone.assumptions[0].startswith(
        "all 6 rows of the label table are classes, so the network has no null"
    )


def test_what_no_file_states_about_labels_is_told() -> None:
    assert assumed(args={"num_classes": 5}) == assumed(args={"class_dropout_prob": 0.1}) == ()
    assert assumed()[0].startswith("no file states the number of classes: the last of the 6 rows of the label table")
    assert assumed(args={"num_classes": 5, "class_dropout_prob": 0})[0].startswith("the null label was never trained")
    assert assumed(args={"num_classes": 1000}, num_classes=5) == (
        "the training arguments have num_classes = 1000; --num-classes 5 is used",
    )


def test_heads_come_from_the_arguments_then_from_the_width() -> None:
    wide = {name: torch.empty(shape, device="meta") for name, shape in WIDE.items()}
    known = {"num_classes": 5}
    of_width = build("sit", wide, args=known).backbone
    assert of_width.num_heads == 6
    assert of_width.assumptions[0].startswith(
        "no file states the number of attention heads: 6 is that of the published"
    )
    assert build("sit", wide, args=known | {"num_heads": 12}).backbone.num_heads == 12
    named = build("sit", wide, args=known | {"model": "SiT-S/2"}).backbone
    assert (named.num_heads, named.assumptions) == (6, ())
    assert assumed(tensors=wide, args=known | {"model": "SiT-S/2"}, num_heads=4) == (
        "the file's model name SiT-S/2 means 6 heads; --num-heads 4 is used",
    )
    with pytest.raises(
        ValueError,
        match=r"^the file's model name SiT-B/2 is of another network: .* 768, the weights have 384, so the num",
    ):
        build("sit", wide, args=known | {"model": "SiT-B/2"})
    with pytest.raises(ValueError, match=r"^the training arguments have heads = 12, not 6; leave --num-heads out$"):
        build("sit", wide, args={"heads": 12}, num_heads=6)


@pytest.mark.parametrize("name", ["hidden_size", "depth", "patch_size", "in_channels", "input_size"])
def test_arguments_of_another_network_are_refused(name: str) -> None:
    right = {"hidden_size": 32, "depth": 4, "patch_size": 2, "in_channels": 3, "input_size": 8}
    assert len(assumed(args={"model": right})) == 1
    with pytest.raises(ValueError, match=rf"have {name} = 7, but the weights show {right[name]};"):
        build("sit", state(), args={"model": right | {name: 7}}, num_heads=4)


def test_positions_of_another_grid_are_refused() -> None:
    tensors = state() | {"pos_embed": sincos_position(32, (2, 8))}
    assert build("sit", tensors, num_heads=4, shape=(3, 4, 16)).backbone.shape == (3, 4, 16)
    for shape in (None, (3, 16, 4), (3, 8, 8)):
        with pytest.raises(
            ValueError, match=r"^pos_embed has the positions of 2x8 patches, not of .*; pass --shape 3,4,16$"
        ):
            build("sit", tensors, num_heads=4, shape=shape)


def test_unknown_families_and_heads_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"^unknown family 'unet'; use sit, layersync, disploss, dit, repa, sra"):
        build("unet", state())
    with pytest.raises(
        ValueError, match=r"^no preset has width 32, so the number of heads is unknown; pass --num-heads$"
    ):
        build("sit", state())


SHAPES = [(), (0,), (1,), (7,), (0, 4), (1, 1), (3, 0, 2, 2), (1, 1, 1, 1), (2, 3, 4, 5, 6, 7)]
TELLING = [
    "pos_embed",
    "x_embedder.proj.weight",
    "final_layer.linear.weight",
    "y_embedder.embedding_table.weight",
    "blocks.0.mlp.fc1.weight",
    "blocks.0.attn.q_norm.weight",
    "blocks.0.adaLN_modulation.1.bias",
    "blocks.0.mlp.w3.weight",
    "feat_rope.freqs_cos",
]


@pytest.mark.parametrize("name", TELLING)
@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_of_any_shape_get_an_answer_or_a_value_error(name: str, shape: tuple[int, ...]) -> None:
    tensors = state() | {name: torch.zeros(shape)}
    assert set(recognize(tensors)) <= set(FAMILIES)
    for family in FAMILIES:
        with contextlib.suppress(ValueError):
            build(family, tensors, num_heads=4)


def test_a_new_family_takes_its_record_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/architecture.md says: a `Family` that recognizes and builds its own network."""

    def build_linear(tensors: Any, family: Family, **options: Any) -> Opened:
        module = torch.nn.Linear(*reversed(tensors["only.weight"].shape))
        backbone = Backbone(module, (), LinearPath(), "velocity", (4,), 0, lambda *_: torch.zeros(1), family.title)
        return Opened(backbone, dict(tensors), ())

    own = Family("Mine", "sit", "velocity", recognizes=lambda tensors: "only.weight" in tensors, build=build_linear)
    monkeypatch.setattr(families, "FAMILIES", families.FAMILIES | {"mine": own})
    tensors = {"only.weight": torch.zeros(4, 4)}
    assert recognize(tensors) == ("mine",)
    assert build("mine", tensors).backbone.name == "Mine"
