"""The precision of networks and deterministic kernels: what of torch is set, where, and what users see of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SHAPE, tiny_samples, tiny_sit, tiny_splits
from torch import Tensor, nn

from layerprobe.analyses.generation import Extractor, open_encoder, sample_features
from layerprobe.backbones import wrap
from layerprobe.checkpoints import check_convention
from layerprobe.cli.main import COMMANDS
from layerprobe.extraction import ExtractionPlan, ablate_layers, extract, random_weights, raw_input, rounding_error
from layerprobe.memory import is_refusal
from layerprobe.precision import (
    compute_deterministically,
    computing,
    has_tf32,
    precision_on,
    products_of,
    rounded_by,
)
from layerprobe.sampling import SamplingPlan, sample
from layerprobe.training import TrainingPlan, held_out_loss, train

CPU = torch.device("cpu")
MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn


def settings() -> tuple[object, ...]:
    newer = [getattr(part, "fp32_precision", None) for part in (MATMUL, CUDNN.conv, CUDNN.rnn)]
    return torch.is_autocast_enabled("cpu"), *newer


def allows_tf32() -> tuple[bool, bool]:
    return MATMUL.allow_tf32, CUDNN.allow_tf32


@pytest.fixture
def a100(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device has tf32, as far as `has_tf32` knows."""
    monkeypatch.setattr("layerprobe.precision.has_tf32", lambda device: True)


def test_tf32_is_allowed_inside_only() -> None:
    before = settings()
    for precision, allowed in (("tf32", True), ("float32", False), ("bfloat16", False)):
        with computing(precision, CPU):
            assert allows_tf32() == (allowed, allowed)
            assert torch.is_autocast_enabled("cpu") == (precision == "bfloat16")
            with computing(None, CPU):  # leaves everything as it is
                assert allows_tf32() == (allowed, allowed)
        with suppress(KeyboardInterrupt), products_of(precision):
            assert (allows_tf32(), torch.is_autocast_enabled("cpu")) == ((allowed, allowed), False)
            raise KeyboardInterrupt
        assert settings() == before


@pytest.mark.skipif(not hasattr(MATMUL, "fp32_precision"), reason="torch before 2.9 has one name for each setting")
def test_settings_that_a_caller_made_by_their_newer_names_come_back() -> None:
    before = settings()
    try:
        MATMUL.fp32_precision, CUDNN.conv.fp32_precision = "tf32", "ieee"
        own = settings()
        with computing("float32", CPU):
            assert allows_tf32() == (False, False)
        assert settings() == own
    finally:
        MATMUL.allow_tf32, CUDNN.allow_tf32 = False, True
        MATMUL.fp32_precision, CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision = before[1:]  # type: ignore[assignment]
    assert settings() == before


def test_auto_is_what_the_device_has(a100: None) -> None:
    assert precision_on("auto", CPU) == "tf32"
    assert rounded_by("tf32") == {"precision": "tf32"}
    assert rounded_by("float32") == rounded_by(None) == {}


def test_a_cpu_has_no_tf32() -> None:
    assert not has_tf32(CPU)
    assert precision_on("auto", CPU) == "float32"
    with pytest.raises(ValueError, match=r"^cpu does not compute in tf32, .*; pass --precision float32 or bfloat16$"):
        precision_on("tf32", CPU)
    with pytest.raises(ValueError, match="unknown precision 'half'; use auto, float32, tf32 or bfloat16"):
        precision_on("half", CPU)


