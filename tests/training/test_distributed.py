"""Several processes train like one, end together, and resume each other's checkpoints."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from places import HELPERS
from safetensors.torch import load_file
from started import Started
from tiny import SHAPE, tiny_samples, tiny_sit
from torch import Tensor, nn

from layerprobe.backbones.base import Backbone, wrap
from layerprobe.layersync.loss import LayerSync
from layerprobe.layersync.options import SyncOptions
from layerprobe.layersync.pair import LayerPair
from layerprobe.ranks import Ranks, processes
from layerprobe.training.distributed import (
    average_gradients,
    clip_gradients,
    gathered,
    gradient_norm,
    host_copy,
    parallel,
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


def test_a_copy_on_the_host_is_whole_and_its_own() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    module[2].weight = module[0].weight  # tied, as of an embedding and its head
    module[0].bias.requires_grad = False
    copied = host_copy(module)
    before, after = module.state_dict(), copied.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not {t.data_ptr() for t in before.values()} & {t.data_ptr() for t in after.values()}
    assert copied[2].weight is copied[0].weight
    assert not copied[0].bias.requires_grad
    assert copied[2].bias.requires_grad


def test_one_process_does_not_shard() -> None:
    with pytest.raises(ValueError, match=r"^--fsdp needs several processes to share the weights; start them with"):
        parallel(tiny_sit(), Ranks(), fsdp=True)


# ---------------------------------------------------------------------------------------------- gradients and state


class Strange(nn.Module):
    """A network with an unused parameter, one shorter than the number of processes, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(2, 2)
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, None]:
        return (self.second(self.first(x.flatten(1)).tanh()) * self.factor).view_as(x), None


