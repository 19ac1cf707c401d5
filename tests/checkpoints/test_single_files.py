"""Single files with the names of the original code become the same networks as the folders they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers is not installed (pip install 'layerprobe[diffusers]')")

from diffusers_checks import BY_NAME

from layerprobe.checkpoints.opening import describe_checkpoint, open_checkpoint

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")]
UNET, WAN = "UNet2DConditionModel", "WanTransformer3DModel"
RESNET = (("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3"))
RESNET = (*RESNET, ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection"))
OUTER = (("conv_in.", "input_blocks.0.0."), ("conv_norm_out.", "out.0."), ("conv_out.", "out.2."))
OUTER = (*OUTER, ("time_embedding.linear_1.", "time_embed.0."), ("time_embedding.linear_2.", "time_embed.2."))
# The longer names first.
WAN_NAMES = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    (".to_out.0", ".o"),
    (".norm2", ".norm3"),
    (".to_q", ".q"),
    (".to_k", ".k"),
    (".to_v", ".v"),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    (".scale_shift_table", ".modulation"),
    ("proj_out", "head.head"),
)


def latent_diffusion_name(name: str, layers: int) -> str:
    """The name in latent diffusion's code: blocks are counted through, with their down- and upsamplers."""
    for new, old in OUTER:
        if name.startswith(new):
            return name.replace(new, old)
    kind, _, rest = name.partition("_block")
    if kind == "mid":
        part, number, inner = rest.removeprefix(".").split(".", 2)
        place = "1" if part == "attentions" else str(2 * int(number))
        head = f"middle_block.{place}."
    else:
        block, part, number, inner = rest.removeprefix("s.").split(".", 3)
        first = (layers + 1) * int(block)
        if part == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op.{inner.removeprefix('conv.')}"
        if part == "upsamplers":
            return f"output_blocks.{first + layers}.{{up}}.{inner}"
        at = first + int(number) + (kind == "down")
        head = f"{'input' if kind == 'down' else 'output'}_blocks.{at}.{int(part == 'attentions')}."
    for new, old in RESNET:
        if inner.startswith(f"{new}.") and "transformer_blocks" not in inner:
            return head + inner.replace(new, old)
    return head + inner


def latent_diffusion(model: Any) -> dict[str, Tensor]:
    state = model.state_dict()
    names = {name: latent_diffusion_name(name, model.config.layers_per_block) for name in state}
    for name, new in names.items():
        if "{up}" in new:  # After the attention, where there is one.
            names[name] = new.format(up=2 if f"{new.partition('.{')[0]}.1.norm.weight" in names.values() else 1)
    return {names[name]: tensor.clone() for name, tensor in state.items()}


def wan(model: Any) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in model.state_dict().items():
        new = "head.modulation" if name == "scale_shift_table" else name
        for ours, theirs in WAN_NAMES:
            new = new.replace(ours, theirs)
        renamed[new] = tensor.clone()
    return renamed


def same_output(name: str, folder: Path, model: Any, path: Path, **options: Any) -> None:
    case = BY_NAME[name]
    backbone = open_checkpoint(path, pipeline=folder, shape=case.shape, device="cpu", **options)
    assert backbone.schedule.name == open_checkpoint(folder, shape=case.shape, device="cpu").schedule.name
    state = backbone.module.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())


OTHERS = {"first_stage_model.decoder.weight": torch.ones(3), "cond_stage_model.weight": torch.ones(2)}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", [UNET, WAN])
def test_a_single_file_opens_with_the_folder_of_its_model(name: str, prefix: str, tmp_path: Path) -> None:
    folder, path = tmp_path / "folder", tmp_path / "single.safetensors"
    model = BY_NAME[name].save(folder)
    state = (latent_diffusion if name == UNET else wan)(model)
    assert state.keys() != model.state_dict().keys()
    save_file({f"{prefix}{key}": tensor for key, tensor in state.items()} | (OTHERS if prefix else {}), path)
    for file in folder.rglob("diffusion_pytorch_model.safetensors"):
        file.unlink()
    model_options = {"pipeline": folder, "shape": BY_NAME[name].shape}
    backbone = open_checkpoint(path, device="cpu", **model_options)
    found = backbone.module.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in model.state_dict().items())
    told = describe_checkpoint(path, **model_options)
    assert told.get("left_out") == ({"first_stage_model": 1, "cond_stage_model": 1} if prefix else None)
    assert (told["files"], told["stored_types"]) == ([str(path)], ["float32"])


