"""The engine on a second device: everything runs, gives the numbers of the CPU, and waits as rarely as it says.

One case of most kinds runs with all tests, the others with -m devices.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretend_device import NAME, watched, without_float64
from tiny import SHAPE, tiny_samples, tiny_sit, tiny_splits
from tiny_mdm import opened as tiny_mdm
from tiny_mdm import state_dict as mdm_tensors
from torch import Tensor, nn

from layerprobe.backbones.base import Backbone, layer_shapes, wrap
from layerprobe.backbones.lightningdit import LightningDiT, LightningDiTConfig, lightningdit_backbone
from layerprobe.backbones.sit import SiTConfig
from layerprobe.checkpoints.convention import check_convention
from layerprobe.checkpoints.opening import open_checkpoint, resolve_device
from layerprobe.checkpoints.saving import save_checkpoint, weights_hash
from layerprobe.data.latents.vae import decoder, encode
from layerprobe.data.loading import load
from layerprobe.data.samples import Splits, Subset, TensorSamples
from layerprobe.extraction import forward
from layerprobe.extraction.ablation import ablate_layers
from layerprobe.extraction.controls import random_weights, raw_input
from layerprobe.extraction.forward import extract
from layerprobe.extraction.plan import ExtractionPlan
from layerprobe.extraction.rounding import rounding_error
from layerprobe.layersync.loss import LayerSync
from layerprobe.layersync.options import SyncOptions
from layerprobe.layersync.pair import LayerPair
from layerprobe.noise.schedules import schedule_from_name
from layerprobe.precision import FEATURE_TOLERANCE, has_tf32
from layerprobe.sampling.plan import SamplingPlan
from layerprobe.sampling.solvers import sample
from layerprobe.training.distributed import host_copy
from layerprobe.training.loop import train
from layerprobe.training.losses import held_out_loss
from layerprobe.training.plan import TrainingPlan

pytestmark = pytest.mark.devices

PAIR = (LayerPair("blocks.0", "blocks.2"),)
LEVELS = (0.2, 0.7)
CONVENTIONS = (
    ("ddpm-linear", "eps"),
    ("ddpm-cosine", "v"),
    ("edm", "x0"),
    ("sit-gvp", "score"),
    ("sit-vp", "velocity"),
    ("flow-1000", "velocity"),
)


def first_of(*cases: Any) -> list[Any]:
    """The cases of a kind, of which all but the first are marked."""
    marked = [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.devices) for case in cases
    ]
    return [cases[0], *marked[1:]]


def on(device: str, backbone: Backbone) -> Backbone:
    """A copy of the network on the device."""
    return replace(backbone, module=copy.deepcopy(backbone.module).to(device))


def under(device: str, schedule: str, prediction: Any) -> Backbone:
    return on(device, tiny_sit(schedule=schedule_from_name(schedule), prediction=prediction))


def padded(n: int = 16, length: int = 12) -> TensorSamples:
    lengths = torch.arange(n) % 6 + 6
    x = torch.randn(n, 2, length, generator=torch.Generator().manual_seed(0))
    return TensorSamples(x, torch.arange(n) % 3, mask=torch.arange(length)[None] < lengths[:, None], modality="motion")


def padded_splits() -> Splits:
    parts = (range(8), range(8, 12), range(12, 16))
    return Splits(*(Subset(padded(), rows, name=n) for rows, n in zip(parts, "abc", strict=True)))


def same_features(got: Backbone, wanted: Backbone, splits: Splits, folder: Path, **plan: Any) -> None:
    """Both networks give the same features and tokens."""
    extraction = ExtractionPlan(got.layers, LEVELS, **plan)
    stores = [extract(b, splits, extraction, folder / name, batch_size=9) for b, name in ((got, "x"), (wanted, "y"))]
    for layer in got.layers:
        for level in LEVELS:
            x, y = (store.features(layer, level) for store in stores)
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
            if extraction.token_samples:
                x, y = (store.tokens(layer, level) for store in stores)
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


# Extraction


@pytest.mark.parametrize(
    "plan",
    first_of(
        {"draws": 2, "token_samples": 4},
        {},
        {"pool_cells": 2},
        {"token_samples": 4, "tokens_per_sample": 3},
        {"condition": "label"},
    ),
    ids=str,
)
def test_features_are_those_of_the_cpu(device: str, tmp_path: Path, plan: dict[str, Any]) -> None:
    same_features(on(device, tiny_sit()), tiny_sit(), tiny_splits(), tmp_path, **plan)


@pytest.mark.parametrize(
    "plan",
    first_of({"token_samples": 4, "tokens_per_sample": 3}, {}, {"pool_cells": 2}),
    ids=("tokens", "pooled", "cells"),
)
def test_features_of_padded_samples_are_those_of_the_cpu(device: str, tmp_path: Path, plan: dict[str, Any]) -> None:
    network = tiny_sit(shape=(2, 12))
    same_features(on(device, network), network, padded_splits(), tmp_path, **plan)


@pytest.mark.parametrize("condition", ["null", "label"])
def test_a_batch_of_extraction_waits_once_for_the_device_and_gets_nothing_from_the_host(
    counted: str, tmp_path: Path, condition: Any
) -> None:
    backbone, splits = on(counted, tiny_sit()), tiny_splits(16)
    waits, uploads = [], []
    for batch_size in (32, 4):
        plan = ExtractionPlan(backbone.layers, LEVELS, condition=condition)
        with watched() as ledger:
            extract(backbone, splits, plan, tmp_path / str(batch_size), batch_size=batch_size)
        waits.append(sum(ledger.waits.values()))
        uploads.append(sum(ledger.uploads.values()))
    num_batches = [2 * 16 // batch_size for batch_size in (32, 4)]
    assert waits[1] - waits[0] == num_batches[1] - num_batches[0], ledger.waits
    assert uploads[1] == uploads[0], ledger.uploads  # samples and noise go there once a shard


def test_a_shard_without_room_on_the_device_is_corrupted_on_the_host(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, plan = on(device, tiny_sit()), ExtractionPlan(("blocks.1",), LEVELS, condition="label", draws=2)
    there = extract(backbone, tiny_splits(), plan, tmp_path / "there")
    monkeypatch.setattr(forward, "_MOST_ON_DEVICE_BYTES", 0)
    stores = [extract(backbone, tiny_splits(), plan, tmp_path / "large")]
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(forward, "Batch", full)
    stores.append(extract(backbone, tiny_splits(), plan, tmp_path / "full"))
    for here in stores:
        for level in LEVELS:
            np.testing.assert_array_equal(here["blocks.1", level], there["blocks.1", level])


def test_memory_that_runs_out_on_a_card_gives_smaller_batches_and_the_same_features(card: str, tmp_path: Path) -> None:
    class Wide(nn.Module):
        """16 MiB for each row."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.layer(x + x.new_zeros(len(x), 2**22).sum(1)[:, None, None, None])

    torch.manual_seed(0)
    backbone = wrap(Wide().to(card), layers=["layer"], schedule="sit", prediction="velocity", shape=SHAPE)
    plan = ExtractionPlan(backbone.layers, LEVELS)
    wanted = extract(backbone, tiny_splits(), plan, tmp_path / "large", batch_size=32)
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 200 * 2**20
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    try:
        with pytest.warns(UserWarning, match="rows at a time do not fit into memory"):
            got = extract(backbone, tiny_splits(), plan, tmp_path / "small", batch_size=32)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for level in LEVELS:
        np.testing.assert_allclose(got["layer", level], wanted["layer", level], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_a_card_keeps_the_features_within_its_precision(card: str, precision: str) -> None:
    if precision == "tf32" and not has_tf32(torch.device(card)):
        pytest.skip(f"{card} has no tf32")
    backbone = open_checkpoint("digits", device=card)
    plan = ExtractionPlan(backbone.layers, LEVELS, precision=precision)
    error = rounding_error(backbone, load("digits").test, plan).error
    assert error < (FEATURE_TOLERANCE if precision == "tf32" else 0.05)


def test_controls_and_bfloat16_run(device: str, tmp_path: Path) -> None:
    backbone, splits = on(device, tiny_sit()), tiny_splits()
    for index, reader in enumerate((raw_input(backbone), raw_input(backbone, places=True))):
        extract(reader, splits, ExtractionPlan(reader.layers, LEVELS), tmp_path / str(index))
    before = weights_hash(backbone.module)
    with random_weights(backbone) as control:
        extract(control, splits, ExtractionPlan(control.layers, LEVELS), tmp_path / "random")
        assert (control.device.type, weights_hash(control.module) == before) == (device, False)
    assert weights_hash(backbone.module) == before
    plan = ExtractionPlan(backbone.layers, LEVELS, precision="bfloat16")
    extract(backbone, splits, plan, tmp_path / "bfloat16")


def test_the_ablation_is_that_of_the_cpu(device: str) -> None:
    network, samples = tiny_sit(), tiny_samples()
    got, wanted = (ablate_layers(b, samples, LEVELS, split="test") for b in (on(device, network), network))
    np.testing.assert_allclose(got.velocity_change, wanted.velocity_change, rtol=1e-4)
    np.testing.assert_allclose(got.loss_increase, wanted.loss_increase, rtol=1e-3, atol=1e-5)


# Convention check, sampling


@pytest.mark.parametrize(("schedule", "prediction"), CONVENTIONS)
def test_conventions_are_checked_and_sampled(device: str, schedule: str, prediction: Any) -> None:
    network = tiny_sit(schedule=schedule_from_name(schedule), prediction=prediction)
    got, wanted = (check_convention(b, tiny_samples(8)) for b in (on(device, network), network))
    assert got.declared.ratios == pytest.approx(wanted.declared.ratios, rel=1e-4)
    assert got.condition == pytest.approx(wanted.condition, abs=1e-4)
    if schedule == "flow-1000":
        return
    for solver in ("heun", "dopri5", "euler-maruyama"):
        plan = SamplingPlan(solver=solver, steps=2, rtol=0.1)
        x, y = (sample(b, range(2), plan=plan) for b in (on(device, network), network))
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options", first_of({"guidance": 2.0, "guidance_interval": (0.2, 0.7)}, {}, {"guidance": 2.0}), ids=str
)
@pytest.mark.parametrize("solver", first_of("dopri5", "euler", "heun", "euler-maruyama"))
def test_guided_and_padded_samples_are_those_of_the_cpu(device: str, solver: Any, options: dict[str, Any]) -> None:
    plan, labels = SamplingPlan(solver=solver, steps=2, rtol=0.1, **options), torch.arange(3)
    for network, mask in ((tiny_sit(), None), (tiny_sit(shape=(2, 12)), padded().batch(range(3)).mask)):
        x, y = (sample(b, range(3), labels=labels, mask=mask, plan=plan) for b in (on(device, network), network))
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


