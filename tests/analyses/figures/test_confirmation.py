"""Curves of a confirmation against the table and the verdict they were drawn from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from figure_tables import confirmation_table, overlaps, panel, title_of
from scipy import stats

from layerprobe.analyses.experiments.verdict import ArmResult, Trend, Verdict
from layerprobe.analyses.figures import confirmation


def test_confirmation_interval_is_students_on_paired_differences() -> None:
    table = confirmation_table()
    figure = confirmation.confirmation_curves(table)
    last = table[(table["step"] == 2000) & (table["metric"] == "Frechet distance")].pivot(
        index="seed", columns="arm", values="value"
    )
    difference = last["pick"] - last["baseline"]
    interval = stats.ttest_1samp(difference, 0).confidence_interval(0.95)
    axes = panel(figure, "Final difference")
    dots, bar, middle = axes.lines[1:4]
    np.testing.assert_allclose(np.sort(dots.get_xdata()), np.sort(difference), rtol=1e-12)
    np.testing.assert_allclose(bar.get_xdata(), interval, rtol=1e-9)  # two orders of the same sums
    np.testing.assert_allclose(middle.get_xdata(), difference.mean(), rtol=1e-12)
    curves = figure.axes[0]
    level = next(line for line in curves.lines if line.get_linestyle() == ":").get_ydata()[0]
    np.testing.assert_allclose(level, last["baseline"].mean(), rtol=1e-12)
    assert {text.get_text() for text in curves.texts} == {"baseline", "pick", "negative control"}
    percent = next(line for line in panel(figure, "Paired difference").lines[1:])
    np.testing.assert_allclose(percent.get_ydata()[-1], (100 * difference / last["baseline"]).mean(), rtol=1e-12)


def test_verdict_decides_title_and_numbers() -> None:
    trend = Trend(best=1.2, best_step=2000, late_gain=0.0, late_step=1500)
    arm = ArmResult("pick", "blocks.1", "blocks.4", 0.3, [1.2], -0.3, -0.4, -0.2, [None], 1e-4, trend)
    verdict = Verdict(
        metric="Frechet distance",
        extractor="pixels",
        lower_is_better=True,
        start="from scratch",
        steps=2000,
        num_seeds=3,
        num_samples=10,
        answer="helps",
        cautions=(),
        arms=(arm,),
        judged="pick",
        comparisons=(),
        planned_seeds=3,
        stop_early=False,
        level=0.05,
    )
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


def test_few_steps_are_counted_in_whole_numbers() -> None:
    table = confirmation_table()
    figure = confirmation.confirmation_curves(table.assign(step=table["step"] // 500))
    figure.canvas.draw()
    for axes in (figure.axes[0], panel(figure, "Paired difference")):
        ticks = [text.get_text() for text in axes.get_xticklabels()]
        assert len(set(ticks)) == len(ticks)


def test_diverged_arm_does_not_stop_the_figure() -> None:
    table = confirmation_table()
    table.loc[(table["arm"] == "negative control") & (table["step"] > 0), "value"] = np.nan
    figure = confirmation.confirmation_curves(table)
    assert "Pick" in title_of(figure)


def test_every_arm_has_its_own_color() -> None:
    names = ["baseline", "pick", "runner-up", "published prior", "learning rate", "negative control", "a", "b"]
    figure = confirmation.confirmation_curves(
        confirmation_table(arms={name: 1 + i / 10 for i, name in enumerate(names)})
    )
    thick = [line.get_color() for line in figure.axes[0].lines if line.get_linewidth() == 2.4]
    assert len(set(thick)) == len(names)


def test_no_text_overlaps_another() -> None:
    close = {"baseline": 1.0, "pick": 0.97, "published prior": 0.98, "negative control": 1.02}
    assert overlaps(confirmation.confirmation_curves(confirmation_table(arms=close))) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: confirmation.confirmation_curves(confirmation_table(), metric="FID"),
            "'FID' is not in the confirmation table, which has Frechet",
        ),
        (
            lambda: confirmation.confirmation_curves(confirmation_table().query("arm == 'pick'")),
            "no values of 'baseline', only pick; run that arm",
        ),
    ],
)
def test_errors_are_one_line_with_a_remedy(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
