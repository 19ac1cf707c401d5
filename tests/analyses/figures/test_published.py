"""The figure of published pairs shows every row that has a share, at its depths."""

from __future__ import annotations

from layerprobe.analyses.figures import published_figure
from layerprobe.analyses.selection import published_pairs


def test_every_share_stands_at_its_depths() -> None:
    left, right, _ = published_figure().axes
    rows = [pair for pair in published_pairs() if pair.share is not None]
    drawn = sorted(tuple(point) for points in left.collections for point in points.get_offsets().tolist())
    assert drawn == sorted((pair.student_depth, pair.teacher_depth) for pair in rows if pair.teacher_depth is not None)
    curves = sorted((x, y) for line in right.lines[:3] for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True))
    assert curves == sorted((pair.student_depth, pair.share) for pair in rows if pair.teacher is None)
