"""What all figures share: style, colors, labels of layers, matrices, saving."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure as Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

if TYPE_CHECKING:
    from layerprobe.analyses.selection import Selection
    from layerprobe.layersync import LayerPair


INK, BACKGROUND = "#1b1f24", "#fffefd"
MISSING_COLOR = "#c9ced6"
GRAY = "#7a828c"
STUDENT, TEACHER = "#d55e00", "#cc79a7"  # neither is a color of viridis
WIDTH_IN = 11.0
RASTER_DPI = 150
SPARE_COLORS = ("#cc79a7", "#56b4e9", "#009e73", "#f0e442")

STYLE: dict[str, Any] = {
    "axes.edgecolor": INK,
    "axes.facecolor": BACKGROUND,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "figure.facecolor": BACKGROUND,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "font.size": 9,
    "grid.alpha": 0.25,
    "grid.color": GRAY,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "savefig.facecolor": BACKGROUND,
    "svg.fonttype": "none",
    "svg.hashsalt": "layerprobe",
    "text.color": INK,
    "text.parse_math": False,  # a layer may be called "$x$"
    "xtick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.color": INK,
    "ytick.labelsize": 8.5,
}
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

Array = NDArray[np.float64]


@contextmanager
def styled() -> Iterator[None]:
    """Matplotlib's defaults and our style, whatever the caller has set; the caller's settings come back afterwards."""
    with matplotlib.style.context(["default", STYLE]):
        yield


def num_decimals(value: float, digits: int) -> int:
    """Decimals that show this many significant digits."""
    return int(np.clip(digits - 1 - np.floor(np.log10(abs(value))), 0, 9))


def capital(text: str) -> str:
    """Text as the beginning of a line; a kNN keeps its small k."""
    named = re.sub(r"^knn\b", "kNN", text)
    return named if named != text else text[:1].upper() + text[1:]


def label_ends(axes: Axes, ends: Mapping[str, tuple[float, float]], colors: Mapping[str, str]) -> None:
    """Names beside the line ends, moved apart where they would overlap, with a leader to the line."""
    low, high = axes.get_ylim()
    log = axes.get_yscale() == "log"
    scale = np.log if log else np.asarray
    order = sorted((arm for arm in ends if np.isfinite(ends[arm][1])), key=lambda arm: ends[arm][1])
    at = np.array([float((scale(ends[arm][1]) - scale(low)) / (scale(high) - scale(low))) for arm in order])
    for arm, label_y in zip(order, _spread(at, gap=0.075), strict=True):
        axes.annotate(
            arm,
            ends[arm],
            xytext=(1.03, label_y),
            textcoords="axes fraction",
            va="center",
            color=INK,
            # To the text's left edge, so that no leader runs through a neighbor's name.
            arrowprops={
                "arrowstyle": "-",
                "color": colors[arm],
                "linewidth": 1.6,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


# --------------------------------------------------------------------------------------------------------------- saving


def save_figure(figure: Figure, folder: Path | str, name: str) -> tuple[Path, Path]:
    """Write `name.png` (150 dpi) and `name.svg` (text as text, heatmaps as pixels), the same bytes every time.

    Args:
        figure: Figure of this module or any other; its layout is fixed by the first call.
        folder: Created where it does not exist.
        name: File name without a suffix.

    Raises:
        ValueError: If name is not a plain file name.
    """
    if name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(f"{name!r} is not a plain file name; pass the folder and the name apart")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    png.write_bytes(_render(figure, "png"))
    svg.write_bytes(_render(figure, "svg"))
    return png, svg


def to_svg(figure: Figure) -> str:
    """The bytes that `save` writes as SVG, as text."""
    return _render(figure, "svg").decode()


def _render(figure: Figure, file_format: str) -> bytes:
    buffer = io.BytesIO()
    with styled():
        if figure.get_layout_engine() is not None:
            # The constrained layout starts from where it last stood and text sizes differ by format: settle it once.
            FigureCanvasAgg(figure)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        metadata = {"Date": None} if file_format == "svg" else {"Software": None}
        figure.savefig(buffer, format=file_format, dpi=RASTER_DPI, metadata=metadata)
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------------------------- helpers


def require_columns(table: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    missing = [name for name in columns if name not in table.columns]
    if missing:
        has = ", ".join(map(str, table.columns)) or "none"
        raise ValueError(f"the {what} has no column {missing[0]!r}, only {has}; pass the whole table")


def pick_in(selection: Selection | None, layers: Sequence[str]) -> LayerPair | None:
    pair = selection.pick if selection else None
    for layer in (pair.student, pair.teacher) if pair else ():
        if layer not in layers:
            raise ValueError(f"the pick has layer {layer}, the table only {', '.join(layers)}; pass those of one run")
    return pair


def short_names(layers: Sequence[str]) -> tuple[list[str], str]:
    """Names for ticks and for the axis: (["0", "1"], "layer (blocks.*)") for blocks.0 and blocks.1."""
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


def label_layers(axes: Axes, layers: Sequence[str], width_in: float, *, vertical: bool = False) -> None:
    """Layer names as ticks: turned where they do not fit upright, only every second or fifth where there are many."""
    names, _ = short_names(layers)
    longest = max(map(len, names))
    turned = not vertical and longest > 3 and len(names) * (0.075 * longest + 0.1) > width_in
    need_in = 0.15 if turned or vertical else 0.075 * longest + 0.1
    step = next(s for s in (1, 2, 4, 5, 7, 10, 14, 20, 50, len(names)) if len(names) * need_in <= width_in * s)
    axis = axes.yaxis if vertical else axes.xaxis
    axis.set_ticks(range(0, len(names), step), names[::step], rotation=90 if turned else 0)
    axis.set_ticks(range(len(names)), minor=True)
    axis.set_tick_params(which="minor", length=1.5)


def draw_matrix(
    axes: Axes, values: Array, colormap: Colormap, norm: Normalize, *, square: bool = False
) -> ScalarMappable:
    axes.set_facecolor(MISSING_COLOR)
    edges_x, edges_y = (np.arange(size + 1) - 0.5 for size in values.shape[::-1])
    masked = np.ma.masked_invalid(values)
    image = axes.pcolormesh(edges_x, edges_y, masked, cmap=colormap, norm=norm, rasterized=True)
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if square:
        axes.set_aspect("equal")
    return image


def annotate_cells(
    axes: Axes, values: Array, image: ScalarMappable, text: Callable[[float], str], *, size: float
) -> None:
    """Write every value into its cell, black or white as the cell's color asks."""
    colors = image.to_rgba(values)
    dark = colors[..., :3] @ (0.299, 0.587, 0.114) < 0.5
    for (row, column), value in np.ndenumerate(values):
        known = bool(np.isfinite(value))
        color = "#ffffff" if known and dark[row, column] else "#000000"
        cell = axes.text(column, row, text(float(value)) if known else "–", fontsize=size, color=color)
        cell.set(ha="center", va="center", in_layout=False)  # hundreds of them would slow the layout down


