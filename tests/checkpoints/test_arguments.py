"""Arguments beside a checkpoint and in the header of its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import TINY, official, open_tiny, weights

from layerprobe.checkpoints.arguments import stated_arguments
from layerprobe.checkpoints.opening import describe_checkpoint, open_checkpoint


def test_every_place_is_read(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    save_file(
        {"a": torch.zeros(2)},
        checkpoints / "m.safetensors",
        metadata={"num_heads": "4", "path_type": "GVP", "odd": "{"},
    )
    (tmp_path / "args.json").write_text(json.dumps({"num_classes": 10}))
    (checkpoints / "config.yaml").write_text("model:\n  depth: 3\ncallback: !!python/object:os.system {}\n")
    path = checkpoints / "m.safetensors"
    args, places = stated_arguments(path, [path], {"lr": 1e-4})
    assert args == {
        "lr": 1e-4,
        "num_heads": 4,
        "path_type": "GVP",
        "odd": "{",
        "num_classes": 10,
        "model": {"depth": 3},
        "callback": None,
    }
    assert places == [
        "m.safetensors",
        "the header of m.safetensors",
        str(checkpoints / "config.yaml"),
        str(tmp_path / "args.json"),
    ]


def test_the_folder_above_is_another_trainings_unless_this_one_is_for_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "args.json").write_text(json.dumps({"num_classes": 10}))
    assert stated_arguments(tmp_path / "run" / "m.pt", [], {}) == ({}, [])


def test_places_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "args.json").write_text(json.dumps({"num_heads": 8, "resume": "there"}))
    assert stated_arguments(tmp_path / "m.pt", [], {"num_heads": 8, "resume": "here"})[0]["resume"] == "there"
    with pytest.raises(ValueError, match=r"^m.pt has num_heads = 4, but \S+args.json has 8; remove the file"):
        stated_arguments(tmp_path / "m.pt", [], {"num_heads": 4})


@pytest.mark.parametrize(("name", "kind"), [("config.json", "JSON"), ("hparams.yaml", "YAML")])
def test_damaged_files_are_named(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_text("{[")
    with pytest.raises(ValueError, match=rf"^\S+{name} is not valid {kind} \(.*\); repair or remove it$"):
        stated_arguments(tmp_path / "m.pt", [], {})


def test_heads_stated_in_a_file_are_used_and_hold_against_the_option(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"ema": weights(), "args": {"num_heads": 4, "num_classes": 3}}, path)
    assert TINY.num_heads == 2
    backbone = open_checkpoint(path, family="sit", device="cpu")
    assert (backbone.num_heads, backbone.module.blocks[0].attn.num_heads, backbone.assumptions) == (4, 4, ())
    with pytest.raises(ValueError, match=r"^the training arguments have num_heads = 4, not 2; leave --num-heads out$"):
        open_tiny(path)


def test_a_model_name_of_another_network_is_told(tmp_path: Path) -> None:
    path = official(tmp_path / "m.pt")
    told = describe_checkpoint(path, family="sit", num_heads=2)
    assert told["assumptions"][0] == (
        "the file's model name SiT-XL/2 is of another network: it means a width of 1152, the weights have 8"
    )
    with pytest.raises(
        ValueError, match=r"^no preset has width 8, so the number of heads is unknown; pass --num-heads$"
    ):
        open_checkpoint(path, family="sit")


def test_a_family_that_the_file_contradicts_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"ema": weights(), "args": {"model": "DiT-T/2", "num_heads": 2, "num_classes": 3}}, path)
    assert open_tiny(path).assumptions == ("names and arguments of the file are those of dit; --family sit is used",)
