"""The processes of a distributed run: joining them, communication between them, and a common end.

torchrun or SLURM's `srun` starts the processes, and `processes` joins those that the environment variables describe.
Without such variables there is one process, no process group and no cost. Rank r of N takes positions r, r + N, ... of
every batch. Tensors on the CPU are communicated by gloo, tensors on a GPU by NCCL.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

# How long processes wait for the first one, which may be measuring or sampling in the meantime.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the communication with the others.

    Attributes:
        rank: Rank of this process, from 0.
        world_size: Number of processes on all machines.
        local_rank: Rank on this machine, from 0, which selects the GPU.

    Raises:
        ValueError: If the rank is not below the world size.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    # Process group for long waits: unlike NCCL, gloo has no short timeout and detects lost connections at once.
    _patient: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"this is process {self.rank} of {self.world_size}, but ranks go from 0 to world size - 1; "
                "check RANK and WORLD_SIZE"
            )

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints, logs and writes."""
        return self.rank == 0

    def positions(self, positions: range) -> range:
        """Selects the positions of a batch that belong to this process."""
        return positions[self.rank :: self.world_size]

    def share(self, part: int, whole: int) -> float:
        """Returns the factor of this process' mean over `part` of `whole` samples, so that `mean` averages over all."""
        return part * self.world_size / whole

    def mean(self, tensor: Tensor) -> Tensor:
        """Computes the element-wise mean over the processes; every process must call it."""
        if self.world_size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total / self.world_size

    def broadcast(self, item: T) -> T:
        """Returns the item of the first process, which must be picklable, on all processes; they wait for it."""
        if self.world_size == 1:
            return item
        items = [item]
        dist.broadcast_object_list(items, 0, group=self._patient)
        return items[0]

    def barrier(self) -> None:
        """Waits until all processes have called it."""
        if self.world_size > 1:
            dist.barrier(group=self._patient)


_joined: tuple[Ranks, Any] | None = None
_inside = False


@contextmanager
def processes() -> Iterator[Ranks]:
    """Joins the processes that torchrun or srun started; blocks may be nested or follow one another.

    All processes end together. If a process fails, it raises its exception and the others exit silently with code 1, so
    that there is one message. If a process was killed, one of the others reports it.

    Raises:
        ValueError: If the environment describes several processes but no address where they meet.
        ConnectionError: If another process was killed or its machine is unreachable.
    """
    global _inside
    if _joined is None and dist.is_initialized():  # A process group of the caller, who also ends it.
        yield Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))
        return
    ranks, store = _joined or _join()
    if store is None or _inside:
        yield ranks
        return
    _inside = True
    try:
        yield ranks
        ranks.barrier()
    except (Exception, KeyboardInterrupt) as error:
        _fail(error, store)
    finally:
        _inside = False


def _join() -> tuple[Ranks, Any]:
    """Joins the process group for the lifetime of the process, since a store cannot be joined twice."""
    global _joined
    ranks, url = ranks_of(os.environ)
    if ranks.world_size == 1:
        return ranks, None
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    store, _, _ = next(rendezvous(url, ranks.rank, ranks.world_size))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size)
    atexit.register(dist.destroy_process_group)
    ranks = replace(ranks, _patient=dist.new_group(backend="gloo", timeout=PATIENCE))
    _joined = ranks, store
    return ranks, store


def ranks_of(environment: Mapping[str, str]) -> tuple[Ranks, str]:
    """Reads the rank of this process, and the URL where the processes meet, from environment variables.

    Variables of torchrun have priority over those of SLURM, since srun may start torchrun. Variables of SLURM count
    only in a job step: a batch script also has the number of tasks but is a single process.

    Raises:
        ValueError: If the address is missing, or rank and world size contradict each other.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        ranks = Ranks(*(int(environment.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
        if missing and ranks.world_size > 1:
            raise ValueError(f"{missing[0]} is not set, so the processes cannot meet; start them with torchrun or srun")
        return ranks, "env://"
    if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        ranks = Ranks(*(int(environment.get(name, "0")) for name in names))
        host = environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", "localhost"))
        # Job steps that run at the same time need different ports.
        number = 100 * int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
        port = environment.get("MASTER_PORT") or 20000 + number % 12000  # below the ephemeral ports
        return ranks, f"tcp://{host}:{port}"
    return Ranks(), ""


def first_host(nodes: str) -> str:
    """Returns the first host of a SLURM node list: gpu07 for "gpu[07-09,12],login1"."""
    first = re.match(r"(?:[^,\[]|\[[^]]*\])*", nodes)
    assert first is not None
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first.group())


def _fail(error: BaseException, store: Any) -> None:
    """Raises the error of the first process that failed; the others exit silently."""
    atexit.unregister(dist.destroy_process_group)  # It would wait for the other processes.
    try:
        first = store.add("layerprobe/failures", 1) == 1
    except RuntimeError:  # The process that holds the store has ended.
        first = False
    if not first:
        raise SystemExit(1) from error
    if _is_lost_connection(error):
        raise ConnectionError(
            "another process was killed, or its machine is unreachable; repeat the command to continue from the last "
            "checkpoint"
        ) from error
    raise error


def _is_lost_connection(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and re.search(r"gloo|[Cc]onnection (closed|reset)", str(error)) is not None
    )
