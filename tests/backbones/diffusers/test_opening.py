"""Folders of diffusers open by path alone and speak the one convention; every class is compared with itself, called as
its own pipeline calls it, and with one step of its own scheduler."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from places import DOCS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (pip install 'layerprobe[diffusers]')")

from diffusers_models import CASES, LINEAR, SCALED, Case, flow  # noqa: E402

from layerprobe.backbones.base import Backbone, layer_shapes  # noqa: E402
from layerprobe.backbones.diffusers import opening as adapter  # noqa: E402
from layerprobe.backbones.diffusers.class_table import CLASSES  # noqa: E402
from layerprobe.backbones.diffusers.diffusers_class import from_patches, to_patches  # noqa: E402
from layerprobe.backbones.diffusers.opening import is_diffusers, open_diffusers  # noqa: E402
from layerprobe.capture import capture  # noqa: E402
from layerprobe.extraction.controls import random_weights  # noqa: E402
from layerprobe.noise.predictions import convert_prediction  # noqa: E402
from layerprobe.noise.schedules import DDPM, EDM, LinearPath  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
]

BY_NAME = {case.id: case for case in CASES}
PAGE = DOCS / "diffusers.md"
HEADER = "| class | input | layers, in running order | the image in their outputs | native time | configurations run |"
# Filled by the tests that pass; what the documentation may claim.
PASSED: dict[str, str] = {}


def opened(case: Case, folder: Path, **options: Any) -> tuple[nn.Module, Backbone]:
    model = case.save(folder)
    told = {"shape": case.shape} if case.tell_shape else {}
    told |= {"num_classes": case.num_classes} if "num_classes" in case.options else {}
    assert is_diffusers(folder)
    return model, open_diffusers(folder, **told, **options)


def execution_order(backbone: Backbone, x: Tensor, level: Tensor) -> list[str]:
    """The names of all submodules in the order in which they give their outputs, by hooks of PyTorch alone."""
    order: list[str] = []
    handles = [
        part.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, part in backbone.module.named_modules()
    ]
    backbone.predict(x, level)
    for handle in handles:
        handle.remove()
    return order


def noisy(case: Case, rows: int = 2) -> Tensor:
    return torch.randn(rows, *case.shape, generator=torch.Generator().manual_seed(1))


def moment(case: Case) -> tuple[Any, float, float, float]:
    """The case's scheduler in the middle of sampling: (scheduler, its time, noise level there and after one step)."""
    scheduler: Any = type(case.scheduler).from_config(case.scheduler.config)
    if hasattr(scheduler.config, "use_dynamic_shifting") and scheduler.config.use_dynamic_shifting:
        scheduler.set_timesteps(10, mu=1.0)
    else:
        scheduler.set_timesteps(10)
    t = scheduler.timesteps[4]
    if isinstance(case.scheduler, (diffusers.DDIMScheduler, diffusers.CogVideoXDDIMScheduler)):
        stride = scheduler.config.num_train_timesteps // 10
        ends = [float(scheduler.alphas_cumprod[int(i)]) for i in (t, t - stride)]
        levels = [math.sqrt(1 - a) / (math.sqrt(a) + math.sqrt(1 - a)) for a in ends]
    else:
        levels = [float(s) for s in scheduler.sigmas[4:6]]
        if scheduler.config.get("use_flow_sigmas"):
            t = 1000 * scheduler.sigmas[4]  # This scheduler cuts its times down to whole numbers.
        levels = [1 - s for s in levels] if scheduler.config.get("invert_sigmas") else levels
    return scheduler, float(t), levels[0], levels[1]


def check(case: Case, folder: Path) -> Backbone:
    """Everything that is claimed of a class; the table in the docs is made of what passes."""
    model, backbone = opened(case, folder)
    assert backbone.shape == case.shape
    assert backbone.num_classes == (case.num_classes or 0)
    x = noisy(case)
    with torch.inference_mode():
        if isinstance(case.scheduler, dict):
            check_edm(case, model, backbone, x)
        else:
            check_step(case, model, backbone, x)
        level = torch.full((2,), 0.4)
        order = execution_order(backbone, x, level)
        assert [name for name in order if name in backbone.layers] == list(backbone.layers)
        shapes = layer_shapes(backbone)
        assert list(shapes) == list(backbone.layers)
        assert len(shapes) == case.blocks
        assert next(iter(shapes.values())) == case.tokens
        check_places(case, backbone, x[:1])
    PASSED[case.id] = row(case, backbone)
    return backbone


