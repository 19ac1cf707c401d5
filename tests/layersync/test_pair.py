"""Layer pairs, and depths counted from 1."""

from __future__ import annotations

import pytest

from layerprobe.layersync.pair import LayerPair, layer_of_depth


def test_pairs_of_a_layer_with_itself_or_an_earlier_one_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^blocks.3 cannot be its own teacher: a layer aligned to itself learns nothing$"
    ):
        LayerPair("blocks.3", "blocks.3")
    with pytest.raises(ValueError, match=r"^student blocks.10 comes after teacher blocks.9; swap them$"):
        LayerPair("blocks.10", "blocks.9")  # as numbers, not as text
    assert str(LayerPair("blocks.9", "blocks.10")) == "blocks.9 <- blocks.10"
    LayerPair("down.3", "up.0")  # names with different prefixes have no order


def test_depths_count_from_one_and_names_from_zero() -> None:
    assert layer_of_depth(8) == "blocks.7"
    assert layer_of_depth(1, prefix="layers") == "layers.0"
    with pytest.raises(ValueError, match=r"^depth counts from 1, got 0; depth 1 is blocks.0$"):
        layer_of_depth(0)
