"""Parts of blocks have the same names in every network, and hold what a plain formula gives."""

from __future__ import annotations

import pytest
import tiny_mdm
import torch
from tiny import tiny_samples, tiny_sit
from torch import Tensor, nn
from torch.nn import functional as F

from layerprobe.backbones.base import Backbone, layer_shapes
from layerprobe.backbones.lightningdit import LightningDiT, LightningDiTConfig, lightningdit_backbone
from layerprobe.backbones.sit import SiTConfig
from layerprobe.capture import capture, find_layer, is_slice, match_layers
from layerprobe.extraction.ablation import ablate_layers
from layerprobe.layersync import LayerPair, LayerSync
from layerprobe.parts import NAMES, nameable, part_names


def lightningdit() -> Backbone:
    torch.manual_seed(0)
    module = LightningDiT(LightningDiTConfig(SiTConfig((1, 4, 4), 2, 16, 2, 2, 3, qk_norm=True)))
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return lightningdit_backbone(module.eval())


NETWORKS = {"SiT": tiny_sit, "LightningDiT": lightningdit}


def recorded(backbone: Backbone, layers: list[str]) -> dict[str, Tensor]:
    x_t = torch.randn(2, *backbone.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), capture(backbone.module, layers, tokens=backbone.tokens, transform=torch.clone) as outputs:
        backbone.predict(x_t, torch.tensor([0.3, 0.6]))
    return outputs


@pytest.mark.parametrize("name", NETWORKS)
def test_queries_keys_and_values_are_thirds_of_the_projection_of_the_attentions_input(name: str) -> None:
    backbone = NETWORKS[name]()
    attention = backbone.module.get_submodule("blocks.1.attn")
    named = [f"blocks.1.{part}" for part in NAMES]
    found = recorded(backbone, [*named, "blocks.1.attn:input"])
    x = found["blocks.1.attn:input"]
    for index, part in enumerate("qkv"):
        weight, bias = (tensor[16 * index : 16 * index + 16] for tensor in (attention.qkv.weight, attention.qkv.bias))
        torch.testing.assert_close(found[f"blocks.1.attn.{part}"], F.linear(x, weight, bias))
    torch.testing.assert_close(found["blocks.1.attn.out"], found["blocks.1.attn"])
    assert match_layers(backbone.module, "blocks.*.attn.q") == tuple(f"{block}.attn.q" for block in backbone.layers)
    assert layer_shapes(backbone, named) == dict.fromkeys(named, (4, 16))


def test_attention_by_its_formula_from_the_three_is_what_the_attention_returns() -> None:
    backbone = tiny_sit()
    found = recorded(backbone, [f"blocks.0.attn.{part}" for part in ("q", "k", "v", "out")])
    q, k, v = (found[f"blocks.0.attn.{part}"].unflatten(2, (2, 8)).transpose(1, 2) for part in "qkv")
    mixed = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    projection = backbone.module.get_submodule("blocks.0.attn.proj")
    torch.testing.assert_close(found["blocks.0.attn.out"], projection(mixed))


def test_the_attention_of_torch_is_projected_as_it_does_itself() -> None:
    backbone = tiny_mdm.opened(tiny_mdm.state_dict())
    block = backbone.layers[1]
    names = [f"{block}.{part}" for part in NAMES]
    found = recorded(backbone, names)
    q, k, v = (found[f"{block}.attn.{part}"] for part in "qkv")
    assert q.shape == (2, tiny_mdm.FRAMES, tiny_mdm.WIDTH)
    attention = backbone.module.get_submodule(f"{block}.self_attn")
    inputs: list[Tensor] = []
    handle = attention.register_forward_hook(lambda _, args, output: inputs.extend((args[0], output[0])))
    again = recorded(backbone, [block, f"{block}.mlp"])
    handle.remove()
    biases = attention.in_proj_bias.chunk(3)
    for weight, bias, value in zip(attention.in_proj_weight.chunk(3), biases, (q, k, v), strict=True):
        torch.testing.assert_close(value, F.linear(inputs[0], weight, bias)[1:].transpose(0, 1))
    torch.testing.assert_close(found[f"{block}.attn"], inputs[1][1:].transpose(0, 1))
    torch.testing.assert_close(found[f"{block}.attn.out"], found[f"{block}.attn"])
    torch.testing.assert_close(found[f"{block}.mlp"], again[f"{block}.mlp"])


