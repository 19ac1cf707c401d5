"""Published pairs by the depths of student and teacher, and how much each gained."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from layerprobe.analyses.figures.style import BACKGROUND, GRAY, INK, LINE_COLORS, WIDTH_IN, styled
from layerprobe.analyses.selection import PRIOR_RANGES, PublishedPair, published_pairs
from layerprobe.analyses.tables import PRIOR_DEPTHS

_MARKERS = ("o", "s", "D", "^", "v", "P")
# Where the numbers of a study stand beside its points, so that those of different studies do not meet.
_OFFSETS = ((-12, 0), (0, 14), (9, 0), (9, -5))
# Sizes that fall from study to study, so that a point shows around another at the same depths.
_SIZES = (230, 130, 45, 60)
_COLOR_MAP = "cividis"  # one color scale from blue to yellow, which color-blind readers see as others do


@styled()
def published_figure() -> Figure:
    """Draws the share of the best gain against the depths of both layers, and against the student's depth alone.

    Left: self-alignment; a dashed frame holds the ranges in which most of the gain is, a cross the prior. Right:
    alignment with an external encoder, a line for each study.
    """
    figure = Figure(figsize=(WIDTH_IN, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [pair for pair in published_pairs() if pair.share is not None]
    _draw_pairs(left, [pair for pair in rows if pair.teacher is not None])
    _draw_students(right, [pair for pair in rows if pair.teacher is None])
    figure.suptitle(
        "Published pairs gain most with a student at 0.15 to 0.4 of the depth and a teacher at 0.62 to 0.8",
        x=0.008,
        ha="left",
    )
    return figure


def _draw_pairs(axes: Axes, pairs: Sequence[PublishedPair]) -> None:
    studies = list(dict.fromkeys(pair.study for pair in pairs))
    points = None
    for study, marker, size, offset in zip(studies, _MARKERS, _SIZES, _OFFSETS, strict=False):
        chosen = [pair for pair in pairs if pair.study == study]
        points = axes.scatter(
            [pair.student_depth for pair in chosen],
            [pair.teacher_depth or 0.0 for pair in chosen],
            c=[pair.share or 0.0 for pair in chosen],
            vmin=0,
            vmax=1,
            cmap=_COLOR_MAP,
            marker=marker,
            s=size,
            edgecolors=INK,
            linewidths=0.8,
            label=study,
            zorder=3,
        )
        for pair in chosen:
            axes.annotate(
                f"{pair.share:.2f}",
                (pair.student_depth, pair.teacher_depth or 0.0),
                xytext=offset,
                textcoords="offset points",
                ha={-1: "right", 0: "center", 1: "left"}[(offset[0] > 0) - (offset[0] < 0)],
                va="center",
                fontsize=8,
                zorder=4,
            )
    (low, high), (teacher_low, teacher_high) = PRIOR_RANGES
    axes.add_patch(
        Rectangle((low, teacher_low), high - low, teacher_high - teacher_low, fill=False, edgecolor=INK, linestyle="--")
    )
    axes.plot(
        *PRIOR_DEPTHS,
        marker="x",
        markersize=10,
        markeredgewidth=2,
        color=LINE_COLORS[1],
        linestyle="none",
        label=f"prior ({PRIOR_DEPTHS[0]:.2f}, {PRIOR_DEPTHS[1]:.2f})",
        zorder=4,
    )
    axes.plot([0, 1], [0, 1], color=GRAY, linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title="The same network teaches")
    axes.set(xlabel="depth of the student (block / number of blocks)", ylabel="depth of the teacher")
    axes.legend(loc="lower right", facecolor=BACKGROUND, frameon=True, edgecolor="none")
    bar = axes.figure.colorbar(points, ax=axes, shrink=0.75)  # type: ignore[arg-type]
    bar.set_label("share of the best gain in the study")


def _draw_students(axes: Axes, pairs: Sequence[PublishedPair]) -> None:
    studies = list(dict.fromkeys(pair.study for pair in pairs))
    for study, color, marker in zip(studies, LINE_COLORS, _MARKERS, strict=False):
        chosen = sorted((pair for pair in pairs if pair.study == study), key=lambda pair: pair.student_depth)
        depths, shares = [pair.student_depth for pair in chosen], [pair.share for pair in chosen]
        axes.plot(depths, shares, color=color, marker=marker, label=f"{study}, {chosen[0].network}")  # type: ignore[arg-type]
    axes.axhline(0, color=INK, linewidth=1)
    axes.set(xlim=(0, 1), title="An external encoder teaches", xlabel="depth of the student (block / number of blocks)")
    axes.set_ylabel("share of the best gain in the study")
    axes.legend(loc="lower left")
