"""Curves of a confirmation: every arm over training steps, and its final difference from the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from scipy import stats

from layerprobe.analyses.figures.style import (
    GRAY,
    INK,
    SPARE_COLORS,
    WIDTH_IN,
    Array,
    capital,
    label_ends,
    nanmean,
    num_decimals,
    require_columns,
    styled,
    wrap_title,
)

# Okabe and Ito 2008; the baseline takes the ink, so that it is black on white and white on black.
ARM_COLORS = {
    "no alignment": INK,
    "pick": "#0072b2",
    "first-ranked pair": "#0072b2",
    "runner-up": "#009e73",
    "depth heuristic": "#e69f00",
    "learning rate": "#8c6d31",
    "bad control": "#d55e00",
}
CONFIRMATION_COLUMNS = ("arm", "seed", "step", "metric", "value")
Runs = Mapping[str, pd.DataFrame]  # per arm, in the order of the table: one row per step, one column per seed


# --------------------------------------------------------------------------------------------------------- confirmation


@dataclass(frozen=True)
class _Final:
    """Paired difference of one arm to no alignment at the last common step: mean, 95 % interval, and every seed."""

    middle: float
    low: float
    high: float
    seeds: Array

    @property
    def text(self) -> str:
        """−0.17 [−0.25, −0.11], with two significant digits of the interval."""
        known = np.isfinite([self.low, self.high]).all()
        size = (self.high - self.low) / 2 if known and self.high > self.low else abs(self.middle) / 10
        decimals = num_decimals(size, 2) if size > 0 else 2
        middle, low, high = (f"{value:+.{decimals}f}".replace("-", "−") for value in (self.middle, self.low, self.high))
        return f"{middle} [{low}, {high}]" if known else middle


@styled()
def confirmation_curves(
    confirmation: pd.DataFrame,
    verdict: Mapping[str, Any] | None = None,
    *,
    metric: str | None = None,
) -> Figure:
    """What aligning the layers did to training: the metric, and the paired difference to training without alignment.

    Args:
        confirmation: Columns arm, seed, step, metric, value. Arms with equal seeds are paired.
        verdict: The verdict; its numbers take precedence for the final difference. None while the runs are under way.
        metric: Metric to show; the verdict's, or the first of the table.

    Raises:
        ValueError: If a column, the metric or the arm "no alignment" is missing.
    """
    require_columns(confirmation, CONFIRMATION_COLUMNS, "confirmation table")
    verdict = verdict or {}
    known = list(dict.fromkeys(map(str, confirmation["metric"])))
    metric = metric or str(verdict.get("metric") or (known or ["none"])[0])
    if metric not in known:
        has = ", ".join(known) or "no rows"
        raise ValueError(f"metric {metric!r} is not in the confirmation table, which has {has}; pass one of those")
    rows = confirmation[confirmation["metric"] == metric]
    runs = {
        str(arm): part.pivot_table(index="step", columns="seed", values="value")
        for arm, part in rows.dropna(subset="value").groupby("arm", sort=False)
    }
    if "no alignment" not in runs:
        raise ValueError(
            f"the confirmation table has no values of 'no alignment', only {', '.join(runs)}; run that arm"
        )
    figure = Figure(figsize=(WIDTH_IN, 7.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[1.25, 1], width_ratios=[1.35, 1])
    colors = _arm_colors(runs)
    _draw_runs(figure.add_subplot(grid[0, :]), runs, metric, colors, _better(metric, verdict))
    _draw_difference_over_steps(figure.add_subplot(grid[1, 0]), runs, colors)
    told = verdict if metric == verdict.get("metric") else {}
    finals, hidden = _final_differences(runs, told), _too_small_to_find(runs, told)
    _draw_final_differences(figure.add_subplot(grid[1, 1]), runs, finals, metric, colors, hidden)
    figure.suptitle(wrap_title(_confirmation_title(runs, finals, metric, verdict)), x=0.008, ha="left")
    return figure


def _arm_colors(arms: Mapping[str, Any]) -> dict[str, str]:
    taken = {ARM_COLORS[arm] for arm in arms if arm in ARM_COLORS}
    spare = iter([color for color in SPARE_COLORS if color not in taken] * (1 + len(arms)))
    return {arm: ARM_COLORS.get(arm) or next(spare) for arm in arms}


def _draw_runs(axes: Axes, runs: Runs, metric: str, colors: Mapping[str, str], better: str) -> None:
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
        axes.plot(run.index, run.to_numpy(), color=colors[arm], linewidth=0.7, alpha=0.55)
        axes.plot(mean.index, mean.to_numpy(), color=colors[arm], linewidth=2.4)
        ends[arm] = (float(mean.index[-1]), float(mean.iloc[-1]))
    final = runs["no alignment"].mean(axis=1).iloc[-1]
    axes.axhline(final, color=GRAY, linestyle=":", linewidth=1.2)
    axes.set_title("Thin lines are seeds, thick lines their mean; dotted: where training without alignment ends")
    axes.set_xlabel("training step")
    axes.set_ylabel(capital(metric) + better)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.01)
    label_ends(axes, ends, colors)


def _draw_difference_over_steps(axes: Axes, runs: Runs, colors: Mapping[str, str]) -> None:
    baseline = runs["no alignment"]
    axes.axhline(0, color=INK, linewidth=1.2)
    seeds = 0
    for arm, run in runs.items():
        if arm == "no alignment":
            continue
        percent = 100 * ((run - baseline) / baseline.abs()).dropna(how="all").dropna(how="all", axis=1)
        if percent.empty:
            continue
        middle, low, high = _t_interval(percent.to_numpy(dtype=np.float64))
        seeds = max(seeds, percent.shape[1])
        axes.fill_between(percent.index, low, high, color=colors[arm], alpha=0.18, linewidth=0)
        axes.plot(percent.index, middle, color=colors[arm], linewidth=2.0)
    band = "band: 95 % t interval" if seeds > 1 else "one seed: no interval"
    axes.set_title(f"Paired difference to no alignment ({band})")
    axes.set_xlabel("training step")
    axes.set_ylabel("difference (% of no alignment)")
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _final_differences(runs: Runs, verdict: Mapping[str, Any]) -> dict[str, _Final]:
    told = {arm.get("name"): arm for arm in verdict.get("arms", ())}
    finals = {}
    for arm, run in runs.items():
        paired = (run - runs["no alignment"]).dropna(how="all").dropna(how="all", axis=1)
        if arm == "no alignment" or paired.empty:
            continue
        last = paired.iloc[-1].to_numpy(dtype=np.float64)
        numbers = [float(value[0]) for value in _t_interval(last[None])]
        for i, key in enumerate(("difference", "low", "high")):
            if told.get(arm, {}).get(key) is not None:
                numbers[i] = float(told[arm][key])
        finals[arm] = _Final(numbers[0], numbers[1], numbers[2], last)
    return finals


def _too_small_to_find(runs: Runs, verdict: Mapping[str, Any]) -> float | None:
    """The size of difference that the verdict's seeds find in four of five cases; None where it does not say."""
    share = (verdict.get("resolution") or {}).get("difference")
    return None if share is None else float(share * runs["no alignment"].mean(axis=1).iloc[-1])


