"""Curves of a confirmation: every arm over training steps, and its final difference from the baseline.

Intervals of single arms come from the verdict where it has them, so the curves and dots are drawn with matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from scipy import stats

from layerprobe.analyses.experiments import (
    BASELINE,
    CONFIRMATION_COLUMNS,
    LEARNING_RATE,
    NEGATIVE_CONTROL,
    PICK,
    PRIOR,
    RUNNER_UP,
    SAME_DISTANCE,
    SRA,
    Verdict,
)
from layerprobe.analyses.figures.hover import tell_points
from layerprobe.analyses.figures.labels import capital, counted, label_ends, wrap_title
from layerprobe.analyses.figures.style import GRAY, INK, LINE_COLORS, WIDTH_IN, nanmean, require_columns, styled
from layerprobe.analyses.measures import Floats
from layerprobe.analyses.wording import answer_title, rounded

# The baseline has the color of text, so that it is black on a light page and white on a dark one.
ARM_COLORS = {
    BASELINE: INK,
    PICK: LINE_COLORS[0],
    RUNNER_UP: LINE_COLORS[2],
    PRIOR: LINE_COLORS[3],
    SAME_DISTANCE: LINE_COLORS[5],
    SRA: LINE_COLORS[7],
    LEARNING_RATE: LINE_COLORS[4],
    NEGATIVE_CONTROL: LINE_COLORS[1],
}
Runs = Mapping[str, pd.DataFrame]  # by arm, in the order of the table: one row per step, one column per seed


@dataclass(frozen=True)
class _Final:
    """Paired difference of one arm from the baseline at their last common step.

    Attributes:
        middle: Mean over seeds.
        low: Lower end of its interval, nan for one seed.
        high: Upper end of its interval, nan for one seed.
        seeds: Difference of every seed.
    """

    middle: float
    low: float
    high: float
    seeds: Floats

    @property
    def text(self) -> str:
        """The difference and its interval with two significant digits of the interval: −0.17 [−0.25, −0.11]."""
        return rounded(self.middle, self.low, self.high, signed=True)


@styled()
def confirmation_curves(
    confirmation: pd.DataFrame,
    verdict: Verdict | None = None,
    *,
    metric: str | None = None,
) -> Figure:
    """Draws a metric of every arm over training steps, and the paired differences from the baseline.

    Args:
        confirmation: Table with the columns arm, seed, step, metric and value. Arms with equal seeds are paired.
        verdict: Verdict, whose final differences are shown; None while the arms are training.
        metric: Metric to show; None for the metric of the verdict or, without one, the first of the table.

    Raises:
        ValueError: If a column, the metric or the baseline is missing.
    """
    runs, metric, verdict = _runs(confirmation, verdict, metric)
    figure = Figure(figsize=(WIDTH_IN, 7.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[1.25, 1], width_ratios=[1.35, 1])
    colors = _arm_colors(runs)
    _draw_runs(figure.add_subplot(grid[0, :]), runs, capital(metric) + _direction(verdict), colors)
    _draw_difference_over_steps(figure.add_subplot(grid[1, 0]), runs, colors)
    finals, undetectable = _final_differences(runs, verdict), _undetectable_difference(runs, verdict)
    _draw_final_differences(figure.add_subplot(grid[1, 1]), runs, finals, metric, colors, undetectable)
    figure.suptitle(wrap_title(_title(runs, finals, metric, verdict)), x=0.008, ha="left")
    return figure


@styled()
def paper_confirmation(confirmation: pd.DataFrame, verdict: Verdict | None = None, *, width_in: float) -> Figure:
    """Draws the final paired differences of every arm from the baseline, for a paper.

    Args:
        confirmation: Table, as for `confirmation_curves`.
        verdict: Verdict whose metric and differences are shown, or None.
        width_in: Width of the figure in inches.

    Raises:
        ValueError: As `confirmation_curves`.
    """
    runs, metric, verdict = _runs(confirmation, verdict, None)
    finals = _final_differences(runs, verdict)
    figure = Figure(figsize=(width_in, 0.8 + 0.36 * len(finals)), layout="constrained")
    axes = figure.subplots()
    undetectable = _undetectable_difference(runs, verdict)
    _draw_final_differences(axes, runs, finals, metric, _arm_colors(runs), undetectable)
    axes.set_title(axes.get_title(loc="left").replace("; ", ";\n"))
    label = axes.get_xlabel().replace(" (gray", "\n(gray").replace(" with these seeds", "\nwith these seeds")
    axes.set_xlabel(label.replace(" minus", "\nminus"))
    return figure


def _runs(
    confirmation: pd.DataFrame, verdict: Verdict | None, metric: str | None
) -> tuple[dict[str, pd.DataFrame], str, Verdict | None]:
    """The runs of one metric by arm, the metric, and the verdict if it is on that metric."""
    require_columns(confirmation, CONFIRMATION_COLUMNS, "confirmation table")
    metrics = list(dict.fromkeys(map(str, confirmation["metric"])))
    metric = metric or (verdict.metric if verdict else (metrics or ["none"])[0])
    if metric not in metrics:
        present = ", ".join(metrics) or "no rows"
        raise ValueError(f"metric {metric!r} is not in the confirmation table, which has {present}; pass one of those")
    rows = confirmation[confirmation["metric"] == metric]
    runs = {
        str(arm): part.pivot_table(index="step", columns="seed", values="value")
        for arm, part in rows.dropna(subset="value").groupby("arm", sort=False)
    }
    if BASELINE not in runs:
        raise ValueError(f"the confirmation table has no values of {BASELINE!r}, only {', '.join(runs)}; run that arm")
    return runs, metric, verdict if verdict and verdict.metric == metric else None


def _arm_colors(arms: Mapping[str, Any]) -> dict[str, str]:
    used = {ARM_COLORS[arm] for arm in arms if arm in ARM_COLORS}
    spare = iter([color for color in reversed(LINE_COLORS) if color not in used] * (1 + len(arms)))
    return {arm: ARM_COLORS.get(arm) or next(spare) for arm in arms}


def _draw_runs(axes: Axes, runs: Runs, label: str, colors: Mapping[str, str]) -> None:
    values = np.concatenate([run.to_numpy(dtype=np.float64).ravel() for run in runs.values()])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 8 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    ends = {}
    for arm, run in runs.items():
        mean = run.mean(axis=1)
        axes.plot(run.index, run.to_numpy(), color=colors[arm], linewidth=0.6)
        axes.plot(mean.index, mean.to_numpy(), color=colors[arm], linewidth=2.4)
        texts = [f"{arm}, step {step:,.0f}: {value:.3g}" for step, value in mean.items()]
        tell_points(axes, mean.index, mean.to_numpy(), texts)
        ends[arm] = (float(mean.index[-1]), float(mean.iloc[-1]))
    final = runs[BASELINE].mean(axis=1).iloc[-1]
    axes.axhline(final, color=GRAY, linestyle=":", linewidth=1.2)
    axes.set_title("Thin lines: seeds; thick lines: their mean; dotted: final value of the baseline")
    _label_steps(axes)
    axes.set_ylabel(label)
    axes.margins(x=0.01)
    label_ends(axes, ends, colors)


def _label_steps(axes: Axes) -> None:
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _draw_difference_over_steps(axes: Axes, runs: Runs, colors: Mapping[str, str]) -> None:
    baseline = runs[BASELINE]
    axes.axhline(0, color=INK, linewidth=1.2)
    num_seeds = 0
    for arm, run in runs.items():
        if arm == BASELINE:
            continue
        percent = 100 * ((run - baseline) / baseline.abs()).dropna(how="all").dropna(how="all", axis=1)
        if percent.empty:
            continue
        middle, low, high = _t_interval(percent.to_numpy(dtype=np.float64))
        num_seeds = max(num_seeds, percent.shape[1])
        axes.fill_between(percent.index, low, high, color=colors[arm], alpha=0.18, linewidth=0)
        axes.plot(percent.index, middle, color=colors[arm], linewidth=2.0)
    band = "band: 95 % t interval" if num_seeds > 1 else "one seed: no interval"
    axes.set_title(f"Paired difference from the baseline ({band})")
    _label_steps(axes)
    axes.set_ylabel("difference (% of the baseline)")


def _final_differences(runs: Runs, verdict: Verdict | None) -> dict[str, _Final]:
    results = {result.name: result for result in verdict.arms} if verdict else {}
    finals = {}
    for arm, run in runs.items():
        paired = (run - runs[BASELINE]).dropna(how="all").dropna(how="all", axis=1)
        if arm == BASELINE or paired.empty:
            continue
        last = paired.iloc[-1].to_numpy(dtype=np.float64)
        numbers = [float(value[0]) for value in _t_interval(last[None])]
        if result := results.get(arm):
            decisive = (result.difference, result.low, result.high)
            numbers = [old if new is None else new for old, new in zip(numbers, decisive, strict=True)]
        finals[arm] = _Final(numbers[0], numbers[1], numbers[2], last)
    return finals


def _undetectable_difference(runs: Runs, verdict: Verdict | None) -> float | None:
    """Differences below this one are found in fewer than four of five cases; None if the verdict has no resolution."""
    share = verdict.resolution.share if verdict and verdict.resolution else None
    return None if share is None else float(share * runs[BASELINE].mean(axis=1).iloc[-1])


def _draw_final_differences(
    axes: Axes,
    runs: Runs,
    finals: Mapping[str, _Final],
    metric: str,
    colors: Mapping[str, str],
    undetectable: float | None,
) -> None:
    axes.axvline(0, color=INK, linewidth=1.2)
    names = []
    for y, (arm, final) in enumerate(finals.items()):
        seeds_y = np.full(len(final.seeds), y - 0.2)
        axes.plot(final.seeds, seeds_y, "o", color=colors[arm], markersize=3.5, markeredgewidth=0)
        axes.plot([final.low, final.high], [y, y], color=colors[arm], linewidth=2.4)
        axes.plot(final.middle, y, "o", color=colors[arm], markersize=8)
        names.append(f"{arm}\n{final.text}")
    axes.set_yticks(range(len(finals)), names)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.set_ylim(len(finals) - 0.35, -0.6)
    axes.margins(x=0.1)
    axes.grid(False, axis="y")
    last = int(max(run.index.max() for run in runs.values()))
    axes.set_title(f"Final difference after {last:,} steps; small dots: seeds")
    axes.set_xlabel(f"{capital(metric)} minus that of the baseline")
    if undetectable is not None:
        limits = axes.get_xlim()  # a band wider than the panel must not shrink its content
        axes.axvspan(-undetectable, undetectable, color=GRAY, alpha=0.15, linewidth=0, zorder=0)
        axes.set_xlim(limits)
        axes.set_xlabel(f"{axes.get_xlabel()}\n(gray: too small to be found with these seeds in four of five cases)")


def _title(runs: Runs, finals: Mapping[str, _Final], metric: str, verdict: Verdict | None) -> str:
    base = float(runs[BASELINE].mean(axis=1).iloc[-1])
    arm = PICK if PICK in finals else next(iter(finals), None)
    if arm is None:
        return f"{capital(metric)} of the baseline ends at {base:.3g}"
    end, final = float(runs[arm].mean(axis=1).iloc[-1]), finals[arm]
    num_seeds = counted(len(final.seeds), "seed")
    facts = f"{metric} {end:.3g} against {base:.3g} for the baseline; difference {final.text}, {num_seeds}"
    return f"{capital(answer_title(arm, verdict))}: {facts}"


def _direction(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    return "\n(lower is better)" if verdict.lower_is_better else "\n(higher is better)"


def _t_interval(values: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean over the last axis and its 95 % t interval, nan where fewer than two values are finite."""
    count = np.isfinite(values).sum(axis=-1)
    mean = nanmean(values, axis=-1)
    squares = np.nansum((values - mean[..., None]) ** 2, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        half = stats.t.ppf(0.975, np.maximum(count - 1, 1)) * np.sqrt(squares / (count - 1) / count)
    half = np.where(count > 1, half, np.nan)
    return mean, mean - half, mean + half
