"""Draws docs/figures/rooms.svg: the rooms and who may import whom, from the table in tests/test_architecture.py."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "tests"))
from test_architecture import ARROWS  # noqa: E402

TEXTS = {
    "__main__": "python -m layerprobe",
    "messages": "text that is safe to print",
    "configs": "files of options",
    "files": "files that appear whole",
    "memory": "failures, batches that fit",
    "precision": "of networks, equal bits",
    "checksums": "damage is noticed",
    "records": "the one reader of a run",
    "options": "options of dataclasses",
    "progress": "progress callbacks",
    "ranks": "processes of a command",
    "threads": "work beside a device",
    "noise": "schedules, predictions",
    "parts": "names inside blocks",
    "capture": "outputs of layers",
    "data": "samples, splits, sources",
    "backbones": "all families in one convention",
    "checkpoints": "open, check, save, convert",
    "extraction": "features, controls, ablation",
    "layersync": "the regularizer",
    "sampling": "plan and solvers",
    "training": "loop, losses, state",
    "analyses.measures": "mathematics on arrays",
    "analyses.tables": "quality, similarity, evidence",
    "analyses.selection": "filters, ranking, single layers",
    "analyses.generation": "scores of generated samples",
    "analyses.experiments": "arms, verdict, pair sweep",
    "analyses.wording": "sentences from records",
    "analyses.figures": "all figures",
    "analyses.report": "the page of a run",
    "analyses.runs": "a run folder and its jobs",
    "analyses.front": "what notebooks and scripts call",
    "cli": "one file per command",
}
COLORS = {"cli": "#d6c3e0", "analyses": "#c6e0cf", "layerprobe": "#c4d7ee"}


def floors(arrows: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """The floor of each room: one above the highest room that it may import."""
    found: dict[str, int] = {}

    def floor(room: str) -> int:
        if room not in found:
            found[room] = 1 + max((floor(other) for other in arrows[room]), default=-1)
        return found[room]

    for room in arrows:
        floor(room)
    return found


def direct(arrows: Mapping[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    """The arrows that do not follow from others."""

    def below(room: str) -> set[str]:
        return set(arrows[room]).union(*(below(other) for other in arrows[room]))

    return [
        (room, other)
        for room, others in arrows.items()
        for other in others
        if not any(other in below(between) for between in others)
    ]


def main() -> None:
    """Draws the figure."""
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "rooms", "font.family": "sans-serif"}
    # Measures stand below the tables that are made of them, although they could stand on the ground.
    levels = floors(ARROWS)
    levels["analyses.measures"] = levels["analyses.tables"] - 1
    half = 1.7 * max(Counter(levels.values()).values()) + 0.1  # of the width
    figure, axes = plt.subplots(figsize=(1.663 * half, 12))
    places = {}
    for level in range(max(levels.values()) + 1):
        rooms = sorted((room for room in ARROWS if levels[room] == level), key=lambda room: room == "analyses.measures")
        for i, room in enumerate(rooms):
            places[room] = ((i - (len(rooms) - 1) / 2) * 3.4, level * 1.2)
    for room, other in direct(ARROWS):
        (x, y), (to_x, to_y) = places[room], places[other]
        style = {"arrowstyle": "-|>", "color": "#5b6470", "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (to_x, to_y + 0.35), (x, y - 0.35), arrowprops=style, zorder=1)
    for room, (x, y) in places.items():
        building, _, name = room.rpartition(".")
        color = COLORS.get(building or room, COLORS["layerprobe"])
        corners = "round,pad=0,rounding_size=0.1"
        axes.add_patch(
            FancyBboxPatch((x - 1.6, y - 0.35), 3.2, 0.7, boxstyle=corners, fc=color, ec="#3a4149", zorder=2)
        )
        axes.text(x, y + 0.14, name, ha="center", va="center", fontsize=11, weight="bold", zorder=3)
        axes.text(x, y - 0.17, TEXTS[room], ha="center", va="center", fontsize=8.5, zorder=3)
    top = max(levels.values()) * 1.2
    for i, (name, color) in enumerate(COLORS.items()):
        axes.text(0.3 - half, top - 0.7 * i, f" {name}/ ", fontsize=11, bbox={"fc": color, "ec": "#3a4149", "pad": 3})
    axes.set(xlim=(-half, half), ylim=(-0.5, top + 0.5))
    axes.axis("off")
    figure.savefig(DOCS / "figures" / "rooms.svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
