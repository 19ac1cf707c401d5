"""Several processes that meet like those of torchrun, for tests of work that they share."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

# Processes are forked from one that has imported everything and run nothing.
PROCESSES = multiprocessing.get_context("forkserver")
# torch itself sometimes logs lost connections, which these tests do not check.
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
PROCESSES.set_forkserver_preload(
    [
        "hypothesis",
        "layerprobe.analyses.experiments.pair_sweep",
        "layerprobe.analyses.runs.probe",
        "layerprobe.analyses.runs.sample",
        "matplotlib.backends.backend_svg",
        "layerprobe.training.loop",
        "pytest",
        "torch._dynamo",  # which the first optimizer of a process imports, in several seconds
        "torch.distributed.fsdp",
    ]
)


class Started:
    """Runs function(*arguments) in several processes, which meet like those of torchrun.

    Attributes:
        processes: Processes by rank.
        stderr_files: Files with the standard error of the processes, by rank; an exception is one line.
    """

    def __init__(self, folder: Path, function: Callable[..., Any], *arguments: Any, num: int = 2) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        folder.mkdir(exist_ok=True)
        self.stderr_files = [folder / f"stderr-{rank}" for rank in range(num)]
        self.processes: list[Any] = []
        self._receivers = []
        for rank in range(num):
            receiver, sender = PROCESSES.Pipe(duplex=False)
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(num)}
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = PROCESSES.Process(
                target=_begin, args=(function, arguments, environment, self.stderr_files[rank], sender), daemon=True
            )
            process.start()
            sender.close()
            self.processes.append(process)
            self._receivers.append(receiver)

    def results(self) -> list[Any]:
        """The results by rank."""
        received = [receiver.recv_bytes() if receiver.poll(90) else None for receiver in self._receivers]
        assert self.exit_codes() == [0] * len(received)
        return [pickle.loads(result) for result in received if result is not None]

    def exit_codes(self) -> list[int]:
        for process in self.processes:
            process.join(30)
            assert process.exitcode is not None, "the process hangs"
        return [process.exitcode for process in self.processes]


def kill_after(steps: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Runs function(tell, *arguments) in a process of its own, and kills it (SIGKILL) at this call of tell.

    The process goes on until the signal arrives, so it is killed anywhere, in the middle of a write too.
    """
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_tell, args=(function, arguments, sender), daemon=True)
    process.start()
    sender.close()
    for step in range(steps):
        assert receiver.poll(90), "the process hangs"
        try:
            receiver.recv_bytes()
        except EOFError:
            raise AssertionError(f"it ended by itself after {step} steps") from None
    process.kill()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL


def _tell(function: Callable[..., Any], arguments: tuple[Any, ...], sender: Connection) -> None:
    torch.set_num_threads(1)
    function(lambda *_: sender.send_bytes(b"."), *arguments)


def _begin(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    stderr_file: Path,
    sender: Connection,
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    os.dup2(os.open(stderr_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    try:
        result = function(*arguments)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    sender.send_bytes(pickle.dumps(result))
