"""Deterministic kernels: what is set, and what torch refuses reaches the user as it is."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from tiny import SHAPE, tiny_samples
from torch import Tensor, nn

from layerprobe.backbones import wrap
from layerprobe.checkpoints import check_convention
from layerprobe.cli.main import COMMANDS
from layerprobe.determinism import compute_deterministically, is_refusal

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
