"""A network of the same weights with another number of heads."""

from __future__ import annotations

import torch
from plain_sit import plain_sit
from torch import nn

from layerprobe.backbones.base import wrap
from layerprobe.backbones.heads import possible_heads, with_heads
from layerprobe.backbones.sit import SiTConfig, new_sit


def test_possible_heads_divide_the_width_into_usual_sizes() -> None:
    assert possible_heads(64) == (1, 2, 4, 8, 16)
    assert possible_heads(1152) == (6, 8, 9, 12, 16, 18, 24, 32, 36, 48, 72, 96, 144, 288)
    assert possible_heads(6) == ()


@torch.no_grad()
def test_other_heads_compute_what_a_network_built_with_them_computes() -> None:
    generator = torch.Generator().manual_seed(0)
    config = SiTConfig((1, 4, 4), hidden_size=16, depth=2, num_heads=2, num_classes=3)
    backbone = new_sit(config, seed=0)
    for parameter in backbone.module.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    other = with_heads(backbone, 4)
    assert (other.num_heads, backbone.num_heads) == (4, 2)
    assert [id(p) for p in other.module.parameters()] == [id(p) for p in backbone.module.parameters()]
    x, time, label = (
        torch.randn(3, 1, 4, 4, generator=generator),
        torch.tensor([0.2, 0.5, 0.8]),
        torch.tensor([0, 1, 3]),
    )
    for network, heads in ((other, 4), (backbone, 2)):
        built = SiTConfig((1, 4, 4), hidden_size=16, depth=2, num_heads=heads, num_classes=3)
        expected = plain_sit(backbone.module.state_dict(), built, x, time, label)[-1]
        torch.testing.assert_close(network.module(x, time, label), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_torchs_own_attention_changes_too() -> None:
    torch.manual_seed(0)
    two, four = (nn.TransformerEncoderLayer(16, heads, 32).eval() for heads in (2, 4))
    four.load_state_dict(two.state_dict())
    backbone = wrap(two, layers="linear1", schedule="flow", prediction="velocity", shape=(16,))
    x = torch.randn(5, 2, 16)
    torch.testing.assert_close(with_heads(backbone, 4).module(x), four(x))
    assert not torch.allclose(two(x), four(x))


def test_nothing_is_possible_where_a_tensor_is_as_wide_as_a_head() -> None:
    config = SiTConfig((1, 4, 4), hidden_size=16, depth=1, num_heads=2, qk_norm=True)
    assert new_sit(config, seed=0).possible_heads == ()
