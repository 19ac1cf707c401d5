"""ProbeEvery in training loops: it sees what changes and changes nothing."""

from __future__ import annotations

import gc
import multiprocessing
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from gated_network import CLASS, REST, Gated, classes, gated, let_through
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import layerprobe as lp
from layerprobe.analyses.front import probe_every
from layerprobe.layersync import LayerSync

OPTIONS: dict[str, Any] = {"schedule": "flow", "prediction": "velocity", "shape": (1, 2, 4)}
DATA = classes()


class Fragile(nn.Module):
    """A network that everything could disturb: dropout, running statistics, hooks of LayerSync."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(1), nn.Dropout(0.5)) for _ in range(3)
        )

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        tokens = x_t.flatten(1)[:, None] + t[:, None, None]
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return tokens.view_as(x_t)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        tokens = x_t.flatten(1)[:, None] + t[:, None, None]
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return tokens.view_as(x_t)


def trained(folder: Path | None) -> tuple[nn.Module, list[Tensor]]:
    """A training of six steps in bfloat16, measured between forward and backward if there is a folder."""
    network = Fragile()
    network.train()
    network.blocks[2].eval()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    x = DATA.train.batch(range(60)).x
    probe = None
    if folder:
        options = {"every": 2, "max_share": 1, "num_samples": 48, "say": lambda _: None, "layers": "blocks.*"}
        probe = lp.ProbeEvery(network, DATA, out=folder, **options, **OPTIONS)
    trace = []
    with LayerSync(network, [("blocks.0", "blocks.2")], weight=0.3, say=lambda _: None) as sync:
        for step in range(6):
            with torch.autocast("cpu", torch.bfloat16):
                t = torch.rand(len(x))
                loss = (network(x + torch.randn_like(x), t) - x).square().mean()
                if probe:
                    probe(step)
                loss = loss + sync.loss()
            loss.backward()
            optimizer.step()
            if probe:
                probe(step)
            trace += [parameter.grad.clone() for parameter in network.parameters()]
            optimizer.zero_grad()
    if probe:
        assert sorted(set(probe.table["step"])) == [0, 2, 4]
        probe.close()
    return network, [*trace, torch.get_rng_state()]


def test_training_with_and_without_it_gives_equal_bytes(tmp_path: Path) -> None:
    (plain, plain_trace), (probed, probed_trace) = trained(None), trained(tmp_path / "curves")
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, probed.state_dict()[name]), name
    assert all(torch.equal(one, other) for one, other in zip(plain_trace, probed_trace, strict=True))
    assert [part.training for part in plain.modules()] == [part.training for part in probed.modules()]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in probed.modules())


def test_a_loop_gets_curves_in_a_few_lines() -> None:
    network, rows = gated(REST, CLASS), []
    x, y = DATA.train.batch(range(60)).x, DATA.train.labels
    with lp.ProbeEvery(
        network, x, y, every=5, max_share=1, pairs=[("blocks.0", "blocks.1")], say=lambda _: None,
        tracker=lambda step, row: rows.append(step),
    ) as probe:  # fmt: skip
        assert [finding.layers for finding in probe(0)] == [("blocks.1",)]
        let_through(network, CLASS, REST)
        assert "richest moved" in [finding.code for finding in probe(6)]  # step 5 was passed over
        assert probe(9) == probe(9, last=True)[3:] == []
        folder = probe._curves.folder
    assert rows == [0, 6, 9]
    assert 0 < probe.cost_s < 60
    assert probe.plot().get_suptitle().startswith("The richest layer (probe accuracy) moved from blocks.1 to blocks.0")
    assert (folder / "layer_curves.svg").is_file()


def test_only_the_first_process_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = lp.ProbeEvery(gated(REST, CLASS), DATA, say=pytest.fail)
    monkeypatch.setattr(probe_every, "_rank", lambda: 1)
    assert probe(0) == []
    probe.close()
    assert probe.table.empty


def in_ddp(rank: int, folder: str) -> None:
    """One of two processes that train together, without and with ProbeEvery; writes what came out."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    meet = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=meet)
    x = DATA.train.batch(range(30 * rank, 30 * rank + 30)).x
    trained = [trained_in_ddp(x, out) for out in (None, Path(folder) / "curves")]
    torch.save({"weights": [weights for weights, _ in trained], "cost_s": trained[1][1]}, f"{folder}/{rank}.pt")
    gc.collect()  # A DDP module must not outlive its group, see `layerprobe.ranks._leave`.
    dist.destroy_process_group()


def trained_in_ddp(x: Tensor, out: Path | None) -> tuple[dict[str, Tensor], float]:
    """Weights after five steps, and the seconds that ProbeEvery took."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Plain())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"every": 2, "max_share": 1, "num_samples": 48, "say": lambda _: None, "layers": "blocks.*"}
    probe: Any = lp.ProbeEvery(model, DATA, out=out, **options, **OPTIONS) if out else None
    with LayerSync(model, 0, 1, say=lambda _: None) as sync:
        for step in range(5):
            if probe:
                probe(step)
            loss = (model(x, torch.full((len(x),), 0.5)) - x).square().mean()
            (loss + sync.loss()).backward()
            optimizer.step()
            optimizer.zero_grad()
    if probe:
        probe.close()
    return model.module.state_dict(), probe.cost_s if probe else 0.0


@pytest.mark.slow  # two processes that import everything
def test_two_processes_train_alike_with_it_and_the_first_one_measures(tmp_path: Path) -> None:
    processes = [
        multiprocessing.get_context("forkserver").Process(target=in_ddp, args=(i, str(tmp_path))) for i in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["cost_s"] > 0 == second["cost_s"]
    assert sorted(set(pd.read_csv(tmp_path / "curves" / "layer_curves.csv")["step"])) == [0, 2, 4]
    for weights in (first["weights"][1], *second["weights"]):
        assert all(torch.equal(tensor, weights[name]) for name, tensor in first["weights"][0].items())
    assert (tmp_path / "curves" / "layer_curves.png").is_file()


def test_what_cannot_be_probed_is_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"a model that is open carries its layers; pass them to lp\.open"):
        lp.ProbeEvery(lp.open(gated(CLASS)), DATA, layers="blocks.*")
    with pytest.raises(ValueError, match="a module does not say its layers"):
        lp.ProbeEvery(Gated(), DATA)
    network = gated(CLASS)
    network.module.blocks[0].matrix.ds_id = 1
    with pytest.raises(ValueError, match="the weights are shards of several processes, which one process cannot"):
        lp.ProbeEvery(network, DATA)(0)