# Training


def weights_after(backbone: Backbone, samples: TensorSamples, folder: Path, **plan: Any) -> dict[str, Tensor]:
    steps = {"steps": 2, "batch_size": 4, "log_every": 1} | plan
    losses: list[dict[float, float]] = []
    is_fresh = not (folder / "training.json").exists()  # a continued training has been observed at step 0 before
    trained = train(
        backbone,
        samples,
        TrainingPlan(**steps),
        folder,
        observe=lambda _, model: losses.append(held_out_loss(model, samples)),
        observe_at=(0, steps["steps"]),
    )
    assert len(losses) == 1 + is_fresh
    return {name: tensor.cpu() for name, tensor in trained.module.state_dict().items()}


@pytest.mark.parametrize(
    "plan",
    first_of(
        {"pairs": PAIR, "accumulate": 2, "clip_norm": 1.0},
        {"pairs": PAIR},
        {"time_sampling": "logit-normal", "loss_weighting": "likelihood", "more_ema_decays": (0.9,)},
        {"loss_weighting": "min-snr"},
        {"pairs": PAIR, "sync": SyncOptions(projector_width=8, teacher_decay=0.9)},
        {"pairs": PAIR, "sync": SyncOptions(noise_gap=0.2)},
        {"pairs": PAIR, "sync": SyncOptions(noise_range=(0.2, 0.8), centered=True)},
        {"pairs": PAIR, "sync": SyncOptions(warmup_steps=2, decay="cosine", stop_step=4)},
    ),
    ids=str,
)
def test_a_training_ends_where_that_of_the_cpu_ends(device: str, tmp_path: Path, plan: dict[str, Any]) -> None:
    network = tiny_sit()
    runs = ((on(device, network), "device"), (network, "cpu"))
    got, wanted = (weights_after(b, tiny_samples(), tmp_path / name, **plan) for b, name in runs)
    for name, tensor in wanted.items():
        # Where a gradient is next to nothing, its rounding decides the sign of Adam's step, of at most 1e-4.
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=2e-5 if device == NAME else 5e-4)


