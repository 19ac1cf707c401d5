"""Labels and shapes reach the class as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed (pip install 'layerprobe[diffusers]')")

from diffusers_checks import BY_NAME, opened

from layerprobe.backbones.diffusers.opening import open_diffusers

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
]


def test_an_oblong_that_the_class_folds_into_a_square_is_refused(tmp_path: Path) -> None:
    BY_NAME["DiTTransformer2DModel"].save(tmp_path)
    backbone = open_diffusers(tmp_path, shape=(4, 4, 16))
    with pytest.raises(ValueError, match=r"returns shape \(4, 8, 8\) for \(4, 4, 16\); pass --shape"):
        backbone.predict(torch.zeros(1, 4, 4, 16), torch.tensor([0.5]))


def test_labels_reach_the_class(tmp_path: Path) -> None:
    model: Any
    model, backbone = opened(BY_NAME["DiTTransformer2DModel"], tmp_path)
    x, level = torch.randn(2, 4, 8, 8), backbone.schedule.noise_level(torch.tensor([100, 700]))
    with torch.inference_mode():
        wanted = model(x, timestep=torch.tensor([100, 700]), class_labels=torch.tensor([3, 10])).sample[:, :4]
        assert torch.equal(backbone.predict(x, level, torch.tensor([3, 10])), wanted)
        assert not torch.equal(backbone.predict(x, level, torch.tensor([4, 10])), wanted)
