"""LoRA adapters are merged into the base model, and others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers", reason="diffusers is not installed (pip install 'layerprobe[diffusers]')")

from diffusers_checks import BY_NAME, noisy

from layerprobe.backbones.diffusers.opening import open_diffusers

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
]


def adapted(name: str, tmp_path: Path) -> tuple[Path, Any, Any]:
    """A saved base model's folder, the model, and the configuration of a random adapter of it."""
    peft = pytest.importorskip("peft")
    base = BY_NAME[name].save(tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights=False)
    return tmp_path / "base", base, config


def test_a_peft_adapter_is_merged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder, base, config = adapted("DiTTransformer2DModel", tmp_path)
    plain = open_diffusers(folder)
    tuned = peft.get_peft_model(base, config).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    backbone = open_diffusers(folder, lora=tmp_path / "adapter")
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([50, 600])
    level = backbone.schedule.noise_level(t)
    with torch.inference_mode():
        wanted = tuned(x, timestep=t, class_labels=torch.tensor([10, 10])).sample[:, :4]
        torch.testing.assert_close(backbone.predict(x, level), wanted, rtol=1e-4, atol=1e-5)
        assert float((backbone.predict(x, level) - plain.predict(x, level)).abs().max()) > 1e-2
    # Merged: the layers and weights are named as in the base model.
    assert backbone.layers == plain.layers
    assert backbone.module.state_dict().keys() == plain.module.state_dict().keys()


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_a_lora_file_of_diffusers_is_merged(prefix: str, tmp_path: Path) -> None:

    folder, base, config = adapted("SD3Transformer2DModel", tmp_path)
    config.lora_alpha = config.r  # The file alone does not tell another.
    base.add_adapter(config)
    base.save_lora_adapter(tmp_path / "adapter")
    file = tmp_path / "adapter/pytorch_lora_weights.safetensors"
    others = {"text_encoder.q_proj.lora_B.weight": torch.ones(2)} if prefix else {}
    save_file({f"{prefix}{name}": value for name, value in load_file(file).items()} | others, file)
    case, t = BY_NAME["SD3Transformer2DModel"], torch.tensor([100.0, 800.0])
    with torch.inference_mode():
        wanted = case.direct(base, noisy(case), t)
        plain = open_diffusers(folder).predict(noisy(case), t / 1000)
        assert float((plain - wanted).abs().max()) > 1e-3
        for path in (file, file.parent):
            backbone = open_diffusers(folder, lora=path)
            torch.testing.assert_close(backbone.predict(noisy(case), t / 1000), wanted, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name in backbone.module.state_dict())
    save_file({"transformer.nothing.lora_B.weight": torch.ones(2, 2)}, file)
    with pytest.raises(ValueError, match="SD3Transformer2DModel"):
        open_diffusers(folder, lora=file)


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder, _, _ = adapted("DiTTransformer2DModel", tmp_path)
    other = BY_NAME["PixArtTransformer2DModel"].build()
    peft.get_peft_model(other, peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False)).save_pretrained(
        tmp_path / "adapter"
    )
    file = tmp_path / "adapter/adapter_model.safetensors"
    with pytest.raises(ValueError, match=r"does not fit DiTTransformer2DModel.*attn2.*pass its base model"):
        open_diffusers(folder, lora=tmp_path / "adapter")
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match="cannot be applied to DiTTransformer2DModel"):
        open_diffusers(folder, lora=tmp_path / "adapter")
    file.rename(file.with_name("loose.safetensors"))
    with pytest.raises(ValueError, match="cannot be applied to DiTTransformer2DModel"):
        open_diffusers(folder, lora=file.with_name("loose.safetensors"))
    with pytest.raises(FileNotFoundError, match="there is no adapter at"):
        open_diffusers(folder, lora=tmp_path / "adapter")
