"""Draws the pictures of the README and the landing page from a finished run: `python docs/make_readme_images.py RUN`.

The hero figure has a light and a dark version. Pictures of the report are taken with Chromium, if it is installed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from layerprobe.analyses.tables import MODEL, PROBE, RANDOM_WEIGHTS

FIGURES = Path(__file__).parent / "figures"
SHOWN_LEVELS = (0.3, 0.5, 0.7, 0.9)
# Ink, page and lines, from clean to noise.
THEMES = {
    "light": ("#1f2328", "#ffffff", ("#4a4fc4", "#0a78a3", "#16835f", "#7a7d00")),
    "dark": ("#e6edf3", "#0d1117", ("#9a9eff", "#4cc3f0", "#4fd6ac", "#d3d64a")),
}
VIEWS = {"report-wide": (1200, 900), "report-phone": (500, 1000)}  # width and height of the window


def main() -> None:
    """Writes all pictures."""
    run = Path(sys.argv[1])
    quality = pd.read_csv(run / "quality.csv")
    for name, (ink, page, lines) in THEMES.items():
        hero(quality, ink=ink, page=page, lines=lines).savefig(FIGURES / f"hero-{name}.png", dpi=150, facecolor=page)
        shrink(FIGURES / f"hero-{name}.png")
    for name, (width, height) in VIEWS.items():
        photograph(run / "report.html", FIGURES / f"{name}.png", width, height)


def hero(quality: pd.DataFrame, *, ink: str, page: str, lines: tuple[str, ...]) -> Figure:
    """Draws probe accuracy by layer, a line for each noise level, beside the same network with random weights."""
    rows = quality[(quality["metric"] == PROBE) & (quality["split"] == "test")]
    table = rows.pivot_table(index=["source", "noise_level"], columns="layer_index", values="value")
    text = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), ink)
    with matplotlib.rc_context({**text, "font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8.4, 4.2), layout="constrained", facecolor=page)
        axes = figure.add_subplot(facecolor=page)
        for level, color in zip(SHOWN_LEVELS, lines, strict=True):
            model, random = table.loc[(MODEL, level)].dropna(), table.loc[(RANDOM_WEIGHTS, level)].dropna()
            axes.plot(model.index, model, color=color, linewidth=2.4, marker="o", markersize=5)
            axes.plot(random.index, random, color=color, linewidth=1.3, linestyle=(0, (4, 3)))
            axes.annotate(
                f"noise {level:g}", (model.index[-1], model.iloc[-1]), (8, 0), textcoords="offset points",
                color=color, va="center", weight="bold",
            )  # fmt: skip
        num_layers = len(model)
        axes.set_xticks(np.arange(num_layers))
        axes.set(xlabel="block", ylabel="probe accuracy", xlim=(-0.2, num_layers), ylim=(0, 1))
        axes.grid(axis="y", alpha=0.2, color=ink)
        axes.set_title("What each block knows: trained (solid) and with random weights (dashed)", loc="left", color=ink)
    return figure


def photograph(page: Path, picture: Path, width: int, height: int) -> None:
    """Takes a picture of a page; leaves the old one where there is no Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        print(f"no Chromium: {picture.name} stays as it is")
        return
    with tempfile.TemporaryDirectory() as profile:
        command = [chromium, "--headless", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={profile}"]
        command += [f"--screenshot={picture}", f"--window-size={width},{height}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    shrink(picture)


def shrink(picture: Path) -> None:
    """Saves a picture with 128 colors, a third of its size."""
    Image.open(picture).convert("RGB").quantize(128).save(picture, optimize=True)


if __name__ == "__main__":
    main()
