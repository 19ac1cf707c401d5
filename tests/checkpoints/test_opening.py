"""Files become backbones, or one line that says why not; no code from a file is run."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import ONE_LINE, Payload
from safetensors.torch import save_file
from tiny_checkpoints import TINY, assert_same_weights, official, open_tiny, tiny, weights
from torch import Tensor

from layerprobe.backbones.mdm import MDM, MDMConfig
from layerprobe.backbones.sit import SiT
from layerprobe.checkpoints.opening import (
    describe_checkpoint,
    embedded_checkpoint,
    open_checkpoint,
    resolve_device,
    training_record,
)
from layerprobe.checkpoints.saving import save_checkpoint, weights_hash
from layerprobe.files import MissingWeights
from layerprobe.noise.schedules import DDPM, EDM, LinearPath


def test_the_embedded_checkpoint_opens_by_its_name() -> None:
    assert embedded_checkpoint().is_file()
    backbone = open_checkpoint("digits", device="cpu")
    assert backbone.num_classes == 10
    assert backbone.shape[0] == 1
    told = describe_checkpoint("digits")
    assert told["checkpoint"] == "digits"
    assert told["training"]["steps"] > 0


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"family": "unet"}, r"is of family 'unet', which this version does not know; update layerprobe"),
        ({"config": {"shape": [1, 4, 4], "wings": 2}}, "has a damaged record .*wings"),
        ({"config": None}, "has a damaged record"),
        ({"config": {"shape": [1, 4, 4], "depth": 0}}, "has a damaged record .*must be at least 1"),
        ({"config": {"shape": "14"}}, "has a damaged record"),
        ({"config": {"shape": [1, 4, 4], "hidden_size": 10**12, "num_heads": 1}}, "has a damaged record"),
        ({"schedule": {}}, "has a damaged record .*schedule"),
        ({"schedule": {"schedule": "ddpm-linear", "betas": [2.0]}}, "has a damaged record .*betas must be"),
        ({"schedule": {"schedule": "linear", "sigma": 2}}, "has a damaged record"),
        ({"training": "none"}, "has a damaged record .*training is .none."),
        ({"training": {"steps": [5]}}, "has a damaged record .*training is"),
        ({"training": {"learning_rate": "1e-3"}}, "has a damaged record .*training is"),
        ({"prediction": "flow"}, "has a damaged record .*unknown prediction 'flow'"),
    ],
)
def test_damaged_records_are_refused_in_one_line(tmp_path: Path, change: dict[str, Any], seen: str) -> None:
    record = {
        "family": "sit",
        "config": TINY.to_dict(),
        "schedule": LinearPath().to_config(),
        "prediction": "velocity",
    }
    path = tmp_path / "model.safetensors"
    save_file(weights(), path, metadata={"layerprobe": json.dumps(record | change)})
    with pytest.raises(ValueError, match=seen) as caught:
        open_checkpoint(path)
    caught.match(ONE_LINE)


@pytest.mark.parametrize("record", ["[1]", "3", '"sit"', "null", "{", ""])
def test_records_that_are_no_records_are_refused(tmp_path: Path, record: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file(weights(), path, metadata={"layerprobe": record})
    with pytest.raises(
        ValueError, match=r"(damaged record|not a valid safetensors file) .*; copy or download it again"
    ):
        open_checkpoint(path)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module.module."])
def test_official_files_open_with_their_averaged_weights(tmp_path: Path, prefix: str) -> None:
    backbone = open_tiny(official(tmp_path / "0400000.pt", prefix=prefix))
    assert_same_weights(backbone.module, weights(0))
    assert (backbone.shape, backbone.num_classes) == ((1, 4, 4), 3)
    assert not backbone.module.training


def test_wrappers_inside_a_name_are_taken_off_too(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    wrapped = {
        name.replace("attn.", "_checkpoint_wrapped_module.attn._orig_mod."): tensor
        for name, tensor in weights().items()
    }
    assert wrapped.keys() != weights().keys()
    torch.save(wrapped, path)
    assert_same_weights(open_tiny(path).module, weights())


@pytest.mark.parametrize("container", ["ema", "model", "state_dict", "module", "network", None])
def test_weights_are_found_where_people_put_them(tmp_path: Path, container: str | None) -> None:
    content = weights() if container is None else {"step": 5, container: weights(), "empty": {}}
    torch.save(content, tmp_path / "model.pt")
    assert_same_weights(open_tiny(tmp_path / "model.pt").module, weights())


def test_averaged_weights_that_are_no_tensors_are_passed_over(tmp_path: Path) -> None:
    torch.save({"model": weights(), "ema": {"decay": 0.999, "steps": 3}}, tmp_path / "model.pt")
    assert_same_weights(open_tiny(tmp_path / "model.pt").module, weights())


@pytest.mark.parametrize("head", ["network.", "module.network.", "diffusion_model."])
def test_a_prefix_that_all_names_share_is_taken_off(tmp_path: Path, head: str) -> None:
    torch.save({head + name: tensor for name, tensor in weights().items()}, tmp_path / "model.pt")
    options: dict[str, Any] = {"layers": "blocks.*", "schedule": "sit", "prediction": "velocity", "shape": (1, 4, 4)}
    backbone = open_checkpoint(tmp_path / "model.pt", model=lambda: SiT(TINY), num_classes=3, **options)
    assert_same_weights(backbone.module, weights())


def test_files_of_the_old_format_open(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"model": weights(), "args": argparse.Namespace(lr=1e-4)}, path, _use_new_zipfile_serialization=False)
    assert path.read_bytes()[:2] != b"PK"
    assert_same_weights(open_tiny(path).module, weights())


def test_plain_safetensors_files_open(tmp_path: Path) -> None:
    save_file({f"module.{name}": tensor for name, tensor in weights().items()}, tmp_path / "model.safetensors")
    assert_same_weights(open_tiny(tmp_path / "model.safetensors").module, weights())
    assert training_record(tmp_path / "model.safetensors") == {}


def test_half_precision_files_become_float32(tmp_path: Path) -> None:
    torch.save({name: tensor.to(torch.bfloat16) for name, tensor in weights().items()}, tmp_path / "model.pt")
    module = open_tiny(tmp_path / "model.pt").module
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_one_name_with_and_without_prefix_is_refused(tmp_path: Path) -> None:
    torch.save(weights() | {"module.pos_embed": torch.zeros(1, 4, 8)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"holds both module.pos_embed and pos_embed; save one of the two networks"):
        open_tiny(tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["blocks.0\nall is well", "\x1b[2Jpos_embed", "pos\x00embed"])
def test_names_that_a_terminal_would_obey_are_refused(tmp_path: Path, name: str) -> None:
    torch.save(weights() | {name: torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match=r"is damaged: it has a tensor called .*; copy or download it again$"
    ) as caught:
        open_tiny(tmp_path / "model.pt")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("family", "data_time", "noise_time", "prediction"),
    [("sit", 1.0, 0.0, "velocity"), ("layersync", 1.0, 0.0, "velocity"), ("dit", 0.0, 999.0, "eps")],
)
def test_families_have_the_conventions_of_their_code(
    tmp_path: Path, family: str, data_time: float, noise_time: float, prediction: str
) -> None:
    backbone = open_tiny(official(tmp_path / "model.pt"), family=family)
    ends = backbone.schedule.native_time(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == [data_time, noise_time]
    assert backbone.prediction == prediction


def test_a_family_trained_otherwise_can_be_told_so(tmp_path: Path) -> None:
    path = official(tmp_path / "model.pt")
    backbone = open_tiny(path, schedule="flow", prediction="x0")
    assert (backbone.schedule.time_direction, backbone.prediction) == (1, "x0")
    assert open_tiny(path, schedule=EDM(0.25)).schedule.scale == 0.25
    with pytest.raises(ValueError, match="unknown schedule 'vp'; use sit"):
        open_tiny(path, schedule="vp")
    with pytest.raises(ValueError, match="unknown prediction 'flow'; use velocity"):
        open_tiny(path, prediction="flow")


def test_a_file_of_several_possible_families_asks_for_one(tmp_path: Path) -> None:
    path = official(tmp_path / "model.pt")
    with pytest.raises(
        ValueError,
        match=r"model.pt could belong to any of sit, layersync, .* which differ in their time convention; pass",
    ):
        open_tiny(path, family=None)
    with pytest.raises(ValueError, match=r"^unknown family 'unet'; use sit, layersync, "):
        open_tiny(path, family="unet")
    with pytest.raises(ValueError, match="no preset has width 8, so the number of heads is unknown; pass --num-heads"):
        open_tiny(path, num_heads=None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no weights; expected named tensors, possibly under ema, model"),
        ([torch.zeros(3)], "holds no weights"),
        (torch.zeros(3), "holds no weights"),
        ({"model": {"lr": 0.1}, "ema": 3}, "holds no weights, only model, ema"),
        (
            {"conv.weight": torch.zeros(3)},
            r"belongs to no known family \(its first tensors are conv.weight\); pass --model file.py:factory",
        ),
    ],
)
def test_files_that_hold_no_sit_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message) as caught:
        open_tiny(tmp_path / "model.pt")
    caught.match(ONE_LINE)


def without(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            without("blocks.1.attn.qkv.bias"),
            r"does not fit SiT: it lacks blocks.1.attn.qkv.bias \(1 missing, 0 unexpected\)",
        ),
        (without("pos_embed"), "this is not a complete SiT or DiT: pos_embed is missing"),
        (
            lambda tensors: tensors.update({"projectors.0.weight": torch.zeros(2)}),
            r"does not fit SiT: it also has projectors.0.weight \(0 missing, 1 unexpected\); pass the network",
        ),
        (
            lambda tensors: tensors.update({"blocks.0.mlp.fc2.bias": torch.zeros(8, dtype=torch.int8)}),
            r"does not fit SiT: blocks.0.mlp.fc2.bias has type torch.int8, .*; convert or dequantize it first",
        ),
        (
            lambda tensors: tensors.update({"blocks.0.mlp.fc2.bias": torch.zeros(9)}),
            r"does not fit SiT: blocks.0.mlp.fc2.bias has shape \(9,\), but the network expects \(8,\); pass",
        ),
        (
            lambda tensors: tensors["final_layer.linear.bias"].fill_(float("nan")),
            r"holds values that are not finite in final_layer.linear.bias; use an earlier checkpoint",
        ),
        (
            lambda tensors: tensors["blocks.0.mlp.fc1.weight"].view(-1)[5:6].fill_(float("inf")),
            "holds values that are not finite in blocks.0.mlp.fc1.weight",
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_that_do_not_fit_or_are_not_finite_are_refused(
    tmp_path: Path, damage: Callable[[dict[str, Tensor]], Any], message: str, suffix: str
) -> None:
    tensors, path = {name: tensor.clone() for name, tensor in weights().items()}, tmp_path / f"model{suffix}"
    damage(tensors)
    (save_file if suffix == ".safetensors" else torch.save)(tensors, path)
    with pytest.raises(ValueError, match=message) as caught:
        open_tiny(path)
    caught.match(ONE_LINE)


def test_the_payload_does_harm_where_it_is_trusted(tmp_path: Path) -> None:
    """The control of the tests below."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "planted")))
    assert (tmp_path / "planted").exists()


