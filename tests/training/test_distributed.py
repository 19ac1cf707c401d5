"""Several processes train as one does, end together, and go on from each other's checkpoints."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from places import HELPERS
from safetensors.torch import load_file
from tiny import SHAPE, tiny_samples, tiny_sit
from torch import Tensor, nn

from layerprobe.backbones.base import Backbone, wrap
from layerprobe.layersync.loss import LayerSync
from layerprobe.layersync.options import SyncOptions
from layerprobe.layersync.pair import LayerPair
from layerprobe.training.distributed import (
    Ranks,
    average_gradients,
    clip_gradients,
    first_host,
    gathered,
    gradient_norm,
    parallel,
    processes,
    ranks_of,
)
from layerprobe.training.loop import Decision, train
from layerprobe.training.plan import TrainingPlan

PAIR = LayerPair("blocks.0", "blocks.2")
PLAN = TrainingPlan(
    steps=8,
    batch_size=6,
    learning_rate=1e-3,
    warmup_steps=2,
    weight_decay=0.1,
    clip_norm=0.5,
    ema_decay=0.8,
    seed=3,
    checkpoint_every=3,
    log_every=1,
    pairs=(PAIR,),
)
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "::1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_LOCALID": "2",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],login1",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "3",
}
# Of a batch script: one process, whatever the number of tasks.
SBATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "6", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "4711"}

# Its processes are forked from one that has imported everything and run nothing.
PROCESSES = multiprocessing.get_context("forkserver")
# Of a lost connection torch warns in lines of its own, sometimes. What is tested is what we say.
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
PROCESSES.set_forkserver_preload(["hypothesis", "layerprobe.training.loop", "pytest", "torch.distributed.fsdp"])


class Started:
    """function(*arguments) in several processes, which meet as those of torchrun do.

    Attributes:
        processes: By rank.
        said: By rank, the file of what it wrote to standard error, an exception in one line.
    """

    def __init__(self, folder: Path, function: Callable[..., Any], *arguments: Any, num: int = 2) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(num)}
        folder.mkdir(exist_ok=True)
        self.said = [folder / f"said-{rank}" for rank in range(num)]
        self.processes: list[Any] = []
        self._receivers = []
        for rank in range(num):
            receiver, sender = PROCESSES.Pipe(duplex=False)
            environment = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = PROCESSES.Process(
                target=_begin, args=(function, arguments, environment, self.said[rank], sender), daemon=True
            )
            process.start()
            sender.close()
            self.processes.append(process)
            self._receivers.append(receiver)

    def results(self) -> list[Any]:
        """What they gave, by rank."""
        received = [receiver.recv_bytes() if receiver.poll(90) else None for receiver in self._receivers]
        assert self.exit_codes() == [0] * len(received)
        return [pickle.loads(result) for result in received if result is not None]

    def exit_codes(self) -> list[int]:
        for process in self.processes:
            process.join(30)
            assert process.exitcode is not None, "it hangs"
        return [process.exitcode for process in self.processes]


def _begin(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    said: Path,
    sender: Connection,
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    try:
        result = function(*arguments)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    sender.send_bytes(pickle.dumps(result))


# ------------------------------------------------------------------------------------------------------- who is who


def test_torchrun_tells_who_is_who() -> None:
    assert ranks_of(TORCHRUN) == (Ranks(3, 8, 1), "env://")
    assert ranks_of(TORCHRUN | SRUN) == (Ranks(3, 8, 1), "env://")  # a torchrun on each node, started by srun


def test_srun_tells_who_is_who() -> None:
    ranks, url = ranks_of(SRUN)
    assert ranks == Ranks(5, 6, 2)
    assert re.fullmatch(r"tcp://gpu07:[23]\d{4}", url)
    assert ranks_of(SRUN | {"SLURM_STEP_ID": "4"})[1] != url
    assert ranks_of(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})[1] == "tcp://10.0.0.1:1234"


@pytest.mark.parametrize("environment", [{}, SBATCH, {"RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "4"}])
def test_one_process_is_one_process(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_an_environment_that_cannot_be_right_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^MASTER_ADDR is not set, so the processes cannot meet; start them with"):
        ranks_of({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match=r"^this is process 2 of 2, but ranks go from 0 to world size - 1; check RANK"):
        ranks_of(TORCHRUN | {"RANK": "2", "WORLD_SIZE": "2"})


@given(num=st.integers(1, 9), start=st.integers(0, 50), size=st.integers(0, 30))
def test_every_position_belongs_to_one_process(num: int, start: int, size: int) -> None:
    parts = [Ranks(rank, num).positions(range(start, start + size)) for rank in range(num)]
    assert sorted(p for part in parts for p in part) == list(range(start, start + size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if size:  # The mean over processes of weighted means is the mean over all.
        values = [Ranks(0, num).share(len(part), size) * (sum(part) / len(part) if part else 0) for part in parts]
        assert sum(values) / num == pytest.approx(start + (size - 1) / 2)


def test_one_process_does_not_shard() -> None:
    with pytest.raises(ValueError, match=r"^one process has nobody to share the weights with; start several with"):
        parallel(tiny_sit(), Ranks(), fsdp=True)


# ---------------------------------------------------------------------------------------------- gradients and state


class Strange(nn.Module):
    """It has a parameter that nothing uses, one that is shorter than the number of processes, and two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(2, 2)
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, None]:
        return (self.second(self.first(x.flatten(1)).tanh()) * self.factor).view_as(x), None