def row(case: Case, backbone: Backbone) -> str:
    """The class's line of the table in the documentation."""
    family, schedule = CLASSES[case.name], backbone.schedule
    layers = (" and " if family.interleaved else ", ").join(f"`{name}`" for name in family.layers)
    if isinstance(schedule, LinearPath):
        time = f"{schedule.data_time:g} data, {schedule.noise_time:g} noise"
    else:
        time = "0, 1, … 999" if isinstance(schedule, DDPM) else "σ"
    grid = ("C, L", "C, H, W", "C, F, H, W")[len(case.shape) - 2]
    runs = sum(other.name == case.name for other in CASES)
    turns = ", in turns" if family.interleaved else ""
    return f"| `{case.name}` | {case.modality} ({grid}) | {layers}{turns} | {case.image} | {time} | {runs} |"


def table(folder: Path) -> str:
    """The table of covered classes, made of the checks that passed; those that have not run yet run now."""
    for i, case in enumerate(CASES):
        if case.id not in PASSED:
            check(case, folder / str(i))
    first = {case.name: PASSED[case.id] for case in reversed(CASES)}
    names = dict.fromkeys(case.name for case in CASES)
    return "\n".join([HEADER, "|---" * 6 + "|", *[first[name] for name in names]])


def check_step(case: Case, model: Any, backbone: Backbone, x: Tensor) -> None:
    scheduler, time, level, next_level = moment(case)
    t = torch.full((2,), time)
    direct = case.direct(model, x, t.long() if backbone.schedule.integer_time else t)
    levels = torch.full((2,), level, dtype=torch.float64)
    # Mochi's scheduler counts from noise to data, so its network points that way.
    sign = -1 if scheduler.config.get("invert_sigmas") else 1
    torch.testing.assert_close(sign * backbone.predict(x, levels), direct, rtol=1e-5, atol=1e-5)
    assert float(direct.std()) > 0.01  # A network that gives zeros would agree with anything.
    following = scheduler.step(direct, scheduler.timesteps[4], x, return_dict=False)[0]
    # One deterministic step along the path: the same x_0 and noise, less of it.
    velocity = backbone(x, levels)
    clean = convert_prediction(velocity, x, levels, backbone.schedule, source="velocity", to="x0")
    noise = convert_prediction(velocity, x, levels, backbone.schedule, source="velocity", to="eps")
    after = backbone.schedule.corrupt(clean, noise, torch.full((2,), next_level, dtype=torch.float64))
    torch.testing.assert_close(after, following, rtol=1e-3, atol=1e-3)


def check_edm(case: Case, model: Any, backbone: Backbone, x: Tensor) -> None:
    """EDM with v and sigma_data 1 is the quarter circle of v-prediction: x_0 = cos(a) z - sin(a) v, z = cos(a) x."""
    angle = torch.tensor([0.5, 1.2])
    v = case.direct(model, torch.cos(angle)[:, None, None] * x, angle * 2 / math.pi)
    clean = torch.cos(angle)[:, None, None] ** 2 * x - torch.sin(angle)[:, None, None] * v
    levels = torch.tan(angle.double()) / (1 + torch.tan(angle.double()))
    torch.testing.assert_close(backbone.predict(x, levels), clean, rtol=1e-4, atol=1e-5)