@pytest.mark.parametrize("place", ["bare", "beside", "as args", "in the state dict"])
@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_code_in_a_file_is_never_run(tmp_path: Path, place: str, form: str) -> None:
    payload, path = Payload(tmp_path / "planted"), tmp_path / "model.pt"
    contents: dict[str, Any] = {
        "bare": payload,
        "beside": {"ema": weights(), "zzz": payload},
        "as args": {"args": argparse.Namespace(out=payload), "ema": weights()},
        "in the state dict": {"ema": weights() | {"zzz": payload}},
    }
    if form == "pickle":
        path.write_bytes(pickle.dumps(contents[place]))
    else:
        torch.save(contents[place], path, _use_new_zipfile_serialization=form == "zip")
    if place == "bare":
        with pytest.raises(ValueError, match="holds no weights") as caught:
            open_tiny(path)
        caught.match(ONE_LINE)
    else:
        assert_same_weights(open_tiny(path).module, weights())
        told = describe_checkpoint(path, family="sit", num_heads=2)
        assert f"{os.system.__module__}.system" in told["left_unbuilt"]
    assert not (tmp_path / "planted").exists()


def written(folder: Path, form: str) -> Path:
    path = folder / ("model.safetensors" if form == "safetensors" else "model.pt")
    if form == "safetensors":
        save_checkpoint(path, tiny(), weights(), training={"steps": 1})
    else:
        torch.save({"ema": weights()}, path, _use_new_zipfile_serialization=form == "zip")
    return path


