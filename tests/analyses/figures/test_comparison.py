"""Figures of several runs: what they show is what the tables hold."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from layerprobe.analyses.figures import block_map_heatmap, comparison_curves, quality_over_steps
from layerprobe.analyses.tables import QUALITY_COLUMNS


def quality(depth: int, offset: float, levels=(0.1, 0.5)) -> pd.DataFrame:
    rows = [
        ("model", f"blocks.{i}", i, level, "probe accuracy", "test", offset + i / 10, offset + i / 10 - 0.05, 0.95, "")
        for i in range(depth)
        for level in levels
    ]
    return pd.DataFrame(rows, columns=list(QUALITY_COLUMNS))


def test_curves_share_the_depth_and_the_levels_that_all_runs_have() -> None:
    figure = comparison_curves({"a": quality(4, 0.1), "b": quality(8, 0.05, (0.5, 0.9))}, "probe accuracy")
    panels = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title(loc="left") for axes in panels] == ["Mean over the levels", "Noise level 0.5"]
    a, b = panels[0].lines
    assert a.get_xdata().tolist() == [0.25, 0.5, 0.75, 1]
    assert len(b.get_xdata()) == 8
    assert np.allclose(a.get_ydata(), [0.1, 0.2, 0.3, 0.4])
    assert "0.4 (a), 0.75 (b)" in figure.get_suptitle().replace("\n", " ")


def test_runs_without_a_common_level_are_refused() -> None:
    with pytest.raises(ValueError, match="no noise level in common; probe them at the same --noise-levels"):
        comparison_curves({"a": quality(4, 0.1, (0.1,)), "b": quality(4, 0.1, (0.2,))}, "probe accuracy")
    with pytest.raises(ValueError, match="8 runs at most, got 9"):
        comparison_curves({str(i): quality(2, 0.1) for i in range(9)}, "probe accuracy")


def test_the_most_alike_layer_of_each_row_is_framed() -> None:
    cka = np.array([[0.9, 0.2, 0.1], [0.3, 0.4, 0.8]])
    figure = block_map_heatmap(cka, ["x.0", "x.1"], ["y.0", "y.1", "y.2"], names=("a", "b"))
    frames = {(patch.get_x(), patch.get_y()) for patch in figure.axes[0].patches}
    assert frames == {(0, 0), (2, 1)}
    assert figure.axes[0].get_xlabel() == "b: layer (y.*)"


def test_the_best_layer_over_the_steps_is_chosen_on_validation_and_shown_on_test() -> None:
    def at_step(best: int) -> pd.DataFrame:
        test = quality(3, 0.1)
        chosen = test.assign(split="validation", value=[float(i == best) for i in test["layer_index"]])
        return pd.concat([test, chosen], ignore_index=True)

    figure = quality_over_steps({400: at_step(1), 100: at_step(0)}, "probe accuracy")
    lines, table = figure.axes[0].lines, figure.axes[1]
    assert [line.get_xdata().tolist() for line in lines] == [[100, 400]] * 2
    assert all(np.allclose(line.get_ydata(), [0.1, 0.2]) for line in lines)
    assert [tick.get_text() for tick in table.get_xticklabels()] == ["100", "400"]
    shown = table.collections[0].get_array().reshape(3, 2)
    assert np.allclose(shown, [[0.3, 0.3], [0.2, 0.2], [0.1, 0.1]])  # the deepest layer first
    assert "at 2 steps of one training" in figure.get_suptitle().replace("\n", " ")
    assert "0.3 (blocks.2) at step 100" in figure.get_suptitle().replace("\n", " ")


def test_steps_of_other_networks_have_no_figure() -> None:
    with pytest.raises(ValueError, match="the runs at steps 1 and 2 have other layers; pass steps of one training"):
        quality_over_steps({1: quality(3, 0.1), 2: quality(4, 0.1)}, "probe accuracy")
    with pytest.raises(ValueError, match="no noise level in common; probe them at the same --noise-levels"):
        quality_over_steps({1: quality(3, 0.1, (0.1,)), 2: quality(3, 0.1, (0.2,))}, "probe accuracy")
