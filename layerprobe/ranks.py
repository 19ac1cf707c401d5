"""The processes of one command: joining them, dividing its work among them, and a common end.

torchrun or SLURM's `srun` starts the processes, and `processes` joins those that the environment variables describe.
Without such variables there is one process, no process group and no cost. All processes run the same code: each
computes its own part (`Ranks.mine`) and gets the parts of the others (`Ranks.whole`), and the first one writes and
prints. Tensors on the CPU are communicated by gloo, tensors on a GPU by NCCL, all other values by gloo.

This module imports torch only when processes are joined, so that the command line can ask for them without it.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import wraps
from inspect import signature
from itertools import zip_longest
from pathlib import Path
from socket import create_connection
from threading import Timer
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

from layerprobe.files import locked, one_line
from layerprobe.memory import failure_in, is_lost_connection, is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Item = TypeVar("Item")
Items = TypeVar("Items", bound=Sequence[Any])
P = ParamSpec("P")

# How long processes wait for the others to start, and for each other while one of them measures or draws.
MEETING = timedelta(minutes=10)
PATIENCE = timedelta(days=1)
_QUIET_S = 20.0  # of waiting, before it is told
_FAILURES = "layerprobe/failures"
logger = logging.getLogger(__name__)


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
    _store: Any = field(default=None, repr=False, compare=False)

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

    def mine(self, items: Items, *, turn: int = 0) -> Items:
        """Selects the items that belong to this process: every N-th of N processes.

        Args:
            items: A list, or a range of positions.
            turn: Number of items that were divided before. The process whose turn it is gets the first item, so that
                several short lists use all processes.
        """
        part: Items = items[(self.rank - turn) % self.world_size :: self.world_size]  # type: ignore[assignment]
        return part

    def whole(self, part: Sequence[T]) -> list[T]:
        """Returns the parts of all processes in the order of the items that `mine` divided; every process must call it.

        Args:
            part: One picklable result for each item of this process, divided with a turn of 0.
        """
        if self.world_size == 1:
            return [*part]
        import torch.distributed as dist

        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, [*part], group=self._patient)
        nothing = object()
        rounds = zip_longest(*parts, fillvalue=nothing)
        return [item for of_round in rounds for item in of_round if item is not nothing]

    def map(self, compute: Callable[[Item], T], items: Sequence[Item]) -> Iterator[T]:
        """Yields compute(item) for all items in their order, on all processes, each of which computes some of them.

        Every process must call it and take all results. It holds the results of two items for each process, one from
        the front of these items and one from the back, so that work which becomes less is divided evenly.

        Args:
            compute: Function of one item with a picklable result, which must not lie on a GPU.
            items: The same items on every process.
        """
        size = self.world_size
        for start in range(0, len(items), 2 * size):
            self.check()
            some = range(start, min(start + 2 * size, len(items)))
            order = [*some[:size], *some[size:][::-1]]
            results = self.whole([compute(items[position]) for position in self.mine(order)])
            by_position = dict(zip(order, results, strict=True))
            yield from (by_position[position] for position in some)

    def once(self, compute: Callable[[], T]) -> T:
        """Lets the first process compute, and returns its picklable result on all processes, which wait for it."""
        return self.broadcast(compute() if self.is_first else None)  # type: ignore[return-value]

    def first_alone(self, compute: Callable[[], T]) -> T:
        """Lets the first process compute, and then the others, which find the files that the first one wrote."""
        if self.is_first:
            result = compute()
        self.barrier()
        if not self.is_first:
            result = compute()
        return result

    def share(self, part: int, whole: int) -> float:
        """Returns the factor of this process' mean over `part` of `whole` samples, so that `mean` averages over all."""
        return part * self.world_size / whole

    def mean(self, tensor: Tensor) -> Tensor:
        """Computes the element-wise mean over the processes; every process must call it."""
        if self.world_size == 1:
            return tensor
        import torch.distributed as dist

        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total / self.world_size

    def broadcast(self, item: T) -> T:
        """Returns the item of the first process, which must be picklable, on all processes; they wait for it."""
        if self.world_size == 1:
            return item
        import torch.distributed as dist

        items = [item]
        dist.broadcast_object_list(items, 0, group=self._patient)
        return items[0]

    def barrier(self) -> None:
        """Waits until all processes have called it."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.barrier(group=self._patient)

    def check(self) -> None:
        """Ends this process if another one has failed; for loops that run long before the next communication."""
        if self._store is not None and self._store.check([_FAILURES]):
            raise _AnotherFailed


ALONE = Ranks()


class _AnotherFailed(Exception):
    """Another process has failed and tells why."""


_joined: tuple[Ranks, Any] | None = None  # for the lifetime of the process, since a store cannot be joined twice
_block: Ranks | None = None  # of the innermost block


def current() -> Ranks:
    """Returns the processes of the block around, see `processes` and `alone`; this process alone outside."""
    return _block or ALONE


@contextmanager
def processes() -> Iterator[Ranks]:
    """Joins the processes that torchrun or srun started; blocks may be nested or follow one another.

    All processes end together. If a process fails, it raises its exception and the others exit silently with code 1, so
    that there is one message. If a process was killed, one of the others reports it.

    Raises:
        ValueError: If the environment describes several processes but no address where they meet.
        ConnectionError: If the processes do not meet, another process was killed, or the GPUs cannot communicate.
    """
    if _block is not None:
        yield _block
        return
    ranks, store = _joined or _join()
    with _within(ranks):
        if store is None:
            yield ranks
            return
        try:
            yield ranks
            ranks.barrier()
        except (Exception, KeyboardInterrupt) as error:
            _fail(error, store)


@contextmanager
def alone() -> Iterator[None]:
    """Lets this process work for itself inside the block, in which `processes` finds no others."""
    with _within(ALONE):
        yield


@contextmanager
def _within(ranks: Ranks) -> Iterator[None]:
    global _block
    before, _block = _block, ranks
    try:
        yield
    finally:
        _block = before


def together(argument: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes a job run on all processes, of which the first holds the folder that one of its arguments names.

    All processes must call the job.

    Args:
        argument: Name of the argument.
    """

    def decorate(job: Callable[P, T]) -> Callable[P, T]:
        parameters = signature(job)

        @wraps(job)
        def joined(*args: P.args, **kwargs: P.kwargs) -> T:
            folder = Path(parameters.bind(*args, **kwargs).arguments[argument])
            with processes() as ranks, locked(folder) if ranks.is_first else nullcontext():
                result = job(*args, **kwargs)
                ranks.barrier()  # The folder is held until all have finished.
                return result

        return joined

    return decorate


