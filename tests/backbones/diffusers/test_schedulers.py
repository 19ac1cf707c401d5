"""Schedules and predictions are those of the scheduler's configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (pip install 'layerprobe[diffusers]')")

from diffusers_checks import BY_NAME, noisy, opened  # noqa: E402
from diffusers_models import LINEAR, SCALED, flow  # noqa: E402

from layerprobe.backbones.diffusers.opening import open_diffusers  # noqa: E402
from layerprobe.noise.schedules import DDPM, EDM, LinearPath  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
]


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
        (
            {"_class_name": "DDIMScheduler", "trained_betas": 0.5},
            r"is damaged \(trained_betas is not a list of numbers\)",
        ),
        ([], "holds a list, not keys and values"),
    ],
)
def test_schedulers_that_cannot_be_read_are_refused(config: Any, message: str, tmp_path: Path) -> None:
    BY_NAME["UNet2DModel"].save(tmp_path)
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        open_diffusers(tmp_path)
    # What the user says replaces what the file cannot.
    assert open_diffusers(tmp_path, schedule="ddpm-linear", prediction="x0").prediction == "x0"


@pytest.mark.parametrize("steps", [3_000_000_000, 0, "many", None])
def test_schedulers_that_count_no_sensible_number_of_times_are_refused(tmp_path: Path, steps: Any) -> None:
    BY_NAME["UNet2DModel"].save(tmp_path)
    place = next(tmp_path.rglob("scheduler_config.json"))
    place.write_text(json.dumps(json.loads(place.read_text()) | {"num_train_timesteps": steps}))
    with pytest.raises(
        ValueError, match=r"scheduler_config\.json has .* timesteps, but 1 to 100000 are supported; pass"
    ):
        open_diffusers(tmp_path)
