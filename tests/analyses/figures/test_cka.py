"""The CKA heatmap against the table it was drawn from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from figure_tables import BLOCKS, LEVELS, MODELS, cells, overlaps, panel, selection, similarity_table, title_of

from layerprobe.analyses.figures import cka


@pytest.mark.parametrize("both_orders", [True, False])
def test_cka_blocks_and_their_mean(both_orders: bool) -> None:
    table = similarity_table(both_orders=both_orders)
    figure = cka.cka_heatmap(table, selection=selection())
    full, mean = cells(panel(figure, "All 24")), cells(panel(figure, "Mean over equal"))
    i, j = np.meshgrid(range(8), range(8))
    np.testing.assert_allclose(mean, np.exp(-abs(i - j) / 8), rtol=1e-12)  # the planted value, up to a sum of three
    level, other = np.repeat(LEVELS, 8), np.tile(range(8), 3)
    expected = np.exp(-abs(other[:, None] - other) / 8 - abs(level[:, None] - level))
    np.testing.assert_array_equal(full, expected)
    marked = {(patch.get_x(), patch.get_y()) for patch in panel(figure, "Mean over equal").patches}
    assert marked == {(4, 1), (1, 4)}
    assert title_of(figure) == "Student blocks.1 and teacher blocks.4: mean CKA 0.69 on the validation split"


def test_cka_takes_the_order_of_layers() -> None:
    table = similarity_table().sample(frac=1, random_state=0)
    mean = cells(panel(cka.cka_heatmap(table, layers=BLOCKS), "Mean over equal"))
    assert (np.diff(mean[0]) < 0).all()


def test_cka_without_pick_names_the_sharpest_change() -> None:
    table = similarity_table()
    sharp = (table["layer_a"] < "blocks.3") != (table["layer_b"] < "blocks.3")
    table.loc[sharp, "cka"] -= 0.3
    title = title_of(cka.cka_heatmap(table))
    assert title == "Sharpest change: blocks.2 to blocks.3, mean CKA 0.58 on the validation split"


def test_dead_representation_stays_empty() -> None:
    table = similarity_table()
    dead = ((table["layer_a"] == "blocks.2") & (table["noise_level_a"] == 0.1)) | (
        (table["layer_b"] == "blocks.2") & (table["noise_level_b"] == 0.1)
    )
    table.loc[dead, "cka"] = np.nan
    full = cells(panel(cka.cka_heatmap(table), "All 24"))
    assert np.isnan(full).sum() == 2 * 24 - 1


@pytest.mark.parametrize("model", MODELS)
def test_no_text_overlaps_another(model: str) -> None:
    layers, levels = MODELS[model]
    figure = cka.cka_heatmap(similarity_table(layers, levels), selection=selection(layers[2], layers[-3]))
    assert overlaps(figure) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cka.cka_heatmap(similarity_table().iloc[:0]), "the similarity table has no rows"),
        (lambda: cka.cka_heatmap(similarity_table(), layers=BLOCKS[1:]), "`layers` does not contain 'blocks.0'"),
    ],
)
def test_errors_are_one_line_with_a_remedy(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
