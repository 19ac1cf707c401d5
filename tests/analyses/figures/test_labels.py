"""Texts of figures: layer names on axes, titles, numbers, and names beside lines."""

from __future__ import annotations

import numpy as np
import pytest
from figure_tables import DIT, UNET
from matplotlib.figure import Figure

from layerprobe.analyses.figures import labels


@pytest.mark.parametrize(
    ("layers", "first", "last", "axis"),
    [
        (DIT, "0", "27", "layer (transformer.transformer_blocks.*)"),
        (UNET, "conv_in", "up2.attn0", "layer"),
        (["a.b.c", "a_b.c", "a.bc"], "a.b.c", "a.bc", "layer"),
        (["only"], "only", "only", "layer"),
        ([f"a_very_long_name_of_a_module_{i}" for i in range(3)], "a_very_…module_0", "a_very_…module_2", "layer"),
    ],
)
def test_layer_names_are_short_and_distinct(layers: list[str], first: str, last: str, axis: str) -> None:
    names, pattern = labels.short_names(layers)
    assert len(set(names)) == len(layers)
    assert (names[0], names[-1], pattern) == (first, last, axis)


@pytest.mark.parametrize(("first", "vertical"), [(0.0, False), (0.5, False), (0.5, True)])
def test_ticks_stand_at_their_layers_and_skip_where_space_is_short(first: float, vertical: bool) -> None:
    axes = Figure().subplots()
    labels.label_layers(axes, DIT, 0.9, first=first, vertical=vertical)
    axis = axes.yaxis if vertical else axes.xaxis
    ticks = {
        tick.get_text(): position for tick, position in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)
    }
    assert 2 <= len(ticks) < 28
    assert ticks == {name: int(name) + first for name in ticks}
    assert len(axis.get_ticklocs(minor=True)) + len(ticks) >= 28


def test_names_beside_lines_keep_their_order_and_their_distance() -> None:
    axes = Figure().subplots()
    axes.set_ylim(0, 1)
    ends = {"c": (1.0, 0.51), "a": (1.0, 0.5), "b": (1.0, 0.505), "gone": (1.0, np.nan)}
    labels.label_ends(axes, ends, dict.fromkeys(ends, "#000000"))
    heights = {text.get_text(): text.xyann[1] for text in axes.texts}
    assert list(heights) == ["a", "b", "c"]
    assert np.diff(list(heights.values())) == pytest.approx([0.075, 0.075], abs=1e-6)  # iterated 100 times


def test_texts() -> None:
    assert [labels.capital(text) for text in ("probe accuracy", "knn accuracy")] == ["Probe accuracy", "kNN accuracy"]
    assert labels.capital("layers.4 is not surely above") == "layers.4 is not surely above"
    assert [labels.counted(n, "seed") for n in (0, 1, 2)] == ["0 seeds", "1 seed", "2 seeds"]
    assert [labels.num_decimals(value, 2) for value in (0.0123, 1.5, 1500)] == [3, 1, 0]


def test_long_titles_break_at_semicolons_and_keep_noise_levels_together() -> None:
    assert labels.wrap_title("a; b at noise level 0.1") == "a; b at noise level\N{NO-BREAK SPACE}0.1"
    lines = labels.wrap_title(f"{'a' * 60}; {'b' * 60} at noise level 0.1").split("\n")
    assert [line[0] for line in lines] == ["a", "b"]
