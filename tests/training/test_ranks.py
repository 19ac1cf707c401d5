"""Ranks of torchrun and SLURM, and the positions of a batch that belong to each process."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from layerprobe.training.ranks import Ranks, first_host, processes, ranks_of

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "::1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_LOCALID": "2",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],login1",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "3",
}
# A batch script is a single process, whatever the number of tasks.
SBATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "6", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "4711"}


def test_ranks_of_torchrun() -> None:
    assert ranks_of(TORCHRUN) == (Ranks(3, 8, 1), "env://")
    assert ranks_of(TORCHRUN | SRUN) == (Ranks(3, 8, 1), "env://")  # a torchrun on each node, started by srun


def test_ranks_of_srun() -> None:
    ranks, url = ranks_of(SRUN)
    assert ranks == Ranks(5, 6, 2)
    assert re.fullmatch(r"tcp://gpu07:[23]\d{4}", url)
    assert ranks_of(SRUN | {"SLURM_STEP_ID": "4"})[1] != url
    assert ranks_of(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})[1] == "tcp://10.0.0.1:1234"


@pytest.mark.parametrize("environment", [{}, SBATCH, {"RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "4"}])
def test_a_single_process_has_no_group(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks_of(environment)[0] == Ranks(0, 1, 0)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with processes() as ranks:
        assert ranks == Ranks()
        assert not dist.is_initialized()
        ranks.barrier()
        tensor, item = torch.ones(2), object()
        assert ranks.mean(tensor) is tensor
        assert ranks.broadcast(item) is item


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("rack[0-1]node[2-3].cluster", "rack0node2.cluster"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_contradictory_variables_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^MASTER_ADDR is not set, so the processes cannot meet; start them with"):
        ranks_of({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match=r"^this is process 2 of 2, but ranks go from 0 to world size - 1; check RANK"):
        ranks_of(TORCHRUN | {"RANK": "2", "WORLD_SIZE": "2"})


@given(num=st.integers(1, 9), start=st.integers(0, 50), size=st.integers(0, 30))
def test_every_position_belongs_to_one_process(num: int, start: int, size: int) -> None:
    parts = [Ranks(rank, num).positions(range(start, start + size)) for rank in range(num)]
    assert sorted(p for part in parts for p in part) == list(range(start, start + size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if size:  # The mean of the weighted means of all processes is the mean over all samples.
        values = [Ranks(0, num).share(len(part), size) * (sum(part) / len(part) if part else 0) for part in parts]
        assert sum(values) / num == pytest.approx(start + (size - 1) / 2)
