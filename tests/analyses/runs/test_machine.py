"""What a run records of its machine, and what doctor prints of it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from layerprobe.analyses.runs.machine import describe_machine, host_memory
from layerprobe.analyses.wording.machine import gigabytes, machine_rows


def test_devices_memory_and_what_they_compute_in(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    cards = [
        SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, major=9, minor=0),
        SimpleNamespace(name="Tesla T4", total_memory=15 * 2**30, major=7, minor=5),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: cards[index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at: (cards[at.index].major, cards[at.index].minor))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build\n")
    monkeypatch.setattr("layerprobe.analyses.runs.machine._DRIVER", driver)
    machine = describe_machine()
    assert json.loads(json.dumps(machine)) == machine
    rows = machine_rows(machine | {"precision": "tf32", "embedded model": "read"})
    assert rows["cuda:0"] == "NVIDIA H100, 80.0 GiB, compute capability 9.0, bfloat16 and tf32"
    assert rows["cuda:1"] == "Tesla T4, 15.0 GiB, compute capability 7.5, neither bfloat16 nor tf32"
    assert rows["driver"] == "nvidia 570.124.06, cuda 12.8"
    assert rows["precision"] == "tf32, unless --precision says another"


def test_a_machine_without_a_gpu() -> None:
    machine = describe_machine()
    rows = machine_rows(machine | {"precision": "float32", "embedded model": "read"})
    assert (machine["devices"] == []) == rows.get("cuda", "").startswith("none")
    memory = host_memory()
    assert memory is None or rows["memory"] == gigabytes(memory)
    assert gigabytes(3 * 2**20) == "3 MiB"