def cell_box(x: int, y: int, color: str, width: float = 2.4) -> Rectangle:
    return Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=color, linewidth=width, zorder=3, clip_on=False)


def value_range(values: Array) -> Normalize:
    if not np.isfinite(values).any():
        return Normalize(0, 1)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    return Normalize(low, high if high > low else low + 1)


def level_colors(count: int) -> list[Any]:
    # The ends of viridis vanish on a black or a white page.
    return [mpl.colormaps["viridis"](x) for x in np.linspace(0.28, 0.86, count)]


def point_marker(values: Array) -> str:
    """Show points where there are few, or where a gap leaves one without a neighbor to draw a line to."""
    finite = np.isfinite(values)
    alone = finite & ~np.roll(finite, 1) & ~np.roll(finite, -1)
    return "." if len(values) <= 12 or alone.any() else ""


def widen_range(axes: Axes, values: Array, headroom: float = 0.06) -> None:
    if np.isfinite(values).any():
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        span = (high - low) or max(abs(high), 1.0) * 0.1
        axes.set_ylim(low - 0.08 * span, high + headroom * span)


def _spread(targets: Array, *, gap: float) -> Array:
    """Ascending positions at least `gap` apart, as near to ascending targets as moving neighbors together allows."""
    placed = targets.copy()
    for _ in range(100):
        for i in range(1, len(placed)):
            overlap = gap - (placed[i] - placed[i - 1])
            if overlap > 1e-9:
                placed[i - 1] -= overlap / 2
                placed[i] += overlap / 2
    return placed


def nanmean(values: Array, axis: int = 0) -> Array:
    """Mean of the finite values; nan, without a warning, where there are none."""
    finite = np.isfinite(values)
    count = finite.sum(axis=axis)
    total = np.where(finite, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def wrap_title(title: str) -> str:
    """Break a long title, where it can at its semicolon, and never between a noise level and its number."""
    title = re.sub(r"noise level (?=\d)", "noise level\N{NO-BREAK SPACE}", title)
    parts = title.replace("; ", ";\n").split("\n") if len(title) > 104 else [title]
    return "\n".join(textwrap.fill(part, 104) for part in parts)