def strange() -> Backbone:
    def forward(module: Any, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        assert module.factor.shape == (1,)  # Adapters look at the network.
        output: Tensor = module(x, t)[0]
        return output

    torch.manual_seed(0)
    return wrap(
        Strange(), layers=("first", "second"), schedule="flow", prediction="velocity", shape=SHAPE, forward=forward
    )


MODELS = {"sit": tiny_sit, "strange": strange}


def trained_a_step(ranks: Ranks, backbone: Backbone, *, size: int, fsdp: bool = False) -> dict[str, Any]:
    """Loss, gradients and their norm of a batch of this size, LayerSync included; shards are put together."""
    generator = torch.Generator().manual_seed(1)
    x, level = torch.randn(size, *SHAPE, generator=generator), torch.rand(size, generator=generator)
    wanted, condition = torch.randn(size, *SHAPE, generator=generator), torch.arange(size) % 3
    mine = list(ranks.positions(range(size)))
    share = ranks.share(len(mine), size)
    backbone.module.train()
    live = parallel(backbone, ranks, fsdp=fsdp)
    extra = nn.Parameter(torch.ones(3))  # As of a projector: neither sharded nor in the network.
    with LayerSync(backbone.module, [(backbone.layers[0], backbone.layers[-1])], weight=0.5) as sync:
        output = live.predict(x[mine], level[mine], condition[mine])
        loss = (output - wanted[mine]).square().mean() + sync.loss() + extra.square().sum()
        (loss * share).backward()
    average_gradients([extra], ranks)
    parameters = [*backbone.module.parameters(), extra]
    norm = gradient_norm(parameters)
    clip_gradients(parameters, 0.1, norm)
    gradients = {name: p.grad for name, p in backbone.module.named_parameters() if p.grad is not None}
    return {
        "loss": float(ranks.mean(loss.detach() * share)),
        "norm": float(norm),
        "gradients": gathered(gradients, ranks),
        "extra": extra.grad,
        "names": list(backbone.module.state_dict()),
    }


def steps_of_models() -> dict[Any, Any]:
    with processes() as ranks:
        return {
            (name, fsdp, size): trained_a_step(ranks, model(), size=size, fsdp=fsdp)
            for name, model in MODELS.items()
            for fsdp in (False, True)
            for size in (6, 5)
        }


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return Started(tmp_path_factory.mktemp("steps"), steps_of_models).results()


@pytest.mark.parametrize("size", [6, 5])  # 5: one has three samples, the other two
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("model", MODELS)
def test_two_processes_have_the_gradients_of_one(
    steps: list[dict[Any, Any]], model: str, fsdp: bool, size: int
) -> None:
    first, second = (result[model, fsdp, size] for result in steps)
    one = trained_a_step(Ranks(), MODELS[model](), size=size)
    assert first["loss"] == second["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert first["norm"] == second["norm"] == pytest.approx(one["norm"], rel=1e-5)
    assert first["names"] == one["names"]
    assert first["gradients"].keys() == one["gradients"].keys()
    torch.testing.assert_close(first["extra"], one["extra"])
    for name, gradient in one["gradients"].items():
        # Sums of float32 in another order.
        torch.testing.assert_close(first["gradients"][name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("max_norm", [0.1, 100.0])
def test_one_process_clips_as_torch_does(max_norm: float) -> None:
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.zeros(n)) for n in (3, 40, 7)] for _ in range(2))
    for a, b in zip(ours[:2], theirs, strict=False):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    norm = gradient_norm(iter(ours))
    clip_gradients(iter(ours), max_norm, norm)
    assert norm == nn.utils.clip_grad_norm_(theirs, max_norm)
    assert ours[2].grad is None
    for a, b in zip(ours[:2], theirs, strict=False):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


# --------------------------------------------------------------------------------------------------------- training

PROJECTED = SyncOptions(projector_width=8, noise_gap=0.2, noise_range=(0.2, 0.8))
PLANS = {
    "plain": PLAN,
    "uneven": replace(PLAN, batch_size=5),
    "projected": replace(PLAN, batch_size=8, accumulate=2, sync=PROJECTED, more_ema_decays=(0.5,)),
    "taught": replace(PLAN, batch_size=8, accumulate=2, sync=SyncOptions(teacher_decay=0.9)),
}
TRAININGS = [(name, fsdp) for name in PLANS for fsdp in (False, True) if not (fsdp and name == "taught")]


def run(folder: Path, plan: TrainingPlan, fsdp: bool = False, steps: int | None = None) -> None:
    train(tiny_sit(), tiny_samples(), replace(plan, steps=steps or plan.steps), folder, fsdp=fsdp)


def all_trainings(folder: Path) -> list[dict[str, Tensor]]:
    """The averaged weights that every process gets, and what it was shown on the way."""
    with processes() as ranks:
        for name, fsdp in TRAININGS:
            run(folder / f"{name}-{fsdp}", PLANS[name], fsdp)
        seen: list[Any] = []

        def direct(step: int, model: Backbone) -> Decision:
            seen.append(("direct", step, type(model.module).__name__))
            return Decision((LayerPair("blocks.1", "blocks.2"),), {"because": step})

        trained = train(
            tiny_sit(),
            tiny_samples(),
            replace(PLAN, pairs=()),
            folder / "directed",
            observe=lambda step, model: seen.append(("observe", step, ranks.rank)),
            observe_at=(0, 5),
            log=lambda step, row: seen.append(("log", step)),
            progress=lambda *now: seen.append(("progress", *now[:2])),
            direct=direct,
            direct_at=(4,),
            fsdp=ranks.world_size > 1,
        )
    return [dict(trained.module.state_dict()), {"seen": seen}]  # type: ignore[dict-item]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name in PLANS:
        run(folder / name, PLANS[name])
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Runs of two processes, and what each gave."""
    folder = tmp_path_factory.mktemp("both")
    return folder, Started(folder, all_trainings, folder).results()


def log(folder: Path, *columns: str) -> list[list[float]]:
    return [[row[name] for name in columns] for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines())]


def assert_close(folder: Path, wanted: Path) -> None:
    for place in sorted(wanted.glob("*.safetensors")):
        found, tensors = load_file(folder / place.name), load_file(place)
        for name, tensor in tensors.items():
            if not name.endswith("qkv.bias"):  # The bias of the keys has a gradient of nothing but rounding.
                # Adam divides by the gradient's size: the rounding of a small one grows to a part of a step of 1e-3.
                torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("name", "fsdp"), TRAININGS)
def test_two_processes_have_the_loss_curve_of_one(both: tuple[Path, Any], alone: Path, name: str, fsdp: bool) -> None:
    folder = both[0] / f"{name}-{fsdp}"
    found, wanted = (torch.tensor(log(place, "step", "loss", "grad_norm")) for place in (folder, alone / name))
    assert len(found) == 8
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)  # Eight steps of rounding.
    assert_close(folder, alone / name)


def test_the_first_alone_calls_and_all_get_the_model(both: tuple[Path, list[Any]]) -> None:
    folder, ((weights, first), (others, second)) = both
    assert second == {"seen": []}
    assert [what for what in first["seen"] if what[0] in ("observe", "direct")] == [
        ("observe", 0, 0),
        ("direct", 4, "SiT"),
        ("observe", 5, 0),
    ]
    assert [what for what in first["seen"] if what[0] == "log"] == [("log", step) for step in range(1, 9)]
    assert [what for what in first["seen"] if what[0] == "progress"] == [("progress", step, 8) for step in range(1, 9)]
    written = load_file(folder / "directed" / "model.safetensors")
    for name, tensor in written.items():
        assert torch.equal(weights[name], tensor)
        assert torch.equal(others[name], tensor)


def test_a_decision_of_the_first_holds_for_all(both: tuple[Path, Any], tmp_path: Path) -> None:
    decided = Decision((LayerPair("blocks.1", "blocks.2"),), {"because": 4})
    plan = replace(PLAN, pairs=())
    train(tiny_sit(), tiny_samples(), plan, tmp_path, direct=lambda *_: decided, direct_at=(4,))
    assert_close(both[0] / "directed", tmp_path)
    name = "decisions.jsonl"
    assert (both[0] / "directed" / name).read_text() == (tmp_path / name).read_text()


def in_pieces(folder: Path, fsdp: bool, steps: list[int]) -> None:
    for step in steps:
        run(folder, PLAN, fsdp, step)


def test_any_number_of_processes_continues_any_other(alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for num, fsdp, steps in ((2, True, 2), (3, False, 4), (1, False, 5), (3, True, 6), (2, False, 8)):
        Started(tmp_path, in_pieces, folder, fsdp, [steps], num=num).results() if num > 1 else run(
            folder, PLAN, steps=5
        )
    assert [row[0] for row in log(folder, "step")] == list(range(1, 9))
    assert_close(folder, alone / "plain")


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_three_processes_resume_bit_for_bit(tmp_path: Path, fsdp: bool) -> None:
    """Three, since a sum of two has no order; DDP makes its buckets anew after the first step of a start."""
    for name, steps in (("whole", [8]), ("pieces", [3, 8])):
        Started(tmp_path, in_pieces, tmp_path / name, fsdp, steps, num=3).results()
    assert_bit_equal(tmp_path / "pieces", tmp_path / "whole")


def assert_bit_equal(folder: Path, wanted: Path) -> None:
    assert (folder / "model.safetensors").read_bytes() == (wanted / "model.safetensors").read_bytes()
    assert log(folder, "step", "loss", "grad_norm") == log(wanted, "step", "loss", "grad_norm")


# -------------------------------------------------------------------------------------------------------- endings

LONG = replace(PLAN, steps=30, checkpoint_every=2, log_every=5)


def long_run(folder: Path, fsdp: bool) -> None:
    def progress(step: int, steps: int, loss: float) -> None:
        (folder.parent / "step").write_text(str(step))

    train(tiny_sit(), tiny_samples(), LONG, folder, fsdp=fsdp, progress=progress)


def long_runs(folders: list[Path], fsdp: bool) -> None:
    for folder in folders:
        long_run(folder, fsdp)


def kill_at(step: int, rank: int, folder: Path, fsdp: bool) -> None:
    """SIGKILL for one process at this step or soon after; the others end by themselves."""
    reached = folder.parent / "step"
    reached.write_text("0")
    started = Started(folder.parent, long_run, folder, fsdp)
    until = time.monotonic() + 60
    while int(reached.read_text() or 0) < step:
        assert time.monotonic() < until
        time.sleep(0.002)
    started.processes[rank].kill()
    codes = started.exit_codes()
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] != 0, "the run was over"


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_killed_five_times_it_ends_bit_equal(tmp_path: Path, fsdp: bool) -> None:
    for lowest in range(1, 26, 5):
        kill_at(lowest + random.randrange(4), random.randrange(2), tmp_path / "again", fsdp)
    Started(tmp_path, long_runs, [tmp_path / "again", tmp_path / "whole"], fsdp).results()
    assert_bit_equal(tmp_path / "again", tmp_path / "whole")


def test_a_killed_process_is_told_of_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "step").write_text("0")
    started = Started(tmp_path, long_run, tmp_path / "run", False, num=3)
    while int((tmp_path / "step").read_text() or 0) < 5:
        time.sleep(0.002)
    started.processes[2].kill()
    assert sorted(started.exit_codes()) == [-signal.SIGKILL, 1, 2]
    said = "".join(place.read_text() for place in started.said)
    assert said == (
        "ConnectionError: another process was killed, or its machine is gone; "
        "repeat the command to go on from the last checkpoint\n"
    )


def failing(folder: Path, where: int | None, what: str) -> None:
    samples, whole_batch = tiny_samples(), tiny_samples().batch

    def batch(indices: Any) -> Any:
        batch.calls += 1  # type: ignore[attr-defined]
        if batch.calls > 4 and os.environ["RANK"] in (str(where), "0" if where is None else str(where)):  # type: ignore[attr-defined]
            raise OSError("shard 7 cannot be read")
        return whole_batch(indices)

    batch.calls = 0  # type: ignore[attr-defined]
    if what == "data":
        samples.batch = batch  # type: ignore[method-assign]
    plan = replace(PLAN, learning_rate=1e30, clip_norm=0.0) if what == "diverging" else PLAN
    with processes():
        train(
            tiny_sit(),
            samples,
            replace(plan, batch_size=2 if what == "batch" else 6, accumulate=2 if what == "batch" else 1),
            folder,
            observe=lambda step, model: 1 / 0 if what == "observer" else None,  # type: ignore[arg-type, return-value]
            observe_at=(3,),
        )


@pytest.mark.parametrize(
    ("what", "where", "message"),
    [
        ("data", 0, "OSError: shard 7 cannot be read"),
        ("data", 1, "OSError: shard 7 cannot be read"),
        ("observer", 0, "ZeroDivisionError: division by zero"),
        ("diverging", None, r"ValueError: the .* is (nan|inf) at step \d+; lower the learning rate .*"),
        ("batch", None, "ValueError: a batch of 2 cannot be cut into 2 equal parts on each of 2 processes; change .*"),
    ],
)
def test_an_error_ends_all_and_is_told_once(tmp_path: Path, what: str, where: int | None, message: str) -> None:
    started = Started(tmp_path, failing, tmp_path / "run", where, what)
    assert sorted(started.exit_codes()) == [1, 2]
    # torch itself logs that its store is gone where the first process kept it; under torchrun the agent does.
    lines = [line for place in started.said for line in place.read_text().splitlines() if re.match(r"\w+Error: ", line)]
    assert len(lines) == 1
    assert re.fullmatch(message, lines[0])
    if where is not None:
        assert started.processes[where].exitcode == 2


SCRIPT = """
import sys
from dataclasses import replace
from test_distributed import PLAN, run
from pathlib import Path
if __name__ == "__main__":
    run(Path(sys.argv[1]), PLAN)
"""


def test_torchrun_starts_the_processes(both: tuple[Path, Any], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    path = os.pathsep.join([str(HELPERS), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    ran = subprocess.run(
        [*command, tmp_path / "run"],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ""
    assert_bit_equal(tmp_path / "run", both[0] / "plain-False")
