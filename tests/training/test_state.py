"""The averages of a training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerprobe.training.state import new_state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_averages_move_in_every_precision(dtype: torch.dtype) -> None:
    network = nn.Linear(4, 4).to(dtype)
    state = new_state(network, (0.999,), lr=0.1)
    start = network.weight.detach().double().clone()
    with torch.no_grad():
        network.weight += 0.75
    moved = network.weight.detach().double() - start
    state.step = 10**6  # past the warm-up of the decay
    for _ in range(1000):
        state.average()
    average = state.averages[0.999]["weight"]
    assert average.dtype == torch.promote_types(dtype, torch.float32)
    # float32: a thousand roundings of 6e-8 of values up to 1.
    torch.testing.assert_close(average.double(), start + (1 - 0.999**1000) * moved, rtol=0, atol=1e-4)