def check_places(case: Case, backbone: Backbone, x: Tensor) -> None:
    """What is changed at one place of the input changes most at the same place of every layer's tokens."""
    place = [edge - 1 if axis == 0 else edge // 4 for axis, edge in enumerate(case.shape[1:])]
    changed = x.clone()
    changed[(0, slice(None), *place)] += 5
    level = torch.full((1,), 0.4)
    with capture(backbone.module, backbone.layers, tokens=backbone.tokens, transform=torch.clone) as before:
        backbone.predict(x, level)
    with capture(backbone.module, backbone.layers, tokens=backbone.tokens, transform=torch.clone) as after:
        backbone.predict(changed, level)
    frames = case.shape[1] if len(case.shape) == 4 else 1
    image = case.shape[2:] if len(case.shape) == 4 else case.shape[1:]
    for name in backbone.layers:
        difference = (after[name] - before[name])[0].norm(dim=-1)
        stride = (frames * math.prod(image) / len(difference)) ** (1 / len(image))
        grid = [frames, *[round(edge / stride) for edge in image]]
        assert math.prod(grid) == len(difference), name
        found = [int(i) for i in torch.unravel_index(difference.argmax(), grid)]
        wanted = [place[0] if frames > 1 else 0, *[int(p / stride) for p in place[-len(image) :]]]
        # Convolutions spread over their neighbors, and never over the frames as far; Sana's feed-forward has one.
        reach = [0, *[3 if "UNet" in case.name else 1 if "Sana" in case.name else 0] * len(image)]
        assert all(abs(a - b) <= r for a, b, r in zip(found, wanted, reach, strict=True)), (name, found, wanted)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_opens_by_path_and_equals_its_own_class(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


def test_the_documented_table_is_what_passes(tmp_path: Path) -> None:
    assert set(CLASSES) - {"SkyReelsV2Transformer3DModel"} == {case.name for case in CASES}
    assert table(tmp_path) in PAGE.read_text(encoding="utf-8"), "run `python docs/make_diffusers_table.py`"


# --- Schedules


@pytest.mark.parametrize(
    ("scheduler", "prediction"),
    [
        (diffusers.DDPMScheduler(**LINEAR), "eps"),
        (diffusers.PNDMScheduler(**{k: v for k, v in SCALED.items() if k != "clip_sample"}), "eps"),
        (diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"), "v"),
        (diffusers.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample"), "x0"),
        (diffusers.DDIMScheduler(rescale_betas_zero_snr=True, **SCALED), "eps"),
        (diffusers.CogVideoXDDIMScheduler(rescale_betas_zero_snr=True, snr_shift_scale=1.0), "eps"),
        (diffusers.DDPMScheduler(trained_betas=[0.1, 0.2, 0.3]), "eps"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_betas_are_the_scheduler_s_own(scheduler: Any, prediction: str, tmp_path: Path) -> None:
    case = BY_NAME["UNet2DModel"]
    backbone = opened(replace(case, scheduler=scheduler), tmp_path)[1]
    assert isinstance(backbone.schedule, DDPM)
    assert backbone.prediction == prediction
    # diffusers keeps float32 products; the last step of a chain that ends in pure noise is 2**-24 there.
    abar = scheduler.alphas_cumprod.double().clamp(min=2**-24)
    times = torch.arange(len(abar))
    levels = backbone.schedule.noise_level(times)
    torch.testing.assert_close(backbone.schedule.alpha(levels) ** 2, abar, rtol=2e-3, atol=1e-6)
    assert torch.equal(backbone.schedule.native_time(levels), times)


def test_shift_and_spacing_do_not_change_the_path(tmp_path: Path) -> None:
    case = BY_NAME["SD3Transformer2DModel"]
    for i, scheduler in enumerate((flow(), flow(shift=5.0), flow(use_karras_sigmas=True, use_dynamic_shifting=True))):
        schedule = opened(replace(case, scheduler=scheduler), tmp_path / str(i))[1].schedule
        assert schedule.to_config() == LinearPath(0, 1000).to_config()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_preconditioning_is_the_one_of_diffusers(prediction: str, tmp_path: Path) -> None:
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.7, prediction_type=prediction)
    case = BY_NAME["UNet2DModel"]
    model, backbone = opened(replace(case, scheduler=scheduler), tmp_path)
    x, sigma = noisy(case), torch.tensor([0.3, 4.0])
    wide = sigma[:, None, None, None]
    assert isinstance(backbone.schedule, EDM)
    with torch.inference_mode():
        output = model(scheduler.precondition_inputs(x, wide), scheduler.precondition_noise(sigma)).sample
        wanted = scheduler.precondition_outputs(x, output, wide)
        level = (sigma / (0.7 + sigma)).double()
        torch.testing.assert_close(backbone.predict(x, level), wanted, rtol=1e-4, atol=1e-5)


def test_without_a_scheduler_the_published_training_counts(tmp_path: Path) -> None:
    for name in ("DiTTransformer2DModel", "Lumina2Transformer2DModel", "MochiTransformer3DModel"):
        case = BY_NAME[name]
        told = opened(case, tmp_path / name / "told")[1]
        untold = opened(replace(case, scheduler=None), tmp_path / name / "untold")[1]
        assert untold.schedule.native_time(torch.tensor([0.3])) == told.schedule.native_time(torch.tensor([0.3]))
        assert untold.prediction == told.prediction
    case = replace(BY_NAME["UNet2DConditionModel"], scheduler=None)
    with pytest.raises(ValueError, match="trained in several ways; pass --schedule and --prediction"):
        opened(case, tmp_path / "sd")
    backbone = open_diffusers(tmp_path / "sd", schedule="ddpm-scaled_linear", prediction="v")
    assert (backbone.schedule.name, backbone.prediction) == ("ddpm-scaled_linear", "v")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "ScoreSdeVeScheduler"}, "is unknown to layerprobe; pass --schedule"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "is unknown to layerprobe"),
        ({"_class_name": "OsScheduler"}, "is not a scheduler of diffusers"),
        ({"_class_name": "../x"}, "is not a scheduler of diffusers"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "wrong"}, "is not a valid configuration of DDIMScheduler"),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": -1}, "is damaged"),
        ([], "is damaged"),
    ],
)
def test_schedulers_that_cannot_be_read_are_refused(config: Any, message: str, tmp_path: Path) -> None:
    BY_NAME["UNet2DModel"].save(tmp_path)
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        open_diffusers(tmp_path)
    # What the user says replaces what the file cannot.
    assert open_diffusers(tmp_path, schedule="ddpm-linear", prediction="x0").prediction == "x0"


# --- Where checkpoints are


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
    assert not is_diffusers(tmp_path)
    assert not is_diffusers(tmp_path / "nothing")


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
    with pytest.raises(FileNotFoundError, match=r"not in the Hub's cache .* pass hf://us/other to download it"):
        open_diffusers("us/other")
    with pytest.raises(FileNotFoundError, match=r"not in the Hub's cache .* check name and connection"):
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


# --- What is refused


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
        ("not JSON", ValueError, "config.json is damaged"),
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
    ("name", "shape", "message"),
    [
        ("FluxTransformer2DModel", None, "has no size; pass --shape 4,H,W in latent units"),
        ("WanTransformer3DModel", None, "has no size; pass --shape 4,F,H,W in latent units"),
        ("DiTTransformer2DModel", (3, 8, 8), "takes shapes 4,H,W, not 3,8,8"),
        ("DiTTransformer2DModel", (4, 8), "takes shapes 4,H,W, not 4,8"),
        ("DiTTransformer2DModel", (4, 8, 7), "takes multiples of 2 along W, not 7"),
        ("DiTTransformer2DModel", (4, 0, 8), "takes multiples of 2 along H, not 0"),
        ("MochiTransformer3DModel", (4, 3, 5, 8), "takes multiples of 2 along H, not 5"),
        ("UNet2DModel", (4, 15, 16), "takes multiples of 2 along H, not 15"),
    ],
)
def test_wrong_shapes_are_refused(name: str, shape: Any, message: str, tmp_path: Path) -> None:
    BY_NAME[name].save(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_diffusers(tmp_path, shape=shape)


def test_an_oblong_that_the_class_folds_into_a_square_is_refused(tmp_path: Path) -> None:
    BY_NAME["DiTTransformer2DModel"].save(tmp_path)
    backbone = open_diffusers(tmp_path, shape=(4, 4, 16))
    with pytest.raises(ValueError, match=r"returns shape \(4, 8, 8\) for \(4, 4, 16\); pass --shape"):
        backbone.predict(torch.zeros(1, 4, 4, 16), torch.tensor([0.5]))


def test_classes_have_to_be_told_where_the_null_label_is_not_known(tmp_path: Path) -> None:
    BY_NAME["UNet2DModel-num_classes"].save(tmp_path)
    for given in (None, 6):
        with pytest.raises(ValueError, match="has 6 rows of classes; pass --num-classes 5 if the last one is the null"):
            open_diffusers(tmp_path, num_classes=given)
    BY_NAME["UNet2DModel"].save(tmp_path / "plain")
    with pytest.raises(ValueError, match="has no classes; leave --num-classes out"):
        open_diffusers(tmp_path / "plain", num_classes=3)


def test_inputs_that_hold_another_image_are_refused(tmp_path: Path) -> None:
    case = BY_NAME["UNet2DModel"]
    replace(case, config={**case.config, "in_channels": 9}).save(tmp_path)
    with pytest.raises(ValueError, match="takes 5 channels of a conditioning image besides the 4 noisy ones"):
        open_diffusers(tmp_path)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModuleNotFoundError, match=r"install layerprobe\[diffusers\]"):
        open_diffusers(tmp_path)