def options_of(form: str) -> dict[str, Any]:
    return {} if form == "safetensors" else {"family": "sit", "num_heads": 2}


@pytest.mark.parametrize("form", ["safetensors", "zip", "old"])
def test_truncated_files_are_refused_in_one_line(tmp_path: Path, form: str) -> None:
    path = written(tmp_path, form)
    whole = path.read_bytes()
    n = len(whole)
    for length in (0, 1, 2, 7, 8, 9, 100, n // 4, n // 2, n - 1000, n - 23, n - 8, n - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.\w+ (is not a valid|is (empty|damaged)|ends before)") as caught:
            open_checkpoint(path, **options_of(form))
        caught.match(ONE_LINE)
    path.write_bytes(whole)
    open_checkpoint(path, **options_of(form))


@pytest.mark.parametrize("form", ["safetensors", "zip", "old"])
def test_flipped_bytes_give_a_backbone_or_one_line(tmp_path: Path, form: str) -> None:
    """A flip among the values can go unnoticed; one among names, shapes and structure must not end in a traceback."""
    path = written(tmp_path, form)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    # The structure stands at the beginning in all three formats, and at the end of a zip.
    places = [*range(0, 1200, 20), *range(len(whole) - 300, len(whole), 20)]
    places += torch.randint(len(whole), (40,), generator=generator).tolist()
    refused = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        path.write_bytes(damaged)
        try:
            assert open_checkpoint(path, **options_of(form)).shape
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error), place  # noqa: PT017
    assert refused > 20


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x80\x04.", bytes(1000), b"{}" * 100])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".ckpt", ""])
def test_files_of_something_else_are_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"(is not a valid|is empty|holds no weights)") as caught:
        open_checkpoint(path)
    caught.match(ONE_LINE)


