"""Draws docs/figures/where-it-pays.png and writes the tables of docs/atlas/where-it-pays.md.

The trainings are those of benchmarks/fast_atlas/regimes.py; docs/where-it-pays.csv holds their scores.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from layerprobe.analyses.figures import GRAY, LINE_COLORS, WIDTH_IN, save_figure, styled

DOCS = Path(__file__).parent
ARM = ["weight", "projector", "stop_step"]
METRICS = {"frechet": "Fréchet distance", "held_out": "held-out loss", "probe_error": "probe error"}
MARKER = "<!-- made by docs/make_where_it_pays.py -->"


def main() -> None:
    """Writes the figure and the tables."""
    table = pd.read_csv(DOCS / "where-it-pays.csv")
    _, drawn = save_figure(depth_figure(table), DOCS / "figures", "where-it-pays")
    drawn.unlink()
    page = DOCS / "atlas" / "where-it-pays.md"
    before, *_ = page.read_text(encoding="utf-8").partition(MARKER)
    page.write_text("\n".join([before.rstrip(), "", MARKER, "", *arm_table(table)]) + "\n", encoding="utf-8")


def changes(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Relative change of each aligned arm from no alignment, by seed, in percent."""
    keys = ["regime", "depth", "seed", "step"]
    plain = rows[rows["weight"] == 0].set_index(keys)[metric].rename("plain")
    both = rows[rows["weight"] > 0].join(plain, on=keys)
    return both.assign(change=100 * (both[metric] / both["plain"] - 1))


def interval(values: pd.Series) -> tuple[float, float]:
    """Mean and half the 95 % interval over seeds (Student's t); the latter is nan for one seed."""
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n) if n > 1 else float("nan")
    return float(values.mean()), float(half)


@styled()
def depth_figure(table: pd.DataFrame) -> Figure:
    """Draws the change by the published prior over steps, a panel for each metric and a line for each depth."""
    rows = table[table["regime"].str.startswith("depth ")]
    figure = Figure(figsize=(WIDTH_IN, 3.6), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, len(METRICS)), METRICS.items(), strict=True):
        axes.axhline(0, color=GRAY, linewidth=1)
        lines = zip(changes(rows, metric).groupby("depth"), LINE_COLORS, "osD", strict=False)
        for place, ((depth, group), color, marker) in enumerate(lines):
            points = [(step, *interval(one["change"])) for step, one in group.groupby("step")]
            steps, means, halves = np.array(points).T
            shifted = steps * 1.05 ** (place - 1)
            axes.errorbar(shifted, means, halves, color=color, marker=marker, capsize=3, label=f"{depth} blocks")
        steps = sorted(rows["step"].unique())
        axes.set(title=title, xlabel="training step", xscale="log", xticks=steps, xticklabels=steps)
        axes.minorticks_off()
    figure.axes[0].set_ylabel("change by alignment (%)")
    of_distance = changes(rows, "frechet").groupby(["depth", "step"])["change"].mean().unstack()
    found = ", ".join(
        f"{round(row.dropna().iloc[0]):+d} to {round(row.dropna().iloc[-1]):+d} % ({depth})".replace("+0", "0")
        for depth, row in of_distance.iterrows()
    )
    title = f"Change of the Fréchet distance, first to last step: {found} blocks"
    figure.suptitle(title, x=0.008, ha="left")
    figure.axes[0].legend()
    return figure


def arm_table(table: pd.DataFrame) -> list[str]:
    """Lines of the table of all arms: scores at the last step, averaged over seeds, and cost."""
    head = "| regime | network | learning rate, warm-up | weight | projector | aligned until | seeds | steps | "
    head += "Fréchet distance | held-out loss | seconds an arm |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|---|"]
    for (regime, *_), rows in table.groupby(["regime", *ARM], sort=False):
        last = rows[rows["step"] == rows["step"].max()]
        one = last.iloc[0]
        aligned = one["weight"] > 0
        cells = (
            regime,
            f"{one['depth']} x {one['width']}, patch {one['patch']}",
            f"{one['learning_rate']:g}, {one['warmup']}",
            f"{one['weight']:g}" if aligned else "none",
            f"{one['projector']}" if one["projector"] else "",
            f"{one['stop_step']}" if aligned and one["stop_step"] < one["step"] else "",
            len(last),
            one["step"],
            f"{last['frechet'].mean():.3f}",
            f"{last['held_out'].mean():.4f}",
            "" if last["seconds"].isna().all() else f"{last['seconds'].mean():.0f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


if __name__ == "__main__":
    main()
