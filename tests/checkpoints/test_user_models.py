"""A user's own network is made by the user's code, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import ONE_LINE
from tiny_checkpoints import assert_same_weights, official, open_tiny
from torch import nn

from layerprobe.checkpoints.opening import (
    open_checkpoint,
)

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
        ("{file}:Missing", r"cannot be imported \(.*no attribute 'Missing'\); pass file.py:name"),
        ("nowhere.py:Network", r"cannot be imported \(.*No such file.*\)"),
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
    with pytest.raises(ValueError, match=r"odd.py:broken cannot be imported \(.*\); pass file.py:name") as caught:
        open_tiny(path, family=None, num_heads=None, model=f"{tmp_path / 'odd.py'}:broken")
    caught.match(ONE_LINE)
