"""A user's own network is made by the user's code, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import ONE_LINE
from safetensors.torch import save_model
from tiny_checkpoints import assert_same_weights, official, open_tiny
from torch import Tensor, nn

from layerprobe.checkpoints.opening import open_checkpoint
from layerprobe.checkpoints.user_models import user_backbone

FACTORIES = """
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from layerprobe.backbones.base import wrap


@dataclass
class Settings:
    width: int = 4


class Network(nn.Module):
    def __init__(self, width=Settings().width):
        super().__init__()
        self.first, self.second = nn.Linear(3, width), nn.Linear(width, 3)

    def forward(self, x, time):
        return self.second(self.first(x))


def backbone():
    return wrap(Network(), layers="first", schedule="flow", prediction="eps", shape=(3,), name="theirs")


def with_arguments(width):
    return Network(width)


def wrong():
    return "a network"


instance, number = Network(), 3
"""


@pytest.fixture
def factories(tmp_path: Path) -> Path:
    """A user's file, and beside it the weights of its network."""
    path = tmp_path / "random.py"  # a name that the standard library has taken
    path.write_text(FACTORIES)
    made = nn.ModuleDict({"first": nn.Linear(3, 4), "second": nn.Linear(4, 3)})
    torch.save(made.state_dict(), tmp_path / "model.pt")
    return path


TOLD: dict[str, Any] = {"layers": "*", "schedule": "flow", "prediction": "eps", "shape": (3,)}


@pytest.mark.parametrize("name", ["Network", "instance"])
def test_a_users_network_is_made_by_the_users_code(factories: Path, name: str) -> None:
    weights_path = factories.with_name("model.pt")
    backbone = open_checkpoint(weights_path, model=f"{factories}:{name}", **TOLD)
    assert_same_weights(backbone.module, torch.load(weights_path))
    assert (backbone.layers, backbone.name, backbone.num_classes) == (("first", "second"), "Network", 0)
    assert not backbone.module.training
    import random

    assert hasattr(random, "shuffle")  # the user's random.py is not the library's


def test_a_users_backbone_needs_nothing_else(factories: Path) -> None:
    backbone = open_checkpoint(factories.with_name("model.pt"), model=f"{factories}:backbone")
    assert (backbone.layers, backbone.name) == (("first",), "theirs")


def test_a_network_can_come_from_an_installed_module_or_a_callable(
    factories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factories.rename(factories.with_name("an_installed_module.py"))
    monkeypatch.syspath_prepend(factories.parent)
    path = factories.with_name("model.pt")
    backbone = open_checkpoint(path, model="an_installed_module:Network", **TOLD)
    assert type(backbone.module).__module__ == "an_installed_module"
    again = open_checkpoint(path, model=lambda: backbone.module, **TOLD)
    assert again.module is backbone.module


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("Network", r"^--model Network names no object; pass file.py:name or package.module:name$"),
        (
            "{file}:network",
            r"random.py has no network; it has Network, Settings, backbone, with_arguments, wrong, inst",
        ),
        ("nowhere.py:Network", r"cannot be imported \(there is no file nowhere.py\); pass file.py:name"),
        ("no.such.package:Network", r"cannot be imported \(No module named 'no'\)"),
        ("{file}:with_arguments", r"needs arguments \(missing a required argument: 'width'\); pass a function"),
        ("{file}:wrong", "returns a str; it must return a torch.nn.Module or a layerprobe Backbone$"),
        ("{file}:number", "returns a int; it must return a torch.nn.Module"),
        ("{folder}.py:Network", "cannot be imported"),
    ],
)
def test_factories_that_are_none_are_refused(factories: Path, spec: str, message: str) -> None:
    (factories.parent / "folder.py").mkdir()
    spec = spec.format(file=factories, folder=factories.parent / "folder")
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(factories.with_name("model.pt"), model=spec, **TOLD)
    caught.match(ONE_LINE)