class OtherNames(nn.Module):
    """A block in the manner of diffusers, and one whose joint projection has another order."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1 = nn.Module()
        self.attn1.to_q, self.attn1.to_k = nn.Linear(4, 4), nn.Linear(4, 4)
        self.attn1.to_out = nn.ModuleList([nn.Linear(4, 4)])
        self.ff = nn.Linear(4, 4)
        self.joint = nn.Module()
        self.joint.qkv = nn.Linear(4, 12)
        self.joint.q_norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.attn1.to_out[0](self.attn1.to_q(x) + self.attn1.to_k(x))
        output: Tensor = self.ff(mixed + self.joint.qkv(x)[..., :4])
        return output


@pytest.fixture
def other() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"blocks": nn.ModuleList([OtherNames(), OtherNames()])})


def test_submodules_with_other_names_are_found(other: nn.Module) -> None:
    assert find_layer(other, "blocks.1.attn.q") is other.blocks[1].attn1.to_q
    assert find_layer(other, "blocks.1.mlp") is other.blocks[1].ff
    assert match_layers(other, ["blocks.*.attn.out", "blocks.0.attn1", "blocks.1.mlp"]) == (
        "blocks.0.attn1",
        "blocks.0.attn.out",
        "blocks.1.attn.out",
        "blocks.1.mlp",
    )
    assert match_layers(other, "blocks.0.*") == ("blocks.0.attn1", "blocks.0.ff", "blocks.0.joint")  # once each
    assert nameable(other) == {"blocks.*": ["attn.q", "attn.k", "attn.out", "attn", "mlp"]}
    x = torch.randn(2, 3, 4)
    with capture(other.blocks[0], ["attn.q", "attn.out", "mlp"]) as outputs:
        other.blocks[0](x)
    torch.testing.assert_close(outputs["attn.q"], other.blocks[0].attn1.to_q(x))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "blocks.0.joint.q",
            r"^blocks.0.joint.qkv gives q, k and v together, in an order that is not known",
        ),
        ("blocks.0.attn.v", r"^blocks.0.attn.v is not in ModuleDict, which has"),
        ("blocks.0.joint.q_norm", r"^blocks.0.joint.q_norm returns heads and tokens in an order of its own; name "),
    ],
)
def test_what_cannot_be_told_is_refused(other: nn.Module, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_layer(other, name)
    if "norm" not in name:
        with pytest.raises(ValueError, match=message):
            match_layers(other, name)


def test_a_third_of_a_projection_is_read_but_neither_aligned_nor_skipped() -> None:
    backbone = tiny_sit()
    assert is_slice(backbone.module, "blocks.0.attn.k") and not is_slice(backbone.module, "blocks.0.attn")
    message = r"^blocks.0.attn.q is a part of what blocks.0.attn.qkv computes, .*; it can be read, but not aligned"
    with pytest.raises(ValueError, match=message):
        LayerSync(backbone.module, [LayerPair("blocks.0.attn.q", "blocks.1")], weight=0.1)
    ablation = ablate_layers(backbone, tiny_samples(4), [0.5], layers=["blocks.0.attn.q", "blocks.1"], split="test")
    assert ablation.reasons == {"blocks.0.attn.q": "a part of a layer's output cannot be skipped"}


def test_names_of_parts_are_those_that_no_submodule_has() -> None:
    module = tiny_sit().module
    assert set(part_names(module)) >= {"blocks.0.attn.q", "blocks.2.attn.out"}
    assert not set(part_names(module)) & {name for name, _ in module.named_modules()}
    assert nameable(module) == {"blocks.*": [*NAMES]}