def strange() -> Backbone:
    def forward(module: Any, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        assert module.factor.shape == (1,)  # Adapters use attributes of the network.
        output: Tensor = module(x, t)[0]
        return output

    torch.manual_seed(0)
    return wrap(
        Strange(), layers=("first", "second"), schedule="flow", prediction="velocity", shape=SHAPE, forward=forward
    )


MODELS = {"sit": tiny_sit, "strange": strange}


def trained_a_step(ranks: Ranks, backbone: Backbone, *, size: int, fsdp: bool = False) -> dict[str, Any]:
    """Loss, gradients and their norm for a batch of this size, with LayerSync; shards are gathered."""
    generator = torch.Generator().manual_seed(1)
    x, level = torch.randn(size, *SHAPE, generator=generator), torch.rand(size, generator=generator)
    targets, condition = torch.randn(size, *SHAPE, generator=generator), torch.arange(size) % 3
    rows = list(ranks.mine(range(size)))
    share = ranks.share(len(rows), size)
    backbone.module.train()
    live = parallel(backbone, ranks, fsdp=fsdp)
    extra = nn.Parameter(torch.ones(3))  # Like a projector: neither sharded nor in the network.
    with LayerSync(backbone.module, [(backbone.layers[0], backbone.layers[-1])], weight=0.5) as sync:
        output = live.predict(x[rows], level[rows], condition[rows])
        loss = (output - targets[rows]).square().mean() + sync.loss() + extra.square().sum()
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


@pytest.mark.parametrize("size", [6, 5])  # 5: three samples on one process, two on the other
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
        # float32 sums in another order.
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
    """The averaged weights that every process gets, and the calls of its functions."""
    with processes() as ranks:
        for name, fsdp in TRAININGS:
            run(folder / f"{name}-{fsdp}", PLANS[name], fsdp)
        calls: list[Any] = []

        def direct(step: int, model: Backbone) -> Decision:
            calls.append(("direct", step, type(model.module).__name__))
            return Decision((LayerPair("blocks.1", "blocks.2"),), {"because": step})

        trained = train(
            tiny_sit(),
            tiny_samples(),
            replace(PLAN, pairs=()),
            folder / "directed",
            observe=lambda step, model: calls.append(("observe", step, ranks.rank)),
            observe_at=(0, 5),
            log=lambda step, row: calls.append(("log", step)),
            progress=lambda *now: calls.append(("progress", *now[:2])),
            direct=direct,
            direct_at=(4,),
            fsdp=ranks.world_size > 1,
        )
    return [dict(trained.module.state_dict()), {"calls": calls}]  # type: ignore[dict-item]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name in PLANS:
        run(folder / name, PLANS[name])
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Runs of two processes, and their results."""
    folder = tmp_path_factory.mktemp("both")
    return folder, Started(folder, all_trainings, folder).results()


def log(folder: Path, *columns: str) -> list[list[float]]:
    return [[row[name] for name in columns] for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines())]


def assert_close(folder: Path, expected_folder: Path) -> None:
    for path in sorted(expected_folder.glob("*.safetensors")):
        tensors, expected = load_file(folder / path.name), load_file(path)
        for name, tensor in expected.items():
            if not name.endswith("qkv.bias"):  # The gradient of the keys' bias consists of rounding errors.
                # Adam divides by the size of the gradient, so rounding of a small one becomes a part of a step of 1e-3.
                torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("name", "fsdp"), TRAININGS)
def test_two_processes_have_the_loss_curve_of_one(both: tuple[Path, Any], alone: Path, name: str, fsdp: bool) -> None:
    folder = both[0] / f"{name}-{fsdp}"
    rows, expected = (torch.tensor(log(path, "step", "loss", "grad_norm")) for path in (folder, alone / name))
    assert len(rows) == 8
    torch.testing.assert_close(rows[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=0)  # rounding of eight steps
    assert_close(folder, alone / name)


def test_only_the_first_process_calls_functions_and_all_get_the_model(both: tuple[Path, list[Any]]) -> None:
    folder, ((weights, first), (others, second)) = both
    assert second == {"calls": []}
    assert [call for call in first["calls"] if call[0] in ("observe", "direct")] == [
        ("observe", 0, 0),
        ("direct", 4, "SiT"),
        ("observe", 5, 0),
    ]
    assert [call for call in first["calls"] if call[0] == "log"] == [("log", step) for step in range(1, 9)]
    assert [call for call in first["calls"] if call[0] == "progress"] == [("progress", step, 8) for step in range(1, 9)]
    written = load_file(folder / "directed" / "model.safetensors")
    for name, tensor in written.items():
        assert torch.equal(weights[name], tensor)
        assert torch.equal(others[name], tensor)


def test_a_decision_of_the_first_process_holds_for_all(both: tuple[Path, Any], tmp_path: Path) -> None:
    decided = Decision((LayerPair("blocks.1", "blocks.2"),), {"because": 4})
    plan = replace(PLAN, pairs=())
    train(tiny_sit(), tiny_samples(), plan, tmp_path, direct=lambda *_: decided, direct_at=(4,))
    assert_close(both[0] / "directed", tmp_path)
    name = "decisions.jsonl"
    assert (both[0] / "directed" / name).read_text() == (tmp_path / name).read_text()


def in_pieces(folder: Path, fsdp: bool, steps: list[int]) -> None:
    for step in steps:
        run(folder, PLAN, fsdp, step)


def test_any_number_of_processes_resumes_a_run_of_any_other(alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for num, fsdp, steps in ((2, True, 2), (3, False, 4), (1, False, 5), (3, True, 6), (2, False, 8)):
        Started(tmp_path, in_pieces, folder, fsdp, [steps], num=num).results() if num > 1 else run(
            folder, PLAN, steps=5
        )
    assert [row[0] for row in log(folder, "step")] == list(range(1, 9))
    assert_close(folder, alone / "plain")


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_three_processes_resume_bit_for_bit(tmp_path: Path, fsdp: bool) -> None:
    """Three, since a sum of two does not depend on the order; DDP rebuilds its buckets after the first step."""
    for name, steps in (("whole", [8]), ("pieces", [3, 8])):
        Started(tmp_path, in_pieces, tmp_path / name, fsdp, steps, num=3).results()
    assert_bit_equal(tmp_path / "pieces", tmp_path / "whole")


def assert_bit_equal(folder: Path, expected: Path) -> None:
    assert (folder / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert log(folder, "step", "loss", "grad_norm") == log(expected, "step", "loss", "grad_norm")


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
    """Kills one process at this step or soon after; the others end by themselves."""
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
    assert codes[1 - rank] != 0, "the run was finished"


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_a_run_killed_five_times_ends_bit_equal(tmp_path: Path, fsdp: bool) -> None:
    for lowest in range(1, 26, 5):
        kill_at(lowest + random.randrange(4), random.randrange(2), tmp_path / "again", fsdp)
    Started(tmp_path, long_runs, [tmp_path / "again", tmp_path / "whole"], fsdp).results()
    assert_bit_equal(tmp_path / "again", tmp_path / "whole")


def test_a_killed_process_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "step").write_text("0")
    started = Started(tmp_path, long_run, tmp_path / "run", False, num=3)
    while int((tmp_path / "step").read_text() or 0) < 5:
        time.sleep(0.002)
    started.processes[2].kill()
    assert sorted(started.exit_codes()) == [-signal.SIGKILL, 1, 2]
    stderr = "".join(path.read_text() for path in started.stderr_files)
    assert stderr == (
        "layerprobe: blocks.0 <- blocks.2: 4 tokens of width 16\n"
        "ConnectionError: another process was killed, or its machine is unreachable; "
        "repeat the command to continue from what is finished\n"
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
def test_an_error_ends_all_processes_and_is_reported_once(
    tmp_path: Path, what: str, where: int | None, message: str
) -> None:
    started = Started(tmp_path, failing, tmp_path / "run", where, what)
    assert sorted(started.exit_codes()) == [1, 2]
    # torch itself logs the loss of its store, which the first process holds; under torchrun the agent holds it.
    lines = "".join(path.read_text() for path in started.stderr_files).splitlines()
    lines = [line for line in lines if re.match(r"\w+Error: ", line)]
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
