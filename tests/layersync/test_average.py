"""The averaged teacher: in float32 for networks in half precision, and on the network's device."""

from __future__ import annotations

import pytest
import torch
from residual_network import Network

from layerprobe.layersync.average import WeightAverage


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_average_of_half_precision_moves(dtype: torch.dtype) -> None:
    network = Network().to(dtype)
    average = WeightAverage(network, 0.999)
    with torch.no_grad():
        start = network.head.weight.double().clone()
        network.head.weight += 0.75
    moved = network.head.weight.detach().double() - start
    for _ in range(1000):
        average.update(network)
    expected = start + (1 - 0.999**1000) * moved
    assert average.module.head.weight.dtype == dtype
    # float32: a thousand roundings of 6e-8 of values up to 1.
    torch.testing.assert_close(average.state_dict()["head.weight"].double(), expected, rtol=0, atol=1e-4)
    assert torch.equal(average.module.head.weight, average.state_dict()["head.weight"].to(dtype))


def test_the_state_keeps_the_precision() -> None:
    network = Network().to(torch.bfloat16)
    first, second = WeightAverage(network, 0.9), WeightAverage(network, 0.9)
    with torch.no_grad():
        network.head.weight += 0.75
    first.update(network)
    second.load_state_dict(first.state_dict())
    for average in (first, second):
        average.update(network)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert second.state_dict()["head.weight"].dtype == torch.float32


def test_a_network_moved_or_changed_after_its_average_is_refused() -> None:
    network = Network()
    average = WeightAverage(network, 0.9)
    network.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"^extra.bias is not in both the network and its averaged teacher; create"):
        average.update(network)
    network.to("meta")
    with pytest.raises(ValueError, match=r"^the averaged teacher is on cpu, the network on meta; move sync.teacher"):
        average.update(network)
