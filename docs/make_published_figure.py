"""Draws docs/figures/published-pairs.png and writes the tables of docs/published-pairs.md."""

from __future__ import annotations

from pathlib import Path

from layerprobe.analyses.figures import published_figure, save_figure
from layerprobe.analyses.selection import PublishedPair, published_pairs

DOCS = Path(__file__).parent


def main() -> None:
    """Writes the figure and the tables."""
    _, drawn = save_figure(published_figure(), DOCS / "figures", "published-pairs")
    drawn.unlink()
    page = DOCS / "published-pairs.md"
    before, marker, _ = page.read_text(encoding="utf-8").partition("## All rows\n")
    rows = published_pairs()
    tables = [
        _table("An own layer teaches", [row for row in rows if row.teacher is not None]),
        _table("An external encoder teaches", [row for row in rows if row.teacher is None]),
    ]
    page.write_text("\n".join([before.rstrip(), "", marker, *tables]), encoding="utf-8")


def _table(title: str, rows: list[PublishedPair]) -> str:
    head = "| study | network | budget | pair (depths) | metric | with | without | gain | share | known from | source |"
    lines = [f"### {title}", "", head, "|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        pair, depths = f"{row.student}", f"{row.student_depth:.2f}"
        if row.teacher is not None:
            pair, depths = f"{pair} <- {row.teacher}", f"{depths}, {row.teacher_depth:.2f}"
        gain = f"{100 * row.gain:+.0f} %" if row.baseline else f"{row.gain:+.1f}"
        share = "" if row.share is None else f"{row.share:.2f}"
        cells = (
            row.study, row.network, row.budget, f"{pair} ({depths})", row.metric, f"{row.value:g}", f"{row.baseline:g}",
            gain, share, row.confidence, row.source,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