# --- Layers


def test_layers_by_pattern_and_parts_of_blocks(tmp_path: Path) -> None:
    backbone = opened(BY_NAME["SD3Transformer2DModel"], tmp_path, layers=["transformer_blocks.1", "*.0.attn"])[1]
    assert backbone.layers == ("transformer_blocks.0.attn", "transformer_blocks.1")
    assert layer_shapes(backbone) == {"transformer_blocks.0.attn": (16, 16), "transformer_blocks.1": (16, 16)}


@pytest.mark.parametrize(
    "name",
    ["SD3Transformer2DModel", "HunyuanVideoTransformer3DModel", "AllegroTransformer3DModel", "UNet2DConditionModel"],
)
def test_a_class_without_an_entry_is_measured(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME[name]
    config = {**case.config, "guidance_embeds": False} if "guidance_embeds" in case.config else case.config
    case = replace(case, config=config)
    if name.startswith("Hunyuan"):
        case = replace(case, config={**config, "guidance_embeds": False})
    known = opened(case, tmp_path)[1]
    monkeypatch.setattr(adapter, "CLASSES", {})
    options: Any = {} if name[:2] in ("Al", "UN") else {"schedule": "flow-1000", "prediction": "velocity"}
    guessed = open_diffusers(tmp_path, shape=case.shape, **options)
    assert layer_shapes(guessed) == layer_shapes(known)
    x, level = noisy(case), torch.tensor([0.3, 0.6])
    with (
        torch.inference_mode(),
        capture(known.module, known.layers, tokens=known.tokens) as left,
        capture(guessed.module, known.layers, tokens=guessed.tokens) as right,
    ):
        known.predict(x, level), guessed.predict(x, level)
    # With zeros for text and no rotation of places, both calls are the same but for the length of the text.
    assert left.keys() == right.keys()
    assert all(left[layer].shape == right[layer].shape for layer in left)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Lumina2Transformer2DModel", "layers.0 of .* holds image and text in one sequence; wrap"),
        ("CogView3PlusTransformer2DModel", "needs the unknown argument original_size; wrap"),
        ("UNet1DModel", "is not a denoiser of one sample"),
        ("LatteTransformer3DModel", "does not run as guessed .*; wrap"),
    ],
)
def test_a_class_that_cannot_be_guessed_is_refused(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = BY_NAME[name]
    case.save(tmp_path)
    monkeypatch.setattr(adapter, "CLASSES", {})
    with pytest.raises(ValueError, match=message):
        open_diffusers(tmp_path, shape=case.shape, schedule="flow-1000", prediction="velocity")


def test_a_class_that_has_no_entry_opens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"in_channels": 4, "patch_size": 2, "context_in_dim": 12, "hidden_size": 16, "num_heads": 2, "depth": 3}
    model = diffusers.PRXTransformer2DModel(**size, mlp_ratio=2.0, axes_dim=[4, 4], bottleneck_size=None).eval()
    model.save_pretrained(tmp_path)
    told: Any = {"shape": (4, 8, 8), "schedule": "flow", "prediction": "velocity"}
    backbone = open_diffusers(tmp_path, **told)
    assert layer_shapes(backbone) == {f"blocks.{i}": (16, 16) for i in range(3)}
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.7])
    with torch.inference_mode():
        wanted = model(x, timestep=t, encoder_hidden_states=torch.zeros(2, 77, 12)).sample
        torch.testing.assert_close(backbone.predict(x, t), wanted)


