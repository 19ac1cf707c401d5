"""LayerSync on two processes (DDP, `fully_shard`, accumulation) against the formula on the whole batch."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from residual_network import WEIGHT, Network, cosines_of, residuals, task
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from layerprobe.layersync.loss import LayerSync
from layerprobe.layersync.options import SyncOptions

pytestmark = pytest.mark.slow  # two processes that import torch

PAIRS = [("blocks.0", "blocks.2"), ("blocks.1", "blocks.3")]
X = torch.randn(8, 7, 16, generator=torch.Generator().manual_seed(1))
LEVELS = torch.tensor([0.1, 0.2, 0.9, 0.3, 0.4, 0.15, 0.6, 0.3])  # the second of 4 parts has none from 0.5 to 1
RANGE = SyncOptions(noise_range=(0.5, 1.0))
HEADS = SyncOptions(projector_width=8)
TEACHER = SyncOptions(teacher_decay=0.5)
STOP = 0.835  # between the cosines of the two pairs
Gradients = dict[str, Tensor]


def network() -> Network:
    """The test network without its unused layer, for which DDP would wait."""
    module = Network(reentrant=False)
    del module.unused
    return module


def rows(rank: int, part: int = 0, parts: int = 1) -> slice:
    """The rows of one part of a process' half of the batch."""
    size = len(X) // 2 // parts
    start = rank * len(X) // 2 + part * size
    return slice(start, start + size)


def full(gradients: dict[str, Tensor | None]) -> Gradients:
    whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items() if g is not None}
    return {name: g.detach().clone() for name, g in whole.items()}


def of(module: nn.Module) -> Gradients:
    return full({name.removeprefix("module."): parameter.grad for name, parameter in module.named_parameters()})


# --- one process of two


def ddp(rank: int) -> Gradients:
    model = DistributedDataParallel(network())
    with LayerSync(model, PAIRS, weight=WEIGHT) as sync:
        (task(model(X[rows(rank)])) + sync.loss()).backward()
    return of(model)


def ddp_accumulating(rank: int) -> Gradients:
    model = DistributedDataParallel(network())
    with LayerSync(model, PAIRS, weight=WEIGHT, options=RANGE) as sync:
        for part in range(2):
            here = rows(rank, part, 2)
            model.require_backward_grad_sync = part == 1
            ((task(model(X[here])) + sync.loss(noise_level=LEVELS[here])) / 2).backward()
    return of(model)


def ddp_projecting(rank: int) -> Gradients:
    model = DistributedDataParallel(network())
    sync = LayerSync(model, PAIRS, weight=WEIGHT, options=HEADS)
    torch.manual_seed(3)
    sync.prepare(X[:1])
    assert sync.projectors is not None
    sync.projectors = DistributedDataParallel(sync.projectors)
    with sync:
        (task(model(X[rows(rank)])) + sync.loss()).backward()
        if rank == 0:
            assert sync.statistics()["gradient norm blocks.0 <- blocks.2"] > 0  # without waiting for the others
    return of(model) | of(sync.projectors)


def shard(model: Network) -> None:
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)


def fsdp(rank: int) -> Gradients:
    model = network()
    shard(model)
    with LayerSync(model, PAIRS, weight=WEIGHT, options=RANGE) as sync:
        here = rows(rank)
        (task(model(X[here])) + sync.loss(noise_level=LEVELS[here])).backward()
    return of(model)


def fsdp_taught(rank: int) -> Gradients:
    model = network()
    sync = LayerSync(model, PAIRS, weight=WEIGHT, options=TEACHER)
    shard(model)
    assert isinstance(sync.teacher, Network)
    shard(sync.teacher)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    sync.update_teacher()
    with sync:
        output = model(X[rows(rank)])
        with sync.teaching() as teacher:
            teacher(X[rows(rank)])
        (task(output) + sync.loss()).backward()
    return of(model)


def followed(rank: int) -> Gradients:
    """The running cosines, and what the loss is made of once one pair has ended."""
    model = DistributedDataParallel(network())
    with LayerSync(model, PAIRS, weight=WEIGHT, stop_cosine=STOP, say=lambda _: None) as sync:
        for _ in range(2):
            model(X[rows(rank)])
            sync.loss()
        return sync.state_dict() | {"ended": torch.tensor([sync.has_ended(pair) for pair in sync.pairs])}


CASES: dict[str, Callable[[int], Gradients]] = {
    case.__name__: case for case in (ddp, ddp_accumulating, ddp_projecting, fsdp, fsdp_taught)
}


def worker(rank: int, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results: dict[str, Any] = {}
    for name, case in (CASES | {"followed": followed}).items():
        try:
            results[name] = case(rank)
        except Exception as error:  # the other process would wait forever; the test reports the error
            results[name] = f"{type(error).__name__}: {error}"
    torch.save(results, f"{folder}/{rank}.pt")
    gc.collect()  # A DDP module must not outlive its group, see `layerprobe.ranks._leave`.
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


# --- one process with the whole batch, by the formula


def whole_batch(name: str) -> Gradients:
    model, heads = network(), None
    if name == "ddp_projecting":
        sync = LayerSync(model, PAIRS, weight=WEIGHT, options=HEADS)
        torch.manual_seed(3)
        sync.prepare(X[:1])
        heads = sync.projectors
    teacher_model = model
    if name == "fsdp_taught":
        teacher_model = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, follower in zip(model.parameters(), teacher_model.parameters(), strict=True):
                parameter += 0.1
                follower += 0.05
    counts = ((LEVELS >= 0.5) if name in ("ddp_accumulating", "fsdp") else torch.ones(len(X))).unsqueeze(1)
    students, teachers = residuals(model, X), residuals(teacher_model, X)
    loss = task(model.head(students["blocks.3"]))
    for index, (student, teacher) in enumerate(PAIRS):
        token = students[student] if heads is None else heads.heads[index](students[student])
        loss = loss - WEIGHT * (counts * cosines_of(token, teachers[teacher].detach())).mean()
    loss.backward()
    return of(model) | ({} if heads is None else of(heads))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_gradients_of_one(results: list[dict[str, Any]], name: str) -> None:
    expected = whole_batch(name)
    for gradients in (by_case[name] for by_case in results):
        assert not isinstance(gradients, str), gradients
        assert gradients.keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-6)


def test_the_end_of_an_alignment_is_decided_by_all_processes_together(results: list[dict[str, Any]]) -> None:
    tokens = residuals(network(), X)
    whole = {pair: float(cosines_of(tokens[pair[0]], tokens[pair[1]]).mean().detach()) for pair in PAIRS}
    assert min(whole.values()) < STOP < max(whole.values())
    for by_case in results:
        state = by_case["followed"]
        assert not isinstance(state, str), state
        for (student, teacher), cosine in whole.items():
            assert float(state[f"running cosine {student} <- {teacher}"]) == pytest.approx(cosine, rel=1e-5)
        assert state["ended"].tolist() == [cosine >= STOP for cosine in whole.values()]
