"""EDM's networks open through a user's own class: sigma as time, denoised output, one-hot labels, zeros for none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from edm_unet import EDMDenoiser
from places import HELPERS

from layerprobe.backbones.base import Backbone, layer_shapes
from layerprobe.checkpoints.opening import open_checkpoint

NETWORK = f"{HELPERS / 'edm_unet.py'}:backbone"
SIGMAS = torch.tensor([0.002, 0.5, 3.0, 80.0])


@pytest.fixture
def opened(tmp_path: Path) -> tuple[EDMDenoiser, Backbone]:
    torch.manual_seed(0)
    network = EDMDenoiser()
    torch.save({"ema": network.state_dict()}, tmp_path / "edm.pt")
    return network, open_checkpoint(tmp_path / "edm.pt", model=NETWORK, device="cpu")


def test_layers_are_maps_read_as_tokens(opened: tuple[EDMDenoiser, Backbone]) -> None:
    assert layer_shapes(opened[1]) == {"down": (16, 8), "middle": (16, 8), "up": (64, 2)}


@torch.no_grad()
def test_the_network_is_told_sigma_and_one_hot_labels_and_gives_the_denoised_sample(
    opened: tuple[EDMDenoiser, Backbone],
) -> None:
    network, backbone = opened
    level = backbone.schedule.noise_level(SIGMAS)
    assert float(level[1]) == 0.5  # sigma = sigma_data
    x_t = torch.randn(4, 2, 8, 8) * SIGMAS.view(-1, 1, 1, 1)
    labels = torch.tensor([2, 0, 1, 1])
    # 80 becomes a level and sigma again in float32.
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(
        backbone.predict(x_t, level, labels), network(x_t, SIGMAS, torch.eye(3)[labels]), **close
    )
    torch.testing.assert_close(backbone.predict(x_t, level), network(x_t, SIGMAS, torch.zeros(4, 3)), **close)
    assert not torch.equal(backbone.predict(x_t, level), backbone.predict(x_t, level, labels))


@torch.no_grad()
def test_its_velocity_is_that_of_edms_sampler(opened: tuple[EDMDenoiser, Backbone]) -> None:
    """Eq. 3 of EDM: dx / d sigma = (x - D) / sigma; sigma grows with the level as sigma_data / (1 - level)^2."""
    network, backbone = opened
    level = torch.tensor([0.1, 0.5, 0.7, 0.9], dtype=torch.float64)
    sigma = (0.5 * level / (1 - level)).float()
    x_t = torch.randn(4, 2, 8, 8) * sigma.view(-1, 1, 1, 1)
    slope = (x_t - network(x_t, sigma, torch.zeros(4, 3))) / sigma.view(-1, 1, 1, 1)
    rate = (0.5 / (1 - level) ** 2).float().view(-1, 1, 1, 1)
    torch.testing.assert_close(backbone(x_t, level), slope * rate, rtol=1e-4, atol=1e-4)


def test_the_level_at_which_it_is_infinitely_noisy_is_refused(opened: tuple[EDMDenoiser, Backbone]) -> None:
    with pytest.raises(ValueError, match=r"^x0 at noise level 1 does not determine velocity; keep noise levels"):
        opened[1](torch.zeros(1, 2, 8, 8), torch.ones(1))
