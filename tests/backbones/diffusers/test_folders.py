"""Models are found in folders and in the cache of the Hub; damaged and hostile folders are refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed (pip install 'layerprobe[diffusers]')")

from diffusers_checks import BY_NAME, opened

from layerprobe.backbones.diffusers.opening import is_diffusers, open_diffusers

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
]


def test_a_component_inside_its_pipeline_finds_its_scheduler(tmp_path: Path) -> None:
    case = BY_NAME["UNet2DModel"]
    whole = opened(case, tmp_path)[1]
    part = open_diffusers(tmp_path / "unet")
    named = open_diffusers(tmp_path, subfolder="unet")
    assert part.schedule.name == named.schedule.name == whole.schedule.name == "ddpm-cosine"


def test_a_bare_model_folder_with_a_scheduler_beside_it(tmp_path: Path) -> None:
    case = BY_NAME["UNet2DModel"]
    case.save(tmp_path)
    (tmp_path / "model_index.json").unlink()
    assert is_diffusers(tmp_path / "unet")
    assert open_diffusers(tmp_path / "unet").schedule.name == "ddpm-cosine"
    assert open_diffusers(tmp_path).schedule.name == "ddpm-cosine"
    assert not is_diffusers(tmp_path / "scheduler")
    assert not is_diffusers(tmp_path / "nothing")


def test_the_averaged_folder_of_a_trainer_s_checkpoint_is_read(tmp_path: Path) -> None:
    """As the training scripts of diffusers leave it, with the states of accelerate beside the models."""
    folder = tmp_path / "checkpoint-500"
    model = BY_NAME["UNet2DModel"].save(tmp_path)
    (tmp_path / "unet").rename(tmp_path / "last")
    model.save_pretrained(folder / "unet")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    model.save_pretrained(folder / "unet_ema")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (folder / name).write_bytes(b"state")
    assert is_diffusers(folder)
    averaged = open_diffusers(folder)
    assert torch.equal(averaged.module.conv_in.weight, model.conv_in.weight)
    assert averaged.origin["other_weights"] == ["unet"]
    assert averaged.schedule.name == "ddpm-cosine"  # From the pipeline that the training wrote beside it.
    live = open_diffusers(folder, subfolder="unet")
    assert torch.equal(live.module.conv_in.weight, 2 * model.conv_in.weight)
    assert live.origin["other_weights"] == ["unet_ema"]


def test_the_folder_of_the_hub_s_cache_is_read_at_its_top(tmp_path: Path) -> None:
    cache = tmp_path / "models--us--tiny"
    BY_NAME["DiTTransformer2DModel"].save(cache / "snapshots/abc")
    assert is_diffusers(cache)
    assert "snapshots/abc" in open_diffusers(cache).origin["files"][0]
    BY_NAME["DiTTransformer2DModel"].save(cache / "snapshots/def")
    with pytest.raises(ValueError, match=r"has 2 snapshots \(abc, def\); pass one of them"):
        open_diffusers(cache)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("def\n")
    assert "snapshots/def" in open_diffusers(cache).origin["files"][0]


def test_the_files_the_types_and_the_other_variants_are_told(tmp_path: Path) -> None:
    model: Any = BY_NAME["DiTTransformer2DModel"].save(tmp_path)
    model.half().save_pretrained(tmp_path / "transformer", variant="fp16")
    origin = open_diffusers(tmp_path).origin
    assert origin["files"] == [str(tmp_path / "transformer/diffusion_pytorch_model.safetensors")]
    assert origin["stored_types"] == ["F32"]
    assert origin["other_weights"] == ["diffusion_pytorch_model.fp16.safetensors"]
    (tmp_path / "transformer/diffusion_pytorch_model.safetensors").unlink()
    assert open_diffusers(tmp_path).origin["stored_types"] == ["F16, read as F32"]


def test_a_second_denoiser_of_a_pipeline_is_told(tmp_path: Path) -> None:
    """Wan 2.2 has one network for high noise levels and one for low ones."""
    model: Any = BY_NAME["DiTTransformer2DModel"].save(tmp_path)
    model.save_pretrained(tmp_path / "transformer_2")
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["transformer_2"] = index["transformer"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert any("there is also transformer_2 (--subfolder)" in text for text in open_diffusers(tmp_path).assumptions)


def test_the_hub_s_cache_is_read_and_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot, blobs = tmp_path / "models--us--tiny/snapshots/abc", tmp_path / "models--us--tiny/blobs"
    for folder in (snapshot, blobs, tmp_path / "models--us--tiny/refs"):
        folder.mkdir(parents=True)
    (tmp_path / "models--us--tiny/refs/main").write_text("abc")
    model = BY_NAME["DiTTransformer2DModel"].save(snapshot)
    weights = snapshot / "transformer/diffusion_pytorch_model.safetensors"
    weights.rename(blobs / "1234")
    weights.symlink_to(Path("../../../blobs/1234"))
    assert is_diffusers("us/tiny")
    assert not is_diffusers("runs/missing.pt")
    backbone = open_diffusers("us/tiny")
    assert all(torch.equal(backbone.module.state_dict()[k], v) for k, v in model.state_dict().items())
    with pytest.raises(FileNotFoundError, match=r"not in the Hub's cache; pass hf://us/other to download it"):
        open_diffusers("us/other")
    with pytest.raises(FileNotFoundError, match="us/other is not in its cache; unset HF_HUB_OFFLINE"):
        open_diffusers("hf://us/other")  # HF_HUB_OFFLINE holds here.


def test_a_download_leaves_out_what_is_not_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    BY_NAME["DiTTransformer2DModel"].save(tmp_path)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: asked.update(how) or str(tmp_path))
    open_diffusers("hf://us/tiny")
    files = ["model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]
    files += ["tokenizer/merges.txt", "text_encoder/model-00001-of-00002.safetensors", "scheduler/x.json"]
    unwanted = [
        "flux.safetensors",
        "transformer/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    unwanted += ["unet/diffusion_pytorch_model.fp16.safetensors", "evil.py", "text_encoder/pytorch_model.bin"]
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    assert not asked["local_files_only"]
    assert list(huggingface_hub.utils.filter_repo_objects(files + unwanted, **patterns)) == files


def spoilt(folder: Path, kind: str) -> None:
    model = folder / "transformer"
    config = json.loads((model / "config.json").read_text())
    weights = model / "diffusion_pytorch_model.safetensors"
    if kind in ("unknown class", "a function", "a scheduler"):
        config["_class_name"] = {"unknown class": "os", "a function": "logging", "a scheduler": "DDPMScheduler"}[kind]
    elif kind == "remote code":
        config["auto_map"] = {"AutoModel": "evil.Model"}
    elif kind == "quantized":
        config["quantization_config"] = {"quant_method": "bitsandbytes"}
    elif kind == "another width":
        config["num_attention_heads"] = 4
    elif kind == "fewer blocks":
        config["num_layers"] = 2
    elif kind == "more blocks":
        config["num_layers"] = 4
    elif kind == "strange value":
        config["num_layers"] = "three"
    elif kind == "no weights":
        weights.unlink()
    elif kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "link":
        weights.rename(folder.parent / "outside.safetensors")
        weights.symlink_to(folder.parent / "outside.safetensors")
    elif kind == "map":
        weights.rename(folder / "outside.safetensors")
        index = {"weight_map": {"proj_out_1.weight": "../outside.safetensors"}}
        (model / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "nan":
        from safetensors.torch import load_file, save_file

        state = load_file(weights)
        state["proj_out_2.bias"][0] = float("nan")
        save_file(state, weights)
    elif kind == "component code":
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "X", "transformer": ["evil", "Model"]}))
    elif kind == "pipeline code":
        (folder / "model_index.json").write_text(json.dumps({"_class_name": ["evil", "X"]}))
    elif kind == "no denoiser":
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "X", "vae": ["diffusers", "VAE"]}))
    (model / "config.json").write_text("{" if kind == "not JSON" else json.dumps(config))
    (model / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    shutil.copy(model / "evil.py", folder / "evil.py")


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("unknown class", ValueError, "is a 'os', which is not a model of diffusers .*update diffusers"),
        ("a function", ValueError, "is a 'logging', which is not a model of diffusers"),
        ("a scheduler", ValueError, "is a 'DDPMScheduler', which is not a model of diffusers"),
        ("remote code", ValueError, r"needs code of its own \(auto_map\), which is never run"),
        ("component code", ValueError, r"needs code of its own \(evil\), which is never run"),
        ("pipeline code", ValueError, "needs code of its own .*which is never run"),
        ("no denoiser", ValueError, "has no transformer and no unet; pass --subfolder, one of vae"),
        ("quantized", ValueError, "is quantized"),
        ("another width", ValueError, "cannot be opened as DiTTransformer2DModel|does not fit DiTTransformer2DModel"),
        ("fewer blocks", ValueError, "does not fit DiTTransformer2DModel: unexpected transformer_blocks.2"),
        (
            "more blocks",
            ValueError,
            "does not fit DiTTransformer2DModel: missing transformer_blocks.3|cannot be opened",
        ),
        ("strange value", ValueError, "cannot be opened as DiTTransformer2DModel"),
        (
            "no weights",
            FileNotFoundError,
            "there is no weight file .*diffusion_pytorch_model.safetensors; put it there",
        ),
        ("cut", ValueError, "cannot be opened as DiTTransformer2DModel .*copy or download it again"),
        ("empty", ValueError, "cannot be opened as DiTTransformer2DModel"),
        ("link", ValueError, "is a link out of the folder, which is not followed"),
        ("map", ValueError, "no map of weights to files beside it"),
        ("nan", ValueError, "holds values that are not finite in proj_out_2.bias"),
        ("not JSON", ValueError, "config.json is not valid JSON"),
    ],
)
def test_bad_folders_are_refused_in_one_line_and_nothing_runs(
    kind: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    BY_NAME["DiTTransformer2DModel"].save(folder)
    spoilt(folder, kind)
    with pytest.raises(error, match=message) as refused:
        open_diffusers(folder)
    assert "\n" not in str(refused.value)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_layers", 10**9, "has num_layers = 1000000000, more than 1000; repair it or copy it again"),
        ("sample_size", 10**5, "has sample_size = 100000, more than 2048"),
        ("sample_size", 4.0, "DiTTransformer2DModel has a damaged configuration"),
        ("patch_size", 2 * 10**6, "has patch_size = 2000000, more than 1024"),
        ("attention_head_dim", 10**12, "has attention_head_dim = 1000000000000, more than"),
        ("attention_head_dim", 4 * 10**6, "has attention_head_dim = 4000000, more than 8192"),
        ("num_attention_heads", 2 * 10**6, "has num_attention_heads = 2000000, more than 1024"),
        ("dropout", float("nan"), "has dropout = nan, which cannot be right; repair it or copy it again"),
    ],
)
def test_absurd_numbers_are_refused_before_anything_is_built(
    key: str, value: float, message: str, tmp_path: Path
) -> None:
    BY_NAME["DiTTransformer2DModel"].save(tmp_path)
    file = tmp_path / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=rf"(config\.json |^){message}"):
        open_diffusers(tmp_path)
