"""Any module becomes a backbone; a published DDPM, which layerprobe does not know, takes the same path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ddpm_unet import DDPMUNet
from places import HELPERS
from torch import Tensor, nn

from layerprobe.backbones.base import Backbone, alignable_layers, layer_shapes, wrap
from layerprobe.backbones.sit import SiT, SiTConfig, sit_backbone
from layerprobe.checkpoints.opening import open_checkpoint
from layerprobe.data.loading import load
from layerprobe.data.samples import Splits, Subset, TensorSamples
from layerprobe.extraction.forward import extract
from layerprobe.extraction.plan import ExtractionPlan
from layerprobe.noise.random_stream import RandomStream
from layerprobe.noise.schedules import LinearPath

NETWORK = f"{HELPERS / 'ddpm_unet.py'}:DDPMUNet"
CONVENTION = {"schedule": "ddpm-linear", "prediction": "eps", "shape": (1, 28, 28)}
# Mean squared error of the noise on test images by time, from the checkpoints' README.
EPS_MSE = {10: 0.157, 100: 0.068, 300: 0.033, 500: 0.017, 800: 0.003}


class Denoiser(nn.Module):
    """A user's own network, with dropout so that evaluation mode can be told."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(4, 6), nn.Linear(6, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        output: Tensor = self.second(self.drop(self.first(x).relu())) + time.view(-1, 1)
        return output


def test_wrap_makes_a_backbone_of_any_module() -> None:
    module = Denoiser()
    backbone = wrap(module, layers=["second", "fir*"], schedule="flow-1000", prediction="x0", shape=[4])
    assert (backbone.layers, backbone.shape, backbone.name) == (("first", "second"), (4,), "Denoiser")
    assert not module.training
    x, level = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.5, 0.9])
    denoised = module(x, 1000 * level)
    torch.testing.assert_close(backbone(x, level), (x - denoised) / level.view(-1, 1))
    assert layer_shapes(backbone) == {"first": (1, 6), "second": (1, 4)}
    assert wrap(module, layers="first", schedule="sit", prediction="x0", shape=(4,), name="mine").name == "mine"


def test_wrap_calls_the_module_as_it_is_told() -> None:
    def forward(module: nn.Module, x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        output: Tensor = module(x + label.view(-1, 1), time) if label is not None else module(x, time)
        return output

    backbone = wrap(
        Denoiser(),
        layers="*",
        schedule=LinearPath(0, 1),
        prediction="velocity",
        shape=(4,),
        num_classes=3,
        forward=forward,
    )
    x, level = torch.zeros(2, 4), torch.tensor([0.1, 0.5])
    torch.testing.assert_close(backbone(x, level), backbone.module(x + 3, level))


def test_wrap_refuses_what_it_does_not_know() -> None:
    good = {"layers": "first", "schedule": "sit", "prediction": "eps", "shape": (4,)}
    for change, message in (
        ({"layers": "third"}, "third is not in Denoiser, which has first, second, drop"),
        ({"layers": []}, "no layer is named; name some of Denoiser"),
        ({"schedule": "vp"}, "unknown schedule 'vp'"),
        ({"prediction": "epsilon"}, "unknown prediction 'epsilon'; use velocity, eps, x0, v or score"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            wrap(Denoiser(), **(good | change))
    with pytest.raises(ValueError, match="unknown prediction 'epsilon'"):
        sit_backbone(SiT(SiTConfig(shape=(3, 8, 8))), prediction="epsilon")


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        output: Tensor = self.layer(self.layer(x))
        return output


def test_layer_shapes_notice_a_layer_that_runs_twice() -> None:
    backbone = wrap(Shared(), layers="layer", schedule="sit", prediction="x0", shape=(4,))
    with pytest.raises(ValueError, match=r"^layer ran twice in one forward pass"):
        layer_shapes(backbone)


def own(checkpoint: Path) -> Backbone:
    return open_checkpoint(checkpoint, model=NETWORK, layers=["b*"], **CONVENTION)


def test_published_error_is_reached(shared_data: Path, shared_checkpoints: Path) -> None:
    backbone = own(shared_checkpoints / "ddpm_mnist.pt")
    batch = load(shared_data / "mnist", num_test=128).test.batch(range(128))
    eps = RandomStream(0).normal(batch.ids, backbone.shape)
    for time, published in EPS_MSE.items():
        level = backbone.schedule.noise_level(torch.full((128,), time))
        with torch.inference_mode():
            predicted = backbone.predict(backbone.schedule.corrupt(batch.x, eps, level), level)
        # 128 images instead of all: a few per cent.
        assert float(((predicted - eps) ** 2).mean()) == pytest.approx(published, rel=0.12)


def test_layers_are_read_in_the_order_in_which_they_run() -> None:
    backbone = wrap(DDPMUNet(), layers="b*", **CONVENTION)
    assert layer_shapes(backbone) == {
        "b1": (784, 10),
        "b2": (196, 20),
        "b3": (49, 40),
        "b_mid": (9, 40),
        "b4": (49, 20),
        "b5": (196, 10),
        "b_out": (784, 10),
    }


def test_features_of_a_wrapped_module(tmp_path: Path) -> None:
    backbone = wrap(DDPMUNet(), layers=["b_mid", "b2"], **CONVENTION)
    samples = TensorSamples(torch.rand(9, 1, 28, 28) * 2 - 1)
    splits = Splits(*(Subset(samples, range(i, i + 3), name=str(i)) for i in (0, 3, 6)))
    store = extract(backbone, splits, ExtractionPlan(backbone.layers, (0.2, 0.8), pool_cells=2), tmp_path / "store")
    assert store.layers == ("b2", "b_mid")
    assert store["b_mid", 0.8].shape == (9, 4 * 40)


def test_inspect_takes_the_code_of_a_network(shared_checkpoints: Path, cli: Any) -> None:
    options = ["--model", NETWORK, "--layers", "b*", "--schedule", "ddpm-linear", "--prediction", "eps", "--json"]
    arguments = ["inspect", shared_checkpoints / "ddpm_mnist.pt", *options]
    assert json.loads(cli(*arguments, "--shape", "1,28,28")[1])["parameters"] == 606_852
    assert cli(*arguments) == (2, "", "layerprobe: DDPMUNet is not a known family; pass --shape\n")


def test_only_layers_of_one_shape_are_put_on_trial() -> None:
    """Refused, or left out, before any arm is trained."""

    def backbone(*widths: int) -> Backbone:
        pairs = zip((1, *widths), widths, strict=False)
        network = torch.nn.Sequential(*(torch.nn.Conv1d(a, b, 1) for a, b in pairs), torch.nn.Conv1d(widths[-1], 1, 1))
        return wrap(
            network,
            layers=[str(i) for i in range(len(widths))],
            schedule="flow",
            prediction="velocity",
            shape=(1, 4),
            forward=lambda module, x, time, condition: module(x),
        )

    assert alignable_layers(backbone(16, 32, 32, 16, 32)) == ("1", "2", "4")
    with pytest.raises(
        ValueError, match=r"^no two layers of Sequential have tokens of the same shape; pass other --layers"
    ):
        alignable_layers(backbone(8, 16, 32))