def test_a_control_with_shuffled_weights_has_the_same_layers(tmp_path: Path) -> None:
    backbone = opened(BY_NAME["Lumina2Transformer2DModel"], tmp_path)[1]
    assert layer_shapes(random_weights(backbone)) == layer_shapes(backbone)


def test_time_is_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BY_NAME["SD3Transformer2DModel"].save(tmp_path)
    monkeypatch.setattr(adapter, "CLASSES", {})
    with pytest.raises(ValueError, match="the native time of this class is unknown; pass --schedule"):
        open_diffusers(tmp_path)


@pytest.mark.parametrize("patch", [(2, 2), (1, 2, 4)])
def test_patches_are_cut_and_put_together(patch: tuple[int, ...]) -> None:
    edges = tuple(2 * p for p in patch)
    x = torch.arange(2 * 3 * math.prod(edges)).view(2, 3, *edges)
    tokens = to_patches(x, patch)
    assert tokens.shape == (2, 2 ** len(patch), 3 * math.prod(patch))
    assert torch.equal(from_patches(tokens, patch, edges), x)
    # The second token is the next place along the last axis; its channels are its slowest axis.
    corner = x[(0, slice(None), *[slice(0, p) for p in patch[:-1]], slice(patch[-1], 2 * patch[-1]))]
    assert torch.equal(tokens[0, 1], corner.flatten())