def test_a_bare_module_needs_to_be_described(factories: Path) -> None:
    path = factories.with_name("model.pt")
    with pytest.raises(
        ValueError, match=r"^Network is not a known family; pass --layers, --schedule, --prediction, --shape$"
    ):
        open_checkpoint(path, model=f"{factories}:Network")
    with pytest.raises(ValueError, match=r"^Network is not a known family; pass --shape$"):
        open_checkpoint(path, model=f"{factories}:Network", **(TOLD | {"shape": None}))


def test_factories_with_a_mistake_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text("def broken(:\n")
    path = official(tmp_path / "model.pt")
    match = r"odd.py:broken cannot be imported \(invalid syntax, \S*odd.py:1\); correct the file$"
    with pytest.raises(ValueError, match=match) as caught:
        open_tiny(path, family=None, num_heads=None, model=f"{tmp_path / 'odd.py'}:broken")
    caught.match(ONE_LINE)


class Net(nn.Module):
    """One linear layer that adds the time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.layer(x) + t[:, None]
        return output


class Scaled(Net):
    """Divides by the weights."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) / self.layer.bias.mean()


def raises() -> None:
    raise FileNotFoundError("no config.yaml")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: None, "returns nothing, without a return statement; it must return a torch.nn.Module"),
        (lambda: Net, "returns the class Net and not an object of it; it must"),
        (lambda: (Net(), 3), "returns a tuple of Net, int; it must"),
        (lambda: torch.jit.script(nn.Linear(3, 3)), "returns TorchScript, whose layers cannot be read; return the"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "returns lazy layers, which have no weights yet; call the network"),
        (raises, r"fails \(no config.yaml, \S*test_user_models.py:\d+\); correct the file$"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_what_a_factory_does_wrong_is_told_in_one_line(factory: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        user_backbone(factory, **TOLD)
    caught.match(ONE_LINE)


def test_wrappers_of_training_are_taken_off() -> None:
    network = Net()
    for wrapped in (nn.DataParallel(network), torch.compile(network, backend="eager")):
        backbone = user_backbone(lambda made=wrapped: made, **(TOLD | {"layers": "layer"}))
        assert backbone.module is network


def test_the_trial_uses_the_weights_of_the_file_and_tells_what_was_assumed(tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.eye(3), "layer.bias": torch.zeros(3)}, tmp_path / "model.pt")
    backbone = open_checkpoint(tmp_path / "model.pt", model=Net, **TOLD)
    assert backbone.assumptions[0].startswith("its forward gets x = noisy samples, t = time; otherwise let the")
    with pytest.raises(ValueError, match=r"Scaled returns values that are not finite at noise level 0.5, its time 0.5"):
        open_checkpoint(tmp_path / "model.pt", model=Scaled, **TOLD)


class Whole(nn.Module):
    """A network and a part of its training."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.loss = Net(), nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.net(x, t)
        return output


@pytest.mark.parametrize(
    ("saved", "made", "message"),
    [
        (Net, Whole, r"\(4 missing, 2 unexpected\); the file has all of the network below 'net.': return that part$"),
        (lambda: nn.Linear(3, 3), Net, r"\(2 missing, 2 unexpected\); the file has all of the network below 'layer.'"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), Net, "pass the network that it was saved from$"),
    ],
)
def test_a_part_of_the_network_that_was_saved_is_recognized(
    tmp_path: Path, saved: Callable[[], nn.Module], made: Callable[[], nn.Module], message: str
) -> None:
    torch.save(saved().state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "model.pt", model=made, **(TOLD | {"layers": "*"}))


def test_a_tensor_with_two_names_is_stored_under_one_of_them(tmp_path: Path) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Linear(3, 3)
            self.again.weight = self.layer.weight

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            output: Tensor = self.again(super().forward(x, t))
            return output

    saved = Tied()
    save_model(saved, str(tmp_path / "model.safetensors"))
    backbone = open_checkpoint(tmp_path / "model.safetensors", model=Tied, **TOLD)
    assert_same_weights(backbone.module, saved.state_dict())
