"""Texts of figures: numbers, titles, short layer names on axes, and names beside the ends of lines."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from layerprobe.analyses.figures.style import INK
from layerprobe.analyses.measures import Floats

SHORT_WORDS = {
    "attentions": "attn",
    "blocks": "b",
    "down_blocks": "down",
    "mid_block": "mid",
    "resnets": "res",
    "single_transformer_blocks": "single",
    "transformer_blocks": "tb",
    "up_blocks": "up",
}


def num_decimals(value: float, digits: int) -> int:
    """Returns the number of decimals that shows this many significant digits of a value other than 0."""
    return int(np.clip(digits - 1 - np.floor(np.log10(abs(value))), 0, 9))


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: "1 sample", "2 samples"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def capital(text: str) -> str:
    """Returns a text with a capital first letter, but for "kNN" and names of layers such as "blocks.5"."""
    with_knn = in_sentence(text)
    return with_knn if re.match(r"kNN|\w+\.\w", with_knn) else with_knn[:1].upper() + with_knn[1:]


def in_sentence(metric: str) -> str:
    """Returns the name of a metric as it is written inside a sentence: "kNN accuracy"."""
    return re.sub(r"\bknn\b", "kNN", metric)


def wrap_title(title: str) -> str:
    """Returns a long title in lines, broken at its semicolons, and never between "noise level" and its number."""
    title = re.sub(r"noise level (?=\d)", "noise level\N{NO-BREAK SPACE}", title)
    parts = title.replace("; ", ";\n").split("\n") if len(title) > 104 else [title]
    return "\n".join(textwrap.fill(part, 104) for part in parts)


# --------------------------------------------------------------------------------------------------------------- layers


def short_names(layers: Sequence[str]) -> tuple[list[str], str]:
    """Returns short layer names and the axis label: (["0", "1"], "layer (blocks.*)") for blocks.0 and blocks.1."""
    parts = [name.split(".") for name in layers]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    rest = [part[shared:] for part in parts]
    pattern = f"layer ({'.'.join([*parts[0][:shared], '*'])})" if shared else "layer"
    for names in (["".join(_shorten(part)) for part in rest], [".".join(part) for part in rest]):
        clipped = [name if len(name) <= 16 else f"{name[:7]}…{name[-8:]}" for name in names]
        for candidate in (clipped, names):
            if len(set(candidate)) == len(layers):
                return candidate, pattern
    return list(layers), "layer"


def _shorten(parts: Sequence[str]) -> Iterator[str]:
    """down_blocks, 0, attentions, 1 -> down, 0, ., attn, 1."""
    for i, part in enumerate(parts):
        if i and not (part.isdigit() and not parts[i - 1].isdigit()):
            yield "."
        yield SHORT_WORDS.get(part, part)


def label_layers(
    axes: Axes, layers: Sequence[str], length_in: float, *, first: float = 0.0, vertical: bool = False
) -> None:
    """Labels an axis with short layer names: rotated or with gaps where there is too little space.

    Args:
        axes: Axes to label.
        layers: Layer names; the ticks are one unit apart.
        length_in: Approximate length of the axis in inches.
        first: Position of the first layer: 0 for lines, 0.5 for heatmaps.
        vertical: Whether to label the y axis.
    """
    names, _ = short_names(layers)
    longest = max(map(len, names))
    rotated = not vertical and longest > 3 and len(names) * (0.075 * longest + 0.1) > length_in
    need_in = 0.15 if rotated or vertical else 0.075 * longest + 0.1
    step = next(s for s in (1, 2, 4, 5, 7, 10, 14, 20, 50, len(names)) if len(names) * need_in <= length_in * s)
    ticks = np.arange(len(names)) + first
    axis = axes.yaxis if vertical else axes.xaxis
    axis.set_ticks(ticks[::step], names[::step], rotation=90 if rotated else 0)
    axis.set_ticks(ticks, minor=True)
    axis.set_tick_params(which="minor", length=1.5)


# ------------------------------------------------------------------------------------------------------------ line ends


def label_ends(axes: Axes, ends: Mapping[str, tuple[float, float]], colors: Mapping[str, str]) -> None:
    """Writes names beside the ends of lines, apart from each other, each with a leader to its line.

    Args:
        axes: Axes with the lines; their limits must be final.
        ends: Last point of each line, by name; lines that end in nan get no name.
        colors: Color of each line, by name.
    """
    low, high = axes.get_ylim()
    scale = np.log if axes.get_yscale() == "log" else np.asarray
    order = sorted((name for name in ends if np.isfinite(ends[name][1])), key=lambda name: ends[name][1])
    heights = np.array([float((scale(ends[name][1]) - scale(low)) / (scale(high) - scale(low))) for name in order])
    for name, label_y in zip(order, _spread(heights, gap=0.075), strict=True):
        axes.annotate(
            name,
            ends[name],
            xytext=(1.03, label_y),
            textcoords="axes fraction",
            va="center",
            color=INK,
            # To the left edge of the text, so that no leader crosses another name.
            arrowprops={
                "arrowstyle": "-",
                "color": colors[name],
                "linewidth": 1.6,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


def _spread(targets: Floats, *, gap: float) -> Floats:
    """Ascending positions at least `gap` apart, near the ascending targets: overlapping neighbors are pushed apart."""
    positions = targets.copy()
    for _ in range(100):
        for i in range(1, len(positions)):
            overlap = gap - (positions[i] - positions[i - 1])
            if overlap > 1e-9:
                positions[i - 1] -= overlap / 2
                positions[i] += overlap / 2
    return positions
