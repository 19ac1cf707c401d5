"""What training arguments state about a transformer."""

from __future__ import annotations

from typing import Any

import pytest

from layerprobe.backbones.stated import HEADS, check_sizes, model_name, network_settings, stated_number


def test_only_the_networks_own_sections_are_read() -> None:
    args = {
        "model": {"params": {"num_heads": 8, "depth": 4}},
        "vae": {"in_channels": 3, "depth": 99},
        "depth": 6,
    }
    assert network_settings(args) == {"num_heads": 8, "depth": 6}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model": "SiT-XL/2"}, ("SiT-XL/2", "XL")),
        ({"model_type": "LightningDiT-1p0B/1"}, ("LightningDiT-1p0B/1", "1p0B")),
        ({"model": "DiT_b_4"}, ("DiT_b_4", "B")),
        ({"model": "my-net/2"}, None),
        ({"model": 3}, None),
        ({}, None),
    ],
)
def test_names_of_models_tell_the_size(settings: dict[str, Any], named: tuple[str, str] | None) -> None:
    assert model_name(settings) == named


def test_a_number_is_a_number() -> None:
    assert stated_number({"heads": 4}, HEADS) == ("heads", 4)
    assert stated_number({"heads": True, "num_heads": "8"}, HEADS) is None


def test_arguments_of_another_network_are_refused() -> None:
    check_sizes({"depth": [], "patch_size": [[2, 2]]}, {"depth": 4, "patch_size": 2})
    check_sizes({"depth": 4, "patch_size": [2, 2], "use_rope": True}, {"depth": 4, "patch_size": 2, "use_rope": True})
    with pytest.raises(
        ValueError,
        match=r"^the training arguments have depth = 12, but the weights show 4; these arguments are of another",
    ):
        check_sizes({"depth": 12}, {"depth": 4})
    with pytest.raises(ValueError, match=r"have use_rope = True, but the weights show False;"):
        check_sizes({"use_rope": True}, {"use_rope": False})


@pytest.mark.parametrize(("text", "number"), [("8", 8), (" 8", 8), ("0.1", 0.1), (".1", 0.1), ("4.0", 4.0), ("-1", -1)])
def test_a_number_that_was_stored_as_a_text_is_a_number(text: str, number: float) -> None:
    settings = network_settings({"model": {"params": {"num_heads": text}}})
    assert stated_number(settings, HEADS) == ("num_heads", number)


def test_other_texts_stay_texts() -> None:
    texts = {"model": "SiT-XL/2", "path_type": "Linear", "num_heads": "8 or 16", "lr": "1e-4", "empty": ""}
    assert network_settings(texts) == texts