def test_padded_bfloat16_and_resumed_trainings_run(device: str, tmp_path: Path) -> None:
    weights_after(on(device, tiny_sit(shape=(2, 12))), padded(), tmp_path / "padded", pairs=PAIR)
    weights_after(on(device, tiny_sit()), tiny_samples(), tmp_path / "bfloat16", precision="bfloat16", pairs=PAIR)
    options = {"pairs": PAIR, "sync": SyncOptions(projector_width=8, teacher_decay=0.9), "checkpoint_every": 1}
    weights_after(on(device, tiny_sit()), tiny_samples(), tmp_path / "resumed", steps=1, **options)
    resumed = weights_after(on(device, tiny_sit()), tiny_samples(), tmp_path / "resumed", **options)
    at_once = weights_after(on(device, tiny_sit()), tiny_samples(), tmp_path / "at once", **options)
    for name, tensor in at_once.items():  # A real device adds up in an order that is left to chance.
        rounding = 0.0 if device == NAME else 5e-4
        torch.testing.assert_close(resumed[name], tensor, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(("schedule", "prediction"), CONVENTIONS[:-1])
def test_every_convention_trains(device: str, tmp_path: Path, schedule: str, prediction: Any) -> None:
    weights_after(under(device, schedule, prediction), tiny_samples(), tmp_path, loss_weighting="velocity")


@pytest.mark.parametrize("pairs", [(), PAIR], ids=("plain", "aligned"))
def test_a_training_step_waits_once_for_the_device(counted: str, tmp_path: Path, pairs: Any) -> None:
    waits = []
    for steps in (1, 4):
        plan = TrainingPlan(steps=steps, batch_size=4, log_every=99, pairs=pairs)
        with watched() as ledger:
            train(on(counted, tiny_sit()), tiny_samples(), plan, tmp_path / str(steps))
        waits.append(sum(ledger.waits.values()))
    assert waits[1] - waits[0] == 3, ledger.waits


def test_a_copy_on_the_host_takes_no_room_on_the_device(counted: str) -> None:
    module = on(counted, tiny_sit()).module
    with watched() as ledger:
        copied = host_copy(module)
    assert not sum(ledger.kernels.values())
    assert not sum(ledger.uploads.values())
    assert {tensor.device.type for tensor in copied.state_dict().values()} == {"cpu"}
    assert {tensor.device.type for tensor in module.state_dict().values()} == {counted}


def test_layersync_runs_in_a_loop_of_ones_own(device: str) -> None:
    module = on(device, tiny_sit()).module
    options = SyncOptions(noise_range=(0.2, 0.8))
    with LayerSync(module, [("blocks.0", "blocks.2")], weight=0.3, options=options) as sync:
        x, labels = torch.randn(4, *SHAPE, device=device), torch.zeros(4, dtype=torch.long, device=device)
        output = module(x, torch.rand(4, device=device), labels)
        (output.square().mean() + sync.loss(noise_level=torch.linspace(0.1, 0.9, 4))).backward()
        assert all(isinstance(value, float) for value in sync.statistics().values())


@pytest.mark.parametrize(("stop", "waits_per_loss"), [(None, 0), (0.99, 1)])
def test_a_loss_waits_for_the_device_only_to_end_by_its_cosine(
    counted: str, stop: float | None, waits_per_loss: int
) -> None:
    module = on(counted, tiny_sit()).module
    with LayerSync(module, [("blocks.0", "blocks.2")], weight=0.3, stop_cosine=stop) as sync:
        waits = []
        for _ in range(4):
            module(
                torch.randn(4, *SHAPE, device=counted), torch.rand(4, device=counted), torch.arange(4).to(counted) % 3
            )
            with watched() as ledger:
                sync.loss().backward()
            waits.append(sum(ledger.waits.values()))
    assert waits[1:] == [waits_per_loss] * 3  # The first loss checks values.


# Other networks


def test_a_checkpoint_is_opened_hashed_and_saved(device: str, tmp_path: Path) -> None:
    backbone, on_cpu = (open_checkpoint("digits", device=name) for name in (device, "cpu"))
    assert backbone.device.type == device
    assert weights_hash(backbone.module) == weights_hash(on_cpu.module)
    save_checkpoint(tmp_path / "a.safetensors", backbone, backbone.module.state_dict(), training={})
    assert weights_hash(open_checkpoint(tmp_path / "a.safetensors", device="cpu").module) == weights_hash(on_cpu.module)


def lightningdit() -> Backbone:
    config = SiTConfig(SHAPE, 2, 16, 3, 2, 3)
    torch.manual_seed(0)
    modern = {"rotary": True, "rms_norm": True, "gated_mlp": True, "shift": False}
    return lightningdit_backbone(LightningDiT(LightningDiTConfig(config, **modern)).eval())


@pytest.mark.parametrize(
    "build",
    first_of(lambda: tiny_mdm(mdm_tensors("text")), lambda: tiny_mdm(mdm_tensors("action")), lightningdit),
    ids=("MDM of texts", "MDM of actions", "LightningDiT"),
)
def test_networks_of_other_families_give_the_same_features(
    device: str, tmp_path: Path, build: Callable[[], Backbone]
) -> None:
    network = build()
    same_features(on(device, network), network, tiny_splits(shape=network.shape), tmp_path)


FAMILIES = (
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "QwenImageTransformer2DModel",
    "SanaTransformer2DModel",
    "Lumina2Transformer2DModel",
    "UNet2DModel",
    "UNet2DConditionModel",
    "UNet1DModel",
    "WanTransformer3DModel",
    "CogVideoXTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "StableAudioDiTModel",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_networks_of_diffusers_give_the_same_velocity(device: str, tmp_path: Path, name: str) -> None:
    pytest.importorskip("diffusers")
    from diffusers_checks import BY_NAME, noisy, opened

    case = BY_NAME[name]
    _, network = opened(case, tmp_path)
    x, level = noisy(case), torch.full((2,), 0.4)
    moved = on(device, network)
    with torch.inference_mode():
        got, wanted = moved(x.to(device), level.to(device)).cpu(), network(x, level)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert list(layer_shapes(moved)) == list(network.layers)


def test_an_autoencoder_encodes_and_decodes(device: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of diffusers about itself
        diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **blocks).save_pretrained(
            tmp_path / "vae"
        )
    samples = TensorSamples(torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    x, y = (
        encode(samples, tmp_path / "vae", tmp_path / name, device=name, batch_size=2).batch(range(3)).x
        for name in (device, "cpu")
    )
    torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        decoder(tmp_path / "vae", device=device)(x), decoder(tmp_path / "vae")(y), rtol=1e-3, atol=1e-3
    )


def test_a_device_without_float64_is_refused(counted: str) -> None:
    assert resolve_device(counted).type == counted
    with (
        without_float64(),
        pytest.raises(ValueError, match=rf"^--device {counted} does not compute in float64, .*pass cpu$"),
    ):
        resolve_device(counted)


def test_a_small_table_of_times_is_not_asked_on_a_device_for_rows_that_it_lacks(counted: str) -> None:
    class Tabled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.times, self.layer = nn.Embedding(10, 1), nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.layer(x) + self.times(t.long())[:, :, None, None]

    module = Tabled().to(counted)
    backbone = wrap(module, layers=["layer"], schedule="ddpm-linear", prediction="eps", shape=SHAPE)
    with watched() as ledger, pytest.raises(ValueError, match=r"times has 10 rows and none for .*--schedule"):
        layer_shapes(backbone)
    assert not ledger.kernels["embedding"]
