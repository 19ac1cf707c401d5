"""The curves of a run as tables."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from figure_tables import BLOCKS, LEVELS, quality_table

from layerprobe.analyses.runs.figures import draw_figures, write_curves


def test_curves_are_written_wide_for_spreadsheets_and_latex(tmp_path: Path) -> None:
    quality = quality_table()
    quality.to_csv(tmp_path / "quality.csv", index=False)
    table, latex, *_ = write_curves(tmp_path)
    wide = pd.read_csv(table, index_col="layer")
    assert (list(wide.columns), list(wide.index)) == ([str(level) for level in LEVELS], BLOCKS)
    one = quality["source"].eq("model") & quality["metric"].eq("probe accuracy") & quality["split"].eq("test")
    one &= quality["layer"].eq("blocks.3") & quality["noise_level"].eq(0.3)
    assert wide.loc["blocks.3", "0.3"] == quality.loc[one, "value"].item()
    text = latex.read_text(encoding="utf-8")
    assert "\\toprule" in text
    assert "layer & 0.1 & 0.3 & 0.5" in text
    assert f"blocks.3 & {wide.loc['blocks.3', '0.1']:.3f} & {wide.loc['blocks.3', '0.3']:.3f}" in text


def test_a_wrong_width_or_context_is_told_first() -> None:
    with pytest.raises(ValueError, match="unknown width of a figure 'narrow'; use column or full"):
        draw_figures("unused", width="narrow")
    with pytest.raises(ValueError, match="--context talk is for figures of one panel; pass --width full or column"):
        draw_figures("unused", context="talk")