def test_a_safetensors_header_larger_than_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(ValueError, match=r"is not a valid safetensors file .*; copy or download it again"):
        open_checkpoint(path)


def test_missing_files_and_folders_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^there is no checkpoint file \S+nothing.pt; pass a "):
        open_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match=r"contains no checkpoint; pass a "):
        open_checkpoint(tmp_path)
    official(tmp_path / "model.pt")
    assert open_tiny(tmp_path).layers == ("blocks.0", "blocks.1")


def test_devices_that_are_not_there_are_refused_before_the_file_is_read(tmp_path: Path) -> None:
    assert resolve_device("auto").type in ("cpu", "cuda")
    assert resolve_device("cpu") == torch.device("cpu")
    missing = "cuda:99" if torch.cuda.is_available() else "cuda"
    for device in (missing, "tpu-v9", ""):
        with pytest.raises(
            ValueError, match=rf"^--device {device} is not available \(.*\); pass cpu or auto$"
        ) as caught:
            open_checkpoint(tmp_path / "nothing.pt", device=device)
        caught.match(ONE_LINE)


@pytest.mark.parametrize(
    "option",
    [
        {"family": "dit"},
        {"num_heads": 4},
        {"schedule": "edm"},
        {"prediction": "eps"},
        {"shape": (1, 4, 4)},
        {"num_classes": 3},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_without_effect_on_our_own_files_are_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, tiny(), weights(), training={})
    name = next(iter(option)).replace("_", "-")
    with pytest.raises(ValueError, match=rf"records its own configuration: --{name} has no effect; leave it out$"):
        open_checkpoint(path, **option)


def test_options_without_effect_on_other_files_are_refused(tmp_path: Path) -> None:
    path = official(tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"^without a model of your own: --lora has no effect; leave it out$"):
        open_tiny(path, lora="adapter")
    with pytest.raises(ValueError, match=r"the label table has 3 classes and a null label, not 5 classes"):
        open_tiny(path, num_classes=5)
    with pytest.raises(ValueError, match=r"^with a model of your own: --family has no effect; leave it out$"):
        open_tiny(path, model=tiny)
    with pytest.raises(ValueError, match=r"returns a complete Backbone: --schedule has no effect; leave it out$"):
        open_checkpoint(path, model=tiny, schedule="sit")


@pytest.mark.parametrize("layers", ["blocks.1", ["blocks.1"], ["*.1"]])
def test_layers_can_be_chosen_by_name_or_pattern(tmp_path: Path, layers: Any) -> None:
    path = official(tmp_path / "model.pt")
    assert open_tiny(path, layers=layers).layers == ("blocks.1",)
    assert open_tiny(path).layers == ("blocks.0", "blocks.1")
    assert open_checkpoint(path, model=tiny, layers=layers).layers == ("blocks.1",)
    assert open_tiny(path, layers=["blocks.*.mlp", "x_embedder"]).layers == (
        "x_embedder",
        "blocks.0.mlp",
        "blocks.1.mlp",
    )
    with pytest.raises(ValueError, match=r"^blocks.2 is not in SiT, which has x_embedder"):
        open_tiny(path, layers=["blocks.2"])
    with pytest.raises(ValueError, match=r"^no layer is named"):
        open_tiny(path, layers=[])


def test_describe_tells_what_a_checkpoint_is_as_json(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    backbone = tiny(schedule=DDPM.from_name("linear"), prediction="eps")
    save_checkpoint(path, backbone, backbone.module.state_dict(), training={"steps": 9})
    told = describe_checkpoint(path)
    assert json.loads(json.dumps(told)) == told
    assert told == {
        "checkpoint": str(path),
        "model": "SiT with 2 blocks of width 8, patch 2",
        "format": "safetensors",
        "files": [str(path)],
        "weights": "",
        "other_weights": [],
        "left_unbuilt": [],
        "stored_types": ["float32"],
        "parameters": sum(parameter.numel() for parameter in backbone.module.parameters()),
        "shape": [1, 4, 4],
        "heads": 2,
        "value_range": [-1.0, 1.0],
        "assumptions": [],
        "classes": 3,
        "schedule": "ddpm-linear",
        "data_at_time": 0.0,
        "noise_at_time": 999.0,
        "prediction": "eps",
        "weights_hash": weights_hash(backbone.module),
        "layers": {"blocks.0": [4, 8], "blocks.1": [4, 8]},
        "parts": {"blocks.*": ["attn.q", "attn.k", "attn.v", "attn.out", "attn", "mlp"]},
        "training": {"steps": 9},
    }


def test_describe_takes_the_options_of_open(tmp_path: Path) -> None:
    told = describe_checkpoint(official(tmp_path / "model.pt"), family="sit", num_heads=2, layers=["blocks.1"])
    assert (told["schedule"], told["data_at_time"], told["noise_at_time"]) == ("linear", 1.0, 0.0)
    assert told["layers"] == {"blocks.1": [4, 8]}
    assert (told["weights"], told["other_weights"], told["family"]) == ("ema", ["model"], "sit")
    assert told["latents"] == "latents of Stable Diffusion's VAE x 0.18215"
    other = describe_checkpoint(tmp_path / "model.pt", family="sit", num_heads=2, weights="model")
    assert (other["weights"], other["weights_hash"] == told["weights_hash"]) == ("model", False)


def test_a_diffusers_folder_opens_by_its_path(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=2, num_layers=2, sample_size=4, patch_size=2,
        num_embeds_ada_norm=5, norm_num_groups=1, out_channels=4,
    ).eval()  # fmt: skip
    network.save_pretrained(tmp_path / "transformer")
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "DDPMScheduler"]}))
    backbone = open_checkpoint(tmp_path, device="cpu")
    assert backbone.layers == ("transformer_blocks.0", "transformer_blocks.1")
    x, level = torch.randn(2, 2, 4, 4), torch.tensor([0.3, 0.7])
    with torch.inference_mode():
        time = backbone.schedule.native_time(level)
        wanted = network(x, timestep=time, class_labels=torch.full((2,), 5)).sample[:, :2]
        assert torch.allclose(backbone.predict(x, level), wanted, atol=1e-5)
    told = describe_checkpoint(tmp_path)
    assert (told["format"], told["schedule"], told["prediction"]) == ("diffusers", "ddpm-linear", "eps")
    with pytest.raises(ValueError, match="is a diffusers model: --family has no effect; leave it out"):
        open_checkpoint(tmp_path, family="dit")
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(MissingWeights, match=r"there is no weight file \S+; put it there"):
        open_checkpoint(tmp_path)


