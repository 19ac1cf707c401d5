"""Tables with planted values, for tests of figures and of the report, and what these tests read from a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from layerprobe.analyses.figures import to_svg
from layerprobe.layersync import LayerPair

BLOCKS = [f"blocks.{i}" for i in range(8)]
LEVELS = (0.1, 0.3, 0.5)
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
MODELS: dict[str, tuple[list[str], tuple[float, ...]]] = {  # layers and noise levels
    "DiT": (DIT, (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)),
    "U-Net": (UNET, (0.1, 0.3, 0.5, 0.7)),
    "small": (BLOCKS, LEVELS),
}
COLUMNS = ["source", "layer", "layer_index", "noise_level", "metric", "split", "value", "low", "high", "note"]


def quality_table(
    layers: Sequence[str] = BLOCKS,
    levels: Sequence[float] = LEVELS,
    *,
    missing: Sequence[tuple[str, float]] = (),
    metrics: Sequence[str] = ("probe accuracy", "effective rank"),
) -> pd.DataFrame:
    """Accuracies rise to 0.97 at two thirds of the depth and fall with the noise; random weights stay below."""
    rows: list[tuple[Any, ...]] = []
    best = 2 * (len(layers) - 1) // 3
    for level in levels:
        drop = level - levels[0]
        for metric in metrics:
            scale, splits = (100, ("train",)) if metric == "effective rank" else (1, ("validation", "test"))
            for split in splits:
                shift = 0.01 if split == "validation" else 0.0
                for i, layer in enumerate(layers):
                    model = (0.97 - 0.5 * drop - 0.3 * abs(i - best) / len(layers)) * scale - shift
                    random = (0.6 - 0.4 * drop - 0.05 * i / len(layers)) * scale
                    half = 0.02 if scale == 1 else np.nan
                    if (layer, level) in missing:
                        model = np.nan
                    rows.append(("model", layer, i, level, metric, split, model, model - half, model + half, "C=1"))
                    rows.append(
                        ("random weights", layer, i, level, metric, split, random, random - half, random + half, "")
                    )
                raw = (0.8 - 0.6 * drop) * scale
                rows.append(("raw input", "input", -1, level, metric, split, raw, raw - half, raw + half, ""))
    return pd.DataFrame(rows, columns=COLUMNS)


def similarity_table(
    layers: Sequence[str] = BLOCKS, levels: Sequence[float] = LEVELS, *, both_orders: bool = True
) -> pd.DataFrame:
    at = [(layer, level, i) for i, layer in enumerate(layers) for level in levels]
    rows = [
        (a, p, b, q, *[np.exp(-abs(i - j) / len(layers) - abs(p - q))] * 3)
        for first, (a, p, i) in enumerate(at)
        for second, (b, q, j) in enumerate(at)
        if both_orders or first < second
    ]
    measures = ["cka", "mutual_knn", "cknna"]
    return pd.DataFrame(rows, columns=["layer_a", "noise_level_a", "layer_b", "noise_level_b", *measures])


ARMS = {"baseline": 1.0, "pick": 0.8, "negative control": 1.2}


def confirmation_table(num_seeds: int = 3, arms: Mapping[str, float] = ARMS) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(num_seeds):
        luck = rng.normal(0, 0.1)
        for arm, factor in arms.items():
            for step in (0, 1000, 2000):
                value = 20.0 if step == 0 else (3000 / step + luck) * factor + rng.normal(0, 0.01)
                rows += [(arm, seed, step, "Frechet distance", value), (arm, seed, step, "held-out loss", value / 10)]
    return pd.DataFrame(rows, columns=["arm", "seed", "step", "metric", "value"])


def selection(student: str = "blocks.1", teacher: str = "blocks.4") -> Any:
    return SimpleNamespace(pick=LayerPair(student, teacher))


def title_of(figure: Figure) -> str:
    return " ".join(figure.get_suptitle().split())


def panel(figure: Figure, start: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(start))


def cells(axes: Axes) -> Any:
    """The values of a heatmap, nan where a cell is empty."""
    mesh = axes.collections[0]
    array = np.ma.filled(mesh.get_array(), np.nan)
    return np.asarray(array).reshape(mesh.get_coordinates().shape[0] - 1, -1)


def _visible_texts(figure: Figure) -> list[Text]:
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
    """Pairs of texts that overlap, and texts that leave the figure."""
    to_svg(figure)  # fixes the layout, and leaves labels where they are at the 72 dpi of SVG
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    # The extent of an annotation would include its arrow.
    boxes = [
        (text.get_text(), Text.get_window_extent(text, renderer).shrunk(0.9, 0.9)) for text in _visible_texts(figure)
    ]
    page = figure.bbox
    outside = [(text, "the edge") for text, box in boxes if not (page.contains(*box.min) and page.contains(*box.max))]
    return outside + [(a, b) for (a, one), (b, two) in combinations(boxes, 2) if one.overlaps(two)]
