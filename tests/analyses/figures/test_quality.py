"""Figures of layer quality: their titles, lines and cells against the tables they were drawn from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from figure_tables import BLOCKS, LEVELS, MODELS, cells, overlaps, panel, quality_table, selection, title_of

from layerprobe.analyses.figures import quality


def values_of(table: pd.DataFrame, source: str, level: float, metric: str = "probe accuracy") -> Any:
    split = "train" if metric == "effective rank" else "test"
    wanted = {"source": source, "noise_level": level, "metric": metric, "split": split}
    return table[(table[list(wanted)] == pd.Series(wanted)).all(axis=1)]


def test_title_names_the_peak_and_the_best_control() -> None:
    title = title_of(quality.layer_quality_curves(quality_table(), "probe accuracy"))
    assert (
        title
        == "Probe accuracy peaks at blocks.4 (0.97) at noise level 0.1; the highest control there is raw input (0.80)"
    )


def test_title_says_when_a_control_is_as_good() -> None:
    table = quality_table()
    table.loc[table["source"] == "random weights", "value"] += 0.5
    title = title_of(quality.layer_quality_curves(table, "probe accuracy"))
    assert title.endswith("at noise level 0.1; a control is as high there: random weights (1.10)")


def test_panels_hold_the_numbers_of_the_table() -> None:
    table = quality_table()
    figure = quality.layer_quality_curves(table, "probe accuracy")
    for level in LEVELS:
        axes = panel(figure, f"Noise level {level:g}")
        expected = {source: values_of(table, source, level) for source in ("model", "random weights", "raw input")}
        drawn = {str(line.get_linestyle()): line for line in axes.lines if len(line.get_ydata()) > 1}
        np.testing.assert_array_equal(drawn["-"].get_ydata(), expected["model"]["value"])
        np.testing.assert_array_equal(drawn["--"].get_ydata(), expected["random weights"]["value"])
        assert set(drawn[":"].get_ydata()) == set(expected["raw input"]["value"])
        band = axes.collections[1].get_paths()[0].vertices
        assert band[:, 1].min() == expected["model"]["low"].min()
        assert band[:, 1].max() == expected["model"]["high"].max()
    overview = panel(figure, "Trained model")
    for level, line in zip(LEVELS, (line for line in overview.lines if len(line.get_ydata()) > 1), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), values_of(table, "model", level)["value"])
    assert overview.get_ylabel() == "Probe accuracy\n(fraction of the test split)"
    assert overview.get_xlabel() == "layer (blocks.*)"
    assert {text.get_text() for text in overview.texts} == {"0.1", "0.3", "0.5"}  # at the ends of the lines


def test_panels_share_their_scale() -> None:
    figure = quality.layer_quality_curves(quality_table(), "probe accuracy")
    assert (
        len(
            {
                (panel(figure, f"Noise level {v:g}").get_xlim(), panel(figure, f"Noise level {v:g}").get_ylim())
                for v in LEVELS
            }
        )
        == 1
    )


def test_gaps_stay_gaps() -> None:
    figure = quality.layer_quality_curves(quality_table(missing=[("blocks.4", 0.1)]), "probe accuracy")
    axes = panel(figure, "Noise level 0.1")
    line = next(line for line in axes.lines if line.get_linestyle() == "-" and len(line.get_ydata()) == 8)
    assert np.isnan(line.get_ydata()).tolist() == [i == 4 for i in range(8)]
    cross = next(line for line in axes.lines if line.get_marker() == "x")
    assert list(cross.get_xdata()) == [4]
    assert "blocks.5" in title_of(figure) or "blocks.3" in title_of(figure)
    assert "not measured" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_nothing_measured_is_said() -> None:
    table = quality_table().assign(value=np.nan, low=np.nan, high=np.nan)
    for figure in (
        quality.layer_quality_curves(table, "probe accuracy"),
        quality.quality_heatmap(table, "probe accuracy"),
    ):
        assert title_of(figure) == "Probe accuracy could not be measured in any layer"


def test_controls_are_optional() -> None:
    table = quality_table()
    table = table[table["source"] == "model"]
    assert title_of(quality.layer_quality_curves(table, "probe accuracy")).endswith("at noise level 0.1")
    assert not [
        axes for axes in quality.quality_heatmap(table, "probe accuracy").axes if "minus" in axes.get_title(loc="left")
    ]


def test_split_is_the_test_split_where_there_is_one() -> None:
    table = quality_table()
    for split, expected in ((None, "test"), ("validation", "validation")):
        label = quality.layer_quality_curves(table, "probe accuracy", split=split).axes[0].get_ylabel()
        assert label.endswith(f"(fraction of the {expected} split)")
    assert quality.layer_quality_curves(table, "effective rank").axes[0].get_ylabel() == "Effective rank\n(train split)"


def test_pick_is_marked_and_named() -> None:
    figure = quality.layer_quality_curves(quality_table(), "probe accuracy", selection=selection())
    for axes in (panel(figure, "Trained model"), panel(figure, "Noise level 0.3")):
        upright = [
            line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2
        ]
        assert upright == [1, 4]
    assert {"student 1", "teacher 4"} < {text.get_text() for text in panel(figure, "Trained model").texts}


def test_one_noise_level_needs_no_overview() -> None:
    figure = quality.layer_quality_curves(quality_table(levels=[0.1]), "probe accuracy", selection=selection())
    assert len(figure.axes) == 1
    assert figure.axes[0].get_ylabel() and figure.axes[0].get_xlabel() == "layer (blocks.*)"


def test_heatmap_holds_the_numbers_and_what_training_added() -> None:
    table = quality_table()
    figure = quality.quality_heatmap(table, "probe accuracy")
    model, gain = cells(panel(figure, "Probe accuracy")), cells(panel(figure, "Trained model minus"))
    for i, level in enumerate(LEVELS):
        ours, random, raw = (
            values_of(table, source, level)["value"].to_numpy() for source in ("model", "random weights", "raw input")
        )
        np.testing.assert_array_equal(model[i], ours)
        np.testing.assert_array_equal(gain[i], ours - max(random.max(), raw.item()))
    texts = [text.get_text() for text in panel(figure, "Probe accuracy").texts]
    assert len(texts) == 24
    assert texts[4] == "0.97"
    assert title_of(figure).startswith("Highest probe accuracy: blocks.4 at noise level 0.1; training adds most at")


def test_places_are_chosen_on_the_validation_split() -> None:
    table = quality_table()
    lucky = (table["source"] == "model") & (table["layer"] == "blocks.0") & (table["split"] == "test")
    table.loc[lucky & (table["metric"] == "probe accuracy"), "value"] = 1.0
    for figure in (
        quality.layer_quality_curves(table, "probe accuracy"),
        quality.quality_heatmap(table, "probe accuracy"),
    ):
        assert "blocks.4 " in title_of(figure) and "blocks.0" not in title_of(figure)
    curves_title = title_of(quality.layer_quality_curves(table, "probe accuracy"))
    assert "at noise level 0.1, chosen on the validation split; the highest control" in curves_title
    # A control that is the better one on the test split alone is not the one to compare with.
    weak = (table["source"] == "random weights") & (table["split"] == "test") & (table["layer"] == "blocks.7")
    table.loc[weak, "value"] = 0.99
    curves = quality.quality_curves(table, "probe accuracy", "test")
    np.testing.assert_array_equal(quality.better_control(table, curves), curves.raw[..., 0])


def test_large_heatmap_has_no_numbers() -> None:
    layers = [f"blocks.{i}" for i in range(48)]
    assert not panel(quality.quality_heatmap(quality_table(layers), "probe accuracy"), "Probe").texts


def test_metric_panels_show_every_metric_and_the_pick() -> None:
    table = quality_table()
    metrics = list(dict.fromkeys(table["metric"]))
    figure = quality.metric_panels(table, metrics, selection=selection())
    shown = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title(loc="left").partition(" (")[0].lower() for axes in shown] == metrics
    curves = [line for line in shown[0].get_lines() if len(np.atleast_1d(line.get_xdata())) == len(BLOCKS)]
    assert len(curves) == 2 * len(LEVELS)  # the model and random weights
    assert [text.get_text() for text in figure.legends[0].get_texts()][-3:] == ["random weights", "student", "teacher"]


@pytest.mark.parametrize("model", MODELS)
def test_no_text_overlaps_another(model: str) -> None:
    layers, levels = MODELS[model]
    table = quality_table(layers, levels, missing=[(layers[1], levels[1])])
    pick = selection(layers[2], layers[-3])
    assert overlaps(quality.layer_quality_curves(table, "probe accuracy", selection=pick)) == []
    assert overlaps(quality.quality_heatmap(table, "probe accuracy")) == []
    assert overlaps(quality.quality_heatmap(table, "effective rank")) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: quality.layer_quality_curves(quality_table(), "FID"),
            r"metric 'FID' is not in the quality table, which has .*; pass",
        ),
        (
            lambda: quality.layer_quality_curves(quality_table(), "effective rank", split="test"),
            "no values on split 'test', only on train",
        ),
        (
            lambda: quality.quality_heatmap(quality_table().drop(columns="low"), "probe accuracy"),
            "no column 'low', only source, layer",
        ),
        (
            lambda: quality.quality_heatmap(quality_table().query("source != 'model'"), "probe accuracy"),
            "only controls for 'probe accuracy'; analyze the model",
        ),
        (
            lambda: quality.layer_quality_curves(
                quality_table(), "probe accuracy", selection=selection("blocks.1", "blocks.11")
            ),
            "the pick has layer blocks.11, but the table has only blocks.0, .*; pass both from one run",
        ),
        (lambda: quality.metric_panels(quality_table(), []), "there is no metric to draw"),
    ],
)
def test_errors_are_one_line_with_a_remedy(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
