"""Theme and colors of all figures, and saving.

The theme is seaborn's "ticks" style in its "paper" context. Line colors have a contrast of at least 3:1 on a light and
on a dark page, because the report shows figures on either, and stay apart under the common kinds of color blindness.

Seaborn also draws the heatmaps. Lines and bands are drawn with matplotlib: seaborn's `lineplot` computes its own
intervals, while the tables hold finished ones, and it connects points across missing values, which must stay gaps.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from layerprobe.analyses.measures import Floats
from layerprobe.files import atomic_write, one_line, similar_path
from layerprobe.memory import pass_on
from layerprobe.messages import did_you_mean, unknown

if TYPE_CHECKING:
    from layerprobe.analyses.selection import Selection
    from layerprobe.layersync import LayerPair


_FACES = ("axes.facecolor", "figure.facecolor", "savefig.facecolor")
INK, BACKGROUND, GRAY = "#1b1f24", "#fffefd", "#7a828c"
# Blue, vermilion, green and purple of Okabe and Ito 2008, whose other colors are too light for lines; then four more.
LINE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d31", "#4b6e6e", "#d81fb8", "#7a4fd0")
STUDENT, TEACHER = LINE_COLORS[1], LINE_COLORS[3]  # of vertical lines, dashed and solid
LEVEL_COLORS = ("#5a5fd0", "#0d86b5", "#1d9a77", "#8f9200")  # from clean to noise, blended for levels in between
MISSING: dict[str, Any] = {"facecolor": "#c9ced6", "edgecolor": "#59626d", "hatch": "////", "linewidth": 0}
WIDTH_IN = 11.0
MAX_VECTOR_CELLS = 600  # of a heatmap in an SVG
RASTER_DPI, PAPER_DPI = 150, 300
# What makes each format the same every time: metadata without the date and the versions of libraries.
FORMATS: dict[str, dict[str, None]] = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}

STYLE: dict[str, Any] = {
    **seaborn.axes_style("ticks"),
    **seaborn.plotting_context("paper"),
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(_FACES, BACKGROUND),
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that text is as wide on every machine
    "grid.alpha": 0.25,  # faint on a light and on a dark page
    "grid.color": GRAY,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "patch.force_edgecolor": False,
    "savefig.dpi": RASTER_DPI,
    "pdf.fonttype": 42,  # embedded TrueType, as publishers ask; the default, Type 3, is refused by many
    "svg.fonttype": "none",
    "svg.hashsalt": "layerprobe",
    "text.parse_math": False,  # a layer may be called "$x$"
}


PAPER_WIDTHS = {"column": 3.3, "full": 7.0}  # inches
CONTEXTS = {"paper": 1.0, "talk": 1.5}  # factors of text and lines
_PAPER_SIZES = {
    **dict.fromkeys(("font.size", "axes.labelsize", "axes.titlesize", "legend.title_fontsize"), 7.0),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 6.5),
    "lines.linewidth": 1.2,
    "lines.markersize": 3.0,
}
_changes: ContextVar[tuple[dict[str, Any], ...]] = ContextVar("changes", default=())


@contextmanager
def styled() -> Iterator[None]:
    """Applies the theme of all figures to matplotlib's defaults, and restores the caller's settings afterwards."""
    with matplotlib.style.context(["default", STYLE, *_changes.get()]):
        yield


@contextmanager
def changed_style(*, context: str | None = None, sheet: Path | str | None = None) -> Iterator[None]:
    """Changes the theme of the figures that are drawn and saved inside.

    Args:
        context: Sizes of text and lines for figures of `PAPER_WIDTHS`, one of `CONTEXTS`; None for those of screens.
        sheet: A matplotlib style sheet, which has the last word; None for no such file.

    Raises:
        ValueError: If the context is unknown, or the sheet cannot be read or has a wrong line.
    """
    if context not in (None, *CONTEXTS):
        raise ValueError(unknown("context", context, CONTEXTS))
    changes: list[dict[str, Any]] = []
    if context:
        sizes = {name: size * CONTEXTS[context] for name, size in _PAPER_SIZES.items()}
        changes.append({**sizes, **dict.fromkeys(_FACES, "#ffffff"), "savefig.dpi": PAPER_DPI})
    if sheet:
        changes.append(_read_sheet(Path(sheet)))
    token = _changes.set(tuple(changes))
    try:
        yield
    finally:
        _changes.reset(token)


def _read_sheet(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"there is no style sheet {path}; pass a file of lines such as font.size: 8{similar_path(path)}"
        )
    lines = [line.split("#", 1)[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    for key in (line.split(":", 1)[0].strip() for line in lines if line):
        if key not in mpl.rcParams:
            hint = did_you_mean(key, mpl.rcParams) or "; write lines such as font.size: 8"
            raise ValueError(f"{path} has {key!r}, which is no setting of matplotlib{hint}")
    try:
        sheet: Any = mpl.rc_params_from_file(path, fail_on_error=True, use_default_template=False)
        return dict(sheet)
    except Exception as error:  # each setting has its own check
        pass_on(error)
        raise ValueError(f"{path} is not a style sheet ({one_line(error)}); correct that line") from error


def level_colors(count: int) -> list[str]:
    """Returns one color per noise level, in ascending order of the levels."""
    colors: list[str] = seaborn.blend_palette(LEVEL_COLORS, count).as_hex()
    return colors


# --------------------------------------------------------------------------------------------------------------- saving


def save_figure(
    figure: Figure, folder: Path | str, name: str, *, formats: Sequence[str] = ("png", "svg")
) -> tuple[Path, ...]:
    """Writes a figure in files called `name.FORMAT`, the same bytes every time.

    Args:
        figure: Any figure; the first call fixes its layout.
        folder: Folder of the files, created if it does not exist.
        name: File name without a suffix.
        formats: Members of `FORMATS`: "png" (150 dpi; 300 for papers), "svg" (text as text, heatmaps of up to
            `MAX_VECTOR_CELLS` cells as vectors), "pdf" (fonts embedded, heatmaps as vectors).

    Raises:
        ValueError: If name is not a plain file name, or a format is unknown.
    """
    for file_format in formats:
        if file_format not in FORMATS:
            raise ValueError(unknown("format of a figure", file_format, FORMATS))
    if name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(f"{name!r} is not a plain file name; pass the folder and the name separately")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = tuple(folder / f"{name}.{file_format}" for file_format in formats)
    for path in paths:
        with atomic_write(path) as partial:
            partial.write_bytes(_render(figure, path.suffix[1:]))
    return paths


class _NotebookFigure(Figure):
    """Shows itself in a notebook, which knows plain figures only after `%matplotlib inline` or an import of pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=80)
        return buffer.getvalue()