def test_mdm_is_recognized_and_reads_the_settings_beside_it(tmp_path: Path) -> None:
    made = MDM(MDMConfig((6, 10), hidden_size=8, depth=2, num_heads=2, mlp_size=16, num_actions=3, num_positions=1000))
    torch.save(made.state_dict(), tmp_path / "model000100.pt")
    settings = {"num_heads": 2, "noise_schedule": "cosine", "diffusion_steps": 1000, "dataset": "humanact12"}
    (tmp_path / "args.json").write_text(json.dumps(settings))
    backbone = open_checkpoint(tmp_path / "model000100.pt", shape=(6, 10))
    assert (backbone.prediction, backbone.schedule.name, backbone.num_classes) == ("x0", "ddpm-cosine", 3)
    assert describe_checkpoint(tmp_path, shape=(6, 10))["layers"] == {
        "seqTransEncoder.layers.0": [10, 8],
        "seqTransEncoder.layers.1": [10, 8],
    }
    (tmp_path / "args.json").write_text("{")
    with pytest.raises(ValueError, match=r"args.json is not valid JSON .*; repair or remove it"):
        open_checkpoint(tmp_path / "model000100.pt", shape=(6, 10))


def test_opening_takes_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    """The network holds the file's own pages, which writing to does not change."""
    path = official(tmp_path / "model.pt")
    before = path.read_bytes()
    module = open_tiny(path).module
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    assert path.read_bytes() == before
    assert_same_weights(open_tiny(path).module, weights())


def test_weights_of_eight_bits_are_refused(tmp_path: Path) -> None:
    tensors = weights() | {"pos_embed": weights()["pos_embed"].to(torch.float8_e4m3fn)}
    torch.save(tensors, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"has type torch.float8_e4m3fn, .*; convert or dequantize it first"):
        open_tiny(tmp_path / "model.pt")
