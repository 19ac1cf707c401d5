"""Modules for weights that come later."""

from __future__ import annotations

import torch
from torch import nn

from layerprobe.backbones.without_values import unfilled


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table, self.norm = nn.Linear(3, 4), nn.Embedding(5, 4), nn.LayerNorm(4)
        self.convolution, self.attention = nn.Conv2d(3, 4, 2), nn.MultiheadAttention(4, 2)
        nn.init.xavier_uniform_(self.linear.weight)
        self.register_buffer("positions", torch.arange(4.0) ** 2, persistent=False)


def test_weights_have_no_values_and_tables_have_theirs_wherever_the_caller_builds() -> None:
    before = torch.get_rng_state()
    with torch.device("meta"), unfilled():
        network = Network()
    assert all(parameter.is_meta for parameter in network.parameters())
    assert network.positions.tolist() == [0, 1, 4, 9]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_filled_network_equals_the_one_that_was_saved() -> None:
    saved = Network()
    with unfilled():
        network = Network()
    network.load_state_dict(saved.state_dict(), assign=True)
    assert network.state_dict().keys() == saved.state_dict().keys()
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in network.state_dict().items())
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(network.linear(x), saved.linear(x))
