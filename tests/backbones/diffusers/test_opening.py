"""Folders of diffusers open by their path; every class is compared with itself and with its own scheduler's step."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from places import DOCS

pytest.importorskip("diffusers", reason="diffusers is not installed (pip install 'layerprobe[diffusers]')")

from diffusers_checks import BY_NAME, check, opened, record, table
from diffusers_models import CASES, Case

from layerprobe.backbones.base import layer_shapes
from layerprobe.backbones.diffusers.class_table import CLASSES
from layerprobe.backbones.diffusers.opening import open_diffusers
from layerprobe.backbones.diffusers.verified import verified_families
from layerprobe.extraction.controls import random_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
]

PAGE = DOCS / "diffusers.md"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_opens_by_path_and_equals_its_own_class(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


def test_the_documented_table_and_the_packages_record_are_what_passes(tmp_path: Path) -> None:
    assert set(CLASSES) == {case.name for case in CASES}
    found = record(tmp_path)
    assert table(found) in PAGE.read_text(encoding="utf-8"), "run `python docs/make_diffusers_table.py`"
    assert verified_families()["classes"] == found, "run `python docs/make_diffusers_table.py`"


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


def test_layers_by_pattern_and_parts_of_blocks(tmp_path: Path) -> None:
    backbone = opened(BY_NAME["SD3Transformer2DModel"], tmp_path, layers=["transformer_blocks.1", "*.0.attn"])[1]
    assert backbone.layers == ("transformer_blocks.0.attn", "transformer_blocks.1")
    assert layer_shapes(backbone) == {"transformer_blocks.0.attn": (16, 16), "transformer_blocks.1": (16, 16)}


def test_a_control_with_shuffled_weights_has_the_same_layers(tmp_path: Path) -> None:
    backbone = opened(BY_NAME["Lumina2Transformer2DModel"], tmp_path)[1]
    shapes = layer_shapes(backbone)
    with random_weights(backbone) as control:
        assert layer_shapes(control) == shapes
