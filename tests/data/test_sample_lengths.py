"""Samples of unequal length: what is real does not depend on the padding, by any solver, in any company."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny_sit
from torch import Tensor

from layerprobe.backbones.base import Backbone, wrap
from layerprobe.noise.random_stream import RandomStream
from layerprobe.sampling import SamplingPlan, sample

LENGTHS = (6, 8, 2, 4)
PLANS = {
    "heun": SamplingPlan("heun", 3, guidance=2.0),
    "heun in an interval": SamplingPlan("heun", 4, guidance=2.0, guidance_interval=(0.2, 0.6)),
    "dopri5": SamplingPlan("dopri5", 3, guidance=1.5),
    "dopri5 in an interval": SamplingPlan("dopri5", 3, guidance=2.0, guidance_interval=(0.2, 0.6)),
    "euler-maruyama": SamplingPlan("euler-maruyama", 4, guidance=2.0),
}


def padding(lengths: tuple[int, ...] = LENGTHS, size: int = 8) -> Tensor:
    return torch.arange(size) < torch.tensor(lengths).view(-1, 1)


def shortened(long: Backbone, length: int) -> Backbone:
    """The same network for shorter samples."""
    short = tiny_sit(shape=(2, length))
    weights = dict(long.module.state_dict())
    weights["pos_embed"] = weights["pos_embed"][:, : length // 2]
    short.module.load_state_dict(weights)
    return short


@pytest.fixture
def noise_of_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short samples start from the beginning of a long one's noise."""
    drawn = RandomStream.normal

    def normal(self: RandomStream, ids: Tensor, shape: tuple[int, ...], *, draw: int = 0) -> Tensor:
        return drawn(self, ids, (2, 8), draw=draw)[..., : shape[-1]]

    monkeypatch.setattr(RandomStream, "normal", normal)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.usefixtures("noise_of_the_longest")
def test_a_padded_sample_is_the_short_models_own(name: str) -> None:
    backbone, labels = tiny_sit(shape=(2, 8)), torch.arange(4) % 3
    x = sample(backbone, range(4), labels=labels, plan=PLANS[name], mask=padding())
    for i, length in enumerate(LENGTHS):
        alone = sample(shortened(backbone, length), [i], labels=labels[i : i + 1], plan=PLANS[name])[0]
        # Attention sums over fewer keys in another order: float32 rounding, a few steps long.
        torch.testing.assert_close(x[i, :, :length], alone, rtol=1e-4, atol=1e-4)
        assert not bool(x[i, :, length:].any())


@pytest.mark.parametrize("name", ["heun", "dopri5", "euler-maruyama"])
def test_company_and_batch_size_change_nothing(name: str) -> None:
    backbone, labels = tiny_sit(shape=(2, 8)), torch.arange(4) % 3
    together = sample(backbone, range(4), labels=labels, plan=PLANS[name], mask=padding())
    apart = sample(backbone, range(4), labels=labels, plan=PLANS[name], mask=padding(), batch_size=3)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_a_mask_without_padding_is_as_no_mask() -> None:
    backbone, plan = tiny_sit(shape=(2, 8)), SamplingPlan("dopri5", 3)
    full = sample(backbone, range(3), plan=plan, mask=torch.ones(3, 8, dtype=torch.bool))
    torch.testing.assert_close(full, sample(backbone, range(3), plan=plan), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 4, 8), (1, 8, 2, 2)])
def test_padding_stays_zero_on_any_grid(shape: tuple[int, ...]) -> None:
    mask = torch.zeros(2, *shape[1:], dtype=torch.bool)
    mask[0, ..., :1], mask[1, ..., :2] = True, True
    x = sample(tiny_sit(shape=shape), range(2), plan=SamplingPlan("euler-maruyama", 3), mask=mask)
    assert torch.equal(x != 0, mask.unsqueeze(1))


def test_masks_that_fit_nothing_are_refused() -> None:
    backbone = tiny_sit(shape=(2, 8))
    with pytest.raises(ValueError, match=r"of shape \(4, 8\); pass bool of shape \(2, 8\)"):
        sample(backbone, range(2), mask=padding())
    with pytest.raises(ValueError, match=r"the mask is torch.float32 of shape \(4, 8\)"):
        sample(backbone, range(4), mask=padding().float())
    with pytest.raises(ValueError, match="a sample consists of padding only"):
        sample(backbone, range(2), mask=padding((0, 8)))
    network = torch.nn.Sequential(torch.nn.Conv1d(2, 2, 1))
    own = wrap(network, layers="0", schedule="sit", prediction="velocity", shape=(2, 8))
    with pytest.raises(
        ValueError, match=r"Sequential takes no mask, all its samples have shape \(2, 8\); leave out the mask"
    ):
        sample(own, range(4), mask=padding())
    assert sample(replace(own, forward=lambda module, x, *_: module(x)), range(2)).shape == (2, 2, 8)
