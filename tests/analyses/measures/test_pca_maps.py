"""Colors against scikit-learn's components and planted regions; the figure's cells against the maps."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from layerprobe.analyses.figures.tokens import token_maps
from layerprobe.analyses.measures.pca_maps import RgbMap, pca_rgb

Array = NDArray[Any]


def layer(n: int = 6, tokens: int = 50, width: int = 12, seed: int = 0) -> Array:
    return np.random.default_rng(seed).exponential(size=(n, tokens, width)) * np.arange(1, width + 1)


def test_colors_are_the_first_three_components() -> None:
    x = layer()
    pca = PCA(3).fit(x.reshape(-1, 12))
    result = pca_rgb(x)
    assert result.explained == pytest.approx(pca.explained_variance_ratio_, rel=1e-10)
    for color, scores in zip(result.rgb.reshape(-1, 3).T, pca.transform(x.reshape(-1, 12)).T, strict=True):
        low, high = np.percentile(scores, [1, 99])
        expected = np.clip((scores - low) / (high - low), 0, 1)
        flipped = np.clip((high - scores) / (high - low), 0, 1)
        assert min(np.abs(color - expected).max(), np.abs(color - flipped).max()) < 1e-6
    assert result.rgb.dtype == np.float32
    assert (result.rgb.min(), result.rgb.max()) == (0, 1)


@pytest.mark.parametrize("seed", range(5))
def test_the_rarer_side_is_bright(seed: int) -> None:
    """So that a small object is bright in every layer, whatever the signs of its channels."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(5, 40, 8)) * 0.1
    x[:, :4] += 10 * rng.normal(size=8)
    red = pca_rgb(x).rgb[..., 0]
    assert red[:, :4].min() > red[:, 4:].max() + 0.5


def test_planted_regions_have_colors_of_their_own() -> None:
    rng = np.random.default_rng(1)
    region = rng.integers(0, 4, size=(5, 64))
    x = rng.normal(size=(4, 16))[region] * 5 + rng.normal(size=(5, 64, 16)) * 0.2
    rgb = pca_rgb(x).rgb
    means = np.stack([rgb[region == i].mean(axis=0) for i in range(4)])
    within = max(rgb[region == i].std(axis=0).max() for i in range(4))
    between = min(np.abs(means[i] - means[j]).max() for i in range(4) for j in range(i))
    assert between > 5 * within


def test_neither_offset_nor_scale_nor_rotation_changes_the_colors() -> None:
    # Multiples of 1/64 survive an offset of 1e4 in float32 exactly.
    x = np.round(layer() * 64) / 64
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(12, 12)))[0]
    expected = pca_rgb(x).rgb
    for moved in ((x + 1e4).astype(np.float32), x * 1e-30, x * 1e30, x @ rotation):
        np.testing.assert_allclose(pca_rgb(moved).rgb, expected, atol=1e-5)


def test_outliers_do_not_turn_the_rest_gray() -> None:
    x = layer(20)
    clean = pca_rgb(x).rgb
    x[0, 0] *= 100
    assert pca_rgb(x).rgb[1:, :, 0].std() > 0.5 * clean[1:, :, 0].std()


@pytest.mark.parametrize(("width", "rank"), [(1, 1), (2, 2), (8, 2)])
def test_missing_components_are_flat(width: int, rank: int) -> None:
    rng = np.random.default_rng(3)
    result = pca_rgb(rng.normal(size=(4, 30, rank)) @ rng.normal(size=(rank, width)))
    assert (result.rgb[..., rank:] == 0.5).all()
    assert result.rgb[..., :rank].std(axis=(0, 1)).min() > 0.1
    assert result.explained.sum() == pytest.approx(1)


def test_one_token_in_many_that_differs_is_seen() -> None:
    x = np.zeros((10, 50, 3))
    x[4, 7] = 1
    rgb = pca_rgb(x).rgb
    assert rgb[4, 7, 0] == 1
    assert rgb[..., 0].sum() == 1


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_a_constant_layer_has_no_colors(value: float) -> None:
    result = pca_rgb(np.full((2, 9, 4), value, np.float32))
    assert result.reason == "all tokens are the same"
    assert np.isnan(result.rgb).all()
    assert result.rgb.shape == (2, 9, 3)


def test_what_is_no_map_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens of shape \(3, 4\) are no maps; pass \(n, T, D\)"):
        pca_rgb(np.ones((3, 4)))
    with pytest.raises(ValueError, match="tokens hold 1 values"):
        pca_rgb(np.array([[[1.0, np.nan]]]))


# ---------------------------------------------------------------------------------------------- figure