def shown_in_notebooks(figure: Figure) -> Figure:
    """Returns a figure that a notebook shows as a picture."""
    figure.__class__ = _NotebookFigure
    return figure


def to_svg(figure: Figure) -> str:
    """Returns the text of the SVG file that `save_figure` writes."""
    return _render(figure, "svg").decode()


def _render(figure: Figure, file_format: str) -> bytes:
    buffer = io.BytesIO()
    with styled():
        if figure.get_layout_engine() is not None:
            # The constrained layout depends on the previous layout, and text sizes depend on the format: run it once.
            FigureCanvasAgg(figure)
            figure.draw_without_rendering()
            figure.set_layout_engine(None)  # "none" keeps a placeholder, with which every saving draws three times
        pixels = [mesh for mesh in figure.findobj(QuadMesh) if mesh.get_rasterized()]
        for mesh in pixels:
            # A cell is a path in an SVG: a page of many large matrices would take long to open, and the 256 of a color
            # bar would show the seams between them.
            cells, axes = mesh.get_array(), mesh.axes
            assert cells is not None
            assert axes is not None
            many = cells.size > MAX_VECTOR_CELLS or axes.get_label() == "<colorbar>"
            mesh.set_rasterized(file_format == "svg" and many)
        figure.savefig(buffer, format=file_format, metadata=FORMATS[file_format])
        for mesh in pixels:
            mesh.set_rasterized(True)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------------------- tables


def require_columns(table: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    """Checks that a table has all columns.

    Raises:
        ValueError: If a column is missing.
    """
    missing = [name for name in columns if name not in table.columns]
    if missing:
        present = ", ".join(map(str, table.columns)) or "none"
        raise ValueError(f"the {what} has no column {missing[0]!r}, only {present}; pass the whole table")


def pick_in(selection: Selection | None, layers: Sequence[str]) -> LayerPair | None:
    """Returns the pick of a selection after checking that its layers are in the table; None if there is no pick.

    Raises:
        ValueError: If a layer of the pick is missing.
    """
    pair = selection.pick if selection else None
    for layer in (pair.student, pair.teacher) if pair else ():
        if layer not in layers:
            raise ValueError(
                f"the pick has layer {layer}, but the table has only {', '.join(layers)}; pass both from one run"
            )
    return pair


def nanmean(values: Floats, axis: int = 0) -> Floats:
    """Returns the mean of the finite values, and nan without a warning where there are none."""
    finite = np.isfinite(values)
    count = finite.sum(axis=axis)
    total = np.where(finite, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


# ---------------------------------------------------------------------------------------------------------------- lines


def point_marker(values: Floats) -> str:
    """Returns the marker of a line: dots if it has few points, or a point between two gaps that no line would show."""
    finite = np.isfinite(values)
    alone = finite & ~np.roll(finite, 1) & ~np.roll(finite, -1)
    return "." if len(values) <= 12 or alone.any() else ""


def fit_y_limits(axes: Axes, values: Floats) -> None:
    """Sets the limits of the y axis to the finite values and a margin; leaves them alone if there are none."""
    if np.isfinite(values).any():
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        span = (high - low) or max(abs(high), 1.0) * 0.1
        axes.set_ylim(low - 0.08 * span, high + 0.06 * span)
