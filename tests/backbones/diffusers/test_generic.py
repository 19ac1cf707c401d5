"""Classes without an entry in the table are called by their arguments' names, and their layers are measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (pip install 'layerprobe[diffusers]')")

from diffusers_checks import BY_NAME, noisy, opened  # noqa: E402

from layerprobe.backbones.base import layer_shapes  # noqa: E402
from layerprobe.backbones.diffusers import opening as adapter  # noqa: E402
from layerprobe.backbones.diffusers.opening import open_diffusers  # noqa: E402
from layerprobe.capture import capture  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
]


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


def test_a_class_that_has_no_entry_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(adapter.CLASSES, "PRXTransformer2DModel")
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


def test_a_layer_of_the_text_is_not_taken_for_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BY_NAME["SD3Transformer2DModel"].save(tmp_path)
    monkeypatch.setattr(adapter, "CLASSES", {})
    told: Any = {"schedule": "flow-1000", "prediction": "velocity"}
    names = ["transformer_blocks.0.attn.q", "transformer_blocks.0.attn.add_q_proj"]
    guessed = open_diffusers(tmp_path, shape=(4, 8, 8), layers=names, **told)
    assert layer_shapes(guessed, names[:1]) == {names[0]: (16, 16)}
    with pytest.raises(ValueError, match=r"^transformer_blocks.0.attn.add_q_proj returns 77 tokens, not those of the"):
        layer_shapes(guessed)


def test_time_is_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BY_NAME["SD3Transformer2DModel"].save(tmp_path)
    monkeypatch.setattr(adapter, "CLASSES", {})
    with pytest.raises(ValueError, match="the native time of this class is unknown; pass --schedule"):
        open_diffusers(tmp_path)
