"""Saved checkpoints contain everything that is needed to open them again."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import TINY, assert_same_weights, tiny, weights
from torch import Tensor, nn

from layerprobe.backbones.base import wrap
from layerprobe.backbones.sit import SiT, new_sit, sit_backbone
from layerprobe.checkpoints import saving
from layerprobe.checkpoints.opening import (
    open_checkpoint,
    training_record,
)
from layerprobe.checkpoints.saving import save_checkpoint, weights_hash
from layerprobe.noise.schedules import DDPM, EDM, LinearPath, NoiseSchedule


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [
        (LinearPath(), "velocity"),
        (LinearPath(0, 1000), "v"),
        (DDPM.from_name("cosine", 20), "eps"),
        (EDM(0.3, 0.01, 10.0), "x0"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_our_files_say_all_that_it_takes_to_open_them(tmp_path: Path, schedule: NoiseSchedule, prediction: Any) -> None:
    backbone, path = tiny(3, schedule=schedule, prediction=prediction), tmp_path / "model.safetensors"
    save_checkpoint(path, backbone, backbone.module.state_dict(), training={"steps": 7, "class_names": ["a", "b"]})
    again = open_checkpoint(path, device="cpu")
    assert_same_weights(again.module, backbone.module.state_dict())
    assert isinstance(again.module, SiT)
    assert again.module.config == TINY
    assert not again.module.training
    assert again.schedule.to_config() == schedule.to_config()
    assert (again.prediction, again.layers, again.shape, again.num_classes, again.name) == (
        prediction,
        backbone.layers,
        backbone.shape,
        backbone.num_classes,
        backbone.name,
    )
    assert training_record(path) == {"steps": 7, "class_names": ["a", "b"]}
    assert weights_hash(again.module) == weights_hash(backbone.module)


@pytest.mark.parametrize("shape", [(2, 6), (1, 4, 8), (1, 4, 2, 4)])
def test_every_grid_comes_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    backbone = new_sit(replace(TINY, shape=shape), seed=0)
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, backbone, backbone.module.state_dict(), training={})
    assert open_checkpoint(path).shape == shape


def test_the_weights_given_are_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, tiny(0), weights(1), training={})
    assert_same_weights(open_checkpoint(path).module, weights(1))


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, tiny(), weights(0), training={})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checksums.json", "model.safetensors"]
    save_checkpoint(path, tiny(), weights(1), training={})
    assert_same_weights(open_checkpoint(path).module, weights(1))

    def full_disk(tensors: Any, place: Path, metadata: Any) -> None:
        Path(place).write_bytes(b"half of")
        raise OSError("no space left")

    monkeypatch.setattr(saving, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(path, tiny(), weights(2), training={})
    assert_same_weights(open_checkpoint(path).module, weights(1))


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_files_are_as_readable_as_the_user_wants_files_to_be(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_checkpoint(tmp_path / "model.safetensors", tiny(), weights(), training={})
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640


class Tied(nn.Module):
    """A user's network whose two tensors are one, and with a part called like a wrapper's prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 3)
        self.copy = nn.Linear(3, 3)
        self.copy.weight = self.module.weight
        self.register_buffer("slanted", torch.arange(6.0).view(2, 3).t())

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        output: Tensor = self.copy(self.module(x))
        return output


def test_a_users_network_survives_with_tied_weights_and_odd_names(tmp_path: Path) -> None:
    made = Tied()
    backbone = wrap(made, layers=["module", "copy"], schedule="flow", prediction="eps", shape=(3,))
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, backbone, made.state_dict(), training={})
    options: dict[str, Any] = {"layers": "*", "schedule": "flow", "prediction": "eps", "shape": (3,)}
    again = open_checkpoint(path, model=Tied, **options)
    assert_same_weights(again.module, made.state_dict())
    with pytest.raises(ValueError, match=r"belongs to no known family .* pass --model file.py:factory"):
        open_checkpoint(path)


def test_weights_hash_depends_on_names_types_and_values_and_on_nothing_else() -> None:
    module = tiny().module
    before = weights_hash(module)
    assert len(before) == 16
    assert before == weights_hash(tiny().module.eval())
    assert before != weights_hash(tiny(1).module)
    assert before != weights_hash(tiny().module.double())

    class Two(nn.Module):
        def __init__(self, first: str, second: str, shape: tuple[int, ...] = (2,)) -> None:
            super().__init__()
            for value, name in enumerate((first, second)):
                self.register_buffer(name, torch.full(shape, float(value)))

    assert weights_hash(Two("a", "b")) != weights_hash(Two("b", "a"))
    assert weights_hash(Two("a", "b", (2, 1))) != weights_hash(Two("a", "b", (1, 2)))
    # Scalars, bits and views have a hash, too.
    odd = nn.Module()
    odd.register_buffer("scalar", torch.tensor(3))
    odd.register_buffer("bits", torch.tensor([True, False]))
    odd.register_buffer("view", torch.arange(6.0).view(2, 3).t())
    odd.register_buffer("empty", torch.zeros(0, 4, dtype=torch.bfloat16))
    flat = nn.Module()
    for name, tensor in odd.state_dict().items():
        flat.register_buffer(name, tensor.clone().contiguous())
    assert weights_hash(odd) == weights_hash(flat)


def test_a_sit_built_by_hand_is_saved_with_its_convention(tmp_path: Path) -> None:
    backbone = sit_backbone(SiT(TINY), schedule=LinearPath(0, 1))
    save_checkpoint(tmp_path / "m.safetensors", backbone, backbone.module.state_dict(), training={})
    assert open_checkpoint(tmp_path / "m.safetensors").schedule.time_direction == 1
