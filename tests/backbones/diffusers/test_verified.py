"""The record of verified classes is that of a test run, and other classes get an entry to fill in."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed (pip install 'layerprobe[diffusers]')")

from layerprobe.backbones.diffusers.class_table import CLASSES
from layerprobe.backbones.diffusers.verified import entry_to_fill_in, other_classes, verified_families


def test_the_record_names_every_class_of_the_table_and_its_versions() -> None:
    record = verified_families()
    assert {one["class"] for one in record["classes"]} == set(CLASSES)
    assert len(CLASSES) >= 40
    assert set(record["versions"]) == {"diffusers", "torch"}
    others = other_classes()
    assert "ErnieImageTransformer2DModel" in others
    assert not set(others) & set(CLASSES)
    assert not any("ControlNet" in name or "Autoencoder" in name for name in others)


def test_an_entry_to_fill_in_says_what_the_class_needs() -> None:
    text = entry_to_fill_in("GlmImageTransformer2DModel")
    for wanted in (
        'CLASSES["GlmImageTransformer2DModel"] = DiffusersClass(',
        'layers=("transformer_blocks.*",)',
        "text=lambda c: (77, c.text_embed_dim, 0)",
        '"encoder_hidden_states": text.tokens,',
        '"prior_token_id": ...,',
        "times=...,",
    ):
        assert wanted in text
    compile(text, "entry", "exec")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DiTTransformer2DModel", "^DiTTransformer2DModel has an entry already; open its folder by path$"),
        ("Nothing2DModel", r"^Nothing2DModel is not a model of diffusers [\d.]+; pass a class that"),
    ],
)
def test_no_entry_for_other_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entry_to_fill_in(name)
