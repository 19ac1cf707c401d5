"""Weights of every layout are read as data; damaged, quantized and hostile ones are refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers", reason="diffusers is not installed (pip install 'layerprobe[diffusers]')")

from diffusers_checks import BY_NAME, opened

from layerprobe.backbones.diffusers.opening import open_diffusers
from layerprobe.backbones.diffusers.weights import weight_type

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
]


def test_sharded_weights_are_the_same_model(tmp_path: Path) -> None:
    case = BY_NAME["DiTTransformer2DModel"]
    model, whole = opened(case, tmp_path)
    shutil.rmtree(tmp_path / "transformer")
    model.save_pretrained(tmp_path / "transformer", max_shard_size="10KB")
    shards = sorted((tmp_path / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 2
    state = open_diffusers(tmp_path).module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.module.state_dict().items())
    shards[1].write_bytes(shards[1].read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cannot be opened as DiTTransformer2DModel .*copy or download it again"):
        open_diffusers(tmp_path)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"there is no weight file .*{shards[1].name}; put it there"):
        open_diffusers(tmp_path)


def test_variants_and_bin_files(tmp_path: Path) -> None:
    model = BY_NAME["DiTTransformer2DModel"].save(tmp_path)
    folder = tmp_path / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    backbone = open_diffusers(tmp_path)
    assert all(torch.equal(backbone.module.state_dict()[k], v) for k, v in model.state_dict().items())
    (folder / "diffusion_pytorch_model.fp16.safetensors").unlink()
    torch.save(model.state_dict(), folder / "diffusion_pytorch_model.bin")
    backbone = open_diffusers(tmp_path)
    assert all(torch.equal(backbone.module.state_dict()[k], v) for k, v in model.state_dict().items())


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_a_bin_file_that_wants_to_run_code_is_refused(tmp_path: Path) -> None:
    model: Any = BY_NAME["DiTTransformer2DModel"].save(tmp_path)
    folder = tmp_path / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({**model.state_dict(), "x": Payload(tmp_path / "ran")}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be opened as DiTTransformer2DModel"):
        open_diffusers(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_old_name_of_a_class_is_followed(tmp_path: Path) -> None:
    case = BY_NAME["DiTTransformer2DModel"]
    model = case.save(tmp_path)
    config = json.loads((tmp_path / "transformer/config.json").read_text())
    (tmp_path / "transformer/config.json").write_text(json.dumps({**config, "_class_name": "Transformer2DModel"}))
    backbone = open_diffusers(tmp_path)
    assert type(backbone.module).__name__ == case.name
    assert all(torch.equal(backbone.module.state_dict()[k], v) for k, v in model.state_dict().items())


def test_weights_of_eight_bits_are_refused(tmp_path: Path) -> None:
    BY_NAME["UNet2DModel"].save(tmp_path)
    file = next(tmp_path.rglob("diffusion_pytorch_model.safetensors"))
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(ValueError, match=r"is quantized to fp8 \(\S+\), so its features are not the model's"):
        open_diffusers(tmp_path)


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "FluxTransformer2DModel", "UNet2DConditionModel"])
def test_weights_in_bfloat16_stay_so_and_compute_as_their_class_does(name: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    case = BY_NAME[name]
    component = "unet" if "UNet" in name else "transformer"
    case.save(tmp_path)
    case.build().to(torch.bfloat16).save_pretrained(tmp_path / component)
    model = getattr(diffusers, name).from_pretrained(tmp_path / component, torch_dtype=torch.bfloat16).eval()
    backbone = open_diffusers(tmp_path, shape=case.shape)
    assert {parameter.dtype for parameter in backbone.module.parameters()} == {torch.bfloat16}
    assert backbone.origin["stored_types"] == ["BF16"]
    x = torch.randn(2, *case.shape, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([500, 500])
    with torch.inference_mode():
        level = backbone.schedule.noise_level(t) if backbone.schedule.integer_time else t / 1000
        predicted = backbone.predict(x, level)
        torch.set_default_dtype(torch.bfloat16)  # of the empty text
        try:
            direct = case.direct(model, x.bfloat16(), t)
        finally:
            torch.set_default_dtype(torch.float32)
    assert predicted.dtype == torch.float32
    assert torch.equal(predicted, direct.float())
    exact = open_diffusers(tmp_path, shape=case.shape, dtype="float32")
    assert exact.origin["stored_types"] == ["BF16, read as F32"]
    for weight, stored in zip(exact.module.parameters(), model.parameters(), strict=True):
        assert weight.dtype == torch.float32 and torch.equal(weight, stored.float())


def test_the_type_of_weights_is_kept_only_if_all_have_it() -> None:
    assert weight_type({"BF16", "I64"}, None) == torch.bfloat16
    assert weight_type({"BF16", "F32"}, None) == weight_type({"F16"}, None) == weight_type(set(), None) == torch.float32
    assert weight_type({"BF16"}, "float32") == weight_type({"F32"}, "stored") == torch.float32


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantized by bitsandbytes to 4 bits, so"),
        ({"quant_method": "gguf", "compute_dtype": "bfloat16"}, "quantized by gguf, so"),
        ({"quant_method": "torchao", "quant_type": "int8wo"}, r"quantized by torchao \(int8wo\), so"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Float8WeightOnlyConfig"}}}, r"\(Float8Wei"),
    ],
)
def test_quantized_models_are_named_by_their_scheme(quantization: Any, said: str, tmp_path: Path) -> None:
    BY_NAME["DiTTransformer2DModel"].save(tmp_path)
    path = tmp_path / "transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    with pytest.raises(ValueError, match=said + ".*; open the original weights, or dequantize"):
        open_diffusers(tmp_path)