def _join() -> tuple[Ranks, Any]:
    """Joins the process group."""
    global _joined
    if (loaded := sys.modules.get("torch.distributed")) and loaded.is_initialized():
        # A process group of the caller, who also ends it.
        return Ranks(loaded.get_rank(), loaded.get_world_size(), int(os.environ.get("LOCAL_RANK", 0))), None
    ranks, url = ranks_of(os.environ)
    if ranks.world_size == 1:
        return ranks, None
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    place = _place(url, os.environ)
    try:
        with _telling_of_the_wait(ranks, place):
            if not ranks.is_first:
                _reach(place)
            store, _, _ = next(rendezvous(url, ranks.rank, ranks.world_size, timeout=MEETING))
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size)
            patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (OSError, RuntimeError) as error:
        if not (isinstance(error, OSError) or is_lost_connection(error)):
            raise
        raise ConnectionError(_not_met(error, ranks, place)) from error
    atexit.register(_leave)
    ranks = replace(ranks, _patient=patient, _store=store)
    _joined = ranks, store
    return ranks, store


def _leave() -> None:
    """Ends the process group, if a script has not done so itself.

    A DDP module that outlives the group deletes it with the interpreter's lock held, and may then wait forever for a
    thread of gloo that waits for this lock. Such modules stay in cycles of references until they are collected.
    """
    import torch.distributed as dist

    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def _place(url: str, environment: Mapping[str, str]) -> tuple[str, int]:
    """The address and port where the processes meet."""
    parts = urlsplit(url)
    return parts.hostname or environment["MASTER_ADDR"], parts.port or int(environment["MASTER_PORT"])


def _reach(place: tuple[str, int]) -> None:
    """Waits until the first process accepts connections; torch's own wait would end in a stack of C++ frames."""
    until = monotonic() + MEETING.total_seconds()
    while True:
        try:
            create_connection(place, timeout=5).close()
        except OSError:
            if monotonic() > until:
                raise
            sleep(0.5)
        else:
            return


@contextmanager
def _telling_of_the_wait(ranks: Ranks, place: tuple[str, int]) -> Iterator[None]:
    """Says what one process of each machine is waiting for, if it takes long."""
    minutes = MEETING.total_seconds() / 60
    text = f"process {ranks.rank} waits at {_shown(place)} for all {ranks.world_size}, at most {minutes:g} minutes"
    timer = Timer(_QUIET_S, logger.warning, [text])
    timer.daemon = True
    if ranks.local_rank == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _not_met(error: Exception, ranks: Ranks, place: tuple[str, int]) -> str:
    if "EADDRINUSE" in str(error):
        return (
            f"the processes cannot meet at {_shown(place)}: the port is in use; set MASTER_PORT to a free one, or "
            "start them with torchrun --standalone"
        )
    return (
        f"the {ranks.world_size} processes have not met at {_shown(place)} ({one_line(error)}); see that all of them "
        "run and reach this address, and repeat the command"
    )


def _shown(place: tuple[str, int]) -> str:
    return f"{place[0]}:{place[1]}"


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
    atexit.unregister(_leave)  # It would wait for the other processes.
    failure = failure_in(error) or error
    try:
        first = store.add(_FAILURES, 1) == 1
    except RuntimeError:  # The process that holds the store has ended.
        first = False
    if not first:
        raise SystemExit(1) from error
    if is_out_of_memory(failure):
        raise failure
    if "NCCL" in str(failure) and isinstance(failure, RuntimeError):
        raise ConnectionError(
            f"the GPUs of the processes cannot communicate ({nccl_line(str(failure))}); if it says too little, repeat "
            "the command with NCCL_DEBUG=WARN"
        ) from error
    if is_lost_connection(failure):
        raise ConnectionError(
            "another process was killed, or its machine is unreachable; repeat the command to continue from what is "
            "finished"
        ) from error
    raise error


def nccl_line(text: str) -> str:
    """Returns the first line of an error of NCCL without the place in torch's code, and its last error if it has one.

    Args:
        text: The error as torch shows it, of several lines.
    """
    first = text.strip().splitlines()[0]
    reason = re.sub(r"^.*?NCCL error in: \S+:\d+, ", "", first)
    last = re.search(r"Last error:\s*(\S.*)", text)
    return f"{reason}: {last[1].strip()}" if last else reason
