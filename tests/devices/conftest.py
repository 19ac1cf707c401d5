"""The second device, on machines without one.

It changes what torch does in a whole process, so these tests are collected only where they are asked for: `-m devices`.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves these files out, unless their marker is selected."""
    selected = str(config.option.markexpr)
    return None if "devices" in selected and "not devices" not in selected else True


@pytest.fixture
def device() -> str:
    """The name of the pretend device."""
    import pretend_device

    if not pretend_device.AVAILABLE:
        pytest.skip("torch before 2.9 has no devices written in Python")
    return pretend_device.NAME
