"""Massive channels that were planted, and features without any."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerprobe.analyses.measures.channels import massive_channels


def test_planted_massive_channels_are_found_in_order() -> None:
    x = np.random.default_rng(8).normal(size=(500, 64)).astype(np.float32)
    x[:, 7] *= 50
    x[:, 3] = 1000.0  # the same for every input, as massive activations are
    result = massive_channels(x)
    assert result.channels.tolist() == [3, 7]
    assert result.magnitudes == pytest.approx([1000, 50], rel=0.1)
    assert result.ratios == pytest.approx([1000, 50], rel=0.15)
    squares = np.square(x.astype(np.float64)).sum(axis=0)
    assert result.energy_shares == pytest.approx(squares[[3, 7]] / squares.sum(), rel=1e-12)
    assert result.energy_share == pytest.approx(result.energy_shares.sum())


def test_ordinary_channels_are_not_massive() -> None:
    result = massive_channels(np.random.default_rng(9).normal(size=(500, 64)))
    assert len(result.channels) == 0
    assert result.energy_share == 0.0


@given(exponent=st.integers(-150, 150))
@settings(max_examples=10, deadline=None)
def test_massive_channels_do_not_depend_on_the_scale(exponent: int) -> None:
    x = np.random.default_rng(10).normal(size=(50, 9))
    x[:, 4] *= 20
    result = massive_channels(x * 10.0**exponent)
    assert result.channels.tolist() == [4]
    assert result.ratios == pytest.approx(massive_channels(x).ratios)


def test_mostly_dead_channels_have_no_median_to_compare_with() -> None:
    x = np.zeros((5, 4))
    x[:, 0] = 1
    result = massive_channels(x)
    assert result.reason == "3 of 4 channels are 0, and so is the median"
    assert np.isnan(result.energy_share)


def test_a_ratio_of_one_or_less_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ratio is 1\.0; pass a number above 1"):
        massive_channels(np.ones((2, 2)), ratio=1.0)
