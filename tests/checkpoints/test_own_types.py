"""Weights in the types of their file: half the memory, the same values, and a precision that can compute with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_sit, tiny_splits

from layerprobe.backbones.base import layer_shapes
from layerprobe.checkpoints.opening import open_checkpoint
from layerprobe.checkpoints.saving import save_checkpoint
from layerprobe.extraction.controls import random_weights
from layerprobe.extraction.forward import read_features
from layerprobe.extraction.plan import ExtractionPlan


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_stay_so_and_give_the_features_of_bfloat16(tmp_path: Path, dtype: torch.dtype) -> None:
    path, backbone = tmp_path / "half.safetensors", tiny_sit()
    save_checkpoint(path, backbone, {k: v.to(dtype) for k, v in backbone.module.state_dict().items()}, training={})
    wide, kept = (open_checkpoint(path, device="cpu", dtype=held) for held in (None, "stored"))
    sizes = [sum(p.nbytes for p in b.module.parameters()) for b in (wide, kept)]
    assert sizes[1] < 0.6 * sizes[0]
    for name, parameter in kept.module.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.ndim < 2 else dtype), name
        assert torch.equal(parameter.float(), wide.module.get_parameter(name))
    samples = tiny_splits().train
    features = [
        read_features(b, samples, ExtractionPlan(wide.layers, (0.3, 0.7), precision=name))
        for b, name in ((kept, "auto"), (kept, "bfloat16"), (wide, "bfloat16"))
    ]
    for key, values in features[2].items():
        assert torch.equal(features[0][key], features[1][key])
        # Sums with a float32 bias are rounded once less.
        torch.testing.assert_close(features[0][key], values, rtol=0.05, atol=0.05)
    with random_weights(kept) as control:
        assert layer_shapes(control) == layer_shapes(wide)
    with pytest.raises(
        ValueError, match=r"weights of 16 bits, .* in float32; pass --precision bfloat16, or --dtype float32"
    ):
        kept.in_precision("float32")


def test_a_file_of_float32_has_nothing_to_keep() -> None:
    with pytest.raises(ValueError, match="are float32 in their file; leave out --dtype"):
        open_checkpoint("digits", device="cpu", dtype="stored")
