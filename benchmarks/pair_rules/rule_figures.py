"""Figures of the evaluation: correlation of criteria with gains, gains of picks, and expected against true gains."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pair_rules import RulePrediction, judged
from sweep_cases import Case, ceiling, correlations, pooled, worth

from layerprobe.analyses.figures import (
    ARM_COLORS,
    BACKGROUND,
    GRAY,
    INK,
    LINE_COLORS,
    WIDTH_IN,
    capital,
    styled,
    wrap_title,
)
from layerprobe.analyses.selection import prior_pair
from layerprobe.layersync import LayerPair

MARKERS = "osD^vPX*"
COLORS = (ARM_COLORS["pick"], ARM_COLORS["published prior"], ARM_COLORS["runner-up"], *LINE_COLORS[-2:])


@styled()
def criteria_figure(cases: Sequence[Case]) -> Figure:
    """Draws the Spearman correlation of every criterion with the gain, one mark per sweep, and the mean over models.

    Bars are 95 % intervals of the mean over models, thin lines those of single sweeps. A star marks criteria that need
    labels. Dotted lines are the noise ceilings of sweeps with two seeds or more.

    Args:
        cases: Pair sweeps with evidence; each metric has one panel.

    Raises:
        ValueError: If there is no case.
    """
    if not cases:
        raise ValueError("there is no pair sweep to draw; pass one or more")
    tables = {metric: correlations(group).dropna(subset=["rho"]) for metric, group in _by_metric(cases).items()}
    order = pooled(pd.concat(tables.values())).index.tolist()[::-1]
    starred = {name for case in cases for name in case.needs_labels}
    names = list(dict.fromkeys(case.name for case in cases))
    figure = Figure(figsize=(WIDTH_IN, 2.0 + 0.3 * len(order)), layout="constrained")
    all_axes = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    for axes, (metric, table) in zip(all_axes, tables.items(), strict=True):
        _correlation_panel(axes, table, order, names)
        for case in (case for case in cases if case.metric == metric):
            top = ceiling(case).of_mean
            axes.vlines([-top, top], -0.6, len(order) - 0.4, colors=_color(names, case.name), ls=":", lw=1)
        axes.set(
            xlim=(-1.05, 1.05), ylim=(-0.6, len(order) - 0.4), xlabel=f"rank correlation with the gain in {metric}"
        )
        axes.set_title(_best(pooled(table), metric))
    all_axes[0].set_yticks(range(len(order)), [f"{name} *" if name in starred else name for name in order])
    handles = [Line2D([], [], ls="", marker=_marker(names, name), c=_color(names, name), label=name) for name in names]
    handles.append(Line2D([], [], color=INK, lw=4, alpha=0.35, label="mean over models, 95 %"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
    figure.suptitle("Which evidence predicts the gain of a pair? (* needs labels)", x=0.008, ha="left")
    return figure


def _correlation_panel(axes: Axes, table: pd.DataFrame, order: Sequence[str], names: Sequence[str]) -> None:
    axes.axvline(0, color=INK, lw=0.8)
    offsets = np.linspace(0.27, -0.27, len(names)) if len(names) > 1 else np.zeros(1)
    for row in table.to_dict("records"):
        y = order.index(row["criterion"]) + offsets[names.index(row["atlas"])]
        color = _color(names, row["atlas"])
        axes.plot([row["low"], row["high"]], [y, y], color=color, lw=0.7, alpha=0.5)
        filled = color if row["significant"] else BACKGROUND
        axes.plot(row["rho"], y, _marker(names, row["atlas"]), color=color, mfc=filled, ms=5)
    for row in pooled(table).reset_index().to_dict("records"):
        y = order.index(row["criterion"])
        axes.plot([row["low"], row["high"]], [y, y], color=INK, lw=7, alpha=0.22, solid_capstyle="butt", zorder=0)
        axes.plot([row["rho"], row["rho"]], [y - 0.35, y + 0.35], color=INK, lw=2, zorder=0)


def _best(pool: pd.DataFrame, metric: str) -> str:
    correlated = pool.dropna(subset=["rho"])
    if correlated.empty:
        return f"{capital(metric)}: nothing varies"
    first = correlated.iloc[0]
    significant = correlated[(correlated["low"] > 0) | (correlated["high"] < 0)]
    several = f"{len(significant)} of {len(correlated)} hold over models"
    note = several if correlated["models"].max() > 1 else "one model"
    return f"{capital(metric)}: {correlated.index[0]} {first['rho']:+.2f}; {note}"


@styled()
def picks_figure(predictions: Sequence[RulePrediction]) -> Figure:
    """Draws the gain of each rule's pick on models that the rule was not fitted on, one panel per pair sweep.

    The solid line is the best pair (too large by luck), the dashed one the best pair of the other seeds. The band holds
    gains that do not differ from the baseline (95 %). Hollow marks: the rule recommends no pair.

    Args:
        predictions: Predictions in one metric, from `leave_one_model_out`.

    Raises:
        ValueError: If there is no prediction.
    """
    if not predictions:
        raise ValueError("there are no predictions to draw; leave one model out of two or more")
    table, cases = judged(predictions), {one.case.name: one.case for one in predictions}
    rules = list(dict.fromkeys(table["rule"]))
    rows = ["mean random pair", "published prior", *rules][::-1]
    figure = Figure(figsize=(WIDTH_IN, 1.9 + 0.32 * len(rows)), layout="constrained")
    all_axes = figure.subplots(1, len(cases), squeeze=False, sharey=True)[0]
    for axes, (name, case) in zip(all_axes, cases.items(), strict=True):
        value, rows_of_sweep = worth(case), table[table["atlas"] == name]
        axes.axvspan(-196 * value.error, 196 * value.error, color=GRAY, alpha=0.15, lw=0)
        axes.axvline(0, color=INK, lw=0.8)
        axes.axvline(100 * value.best, color=INK, lw=1.4)
        axes.axvline(100 * value.best_elsewhere, color=INK, lw=1.2, ls="--")
        axes.plot(100 * value.random, rows.index("mean random pair"), "s", color=GRAY)
        axes.plot(100 * value.prior, rows.index("published prior"), "s", color=ARM_COLORS["published prior"])
        for row in rows_of_sweep.to_dict("records"):
            at = 0.0 if np.isnan(row["gain"]) else 100 * row["gain"]  # all pairs are refused
            fill = BACKGROUND if row["none"] else ARM_COLORS["pick"]
            axes.plot(at, rows.index(row["rule"]), "o", color=ARM_COLORS["pick"], mfc=fill)
        pays = "" if value.pays else ": nothing to gain beyond the noise"
        axes.set_title(textwrap.fill(f"{name}{pays}", max(16, 110 // len(cases))))
        axes.set_xlabel("gain of the pick (%)")
    all_axes[0].set_yticks(range(len(rows)), rows)
    handles = [
        Line2D([], [], color=INK, lw=1.4, label="best pair, by luck and merit"),
        Line2D([], [], color=INK, lw=1.2, ls="--", label="best pair of the other seeds"),
        Line2D([], [], color=GRAY, lw=7, alpha=0.3, label="not different from the baseline (95 %)"),
        Line2D(
            [], [], ls="", marker="o", color=ARM_COLORS["pick"], mfc=BACKGROUND, label="the rule recommends no pair"
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    metric = predictions[0].case.metric
    figure.suptitle(wrap_title(_regret_title(table, metric)), x=0.008, ha="left")
    return figure


def _regret_title(table: pd.DataFrame, metric: str) -> str:
    regrets = table.groupby("rule", sort=False)["regret"].mean().dropna()
    if regrets.empty:
        return f"{capital(metric)}: no pair gains beyond the noise in any sweep, so the rules cannot be compared"
    return f"{capital(metric)}: {regrets.idxmin()} misses least of the best pair's gain, {regrets.min():.0%} on average"


@styled()
def expectations_figure(predictions: Sequence[RulePrediction]) -> Figure:
    """Draws expected against true gains of all pairs for one rule that was not fitted on the model, a panel per sweep.

    Args:
        predictions: Predictions of one rule in one metric.

    Raises:
        ValueError: If there is no prediction, or there are several rules.
    """
    rules = {one.rule for one in predictions}
    if len(rules) != 1:
        raise ValueError(f"these are predictions of {len(rules)} rules; pass those of one")
    table = judged(predictions)
    columns = min(3, len(predictions))
    rows = -(-len(predictions) // columns)
    figure = Figure(figsize=(WIDTH_IN, 1.2 + 3.1 * rows), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in all_axes[len(predictions) :]:
        axes.set_visible(False)
    for axes, one, rho in zip(all_axes, predictions, table["rho"], strict=False):
        _expectation_panel(axes, one)
        note = f"rank correlation {rho:+.2f}" if np.isfinite(rho) else "all pairs score the same"
        axes.set_title(f"{one.case.name}\n{note}")
    handles = [
        Line2D([], [], ls="", marker="o", color=ARM_COLORS["pick"], ms=8, label="pick"),
        Line2D([], [], ls="", marker="o", color=ARM_COLORS["pick"], mfc=BACKGROUND, label="tie with the pick"),
        Line2D([], [], ls="", marker="o", color=GRAY, label="other pair"),
        Line2D([], [], ls="", marker="s", color=ARM_COLORS["published prior"], label="published prior"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    (rule,), metric = rules, capital(predictions[0].case.metric)
    title = f"{metric}: gains expected by {rule} for models that it was not fitted on"
    figure.suptitle(title, x=0.008, ha="left")
    return figure


def _expectation_panel(axes: Axes, one: RulePrediction) -> None:
    x, y, case = 100 * one.expected, 100 * one.case.gain, one.case
    color, pick = ARM_COLORS["pick"], one.pick
    others = ~one.ties & (np.arange(len(x)) != pick)
    if pick is None:
        return
    axes.axhline(0, color=INK, lw=0.8)
    axes.plot(x[others], y[others], "o", color=GRAY, ms=5)
    axes.plot(x[one.ties], y[one.ties], "o", color=color, mfc=BACKGROUND, ms=5)
    axes.plot(x[pick], y[pick], "o", color=color, ms=8)
    prior = prior_pair(case.layers)
    for index in (i for i, pair in enumerate(case.pairs) if pair == prior):
        axes.plot(x[index], y[index], "s", color=ARM_COLORS["published prior"], ms=5)
    for index in {pick, int(y.argmax())}:
        axes.annotate(_short(case.pairs[index]), (x[index], y[index]), xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="expected gain (%)", ylabel="gain (%)")


def _short(pair: LayerPair) -> str:
    return " ← ".join(name.rsplit(".", 1)[-1] for name in (pair.student, pair.teacher))


def _by_metric(cases: Sequence[Case]) -> dict[str, list[Case]]:
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.metric, []).append(case)
    return groups


def _color(names: Sequence[str], name: str) -> str:
    return COLORS[names.index(name) % len(COLORS)]


def _marker(names: Sequence[str], name: str) -> str:
    return MARKERS[names.index(name) % len(MARKERS)]
