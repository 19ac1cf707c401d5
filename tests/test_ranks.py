"""Ranks of torchrun and SLURM, and the positions of a batch that belong to each process."""

from __future__ import annotations

import re
import socket
import weakref
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from layerprobe import ranks
from layerprobe.ranks import Ranks, alone, current, first_host, processes, ranks_of

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
    with processes() as one:
        assert one == Ranks()
        assert not dist.is_initialized()
        one.barrier()
        one.check()
        tensor, item = torch.ones(2), object()
        assert one.mean(tensor) is tensor
        assert one.broadcast(item) is item
        assert one.whole([item]) == [item]


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
    parts = [Ranks(rank, num).mine(range(start, start + size)) for rank in range(num)]
    assert sorted(p for part in parts for p in part) == list(range(start, start + size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if size:  # The mean of the weighted means of all processes is the mean over all samples.
        values = [Ranks(0, num).share(len(part), size) * (sum(part) / len(part) if part else 0) for part in parts]
        assert sum(values) / num == pytest.approx(start + (size - 1) / 2)


@given(num=st.integers(1, 5), lengths=st.lists(st.integers(0, 7), max_size=4))
def test_several_lists_are_divided_in_turns(num: int, lengths: list[int]) -> None:
    counts, turn = [0] * num, 0
    for length in lengths:
        parts = [Ranks(rank, num).mine(range(length), turn=turn) for rank in range(num)]
        assert sorted(item for part in parts for item in part) == list(range(length))
        counts = [count + len(part) for count, part in zip(counts, parts, strict=True)]
        turn += length
    assert max(counts) - min(counts) <= 1


def test_alone_there_are_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_block", Ranks(1, 4))
    assert current() == Ranks(1, 4)
    with alone(), processes() as found:
        assert found == current() == Ranks()
    assert current() == Ranks(1, 4)


def meet(monkeypatch: pytest.MonkeyPatch, rank: int, port: int) -> None:
    """Waits a second for another process."""
    address = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in address.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "MEETING", timedelta(seconds=1))
    monkeypatch.setattr(ranks, "_QUIET_S", 0.1)
    with processes():
        pass


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.mark.parametrize(("rank", "reason"), [(0, ".+"), (1, ".*refused")])
def test_processes_that_do_not_come_are_not_waited_for_forever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rank: int, reason: str
) -> None:
    port = free_port()
    with pytest.raises(ConnectionError, match=rf"^the 2 processes have not met at 127.0.0.1:{port} \({reason}\); see"):
        meet(monkeypatch, rank, port)
    assert caplog.messages == [f"process {rank} waits at 127.0.0.1:{port} for all 2, at most 0.0166667 minutes"]


def test_a_port_that_is_in_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        port = int(taken.getsockname()[1])
        with pytest.raises(
            ConnectionError, match=rf"^the processes cannot meet at 127.0.0.1:{port}: the port is in use"
        ):
            meet(monkeypatch, 0, port)


class Store:
    """The store of a process that is the first to fail, or not."""

    def __init__(self, earlier: int = 0) -> None:
        self.failures = earlier

    def add(self, _: str, number: int) -> int:
        self.failures += number
        return self.failures


NCCL = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:317, unhandled cuda error, NCCL 2.21.5
ncclUnhandledCudaError: Call to CUDA function failed.
Last error:
Cuda failure 999 'unknown error'"""


def failing_with(error: Exception, monkeypatch: pytest.MonkeyPatch, *, earlier: int = 0) -> None:
    monkeypatch.setattr(ranks, "_join", lambda: (Ranks(), Store(earlier)))
    with processes():
        raise error


def test_an_error_of_nccl_is_its_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    line = r"unhandled cuda error, NCCL 2\.21\.5: Cuda failure 999 'unknown error'"
    with pytest.raises(ConnectionError, match=rf"^the GPUs of the processes cannot communicate \({line}\); if it says"):
        failing_with(dist.DistBackendError(NCCL), monkeypatch)


def test_memory_that_runs_out_in_nccl_is_no_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(dist.DistBackendError):
        failing_with(dist.DistBackendError(NCCL.replace("unknown error", "out of memory")), monkeypatch)


def test_only_the_first_failure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        failing_with(ValueError("the cause"), monkeypatch, earlier=1)
    assert ended.value.code == 1


LOST = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5")


def test_a_lost_connection_that_others_made_a_fault_of_the_network_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = ValueError("the network raised RuntimeError")
    wrapped.__cause__ = LOST
    with pytest.raises(ConnectionError, match=r"^another process was killed, or its machine is unreachable; repeat"):
        failing_with(wrapped, monkeypatch)


def test_nothing_that_waits_to_be_collected_outlives_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A DDP module would hang then."""

    class Module:
        def __init__(self) -> None:
            self.cycle = self

    ranks._leave()  # A script may have ended the group already.
    left, alive = weakref.ref(Module()), []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: alive.append(left() is not None))
    ranks._leave()
    assert alive == [False]
