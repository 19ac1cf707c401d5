"""A checkpoint looks converged if further training does not improve it, and only then."""

from __future__ import annotations

import pandas as pd
import pytest

from layerprobe.analyses.experiments.arms import FRECHET, HELD_OUT
from layerprobe.analyses.experiments.branching import BranchCourse, branch_course, recorded_fall, start_cautions


def scores(losses: list[float], distances: list[float]) -> pd.DataFrame:
    """Two seeds around these means, at steps 0, 10, 20 ..."""
    rows = []
    for metric, values in ((HELD_OUT, losses), (FRECHET, distances)):
        rows += [(s, 10 * i, metric, v * (1 + m)) for i, v in enumerate(values) for s, m in enumerate((-0.1, 0.1))]
    return pd.DataFrame(rows, columns=["seed", "step", "metric", "value"])


@pytest.mark.parametrize(
    ("losses", "distances", "converged"),
    [
        ([1.0, 0.995, 0.993], [2.0, 1.95, 1.96], True),
        ([1.0, 1.1, 1.2], [2.0, 2.5, 2.2], True),  # the dip after a restart
        ([1.0, 0.98, 1.1], [2.0, 2.5, 2.2], False),
        ([1.0, 1.0, 1.0], [2.0, 1.8, 1.9], False),
    ],
)
def test_it_is_converged_if_neither_loss_nor_distance_falls(
    losses: list[float], distances: list[float], converged: bool
) -> None:
    course = branch_course(scores(losses, distances))
    assert course.looks_converged is converged
    falls = (max(0, 1 - min(losses)), max(0, 1 - min(distances) / 2))
    assert (course.steps, course.loss_fall, course.distance_fall) == (20, *map(pytest.approx, falls))


def test_a_recorded_training_tells_how_far_the_loss_fell_at_its_end() -> None:
    table = pd.DataFrame(
        {"step": [0, 30, 60, 75, 80, 100], "0.1": [9, 5, 3, 2.0, 1, 1.9], "0.5": [9, 5, 3, 4.0, 1, 3.9]}
    )
    assert recorded_fall(table) == pytest.approx(1 - 5.8 / 6)
    assert recorded_fall(table.iloc[:1]) is None


def test_what_is_said_of_the_start_depends_on_what_is_recorded() -> None:
    assert start_cautions(from_scratch=True, fall=0.0) == ()
    assert start_cautions(from_scratch=False, fall=None) == ("branch", "convergence not known")
    assert start_cautions(from_scratch=False, fall=0.009) == ("branch", "start looks converged")
    assert start_cautions(from_scratch=False, fall=-0.1) == ("branch", "start looks converged")
    assert start_cautions(from_scratch=False, fall=0.02) == ("branch",)
    assert BranchCourse(9, 0.01, 0.0).looks_converged is False
