"""Figures: their titles, lines and cells against the tables they were drawn from; files byte for byte."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from figure_tables import BLOCKS, LEVELS, confirmation_table, quality_table, similarity_table, title_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from scipy import stats

from layerprobe.analyses.figures import cka, confirmation, image_grid, quality, style
from layerprobe.layersync.pair import LayerPair

DIT = [f"transformer.transformer_blocks.{i}" for i in range(28)]
UNET = [
    "conv_in",
    *(
        f"down_blocks.{i}.{kind}.{j}"
        for i in range(3)
        for kind, j in (("resnets", 0), ("attentions", 0), ("resnets", 1))
    ),
    "mid_block.resnets.0",
    "mid_block.attentions.0",
    *(f"up_blocks.{i}.{kind}.{j}" for i in range(3) for kind, j in (("resnets", 0), ("attentions", 0))),
]
MANY_LEVELS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)


def selection(student: str = "blocks.1", teacher: str = "blocks.4") -> Any:
    return SimpleNamespace(pick=LayerPair(student, teacher))


def panel(figure: Figure, start: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(start))


def values_of(table: pd.DataFrame, source: str, level: float, metric: str = "probe accuracy") -> Any:
    split = "train" if metric == "effective rank" else "test"
    wanted = {"source": source, "noise_level": level, "metric": metric, "split": split}
    return table[(table[list(wanted)] == pd.Series(wanted)).all(axis=1)]


def cells(axes: Axes) -> Any:
    mesh = axes.collections[0]
    array = np.ma.filled(mesh.get_array(), np.nan)
    return np.asarray(array).reshape(mesh.get_coordinates().shape[0] - 1, -1)


# ------------------------------------------------------------------------------------------------------ layer quality


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
    assert [text.get_text() for text in overview.get_legend().get_texts()] == ["0.1", "0.3", "0.5"]


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


def test_split_is_the_report_split_where_there_is_one() -> None:
    table = quality_table()
    for split, expected in ((None, "test"), ("validation", "validation")):
        label = quality.layer_quality_curves(table, "probe accuracy", split=split).axes[0].get_ylabel()
        assert label.endswith(f"(fraction of the {expected} split)")
    assert (
        quality.layer_quality_curves(table, "effective rank").axes[0].get_ylabel() == "Effective rank\n(training split)"
    )


def test_pick_is_marked_and_named() -> None:
    figure = quality.layer_quality_curves(quality_table(), "probe accuracy", selection=selection())
    for axes in (panel(figure, "Trained model"), panel(figure, "Noise level 0.3")):
        upright = [
            line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2
        ]
        assert upright == [1, 4]
    assert [text.get_text() for text in panel(figure, "Trained model").texts] == ["student 1", "teacher 4"]


def test_one_noise_level_needs_no_overview() -> None:
    figure = quality.layer_quality_curves(quality_table(levels=[0.1]), "probe accuracy", selection=selection())
    assert len(figure.axes) == 1
    assert figure.axes[0].get_ylabel() and figure.axes[0].get_xlabel() == "layer (blocks.*)"


def test_heatmap_holds_the_numbers_and_what_training_added() -> None:
    table = quality_table()
    figure = quality.quality_heatmap(table, "probe accuracy")
    model, gain = cells(panel(figure, "Probe accuracy")), cells(panel(figure, "Trained model minus"))
    for i, level in enumerate(LEVELS):
        ours, random = (values_of(table, source, level)["value"].to_numpy() for source in ("model", "random weights"))
        np.testing.assert_array_equal(model[i], ours)
        np.testing.assert_array_equal(gain[i], ours - random)
    texts = [text.get_text() for text in panel(figure, "Probe accuracy").texts]
    assert len(texts) == 24
    assert texts[4] == "0.97"
    assert title_of(figure).startswith("Highest probe accuracy: blocks.4 at noise level 0.1; training adds most at")


def test_large_heatmap_has_no_numbers() -> None:
    layers = [f"blocks.{i}" for i in range(48)]
    assert not panel(quality.quality_heatmap(quality_table(layers), "probe accuracy"), "Probe").texts


# --------------------------------------------------------------------------------------------------------- similarity


@pytest.mark.parametrize("both_orders", [True, False])
def test_cka_blocks_and_their_mean(both_orders: bool) -> None:
    table = similarity_table(both_orders=both_orders)
    figure = cka.cka_heatmap(table, selection=selection())
    full, mean = cells(panel(figure, "All 24")), cells(panel(figure, "Mean over equal"))
    i, j = np.meshgrid(range(8), range(8))
    np.testing.assert_allclose(mean, np.exp(-abs(i - j) / 8), rtol=1e-12)  # the planted value, up to a sum of three
    level, other = np.repeat(LEVELS, 8), np.tile(range(8), 3)
    expected = np.exp(-abs(other[:, None] - other) / 8 - abs(level[:, None] - level))
    np.testing.assert_array_equal(full, expected)
    marked = {(patch.get_x() + 0.5, patch.get_y() + 0.5) for patch in panel(figure, "Mean over equal").patches}
    assert marked == {(4, 1), (1, 4)}
    assert title_of(figure) == "Student blocks.1 and teacher blocks.4: mean CKA 0.69"


def test_metric_panels_show_every_metric_and_the_pick() -> None:
    table = quality_table()
    metrics = list(dict.fromkeys(table["metric"]))
    figure = quality.metric_panels(table, metrics, selection=selection())
    shown = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title(loc="left").partition(" (")[0].lower() for axes in shown] == metrics
    curves = [line for line in shown[0].get_lines() if len(np.atleast_1d(line.get_xdata())) == len(BLOCKS)]
    assert len(curves) == 2 * len(LEVELS)  # the model and random weights
    assert [text.get_text() for text in figure.legends[0].get_texts()][-3:] == ["random weights", "student", "teacher"]
    with pytest.raises(ValueError, match="there is no metric to draw"):
        quality.metric_panels(table, [])


def test_cka_takes_the_order_of_layers() -> None:
    table = similarity_table().sample(frac=1, random_state=0)
    mean = cells(panel(cka.cka_heatmap(table, layers=BLOCKS), "Mean over equal"))
    assert (np.diff(mean[0]) < 0).all()


def test_cka_without_pick_names_the_sharpest_change() -> None:
    table = similarity_table()
    sharp = (table["layer_a"] < "blocks.3") != (table["layer_b"] < "blocks.3")
    table.loc[sharp, "cka"] -= 0.3
    title = title_of(cka.cka_heatmap(table))
    assert title == "Sharpest change: blocks.2 to blocks.3, mean CKA 0.58"


def test_dead_representation_stays_empty() -> None:
    table = similarity_table()
    dead = ((table["layer_a"] == "blocks.2") & (table["noise_level_a"] == 0.1)) | (
        (table["layer_b"] == "blocks.2") & (table["noise_level_b"] == 0.1)
    )
    table.loc[dead, "cka"] = np.nan
    full = cells(panel(cka.cka_heatmap(table), "All 24"))
    assert np.isnan(full).sum() == 2 * 24 - 1


# ------------------------------------------------------------------------------------------------------- confirmation


def test_confirmation_interval_is_students_on_paired_differences() -> None:
    table = confirmation_table()
    figure = confirmation.confirmation_curves(table)
    last = table[(table["step"] == 2000) & (table["metric"] == "Frechet distance")].pivot(
        index="seed", columns="arm", values="value"
    )
    difference = last["pick"] - last["no alignment"]
    interval = stats.ttest_1samp(difference, 0).confidence_interval(0.95)
    axes = panel(figure, "Final difference")
    dots, bar, middle = axes.lines[1:4]
    np.testing.assert_allclose(np.sort(dots.get_xdata()), np.sort(difference), rtol=1e-12)
    np.testing.assert_allclose(bar.get_xdata(), interval, rtol=1e-9)  # two orders of the same sums
    np.testing.assert_allclose(middle.get_xdata(), difference.mean(), rtol=1e-12)
    curves = figure.axes[0]
    level = next(line for line in curves.lines if line.get_linestyle() == ":").get_ydata()[0]
    np.testing.assert_allclose(level, last["no alignment"].mean(), rtol=1e-12)
    assert {text.get_text() for text in curves.texts} == {"no alignment", "pick", "bad control"}
    percent = next(line for line in panel(figure, "Paired difference").lines[1:])
    np.testing.assert_allclose(percent.get_ydata()[-1], (100 * difference / last["no alignment"]).mean(), rtol=1e-12)


def test_verdict_decides_title_and_numbers() -> None:
    verdict = {
        "metric": "Frechet distance",
        "lower_is_better": True,
        "answer": "helps",
        "arms": [{"name": "pick", "difference": -0.3, "low": -0.4, "high": -0.2}],
    }
    figure = confirmation.confirmation_curves(confirmation_table(), verdict)
    assert title_of(figure).startswith("Pick helps: Frechet distance")
    assert title_of(figure).endswith("difference −0.30 [−0.40, −0.20], 3 seeds")
    assert figure.axes[0].get_ylabel() == "Frechet distance\n(lower is better)"
    other = confirmation.confirmation_curves(confirmation_table(), verdict, metric="held-out loss")
    assert title_of(other).startswith("Pick: held-out loss")


def test_one_seed_has_no_interval() -> None:
    figure = confirmation.confirmation_curves(confirmation_table(num_seeds=1))
    assert title_of(figure).endswith("1 seed")
    assert "[" not in title_of(figure)
    assert "one seed: no interval" in panel(figure, "Paired difference").get_title(loc="left")


def test_diverged_arm_does_not_stop_the_figure() -> None:
    table = confirmation_table()
    table.loc[(table["arm"] == "bad control") & (table["step"] > 0), "value"] = np.nan
    figure = confirmation.confirmation_curves(table)
    assert "Pick" in title_of(figure)


# ------------------------------------------------------------------------------------------------------------ samples


def test_samples_are_the_pixels() -> None:
    x = np.linspace(-1.5, 1, 5 * 2 * 3).reshape(5, 1, 2, 3)
    figure = image_grid.sample_grid(x, [7, 1, 2, 3, 4], columns=2)
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == ["7", "1", "2", "3", "4"]
    for axes, image in zip(shown, x, strict=True):
        pixels = np.asarray(axes.images[0].get_array())
        gray = (np.clip(image[0], -1, 1) + 1) / 2
        np.testing.assert_allclose(pixels, np.stack([gray] * 3, axis=-1), atol=1e-6)  # float32
        assert axes.images[0].get_interpolation() == "none"
    color = image_grid.sample_grid(np.zeros((1, 3, 4, 4)))
    assert title_of(color) == "1 sample, 4 x 4 pixels"


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: quality.layer_quality_curves(quality_table(), "FID"),
            r"metric 'FID' is not in the quality table, which has .*; pass",
        ),
        (
            lambda: quality.layer_quality_curves(quality_table(), "effective rank", split="test"),
            "no values on split 'test', only on fit",
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
            "the pick has layer blocks.11, the table only blocks.0, .*; pass those of one run",
        ),
        (lambda: cka.cka_heatmap(similarity_table().iloc[:0]), "the similarity table has no rows"),
        (
            lambda: cka.cka_heatmap(similarity_table(), layers=BLOCKS[1:]),
            "has layer 'blocks.0', which `layers` has not",
        ),
        (
            lambda: confirmation.confirmation_curves(confirmation_table(), metric="FID"),
            "'FID' is not in the confirmation table, which has Frechet",
        ),
        (
            lambda: confirmation.confirmation_curves(confirmation_table().query("arm == 'pick'")),
            "no values of 'no alignment', only pick; run that arm",
        ),
        (
            lambda: image_grid.sample_grid(np.zeros((2, 4, 8, 8))),
            r"shape \(2, 4, 8, 8\); pass images .* latents decoded",
        ),
        (lambda: image_grid.sample_grid(np.full((2, 1, 8, 8), np.nan)), "2 of 2 samples contain nan"),
        (lambda: image_grid.sample_grid(np.zeros((2, 1, 8, 8)), ["a"]), "2 samples but 1 labels"),
        (lambda: image_grid.sample_grid(np.zeros((2, 1, 8, 8)), columns=0), "columns is 0"),
        (lambda: style.save_figure(Figure(), "unused", "../elsewhere"), "not a plain file name"),
    ],
)
def test_errors_are_one_line_with_a_cure(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------- saving


def test_files_are_the_same_bytes_whatever_the_caller_has_set(tmp_path: Path) -> None:
    table = similarity_table(BLOCKS[:3], (0.1, 0.3))  # without care, the layout of this figure moves with every drawing
    first = cka.cka_heatmap(table)
    paths = style.save_figure(first, tmp_path / "new" / "folder", "cka")
    before = [path.read_bytes() for path in paths]
    assert [path.name for path in paths] == ["cka.png", "cka.svg"]
    assert [path.read_bytes() for path in style.save_figure(first, tmp_path, "again")] == before
    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path", "savefig.dpi": 30, "xtick.direction": "in"}):
        settings = dict(mpl.rcParams)
        assert style.to_svg(cka.cka_heatmap(table)).encode() == before[1]
        assert dict(mpl.rcParams) == settings
    assert plt.get_fignums() == []
    with Image.open(paths[0]) as image:
        assert image.size == tuple(np.rint(np.asarray(first.get_size_inches()) * 150))


def test_svg_has_text_as_text_cells_as_pixels_and_no_date(tmp_path: Path) -> None:
    _, path = style.save_figure(cka.cka_heatmap(similarity_table()), tmp_path, "cka")
    svg = path.read_text(encoding="utf-8")
    assert re.search(r"<text [^>]*>All 24 representations</text>", svg)
    assert svg.count("<image") >= 2
    assert svg.count("<path") < 150  # 24 x 24 cells are not paths
    assert "<dc:date>" not in svg


@pytest.mark.parametrize("name", ["$x_{$.1", "<b>&\"'.2"])
def test_hostile_layer_names_are_drawn_as_they_are(name: str) -> None:
    svg = style.to_svg(quality.quality_heatmap(quality_table([name, "other"], (0.1,)), "probe accuracy"))
    assert "<b>" not in svg


# ------------------------------------------------------------------------------------------------------------- legible


@pytest.mark.parametrize(
    ("layers", "first", "last"),
    [
        (DIT, "0", "27"),
        (UNET, "conv_in", "up2.attn0"),
        (["a.b.c", "a_b.c", "a.bc"], "a.b.c", "a.bc"),
        (["only"], "only", "only"),
        ([f"a_very_long_name_of_a_module_{i}" for i in range(3)], "a_very_…module_0", "a_very_…module_2"),
    ],
)
def test_tick_names_are_short_and_distinct(layers: list[str], first: str, last: str) -> None:
    axes = panel(quality.quality_heatmap(quality_table(layers, (0.1,)), "probe accuracy"), "Trained model minus")
    names = [text.get_text() for text in axes.get_xticklabels()]
    assert len(set(names)) == len(layers)
    assert (names[0], names[-1]) == (first, last)


def shown_texts(figure: Figure) -> list[Text]:
    """Every text that is drawn: ticks beyond the limits of their axis exist but are not."""
    hidden = set()
    for axes in figure.findobj(Axes):
        for axis, (low, high), at in (
            (axes.xaxis, sorted(axes.get_xlim()), 0),
            (axes.yaxis, sorted(axes.get_ylim()), 1),
        ):
            ticks = axis.get_majorticklabels() + axis.get_minorticklabels()
            hidden |= {tick for tick in ticks if not low <= tick.get_position()[at] <= high}
    return [
        text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip() and text not in hidden
    ]


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts that lie on each other, and texts that leave the figure."""
    style.to_svg(figure)  # settles the layout, and leaves labels where they are at the 72 dpi of SVG
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    # The extent of an annotation would include its arrow.
    boxes = [(text.get_text(), Text.get_window_extent(text, renderer).shrunk(0.9, 0.9)) for text in shown_texts(figure)]
    page = figure.bbox
    outside = [(text, "the edge") for text, box in boxes if not (page.contains(*box.min) and page.contains(*box.max))]
    return outside + [(a, b) for (a, one), (b, two) in combinations(boxes, 2) if one.overlaps(two)]


@pytest.mark.parametrize(
    ("layers", "levels"),
    [(DIT, MANY_LEVELS), (UNET, (0.1, 0.3, 0.5, 0.7)), (BLOCKS, LEVELS)],
    ids=["DiT", "U-Net", "small"],
)
def test_no_text_lies_on_another(layers: list[str], levels: Sequence[float]) -> None:
    pick = selection(layers[2], layers[-3])
    table = quality_table(layers, levels, missing=[(layers[1], levels[1])])
    assert overlaps(quality.layer_quality_curves(table, "probe accuracy", selection=pick)) == []
    assert overlaps(quality.quality_heatmap(table, "effective rank")) == []
    assert overlaps(cka.cka_heatmap(similarity_table(layers, levels), selection=pick)) == []


def test_no_text_lies_on_another_in_the_confirmation() -> None:
    close = {"no alignment": 1.0, "pick": 0.97, "depth heuristic": 0.98, "bad control": 1.02}
    assert overlaps(confirmation.confirmation_curves(confirmation_table(arms=close))) == []
