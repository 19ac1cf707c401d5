"""The right set of weights is chosen, under names without wrappers."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import (
    ONE_LINE,
    network,
    same,
    saved,
    tiny_net,
)
from safetensors.torch import save_file
from torch import Tensor

from layerprobe.checkpoints.weight_sets import read_weights


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module.", "module.module."]
)
def test_wrappers_are_taken_off_names(tmp_path: Path, prefix: str) -> None:
    inner = {
        f"{prefix}{name}".replace("blocks.", "blocks._checkpoint_wrapped_module."): t for name, t in network().items()
    }
    same(saved(tmp_path, {"model": inner}).tensors, network())


def test_a_count_of_averaged_models_is_no_weight(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(tiny_net())
    same(saved(tmp_path, averaged.state_dict()).tensors, dict(tiny_net().state_dict()))


def test_one_name_with_and_without_prefix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds both blocks.0.weight and module.blocks.0.weight; save one of the two"):
        saved(tmp_path, {f"module.{name}": t for name, t in network().items()} | network())


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "\ud800"])
def test_names_that_a_terminal_would_obey_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "c.pkl").write_bytes(pickle.dumps({name: torch.ones(2)}))
    with pytest.raises(ValueError, match=ONE_LINE) as caught:
        read_weights(tmp_path / "c.pkl")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("content", "containers"),
    [
        ({"model": 1, "ema": 2, "opt": {"state": {0: {"exp_avg": torch.ones(3)}}}}, ("ema", "model")),
        ({"state_dict": 1, "model_ema": 2}, ("model_ema", "state_dict")),
        ({"params": 1, "params_ema": 2}, ("params_ema", "params")),
        ({"net": 1, "unet_ema_0.999": 2}, ("unet_ema_0.999", "net")),
        ({"state_dict": 1, "callbacks": {"EMACallback{'decay': 1}": {"ema_weights": 2}}}, None),
        ({"models": {"unet": 1, "unet_ema": 2}}, ("models.unet_ema", "models.unet")),
        ({"ema_model": {"model": 2}, "model": 1}, ("ema_model.model", "model")),
        ({"optimizer": {"m": 1}, "scaler": {"s": 1}, "whatever": 2}, ("whatever",)),
        ({"avg_model": 2, "model": 1}, ("avg_model", "model")),
        ({"model": 2, "adam": {"exp_avg": 1, "exp_avg_sq": 3}}, ("model", "adam.exp_avg", "adam.exp_avg_sq")),
        ({"schema": 1, "state_dict": 2}, ("state_dict", "schema")),
    ],
)
def test_averaged_weights_are_preferred(tmp_path: Path, content: Any, containers: tuple[str, ...] | None) -> None:
    found = saved(tmp_path, _scaled(content))
    same(found.tensors, network(2))
    assert containers is None or found.containers == containers
    for name in found.containers:
        assert saved(tmp_path, _scaled(content), weights=name).container == name


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"model": 1, "ema": [2, 3]}, ["ema.0", "ema.1"]),
        ({"model": 1, "ema": {0.999: 2, 0.9999: 3}}, ["ema.0.999", "ema.0.9999"]),
        ({"model": 1, "ema_0.999": 2, "ema_0.9999": 3}, ["ema_0.999", "ema_0.9999"]),
        ({"net": 1, "ema1": 2, "ema2": 3}, ["ema1", "ema2"]),
        ({"net": 1, "ema-0.05": 2, "ema-0.1": 3}, ["ema-0.05", "ema-0.1"]),
        ({"net": 1, "emas": {"slow": 2, "fast": 3}}, ["emas.slow", "emas.fast"]),
        ({"model": 1, "ema": 2, "avg_model": 3}, ["ema", "avg_model"]),
    ],
)
def test_one_of_several_averages_is_asked_for(tmp_path: Path, content: Any, names: list[str]) -> None:
    with pytest.raises(ValueError, match=rf"holds several sets of weights \({', '.join(names)}, .*; pass --weights"):
        saved(tmp_path, _scaled(content))
    for scale, name in enumerate(names, 2):
        same(saved(tmp_path, _scaled(content), weights=name).tensors, network(scale))


def test_a_part_of_a_set_is_chosen_by_its_prefix(tmp_path: Path) -> None:
    state = _below("net.inner", network()) | _below("other", network(2))
    for content, name in (({"state_dict": state}, "state_dict.net.inner"), (state, "net.inner")):
        found = saved(tmp_path, content, weights=name)
        assert found.container == name
        same(found.tensors, network())
    with pytest.raises(ValueError, match=r"has no weights called 'net.outer'"):
        saved(tmp_path, state, weights="net.outer")


def _scaled(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _scaled(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_scaled(value) for value in content]
    return network(content) if isinstance(content, int) else content


def test_ema_pytorch_keeps_three_things_in_one_state_dict(tmp_path: Path) -> None:
    online, average = _below("online_model", network()), _below("ema_model", network(2))
    content = {"ema": {"initted": torch.tensor(True), "step": torch.tensor([9]), **online, **average}, "step": 9}
    found = saved(tmp_path, content)
    wanted = network(2)
    same(found.tensors, wanted)
    assert found.containers == ("ema.ema_model", "ema.online_model")
    same(saved(tmp_path, content, weights="ema.online_model").tensors, network())
    same(saved(tmp_path, {"ema": {"initted": torch.tensor(True), **average}}).tensors, wanted)


def _below(head: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{head}.{name}": tensor for name, tensor in state.items()}


def test_latent_diffusion_averages_without_dots_and_buffers(tmp_path: Path) -> None:
    average = {name.replace(".", ""): tensor for name, tensor in network(2).items() if name != "steps"}
    counters = {"decay": torch.tensor(0.9), "num_updates": torch.tensor(3)}
    state = _below("model", network()) | _below("model_ema", average | counters) | {"first_stage.w": torch.ones(5)}
    found = saved(tmp_path, {"state_dict": state})
    same(found.tensors, {name: t for name, t in network(2).items() if name != "steps"} | {})
    assert found.containers == ("state_dict.model_ema", "state_dict")
    whole = saved(tmp_path, {"state_dict": state}, weights="state_dict").tensors
    same(whole, _below("model", network()) | {"first_stage.w": torch.ones(5)})


def test_a_part_called_ema_that_is_no_copy_stays_a_part(tmp_path: Path) -> None:
    state = network() | {"ema.weight": torch.ones(3)}
    same(saved(tmp_path, state).tensors, state)


def test_averaged_parameters_in_a_list_get_the_names_of_the_network(tmp_path: Path) -> None:
    state = dict(tiny_net().state_dict())
    del state["norm.running_mean"], state["norm.running_var"], state["last.1.weight"]
    shadow = [2 * parameter.detach() for parameter in tiny_net().parameters()]
    found = saved(tmp_path, {"model": state, "ema": {"decay": 0.9, "shadow_params": shadow, "collected_params": None}})
    assert found.containers == ("ema.shadow_params", "model")
    parameters = dict(tiny_net().named_parameters())
    same(found.tensors, {name: 2 * t if name in parameters else t for name, t in state.items()})


def test_averaged_parameters_in_a_list_are_not_guessed(tmp_path: Path) -> None:
    """Batch normalization has four vectors of one length, two of them parameters: the list fits in several ways."""
    state = dict(tiny_net().state_dict())
    shadow = [2 * parameter.detach() for parameter in tiny_net().parameters()]
    found = saved(tmp_path, {"model": state, "ema": {"shadow_params": shadow}})
    assert found.containers == ("model",)
    same(found.tensors, state)


def test_weights_are_chosen_by_name_and_asked_for_where_none_is_obvious(tmp_path: Path) -> None:
    same(saved(tmp_path, {"model": network(), "ema": network(2)}, weights="model").tensors, network())
    with pytest.raises(ValueError, match=r"model.pt has no weights called 'emma'; it has ema, model; did you mean ema"):
        saved(tmp_path, {"model": network(), "ema": network(2)}, weights="emma")
    with pytest.raises(
        ValueError, match=r"holds several sets of weights \(encoder, decoder\); pass --weights with one"
    ):
        saved(tmp_path, {"encoder": network(), "decoder": network(2)})
    same(saved(tmp_path, {"encoder": network(), "decoder": network(2)}, weights="decoder").tensors, network(2))


def test_our_own_record_is_read_and_our_networks_are_left_whole(tmp_path: Path) -> None:
    state = _below("ema", network()) | network(2)
    save_file(state, tmp_path / "c.safetensors", metadata={"layerprobe": json.dumps({"family": "sit"})})
    found = read_weights(tmp_path / "c.safetensors")
    assert found.record == {"family": "sit"} and found.containers == ("",)
    assert set(found.tensors) == set(state)
