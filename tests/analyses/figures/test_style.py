"""Theme, colors and saving: the same bytes every time, small files, colors that everybody can tell apart."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from figure_tables import BLOCKS, confirmation_table, quality_table, similarity_table
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from seaborn.utils import relative_luminance

from layerprobe.analyses.figures import cka, confirmation, paper, quality, style

LIGHT_PAGE, DARK_PAGE = style.BACKGROUND, "#15181c"  # of the report


def test_files_are_the_same_bytes_whatever_the_caller_has_set(tmp_path: Path) -> None:
    table = similarity_table(BLOCKS[:3], (0.1, 0.3))  # without care, the layout of this figure moves with every drawing
    first = cka.cka_heatmap(table)
    paths = style.save_figure(first, tmp_path / "new" / "folder", "cka")
    before = [path.read_bytes() for path in paths]
    assert [path.name for path in paths] == ["cka.png", "cka.svg"]
    assert [path.read_bytes() for path in style.save_figure(first, tmp_path, "again")] == before
    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path", "savefig.dpi": 30, "xtick.direction": "in"}):
        settings = dict(mpl.rcParams)
        assert style.to_svg(cka.cka_heatmap(table)).encode() == before[1]
        assert dict(mpl.rcParams) == settings
    assert plt.get_fignums() == []
    with Image.open(paths[0]) as image:
        assert image.size == tuple(np.rint(np.asarray(first.get_size_inches()) * 150))


def test_svg_has_text_as_text_and_no_date_and_a_large_matrix_as_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = cka.cka_heatmap(similarity_table())
    svg = style.to_svg(figure)
    assert re.search(r"<text [^>]*>All 24 representations</text>", svg)
    assert svg.count("<path") > 24 * 24
    assert svg.count("<image") == 1  # the color bar, whose cells would show the seams between them
    assert "<dc:date>" not in svg
    monkeypatch.setattr(style, "MAX_VECTOR_CELLS", 24 * 24 - 1)
    svg = style.to_svg(figure)
    assert svg.count("<image") == 2
    assert svg.count("<path") < 200


@pytest.mark.parametrize("name", ["$x_{$.1", "<b>&\"'.2"])
def test_hostile_layer_names_are_drawn_as_they_are(name: str) -> None:
    svg = style.to_svg(quality.quality_heatmap(quality_table([name, "other"], (0.1,)), "probe accuracy"))
    assert "<b>" not in svg


def test_a_file_name_is_plain() -> None:
    with pytest.raises(ValueError, match=r"'\.\./elsewhere' is not a plain file name; pass"):
        style.save_figure(Figure(), "unused", "../elsewhere")
    with pytest.raises(ValueError, match="unknown format of a figure 'bmp'; use png, svg or pdf"):
        style.save_figure(Figure(), "unused", "cka", formats=["bmp"])


def test_a_pdf_is_for_papers(tmp_path: Path) -> None:
    figure = cka.cka_heatmap(similarity_table())
    (path,) = style.save_figure(figure, tmp_path, "cka", formats=["pdf"])
    content = path.read_bytes()
    assert b"/FontFile2" in content  # embedded TrueType
    assert b"/Type3" not in content
    assert b"/Subtype /Image" not in content
    assert style.save_figure(figure, tmp_path, "again", formats=["pdf"])[0].read_bytes() == content
    assert b"<image" in style.save_figure(figure, tmp_path, "cka", formats=["svg"])[0].read_bytes()


# --------------------------------------------------------------------------------------------------------------- colors


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2.2."""
    dark, light = sorted((relative_luminance(one), relative_luminance(other)))
    return float((light + 0.05) / (dark + 0.05))


@pytest.mark.parametrize("page", [LIGHT_PAGE, DARK_PAGE])
def test_lines_have_a_contrast_of_three_on_every_page(page: str) -> None:
    for color in (*style.LINE_COLORS, style.GRAY, *style.level_colors(5), *style.level_colors(9)):
        assert contrast(color, page) >= 3, color
    assert contrast(style.INK, LIGHT_PAGE) >= 7
    assert contrast(style.MISSING["facecolor"], style.MISSING["edgecolor"]) >= 3


# Machado et al. 2009, complete deficiency, for linear RGB.
SIGHT = {
    "full": np.eye(3),
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}


def lab(color: str, sight: str) -> np.ndarray:
    """CIE L*a*b* of a color as it is seen."""
    rgb = np.array(mpl.colors.to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(SIGHT[sight]) @ linear, 0, 1)
    to_xyz = [[0.412456, 0.357576, 0.180438], [0.212673, 0.715152, 0.072175], [0.019334, 0.119192, 0.950304]]
    x, y, z = np.cbrt(np.array(to_xyz) @ seen / (0.95047, 1, 1.08883))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHT)
def test_colors_of_lines_differ_for_everybody(sight: str) -> None:
    for one, other in combinations(style.LINE_COLORS, 2):
        assert np.linalg.norm(lab(one, sight) - lab(other, sight)) > 10, (one, other)
    for one, other in combinations(style.level_colors(5), 2):
        assert np.linalg.norm(lab(one, sight) - lab(other, sight)) > 10, (one, other)


# --------------------------------------------------------------------------------------------------------------- papers


def test_figures_of_a_column_are_read_at_their_own_size(tmp_path: Path) -> None:
    with style.changed_style(context="paper"):
        figures = (
            paper.paper_curves(quality_table(), "probe accuracy", width_in=3.3),
            paper.paper_heatmap(quality_table(), "probe accuracy", width_in=3.3),
            cka.paper_cka(similarity_table(), width_in=3.3),
            confirmation.paper_confirmation(confirmation_table(), width_in=3.3),
        )
        (path,) = style.save_figure(figures[0], tmp_path, "curves", formats=["png"])
    for figure in figures:
        assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 6
    lines = figures[0].axes[0].lines
    assert len({line.get_marker() for line in lines}) == len(lines)  # told apart without color
    with Image.open(path) as image:
        assert image.width == 990


def test_a_style_sheet_has_the_last_word_and_is_checked(tmp_path: Path) -> None:
    sheet = tmp_path / "mine.mplstyle"
    sheet.write_text("font.size: 13  # large\n", encoding="utf-8")
    with style.changed_style(context="talk", sheet=sheet), style.styled():
        assert (mpl.rcParams["font.size"], mpl.rcParams["axes.labelsize"]) == (13, 10.5)
    with style.styled():
        assert mpl.rcParams["font.size"] != 13
    sheet.write_text("font.sise: 13\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"'font.sise', .*; did you mean font.size"), style.changed_style(sheet=sheet):
        pass
    with pytest.raises(ValueError, match="no style sheet gone"), style.changed_style(sheet="gone"):
        pass
    with pytest.raises(ValueError, match="unknown context 'poster'; use"), style.changed_style(context="poster"):
        pass


def test_a_figure_for_a_paper_is_as_white_as_the_paper() -> None:
    with style.changed_style(context="paper"):
        svg = style.to_svg(cka.paper_cka(similarity_table(), width_in=3.3))
    assert "#ffffff" in svg
    assert style.BACKGROUND not in svg