# --- Conditions


def test_labels_reach_the_class(tmp_path: Path) -> None:
    model: Any
    model, backbone = opened(BY_NAME["DiTTransformer2DModel"], tmp_path)
    x, level = torch.randn(2, 4, 8, 8), backbone.schedule.noise_level(torch.tensor([100, 700]))
    with torch.inference_mode():
        wanted = model(x, timestep=torch.tensor([100, 700]), class_labels=torch.tensor([3, 10])).sample[:, :4]
        assert torch.equal(backbone.predict(x, level, torch.tensor([3, 10])), wanted)
        assert not torch.equal(backbone.predict(x, level, torch.tensor([4, 10])), wanted)


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


def test_the_old_name_of_a_class_is_followed(tmp_path: Path) -> None:
    case = BY_NAME["DiTTransformer2DModel"]
    model = case.save(tmp_path)
    config = json.loads((tmp_path / "transformer/config.json").read_text())
    (tmp_path / "transformer/config.json").write_text(json.dumps({**config, "_class_name": "Transformer2DModel"}))
    backbone = open_diffusers(tmp_path)
    assert type(backbone.module).__name__ == case.name
    assert all(torch.equal(backbone.module.state_dict()[k], v) for k, v in model.state_dict().items())


# --- Adapters


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
    from safetensors.torch import load_file, save_file

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


def test_weights_of_eight_bits_are_refused(tmp_path: Path) -> None:
    BY_NAME["UNet2DModel"].save(tmp_path)
    file = next(tmp_path.rglob("diffusion_pytorch_model.safetensors"))
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(ValueError, match=r"is quantized \(\S+\), so its features are not the model's; open another$"):
        open_diffusers(tmp_path)


@pytest.mark.parametrize("steps", [3_000_000_000, 0, "many", None])
def test_schedulers_that_count_no_sensible_number_of_times_are_refused(tmp_path: Path, steps: Any) -> None:
    BY_NAME["UNet2DModel"].save(tmp_path)
    place = next(tmp_path.rglob("scheduler_config.json"))
    place.write_text(json.dumps(json.loads(place.read_text()) | {"num_train_timesteps": steps}))
    with pytest.raises(
        ValueError, match=r"scheduler_config\.json has .* timesteps, but 1 to 100000 are supported; pass"
    ):
        open_diffusers(tmp_path)


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
