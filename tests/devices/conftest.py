"""The second device, on machines without one."""

from __future__ import annotations

import pretend_device
import pytest


@pytest.fixture
def device() -> str:
    """The name of the pretend device."""
    if not pretend_device.AVAILABLE:
        pytest.skip("torch before 2.9 has no devices written in Python")
    return pretend_device.NAME
