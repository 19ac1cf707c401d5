"""The null condition is the pipeline's empty prompt, or zeros with the reason in the backbone's name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (pip install 'layerprobe[diffusers]')")

from diffusers_checks import BY_NAME, noisy  # noqa: E402
from diffusers_models import SCALED, flow  # noqa: E402

from layerprobe.backbones.diffusers.opening import open_diffusers  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
]


def clip(folder: Path, width: int) -> tuple[Any, Any]:
    """A text encoder and its tokenizer, with random weights and two letters."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir(parents=True)
    letters = {"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
    (folder / "vocab.json").write_text(json.dumps(letters))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=77
    )
    tokens = {"vocab_size": 4, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 3}
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(**tokens, **sizes, projection_dim=10)
    return transformers, (transformers.CLIPTextModel(config).eval(), tokenizer, config)


@pytest.fixture
def stable_diffusion(tmp_path: Path) -> tuple[Path, Any]:
    """A whole Stable Diffusion pipeline, saved."""
    _, (encoder, tokenizer, _) = clip(tmp_path / "clip", 12)
    case = BY_NAME["UNet2DConditionModel"]
    stages = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1, **stages)
    parts = dict.fromkeys(("safety_checker", "feature_extractor"))
    scheduler = diffusers.DDIMScheduler(**SCALED, steps_offset=1)
    pipeline = diffusers.StableDiffusionPipeline(
        vae, encoder, tokenizer, case.build(), scheduler, **parts, requires_safety_checker=False
    )
    pipeline.save_pretrained(tmp_path / "sd")
    return tmp_path / "sd", pipeline


def test_the_null_condition_is_the_empty_prompt_of_the_pipeline(
    stable_diffusion: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, pipeline = stable_diffusion
    capsys.readouterr()
    backbone = open_diffusers(folder)
    assert capsys.readouterr() == ("", "")
    assert backbone.name == "UNet2DConditionModel of 5 blocks, empty prompt as text"
    assert (backbone.prediction, backbone.schedule.name) == ("eps", "ddpm-scaled_linear")
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([20, 700])
    with torch.inference_mode():
        text = pipeline.encode_prompt("", torch.device("cpu"), 1, False)[0]
        assert float(text.std()) > 0.1
        wanted = pipeline.unet(x, t, encoder_hidden_states=text.repeat(2, 1, 1)).sample
        torch.testing.assert_close(backbone.predict(x, backbone.schedule.noise_level(t)), wanted)


def test_a_text_in_a_list_is_read_and_one_of_another_width_is_not(
    stable_diffusion: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, pipeline = stable_diffusion
    text = pipeline.encode_prompt("", torch.device("cpu"), 1, False)[0]
    one_backbone = open_diffusers(folder)
    monkeypatch.setattr(type(pipeline), "encode_prompt", lambda *_, **__: ([text[0]], []))  # as Z-Image's pipeline
    x, level = torch.randn(2, 4, 16, 16), torch.tensor([0.3, 0.6])
    with torch.inference_mode():
        assert torch.equal(open_diffusers(folder).predict(x, level), one_backbone.predict(x, level))
    monkeypatch.setattr(type(pipeline), "encode_prompt", lambda *_, **__: text[..., :3])
    assert open_diffusers(folder).name.endswith("zeros as text (its pipeline gives no text of width 12)")


def test_an_encoder_that_does_not_load_gives_zeros_and_the_name_says_why(stable_diffusion: tuple[Path, Any]) -> None:
    folder, _ = stable_diffusion
    (folder / "text_encoder/model.safetensors").write_bytes(b"")
    backbone = open_diffusers(folder)
    assert backbone.name.startswith("UNet2DConditionModel of 5 blocks, zeros as text (")
    config = json.loads((folder / "text_encoder/config.json").read_text())
    (folder / "text_encoder/config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    assert open_diffusers(folder).name.endswith("zeros as text (text_encoder needs code of its own)")


def test_the_mask_of_the_empty_prompt_is_kept(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)])
    sizes = {"vocab_size": 4, "d_model": 12, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    encoder = transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()
    case = BY_NAME["PixArtTransformer2DModel"]
    model = case.build()
    pipeline = diffusers.PixArtAlphaPipeline(tokenizer, encoder, None, model, case.scheduler)
    pipeline.save_pretrained(tmp_path)
    backbone = open_diffusers(tmp_path)
    assert backbone.name.endswith("empty prompt as text")
    text, mask, *_ = pipeline.encode_prompt("", do_classifier_free_guidance=False)
    assert text.shape == (1, 120, 12)
    assert 0 < int(mask.sum()) < 120
    x, t = noisy(case), torch.tensor([20, 700])
    sizes = {"resolution": None, "aspect_ratio": None}
    with torch.inference_mode():
        wanted = model(
            x, text.repeat(2, 1, 1), t, added_cond_kwargs=sizes, encoder_attention_mask=mask.repeat(2, 1)
        ).sample[:, :4]
        torch.testing.assert_close(backbone.predict(x, backbone.schedule.noise_level(t)), wanted)


def test_two_encoders_and_a_pooled_text(tmp_path: Path) -> None:
    case = BY_NAME["SD3Transformer2DModel"]
    transformers, (_, tokenizer, config) = clip(tmp_path / "clip", 6)
    config.projection_dim = 5
    encoders = [transformers.CLIPTextModelWithProjection(config).eval() for _ in range(2)]
    model = getattr(diffusers, case.name)(**{**case.config, "joint_attention_dim": 12}).eval()
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=model, scheduler=flow(), vae=None, text_encoder=encoders[0], tokenizer=tokenizer,
        text_encoder_2=encoders[1], tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "sd3")
    backbone = open_diffusers(tmp_path / "sd3")
    text, _, pooled, _ = pipeline.encode_prompt("", None, None, do_classifier_free_guidance=False)
    x = torch.randn(2, 4, 8, 8)
    with torch.inference_mode():
        wanted = model(x, text.repeat(2, 1, 1), pooled.repeat(2, 1), torch.tensor([300.0, 800.0])).sample
        torch.testing.assert_close(backbone.predict(x, torch.tensor([0.3, 0.8])), wanted)
    assert backbone.name.endswith("empty prompt as text")


def test_sdxl_asks_for_zeros_itself(tmp_path: Path) -> None:
    BY_NAME["UNet2DConditionModel-sdxl"].save(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": True}))
    assert open_diffusers(tmp_path).name.endswith("zeros as text, as in its pipeline")


@pytest.mark.parametrize("change", ["remove", "nan"])
def test_an_encoder_without_all_of_its_weights_gives_zeros_and_says_nothing_else(
    stable_diffusion: tuple[Path, Any], change: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, _ = stable_diffusion
    file = folder / "text_encoder/model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("fc1.weight"))
    if change == "nan":
        tensors[name] = tensors[name].fill_(math.nan)
    else:
        del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    backbone = open_diffusers(folder)
    assert backbone.name.endswith("zeros as text (its text encoder lacks weights, or has some that are not finite)")
    assert capfd.readouterr().err == ""
