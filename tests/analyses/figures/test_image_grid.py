"""A grid of images against its pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from figure_tables import title_of

from layerprobe.analyses.figures import image_grid


def test_samples_are_the_pixels() -> None:
    x = np.linspace(-1.5, 1, 5 * 2 * 3).reshape(5, 1, 2, 3)
    figure = image_grid.sample_grid(x, [7, 1, 2, 3, 4], columns=2)
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == ["7", "1", "2", "3", "4"]
    for axes, image in zip(shown, x, strict=True):
        pixels = np.asarray(axes.images[0].get_array())
        gray = (np.clip(image[0], -1, 1) + 1) / 2
        np.testing.assert_allclose(pixels, np.stack([gray] * 3, axis=-1), atol=1e-6)  # float32
        assert axes.images[0].get_interpolation() == "none"
    color = image_grid.sample_grid(np.zeros((1, 3, 4, 4)))
    assert title_of(color) == "1 sample, 4 x 4 pixels"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: image_grid.sample_grid(np.zeros((2, 4, 8, 8))),
            r"shape \(2, 4, 8, 8\); pass images .*, decode latents",
        ),
        (lambda: image_grid.sample_grid(np.full((2, 1, 8, 8), np.nan)), "2 of 2 samples contain nan"),
        (lambda: image_grid.sample_grid(np.zeros((2, 1, 8, 8)), ["a"]), "2 samples but 1 labels"),
        (lambda: image_grid.sample_grid(np.zeros((2, 1, 8, 8)), columns=0), "columns is 0"),
    ],
)
def test_errors_are_one_line_with_a_remedy(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