def _draw_final_differences(
    axes: Axes,
    runs: Runs,
    finals: Mapping[str, _Final],
    metric: str,
    colors: Mapping[str, str],
    hidden: float | None,
) -> None:
    axes.axvline(0, color=INK, linewidth=1.2)
    names = []
    for y, (arm, final) in enumerate(finals.items()):
        seeds_y = np.full(len(final.seeds), y - 0.2)
        axes.plot(final.seeds, seeds_y, "o", color=colors[arm], alpha=0.55, markersize=4, markeredgewidth=0)
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
    axes.set_xlabel(f"{capital(metric)} minus that of no alignment")
    if hidden is not None:
        shown = axes.get_xlim()  # a band wider than the panel must not shrink what is in it
        axes.axvspan(-hidden, hidden, color=GRAY, alpha=0.15, linewidth=0, zorder=0)
        axes.set_xlim(shown)
        axes.set_xlabel(f"{axes.get_xlabel()}\n(gray: smaller than these seeds find in four of five cases)")


def _confirmation_title(
    runs: Runs,
    finals: Mapping[str, _Final],
    metric: str,
    verdict: Mapping[str, Any],
) -> str:
    base = float(runs["no alignment"].mean(axis=1).iloc[-1])
    arm = "pick" if "pick" in finals else next(iter(finals), None)
    if arm is None:
        return f"{capital(metric)} without alignment ends at {base:.3g}"
    end, final = float(runs[arm].mean(axis=1).iloc[-1]), finals[arm]
    count = f"{len(final.seeds)} seed{'s' * (len(final.seeds) > 1)}"
    facts = f"{metric} {end:.3g} against {base:.3g} without alignment; difference {final.text}, {count}"
    answer = verdict.get("answer") if metric == verdict.get("metric") else None
    heads = {"helps": f"{capital(arm)} helps", "hurts": f"{capital(arm)} hurts", None: capital(arm)}
    head = heads.get(answer, capital(str(answer))) + ": "
    return head + facts


def _better(metric: str, verdict: Mapping[str, Any]) -> str:
    if metric != verdict.get("metric") or "lower_is_better" not in verdict:
        return ""
    return "\n(lower is better)" if verdict["lower_is_better"] else "\n(higher is better)"


def _t_interval(values: Array) -> tuple[Array, Array, Array]:
    """Mean over the last axis and its 95 % t interval, nan where fewer than two values are finite."""
    count = np.isfinite(values).sum(axis=-1)
    mean = nanmean(values, axis=-1)
    squares = np.nansum((values - mean[..., None]) ** 2, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        half = stats.t.ppf(0.975, np.maximum(count - 1, 1)) * np.sqrt(squares / (count - 1) / count)
    half = np.where(count > 1, half, np.nan)
    return mean, mean - half, mean + half
