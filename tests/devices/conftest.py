"""The second device: a pretended one, or the real one that LAYERPROBE_TEST_DEVICE names, such as cuda.

The pretended one changes what torch does in a whole process, so these tests are collected only where they are asked
for: `-m devices`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves these files out, unless their marker is selected."""
    selected = str(config.option.markexpr)
    return None if "devices" in selected and "not devices" not in selected else True


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the device."""
    if real := os.environ.get("LAYERPROBE_TEST_DEVICE"):
        import torch

        # Its numbers are compared with those of the CPU, which has no tf32.
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        monkeypatch.setattr("layerprobe.precision.has_tf32", lambda _: False)
        return real
    return _pretended()


@pytest.fixture
def counted() -> str:
    """The name of the pretend device, which counts what costs time."""
    if "LAYERPROBE_TEST_DEVICE" in os.environ:
        pytest.skip("a real device does not count")
    return _pretended()


@pytest.fixture
def card() -> str:
    """The name of a real device of CUDA."""
    real = os.environ.get("LAYERPROBE_TEST_DEVICE", "")
    if not real.startswith("cuda"):
        pytest.skip("the memory of a real device of CUDA is limited; set LAYERPROBE_TEST_DEVICE=cuda")
    return real


def _pretended() -> str:
    import pretend_device

    if not pretend_device.AVAILABLE:
        pytest.skip("torch before 2.9 has no devices written in Python")
    return pretend_device.NAME