class Seeing(nn.Module):
    """A network that records the settings under which it is called, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Conv2d(1, 1, 1), set[tuple[bool, bool]]()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.add(allows_tf32())
        output: Tensor = self.layer(x)
        if output.requires_grad:
            output.register_hook(lambda _: self.seen.add(allows_tf32()))
        return output


def test_every_job_computes_the_network_in_its_precision(a100: None, tmp_path: Path) -> None:
    """And what is round the network, such as the losses and the pooling, as before."""
    module, before = Seeing(), settings()
    backbone = wrap(module, layers="layer", schedule="sit", prediction="velocity", shape=(1, 4, 4))
    samples, own = tiny_samples(16), backbone.in_precision("tf32")
    jobs = {
        "extraction": lambda: extract(backbone, tiny_splits(), ExtractionPlan(("layer",), (0.5,)), tmp_path / "a"),
        "convention": lambda: check_convention(own, samples),
        "ablation": lambda: ablate_layers(own, samples, (0.5,), split="test"),
        "sampling": lambda: sample(own, range(2), plan=SamplingPlan(steps=2)),
        "held-out loss": lambda: held_out_loss(own, samples),
        "an encoder": lambda: sample_features(
            Extractor("mine", lambda x: module(x, x).flatten(1), precision="tf32"), samples.batch(range(4)).x
        ),
    }
    for name, job in jobs.items():
        module.seen.clear()
        job()
        assert module.seen == {(True, True)}, name
        assert settings() == before


def test_a_training_step_is_in_its_precision_forward_and_backward(
    a100: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Seeing()
    monkeypatch.setattr(Seeing, "__deepcopy__", lambda self, memo: self, raising=False)
    backbone = wrap(module, layers="layer", schedule="sit", prediction="velocity", shape=(1, 4, 4))
    for precision, allowed in (("auto", True), ("float32", False)):
        module.seen.clear()
        train(backbone, tiny_samples(), TrainingPlan(steps=1, batch_size=4, precision=precision), tmp_path / precision)
        assert module.seen == {(allowed, allowed)}


def test_the_store_says_the_precision_and_how_far_it_moves_features(tmp_path: Path) -> None:
    backbone, splits = tiny_sit(), tiny_splits()
    plan = ExtractionPlan(backbone.layers, (0.2, 0.7))
    stores = {
        name: extract(backbone, splits, replace(plan, precision=name), tmp_path / name)
        for name in ("auto", "float32", "bfloat16")
    }
    assert [store.manifest["plan"]["precision"] for store in stores.values()] == ["float32", "float32", "bfloat16"]
    assert stores["auto"].manifest == stores["float32"].manifest
    found = rounding_error(backbone, splits.train, replace(plan, precision="bfloat16"))
    x, y = (stores[name].features(found.layer, found.noise_level)[:10] for name in ("bfloat16", "float32"))
    wanted = np.linalg.norm(x - y) / np.linalg.norm(y - y.mean(0))
    assert found.error == pytest.approx(wanted, rel=1e-3)
    assert 1e-3 < found.error < 0.2
    assert rounding_error(backbone, splits.train, replace(plan, precision="float32")).error == 0


def test_the_raw_input_is_on_no_device_and_takes_the_precision_of_its_run(tmp_path: Path) -> None:
    reader = raw_input(tiny_sit())
    store = extract(reader, tiny_splits(), ExtractionPlan(reader.layers, (0.5,), precision="tf32"), tmp_path)
    assert store.manifest["plan"]["precision"] == "tf32"


def test_functions_choose_their_own_precision(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def flat(x):\n    return x.flatten(1)\n")
    with pytest.raises(ValueError, match="is a function, which chooses its own precision; leave out --precision"):
        open_encoder(f"{tmp_path / 'mine.py'}:flat", precision="bfloat16")


def test_the_control_has_the_precision_of_its_model() -> None:
    with random_weights(tiny_sit().in_precision("bfloat16")) as control:
        assert control.precision == "bfloat16"


# ------------------------------------------------------------------------------------------------------- determinism

REFUSED = "cumsum_cuda_kernel does not have a deterministic implementation, but you set it"


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    cudnn.deterministic, cudnn.benchmark = before
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_everything_is_set_that_equal_bits_need(restored: None) -> None:
    compute_deterministically()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    compute_deterministically()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_the_option_sets_it_on_every_command_with_a_device(
    cli, restored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[bool] = []
    monkeypatch.setattr("layerprobe.cli.options.compute_deterministically", lambda: called.append(True))
    for command in COMMANDS:
        parameters = command.__signature__.parameters if hasattr(command, "__signature__") else {}
        assert ("device" in parameters) <= ("deterministic" in parameters), command.__name__
    code, _, _ = cli("sample", "digits", "--out", "x", "--dry-run", "--deterministic")
    assert (code, called) == (0, [True])


def test_a_refused_operation_is_no_fault_of_the_network_or_its_convention() -> None:
    class Refused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            raise RuntimeError(REFUSED)

    backbone = wrap(Refused(), layers="layer", schedule="sit", prediction="velocity", shape=SHAPE)
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation") as caught:
        check_convention(backbone, tiny_samples(8))
    assert is_refusal(caught.value)


def test_a_refused_operation_is_told_in_one_line(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(REFUSED)

    monkeypatch.setattr("layerprobe.checkpoints.source.CheckpointSource.open", refuse)
    code, _, err = cli("sample", "digits", "--out", "x")
    assert code == 1
    assert err.splitlines()[-1].endswith("leave out --deterministic, or compute on a CPU with --device cpu")