def cells(figure: Figure) -> dict[tuple[int, float], Array]:
    """Pixels of every cell by its column and row."""
    (axes,) = figure.axes
    result = {}
    for image in axes.get_images():
        assert isinstance(image, AxesImage)
        left, right, bottom, top = image.get_extent()
        result[round((left + right) / 2), round((bottom + top) / 2, 2)] = np.asarray(image.get_array())
    return result


def rows(figure: Figure) -> dict[float, str]:
    axis = figure.axes[0].yaxis
    return {
        round(float(y), 2): text.get_text() for y, text in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    }


def test_layers_are_columns_and_levels_rows_for_each_sample() -> None:
    maps = {(f"blocks.{i}", level): pca_rgb(layer(4, 6, seed=i)) for i in range(3) for level in (0.5, 0.1)}
    figure = token_maps(maps, {f"blocks.{i}": (2, 3) for i in range(3)}, samples=(2, 0))
    shown = cells(figure)
    assert len(shown) == 3 * 2 * 2
    assert rows(figure) == {0.0: "0.1", 1.0: "0.5", 2.35: "0.1", 3.35: "0.5"}
    np.testing.assert_array_equal(shown[1, 0.0], maps["blocks.1", 0.1].rgb[2].reshape(2, 3, 3))
    np.testing.assert_array_equal(shown[2, 3.35], maps["blocks.2", 0.5].rgb[0].reshape(2, 3, 3))
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["0", "1", "2"]
    assert figure.axes[0].get_xlabel() == "layer (blocks.*)"
    shares = [100 * result.explained.sum() for result in maps.values()]
    expected = f"the three colors of a cell hold {min(shares):.0f} to {max(shares):.0f} % of the variance"
    title = " ".join(figure.get_suptitle().split())
    assert title == f"Tokens of 2 samples in 3 layers at 2 noise levels; {expected}"


def test_inputs_are_the_first_column() -> None:
    maps = {("b1", level): pca_rgb(layer(2, 4)) for level in (0.1, 0.9)}
    inputs = {level: np.full((2, 1, 5, 5), level * 2 - 1) for level in (0.1, 0.9)}
    figure = token_maps(maps, {"b1": (2, 2)}, samples=[1], inputs=inputs)
    shown = cells(figure)
    assert shown[0, 1.0].shape == (5, 5, 3)
    np.testing.assert_allclose(shown[0, 1.0], 0.9, rtol=1e-6)
    np.testing.assert_array_equal(shown[1, 0.0], maps["b1", 0.1].rgb[1].reshape(2, 2, 3))
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["input", "b1"]


def test_sequences_are_stripes_and_video_frames_stand_side_by_side() -> None:
    sequence, video = pca_rgb(layer(1, 12)), pca_rgb(layer(1, 12))
    (stripe,) = cells(token_maps({("a", 0.5): sequence}, {"a": (12,)}, samples=[0])).values()
    np.testing.assert_array_equal(stripe[0], sequence.rgb[0])
    (frames,) = cells(token_maps({("a", 0.5): video}, {"a": (3, 2, 2)}, samples=[0])).values()
    assert frames.shape == (2, 6, 3)
    np.testing.assert_array_equal(frames[:, 2:4], video.rgb[0].reshape(3, 2, 2, 3)[1])


def test_cells_without_colors_are_gray() -> None:
    maps = {("a", 0.1): pca_rgb(layer(1, 4)), ("b", 0.1): pca_rgb(np.ones((1, 4, 3))), ("a", 0.5): pca_rgb(layer(1, 4))}
    figure = token_maps(maps, {"a": (2, 2), "b": (2, 2)}, samples=[0])
    gray = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    assert [(round(p.get_x() + 0.47), round(p.get_y() + 0.47)) for p in gray] == [(1, 0), (1, 1)]
    assert set(cells(figure)) == {(0, 0.0), (0, 1.0)}


def test_the_figure_leaves_pyplot_alone() -> None:
    token_maps({("a", 0.1): pca_rgb(layer(1, 4))}, {"a": (4,)}, samples=[0])
    assert plt.get_fignums() == []


def test_what_cannot_be_drawn_is_refused() -> None:
    result = pca_rgb(layer(2, 6))
    with pytest.raises(ValueError, match="there is no map to draw"):
        token_maps({}, {})
    with pytest.raises(ValueError, match=r"a at noise level 0\.1 has 6 tokens, but its grid is \(2, 2\)"):
        token_maps({("a", 0.1): result}, {"a": (2, 2)})
    with pytest.raises(ValueError, match="sample 2 is not in the maps, which have 2"):
        token_maps({("a", 0.1): result}, {"a": (2, 3)})
    with pytest.raises(ValueError, match="pass a grid of one to three axes"):
        token_maps({("a", 0.1): RgbMap(result.rgb, result.explained, "")}, {"a": (1, 1, 2, 3)})
