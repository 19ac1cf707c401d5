"""Outside encoders: folders of transformers, and functions of the user's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from layerprobe.analyses import runs
from layerprobe.analyses.measurements import spectra
from layerprobe.analyses.quality import read_quality
from layerprobe.analyses.similarity import linear_cka
from layerprobe.data.digits import digits
from layerprobe.encoders import open_encoder
from layerprobe.features import FeatureStore
from layerprobe.files import MissingWeights


@pytest.fixture
def dinov2(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    transformers.Dinov2Model(config).eval().save_pretrained(tmp_path / "tiny-dinov2")
    return tmp_path / "tiny-dinov2"


def test_a_folder_of_transformers_gives_the_mean_of_its_patch_tokens(dinov2: Path) -> None:
    transformers = pytest.importorskip("transformers")
    encoder = open_encoder(dinov2)
    assert encoder.name == "tiny-dinov2"
    x = torch.rand(2, 3, 20, 20) * 2 - 1
    model = transformers.Dinov2Model.from_pretrained(dinov2).eval()
    pixels = F.interpolate((x + 1) / 2, (28, 28), mode="bicubic", antialias=True)
    normal = (pixels - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    with torch.inference_mode():
        wanted = model(pixel_values=normal).last_hidden_state[:, 1:].mean(1)
        assert torch.allclose(encoder.features(x), wanted, atol=1e-5)
        grey = x[:, :1]
        assert torch.allclose(encoder.features(grey), encoder.features(grey.repeat(1, 3, 1, 1)), atol=1e-6)
        (dinov2 / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
        wanted = model(pixel_values=2 * pixels - 1).last_hidden_state[:, 1:].mean(1)
        assert torch.allclose(open_encoder(dinov2).features(x), wanted, atol=1e-5)


def test_bad_folders_are_refused_in_one_line(dinov2: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^there is no folder \S+none; pass one that transformers saved"):
        open_encoder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"are no images; pass a file\.py:function as the encoder"):
        open_encoder(dinov2).features(torch.zeros(2, 4, 8, 8))
    config = json.loads((dinov2 / "config.json").read_text())
    (dinov2 / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(ValueError, match="wants code of its own to be run, which is refused"):
        open_encoder(dinov2)
    (dinov2 / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="says no image_size and patch_size"):
        open_encoder(dinov2)
    (dinov2 / "config.json").write_text(json.dumps(config))
    weights = dinov2 / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        ValueError, match=r"does not open as a model of transformers \(.*\); check the folder"
    ) as caught:
        open_encoder(dinov2)
    assert "\n" not in str(caught.value)
    weights.unlink()
    with pytest.raises(MissingWeights, match="holds no safetensors weights"):
        open_encoder(dinov2)


def test_a_function_of_the_users_is_compared_with_every_layer(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def flat(x):\n    return x.flatten(1)\nnumber = 3\n")
    with pytest.raises(ValueError, match=r"mine.py:number is no function; name one from samples"):
        open_encoder(f"{tmp_path / 'mine.py'}:number")
    encoder = open_encoder(f"{tmp_path / 'mine.py'}:flat")
    counts = {"num_fit": 60, "num_choose": 50, "num_report": 30}
    plan = runs.RunPlan("digits", "digits", (0.1, 0.9), {"layers": ["blocks.0", "blocks.6"]}, counts)
    runs.extract_run(plan, tmp_path / "run")
    runs.analyze_run(tmp_path / "run", analyses=[spectra], encoder=encoder)
    table = read_quality(tmp_path / "run" / "quality.csv")
    rows = table[table["metric"] == "CKA with flat"].set_index(["layer", "noise_level"])["value"]
    assert len(rows) == 4
    store = FeatureStore.open(tmp_path / "run" / "features" / "model")
    split = digits().choose
    position = {int(i): row for row, i in enumerate(split.ids)}
    x: Tensor = split.batch([position[int(i)] for i in store.ids[store.splits == "choose"]]).x
    wanted = linear_cka(store.features("blocks.6", 0.1, split="choose"), np.asarray(x.flatten(1)))
    assert rows["blocks.6", 0.1] == pytest.approx(wanted, abs=1e-6)
    assert rows["blocks.0", 0.1] > rows["blocks.0", 0.9]