def test_the_averaged_weights_of_latent_diffusion_are_read(tmp_path: Path) -> None:
    """They have no dots in their names and stand beside the live ones."""
    model = BY_NAME[UNET].save(tmp_path / "folder")
    averaged = {f"diffusion_model.{key}": tensor for key, tensor in latent_diffusion(model).items()}
    state = {f"model.{key}": 0 * tensor for key, tensor in averaged.items()} | OTHERS
    state |= {f"model_ema.{key.replace('.', '')}": tensor for key, tensor in averaged.items()}
    torch.save({"state_dict": state}, tmp_path / "sd.ckpt")
    same_output(UNET, tmp_path / "folder", model, tmp_path / "sd.ckpt")
    live = open_checkpoint(tmp_path / "sd.ckpt", pipeline=tmp_path / "folder", weights="state_dict", device="cpu")
    assert not any(parameter.any() for parameter in live.module.parameters())


@pytest.mark.parametrize("prefix", ["", "unet.", "model.unet."])
def test_a_file_with_the_names_of_diffusers_opens_too(prefix: str, tmp_path: Path) -> None:
    model = BY_NAME[UNET].save(tmp_path / "folder")
    state = {f"{prefix}{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save({"state_dict": state | (OTHERS if prefix else {})}, tmp_path / "last.ckpt")
    same_output(UNET, tmp_path / "folder", model, tmp_path / "last.ckpt")
    torch.save({"state_dict": state | {f"other.{k}": v for k, v in state.items()}}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last.ckpt holds several networks that fit \(.*\); pass --weights with one"):
        open_checkpoint(tmp_path / "last.ckpt", pipeline=tmp_path / "folder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if "out.2.bias" not in k}, "does not fit .*1 tensors are missing"),
        (lambda s: s | {"out.2.bias": torch.ones(9)}, r"1 of another shape, the first conv_out.bias; pass --pipeline"),
        (lambda s: s | {"out.2.bias": s["out.2.bias"] * float("inf")}, "values that are not finite in conv_out.bias"),
        (lambda s: s | {"out.2.bias": s["out.2.bias"].to(torch.float8_e4m3fn)}, r"is quantized \(conv_out.bias\)"),
        (lambda s: {"blocks.0.weight": torch.ones(3)}, "of UNet2DConditionModel as|does not fit UNet2DConditionModel"),
    ],
)
def test_single_files_that_do_not_fit_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    model = BY_NAME[UNET].save(tmp_path / "folder")
    torch.save(change(latent_diffusion(model)), tmp_path / "m.pt")
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(tmp_path / "m.pt", pipeline=tmp_path / "folder")
    assert "\n" not in str(caught.value) and "m.pt" in str(caught.value)


def test_a_single_file_without_its_folder_names_the_way_out(tmp_path: Path) -> None:
    model = BY_NAME[UNET].save(tmp_path / "folder")
    torch.save(latent_diffusion(model), tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"or --pipeline FOLDER for a single file of a model that diffusers knows"):
        open_checkpoint(tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"is no folder that diffusers saved; pass the folder of the file's model"):
        open_checkpoint(tmp_path / "m.pt", pipeline=tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"with --pipeline: --family has no effect; leave it out"):
        open_checkpoint(tmp_path / "m.pt", pipeline=tmp_path / "folder", family="sit")
    config = tmp_path / "folder/unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match=r"m.pt needs a whole configuration, but \S+ cannot be built as UNet2DModel"):
        open_checkpoint(tmp_path / "m.pt", pipeline=tmp_path / "folder")
