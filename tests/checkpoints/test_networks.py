"""A network is found under any prefix, beside other networks, and what is left out is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import TINY, assert_same_weights, open_tiny, weights
from torch import Tensor, nn

from layerprobe.backbones.sit import SiT
from layerprobe.checkpoints.networks import find_network
from layerprobe.checkpoints.opening import describe_checkpoint, open_checkpoint

OWN = {
    "layers": "blocks.*",
    "schedule": "sit",
    "prediction": "velocity",
    "shape": (1, 4, 4),
    "num_classes": 3,
    "device": "cpu",
}


def below(prefix: str, seed: int = 0) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in weights(seed).items()}


OTHERS = {
    "first_stage_model.decoder.conv.weight": torch.ones(3),
    "first_stage_model.encoder.conv.weight": torch.ones(3),
    "loss.lpips.weight": torch.ones(2),
}


def opened(path: Path, *, own: bool, **options: Any) -> nn.Module:
    if own:
        return open_checkpoint(path, model=lambda: SiT(TINY), **OWN, **options).module
    return open_tiny(path, **options).module


@pytest.mark.parametrize("own", [True, False], ids=["own network", "family"])
@pytest.mark.parametrize(
    "prefix", ["net.", "model.diffusion_model.", "module.net.model.", "_forward_module.denoiser._orig_mod.net."]
)
def test_a_prefix_of_any_number_of_parts_is_taken_off(prefix: str, own: bool, tmp_path: Path) -> None:
    torch.save({"state_dict": below(prefix)}, tmp_path / "c.ckpt")
    assert_same_weights(opened(tmp_path / "c.ckpt", own=own), weights())


@pytest.mark.parametrize("own", [True, False], ids=["own network", "family"])
def test_a_network_is_found_beside_others_which_are_told(own: bool, tmp_path: Path) -> None:
    torch.save({"state_dict": below("model.net.") | OTHERS | {"model.scale": torch.ones(2)}}, tmp_path / "c.ckpt")
    assert_same_weights(opened(tmp_path / "c.ckpt", own=own), weights())
    options = {"model": lambda: SiT(TINY), **OWN} if own else {"family": "sit", "num_heads": 2}
    told = describe_checkpoint(tmp_path / "c.ckpt", **options)
    assert told["prefix"] == "model.net."
    assert told["left_out"] == {"first_stage_model.*": 2, "loss.*": 1, "model.scale": 1}


@pytest.mark.parametrize("own", [True, False], ids=["own network", "family"])
def test_of_several_networks_the_averaged_one_is_read_or_one_is_asked_for(own: bool, tmp_path: Path) -> None:
    path = tmp_path / "c.ckpt"
    state = below("wrapped.net.", 1) | below("wrapped.net_ema.") | OTHERS
    torch.save({"state_dict": state}, path)
    assert_same_weights(opened(path, own=own), weights())
    assert_same_weights(opened(path, own=own, weights="state_dict.wrapped.net"), weights(1))
    torch.save({"state_dict": state | below("wrapped.ema2.", 2)}, path)
    asked = (
        r"holds several networks that fit; pass --weights with one of state_dict.wrapped.ema2, state_dict.wrapped.net_"
    )
    with pytest.raises(ValueError, match=asked):
        opened(path, own=own)
    assert_same_weights(opened(path, own=own, weights="state_dict.wrapped.ema2"), weights(2))
    torch.save(below("a.") | below("b.", 1), path)
    with pytest.raises(ValueError, match="holds several networks that fit; pass --weights with one of a, b"):
        opened(path, own=own)
    assert_same_weights(opened(path, own=own, weights="b"), weights(1))


def test_a_network_that_lacks_a_tensor_does_not_fit_under_its_prefix(tmp_path: Path) -> None:
    state = below("model.net.") | OTHERS
    del state["model.net.pos_embed"]
    torch.save(state, tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match=r"does not fit SiT: it lacks pos_embed \(1 missing, 0 unexpected\)"):
        opened(tmp_path / "c.ckpt", own=True)
    torch.save(below("model.net.") | {"model.net.head.weight": torch.ones(2)}, tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match=r"it also has head.weight \(0 missing, 1 unexpected\)"):
        opened(tmp_path / "c.ckpt", own=True)


def test_names_of_many_parts_take_little_work() -> None:
    names = {"a." * 20_000 + str(i): torch.ones(1) for i in range(20)}
    assert find_network(names, lambda part: "nothing" in part, container="") is None


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
        self.blocks[1].weight = self.blocks[0].weight

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_tied_weight_needs_one_of_its_names(prefix: str, tmp_path: Path) -> None:
    """safetensors writes a shared tensor once."""
    from safetensors.torch import save_model

    whole = nn.Module()
    whole.model = Tied()
    save_model(whole if prefix else whole.model, str(tmp_path / "c.safetensors"))
    options = OWN | {"num_classes": 0}
    module = open_checkpoint(tmp_path / "c.safetensors", model=Tied, **options).module
    assert torch.equal(module.blocks[0].weight, whole.model.blocks[0].weight)
    assert module.blocks[1].weight is module.blocks[0].weight
    torch.save({"blocks.0.weight": torch.ones(4, 4), "blocks.1.weight": torch.zeros(4, 4)}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"has other values in blocks.1.weight than in blocks.0.weight, which are one"):
        open_checkpoint(tmp_path / "c.pt", model=Tied, **options)


def test_the_types_of_the_file_are_told(tmp_path: Path) -> None:
    state = weights()
    torch.save({name: t.bfloat16() if name == "pos_embed" else t for name, t in state.items()}, tmp_path / "c.pt")
    told = describe_checkpoint(tmp_path / "c.pt", family="sit", num_heads=2)
    assert told["stored_types"] == ["bfloat16, read as float32", "float32"]
    assert told["files"] == [str(tmp_path / "c.pt")]
