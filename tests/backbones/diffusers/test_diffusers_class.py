"""Patches are cut and joined without loss."""

from __future__ import annotations

import math

import pytest
import torch

from layerprobe.backbones.diffusers.diffusers_class import from_patches, to_patches


@pytest.mark.parametrize("patch", [(2, 2), (1, 2, 4)])
def test_patches_are_cut_and_put_together(patch: tuple[int, ...]) -> None:
    edges = tuple(2 * p for p in patch)
    x = torch.arange(2 * 3 * math.prod(edges)).view(2, 3, *edges)
    tokens = to_patches(x, patch)
    assert tokens.shape == (2, 2 ** len(patch), 3 * math.prod(patch))
    assert torch.equal(from_patches(tokens, patch, edges), x)
    # The second token is the next place along the last axis; its channels are its slowest axis.
    corner = x[(0, slice(None), *[slice(0, p) for p in patch[:-1]], slice(patch[-1], 2 * patch[-1]))]
    assert torch.equal(tokens[0, 1], corner.flatten())
