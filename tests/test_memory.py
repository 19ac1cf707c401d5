"""Memory that runs out halves a batch and says so; it never becomes a result, and no other failure is taken for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_samples, tiny_sit, tiny_splits
from torch import Tensor, nn

from layerprobe.analyses.generation.extractors import Extractor, all_features
from layerprobe.backbones.base import Backbone
from layerprobe.checkpoints.convention import check_convention
from layerprobe.data.latents import vae as autoencoders
from layerprobe.data.samples import TensorSamples
from layerprobe.extraction.ablation import ablate_layers
from layerprobe.extraction.forward import extract
from layerprobe.extraction.plan import ExtractionPlan
from layerprobe.memory import BatchSize, is_device_failure, is_out_of_memory
from layerprobe.sampling.plan import SamplingPlan
from layerprobe.sampling.solvers import sample
from layerprobe.training.losses import held_out_loss

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"
TOLD = "rows at a time do not fit into memory; continuing with"
LEVELS = (0.2, 0.7)


def refuse(num_rows: int, most: int) -> None:
    if num_rows > most:
        raise torch.OutOfMemoryError(FULL)


def small_card(backbone: Backbone, most: int, error: Exception | None = None) -> Backbone:
    """The network on a card whose memory has room for so many rows."""

    def forward(module: nn.Module, x_t: Tensor, *arguments: Tensor | None) -> Tensor:
        if error is not None:
            raise error
        refuse(len(x_t), most)
        return backbone.forward(module, x_t, *arguments)

    return replace(backbone, forward=forward)


class Autoencoder:
    """Encodes and decodes at most so many images at once."""

    def __init__(self, most: int) -> None:
        self.most = most

    def encode(self, x: Tensor) -> Any:
        refuse(len(x), self.most)
        distribution = type("Distribution", (), {"mean": x * 2, "std": x * 0 + 1})
        return type("Output", (), {"latent_dist": distribution})

    def decode(self, z: Tensor) -> Any:
        refuse(len(z), self.most)
        return type("Output", (), {"sample": z / 2})


def features(backbone: Backbone, folder: Path) -> Any:
    store = extract(backbone, tiny_splits(), ExtractionPlan(backbone.layers, LEVELS, token_samples=2), folder)
    return [part(layer, 0.7) for layer in backbone.layers for part in (store.features, store.tokens)]


def ablation(backbone: Backbone, folder: Path) -> Any:
    skipped = ablate_layers(backbone, tiny_samples(), LEVELS, split="test")
    return [skipped.velocity_change, skipped.loss_increase]


def convention(backbone: Backbone, folder: Path) -> Any:
    check = check_convention(backbone, tiny_samples(8))
    return [fit.ratios for fit in check.fits] + [[*check.condition.values()]]


def losses(backbone: Backbone, folder: Path) -> Any:
    return [[*held_out_loss(backbone, tiny_samples()).values()]]


def samples(backbone: Backbone, folder: Path) -> Any:
    return [sample(backbone, range(6), plan=SamplingPlan(steps=2), labels=torch.arange(6) % 3)]


@pytest.mark.parametrize("job", [features, ablation, convention, losses, samples], ids=lambda job: job.__name__)
def test_a_job_on_a_small_card_gives_the_same_in_smaller_batches(
    tmp_path: Path, job: Callable[[Backbone, Path], Any]
) -> None:
    wanted = job(tiny_sit(), tmp_path / "large")
    with pytest.warns(UserWarning, match=TOLD):
        got = job(small_card(tiny_sit(), 3), tmp_path / "small")
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


NO_MEMORY, NO_DEVICE = torch.OutOfMemoryError(FULL), RuntimeError("CUDA error: device-side assert triggered")


@pytest.mark.filterwarnings("ignore:.*do not fit into memory")
@pytest.mark.parametrize(
    ("job", "error"),
    [
        (features, NO_MEMORY),
        (convention, NO_MEMORY),
        (losses, NO_MEMORY),
        (ablation, NO_DEVICE),
        (convention, NO_DEVICE),
    ],
    ids=("features", "convention", "losses", "ablation on a broken card", "convention on a broken card"),
)
def test_what_no_batch_mends_goes_on_to_the_user(
    tmp_path: Path, job: Callable[[Backbone, Path], Any], error: Exception
) -> None:
    with pytest.raises(type(error), match=r"^CUDA (out of memory|error)"):
        job(small_card(tiny_sit(), 0, error), tmp_path)


def test_an_autoencoder_on_a_small_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL", "latent_channels": 3}')
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    images = TensorSamples(torch.rand(5, 3, 4, 4))
    latents, decoded = [], []
    for most in (9, 2):
        monkeypatch.setattr(autoencoders, "_autoencoder", lambda *_, most=most: Autoencoder(most))
        with warned(most < 5):
            encoded = autoencoders.encode(images, tmp_path, tmp_path / str(most), batch_size=8)
            latents.append(encoded.batch(range(5)).x)
        with warned(most < 5):
            decoded.append(autoencoders.decoder(tmp_path)(latents[-1]))
    assert torch.equal(latents[0], latents[1])
    assert torch.equal(decoded[0], decoded[1])


@contextmanager
def warned(expected: bool) -> Iterator[None]:
    if not expected:
        yield
        return
    with pytest.warns(UserWarning, match=TOLD):
        yield


def test_an_encoder_on_a_small_card() -> None:
    def encode(x: Tensor) -> Tensor:
        refuse(len(x), 4)
        return x.flatten(1)

    with pytest.warns(UserWarning, match=TOLD):
        encoded = all_features(Extractor("mine", encode), tiny_samples())
    np.testing.assert_array_equal(encoded, tiny_samples().x.flatten(1))


def test_the_smaller_batch_is_kept_and_every_row_comes_once() -> None:
    size, asked = BatchSize(8), []

    def compute(rows: range) -> list[int]:
        asked.append(len(rows))
        refuse(len(rows), 3)
        return [*rows]

    with pytest.warns(UserWarning, match=TOLD) as told:
        parts = [*size.batches(9, compute, start=1)]
    assert [row for _, result in parts for row in result] == [*range(1, 9)]
    assert [str(each.message).split(" (")[0] for each in told] == [f"8 {TOLD} 4", f"4 {TOLD} 2"]
    assert asked == [8, 4, 2, 2, 2, 2]
    assert [rows for rows, _ in size.batches(3, compute)] == [range(2), range(2, 3)]


def test_other_failures_are_not_taken_for_memory() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("Allocation on device failed"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))
    assert is_device_failure(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_device_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
