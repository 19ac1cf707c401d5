"""Training equals a short loop written by hand, with any alignment, and survives interruptions at any moment."""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from started import kill_after
from tiny import SHAPE, tiny_samples, tiny_sit
from torch import Tensor, nn
from torch.nn import functional as F

from layerprobe.backbones.base import Backbone, wrap
from layerprobe.backbones.heads import with_heads
from layerprobe.checkpoints.opening import open_checkpoint, training_record
from layerprobe.data.samples import TensorSamples
from layerprobe.layersync.options import SyncOptions
from layerprobe.layersync.pair import LayerPair
from layerprobe.noise.schedules import LinearPath
from layerprobe.records import write_record
from layerprobe.training import loop
from layerprobe.training.batches import TrainingBatch, batches
from layerprobe.training.loop import Decision, train
from layerprobe.training.losses import prediction_loss
from layerprobe.training.plan import TrainingPlan

PAIR = LayerPair("blocks.0", "blocks.2")
PLAN = TrainingPlan(
    steps=13,
    batch_size=5,
    learning_rate=1e-2,
    warmup_steps=3,
    weight_decay=0.1,
    clip_norm=0.5,
    ema_decay=0.8,
    label_drop=0.25,
    seed=3,
    checkpoint_every=4,
    log_every=3,
)
NUM = 12


def model(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def log(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(row.pop("samples_per_s") > 0 for row in rows)
    return rows


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Interruption(Exception):
    pass


def interrupt_at(step: int) -> Callable[[int, int, float], None]:
    def progress(now: int, steps: int, loss: float) -> None:
        if now == step:
            raise Interruption

    return progress


# ------------------------------------------------------------------------------------------------------------- training


def few_lines(
    backbone: Backbone, plan: TrainingPlan, pairs_at: Callable[[int], tuple[LayerPair, ...]] | None = None
) -> dict[str, Tensor]:
    """The averaged weights of the whole recipe, written by hand with hooks instead of LayerSync."""
    module: Any = backbone.module
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    ema = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=plan.learning_rate, weight_decay=plan.weight_decay, foreach=False
    )
    outputs: dict[str, Tensor] = {}
    for i, block in enumerate(module.blocks):
        block.register_forward_hook(lambda _, __, out, name=f"blocks.{i}": outputs.update({name: out}))
    for step, batch in enumerate(batches(tiny_sit(), tiny_samples(NUM), plan)):
        level = batch.level.float().view(-1, 1, 1, 1)
        velocity = module((1 - level) * batch.x + level * batch.eps, 1 - level.flatten(), batch.condition)
        loss = F.mse_loss(velocity, batch.x - batch.eps)
        for pair in pairs_at(step) if pairs_at else plan.pairs:
            cosine = F.cosine_similarity(outputs[pair.student], outputs[pair.teacher].detach(), dim=-1)
            loss = loss - plan.weight * cosine.mean()
        optimizer.param_groups[0]["lr"] = plan.learning_rate * min(1, (step + 1) / (plan.warmup_steps + 1))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in trained.values()))
        for p in trained.values():
            p.grad *= min(1, plan.clip_norm / (norm + 1e-6))
        optimizer.step()
        decay = min(plan.ema_decay, (step + 2) / (step + 11))
        for name, p in trained.items():
            ema[name] = decay * ema[name] + (1 - decay) * p.detach()
    return ema


def test_training_is_bit_equal_to_a_plain_loop(tmp_path: Path) -> None:
    """The numbers of the first version, which later additions must not change."""
    module = tiny_sit().module.train()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    ema = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.1, fused=True)
    losses = []
    for step, batch in enumerate(batches(tiny_sit(), tiny_samples(NUM), PLAN)):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, (step + 1) / 4)
        level = batch.level.float().view(-1, 1, 1, 1)
        x_t = (1 - batch.level).float().view(-1, 1, 1, 1) * batch.x + level * batch.eps
        velocity = -module(x_t, 1 - level.flatten(), batch.condition)
        loss = ((velocity - (-1 * batch.x + batch.eps)) ** 2).flatten(1).mean(1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 0.5)
        optimizer.step()
        losses.append(float(loss.detach()))
        for name, p in trained.items():
            ema[name].lerp_(p.detach(), 1 - min(0.8, (step + 2) / (step + 11)))
    reported: list[float] = []
    train(tiny_sit(), tiny_samples(NUM), PLAN, tmp_path, progress=lambda _, __, loss: reported.append(loss))
    assert reported == losses
    averages = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(averages[name], average) for name, average in ema.items())


@pytest.mark.parametrize("pairs", [(), (PAIR,), (PAIR, LayerPair("blocks.0", "blocks.1"))], ids=len)
def test_training_equals_a_short_loop(tmp_path: Path, pairs: tuple[LayerPair, ...]) -> None:
    plan = replace(PLAN, pairs=pairs)
    trained = train(tiny_sit(), tiny_samples(NUM), plan, tmp_path)
    expected = few_lines(tiny_sit(), plan)
    for name, tensor in expected.items():
        weight = trained.module.get_parameter(name).detach()
        if name.endswith("qkv.bias"):  # Softmax ignores the bias of the keys: its gradient consists of rounding errors.
            weight, tensor = weight[[*range(16), *range(32, 48)]], tensor[[*range(16), *range(32, 48)]]
        # Adam divides by the size of the gradient, so rounding of a small one becomes 1e-3 of a step of 1e-2.
        torch.testing.assert_close(weight, tensor, rtol=1e-4, atol=3e-5)


def test_alignment_changes_training_only_through_its_loss(tmp_path: Path) -> None:
    for name, pairs, weight in (("none", (), 0.3), ("without weight", (PAIR,), 0.0), ("aligned", (PAIR,), 0.3)):
        train(tiny_sit(), tiny_samples(NUM), replace(PLAN, pairs=pairs, weight=weight), tmp_path / name)
    none, same, aligned = (load_file(tmp_path / n / "model.safetensors") for n in ("none", "without weight", "aligned"))
    assert all(torch.equal(none[name], same[name]) for name in none)
    assert not torch.equal(none["blocks.0.attn.qkv.weight"], aligned["blocks.0.attn.qkv.weight"])
    first = [log(tmp_path / name)[0]["loss"] for name in ("none", "without weight")]
    assert first[0] == first[1]


def test_the_start_is_unchanged_and_the_file_contains_the_result(tmp_path: Path) -> None:
    backbone = tiny_sit()
    before = {name: tensor.clone() for name, tensor in backbone.module.state_dict().items()}
    trained = train(backbone, tiny_samples(NUM), PLAN, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.module.state_dict().items())
    assert not trained.module.training
    opened = open_checkpoint(tmp_path / "model.safetensors")
    for name, tensor in trained.module.state_dict().items():
        assert torch.equal(tensor, opened.module.state_dict()[name])
    assert not torch.equal(
        before["final_layer.linear.weight"], trained.module.state_dict()["final_layer.linear.weight"]
    )
    assert (opened.schedule.to_config(), opened.prediction) == (backbone.schedule.to_config(), backbone.prediction)


def test_observers_see_the_averaged_model(tmp_path: Path) -> None:
    backbone, states = tiny_sit(), {}

    def observe(step: int, observed: Backbone) -> None:
        assert not observed.module.training
        states[step] = observed.module.state_dict()

    trained = train(backbone, tiny_samples(NUM), PLAN, tmp_path, observe=observe, observe_at=(0, 5, 13))
    assert list(states) == [0, 5, 13]
    shorter = train(backbone, tiny_samples(NUM), replace(PLAN, steps=5), tmp_path / "shorter")
    for name in states[0]:
        assert torch.equal(states[0][name], backbone.module.state_dict()[name])
        assert torch.equal(states[5][name], shorter.module.state_dict()[name])
        assert torch.equal(states[13][name], trained.module.state_dict()[name])


def test_the_log_has_a_row_every_log_every_steps(tmp_path: Path) -> None:
    reported: list[tuple[int, int, float]] = []
    plan = replace(PLAN, pairs=(PAIR,))
    train(tiny_sit(), tiny_samples(NUM), plan, tmp_path, progress=lambda *state: reported.append(state))
    assert [(step, steps) for step, steps, _ in reported] == [(step, 13) for step in range(1, 14)]
    rows = log(tmp_path)
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert [row["loss"] for row in rows] == [reported[step - 1][2] for step in (3, 6, 9, 12)]
    assert all(-1 <= row["cosine blocks.0 <- blocks.2"] <= 1 for row in rows)


def test_half_precision_trains_nearly_the_same(tmp_path: Path) -> None:
    losses_by_precision = {}
    for precision in ("float32", "bfloat16"):
        losses: list[float] = []
        train(
            tiny_sit(),
            tiny_samples(NUM),
            replace(PLAN, precision=precision),
            tmp_path / precision,
            progress=lambda _, __, loss, losses=losses: losses.append(loss),
        )
        losses_by_precision[precision] = losses
    assert losses_by_precision["bfloat16"] != losses_by_precision["float32"]
    # bfloat16 keeps 3 digits, and the losses are near 1.
    np.testing.assert_allclose(losses_by_precision["bfloat16"], losses_by_precision["float32"], rtol=0.05)


@pytest.mark.parametrize("options", [{}, {"noise_range": (0.2, 0.7)}], ids=["plain", "range"])
def test_an_accumulated_step_equals_the_step_of_the_whole_batch(tmp_path: Path, options: dict[str, Any]) -> None:
    plan = replace(PLAN, batch_size=6, pairs=(PAIR,), sync=SyncOptions(**options), loss_weighting="min-snr")
    losses_by_parts = {}
    for parts in (1, 3):
        losses: list[float] = []
        train(
            tiny_sit(),
            tiny_samples(NUM),
            replace(plan, accumulate=parts),
            tmp_path / str(parts),
            progress=lambda _, __, loss, losses=losses: losses.append(loss),
        )
        losses_by_parts[parts] = losses
    # Rounding errors, which Adam amplifies to at most 1e-3 of its step of 1e-2 in 13 steps.
    np.testing.assert_allclose(losses_by_parts[3], losses_by_parts[1], rtol=1e-4)
    whole, cut = (load_file(tmp_path / str(parts) / "model.safetensors") for parts in (1, 3))
    for name, tensor in whole.items():
        if not name.endswith("qkv.bias"):  # see above
            torch.testing.assert_close(cut[name], tensor, rtol=1e-4, atol=3e-5)


def test_the_loss_is_weighted_sample_by_sample(tmp_path: Path) -> None:
    plan = replace(PLAN, steps=1, log_every=1, loss_weighting="velocity", time_sampling="logit-normal")
    backbone = tiny_sit(prediction="x0")
    train(backbone, tiny_samples(NUM), plan, tmp_path)
    first = next(iter(batches(backbone, tiny_samples(NUM), plan)))
    losses = prediction_loss(backbone, first) / first.level.float() ** 2  # velocity = (x_t - x_0) / level
    assert log(tmp_path)[0]["loss"] == pytest.approx(float(losses.detach().mean()), rel=1e-5)


def test_every_average_has_a_file(tmp_path: Path) -> None:
    backbone, plan = tiny_sit(), replace(PLAN, more_ema_decays=(0.0, 0.5))
    with pytest.raises(Interruption):
        train(backbone, tiny_samples(NUM), plan, tmp_path, progress=interrupt_at(6))
    train(backbone, tiny_samples(NUM), plan, tmp_path)
    names = {0.8: "model.safetensors", 0.0: "model-ema-0.0.safetensors", 0.5: "model-ema-0.5.safetensors"}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {*names.values()}
    for decay, name in names.items():
        alone = tmp_path.with_name(f"alone-{decay}")
        train(backbone, tiny_samples(NUM), replace(PLAN, ema_decay=decay), alone)
        averages, expected = load_file(tmp_path / name), load_file(alone / "model.safetensors")
        assert all(torch.equal(averages[key], tensor) for key, tensor in expected.items())
        opened = open_checkpoint(tmp_path / name)
        assert torch.equal(opened.module.pos_embed, backbone.module.pos_embed)
        assert training_record(tmp_path / name)["ema_decay"] == decay
    last = torch.load(tmp_path / "checkpoints" / "step-0000013.pt")["module"]
    assert all(torch.equal(load_file(tmp_path / names[0.0])[key], tensor) for key, tensor in last.items())


@pytest.mark.parametrize("shape", [(2, 8), (1, 2, 4, 4)], ids=["1-D", "3-D"])
def test_other_grids_are_trained_alike(tmp_path: Path, shape: tuple[int, ...]) -> None:
    plan = replace(PLAN, steps=2, pairs=(PAIR,), log_every=1)
    trained = train(tiny_sit(shape=shape), tiny_samples(NUM, shape=shape), plan, tmp_path)
    assert trained.shape == shape
    assert all(math.isfinite(value) for row in log(tmp_path) for value in row.values())


def test_padding_does_not_affect_training(tmp_path: Path) -> None:
    ends = []
    for value in (0.0, 5.0):
        samples = tiny_samples(NUM)
        mask = torch.ones(NUM, 4, 4, dtype=torch.bool)
        mask[::2, 2:] = False
        samples.x = samples.x.masked_fill(~mask.unsqueeze(1), value)
        samples.mask = mask
        plan = replace(PLAN, pairs=(PAIR,), steps=4)
        ends.append(train(tiny_sit(), samples, plan, tmp_path / str(value)).module.state_dict())
    assert all(torch.equal(ends[1][name], tensor) for name, tensor in ends[0].items())


def test_rows_go_to_the_log_immediately_to_the_caller_and_to_the_table(tmp_path: Path) -> None:
    logged: list[tuple[int, dict[str, float]]] = []

    def keep(step: int, row: dict[str, float]) -> None:
        logged.append((step, dict(row)))
        assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1]) == row

    plan = replace(PLAN, pairs=(PAIR,), checkpoint_every=100)
    train(tiny_sit(), tiny_samples(NUM), plan, tmp_path, log=keep)
    assert [step for step, _ in logged] == [3, 6, 9, 12]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row for _, row in logged] == rows
    table = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert list(table[0])[:5] == ["step", "loss", "grad_norm", "learning_rate", "samples_per_s"]
    assert [{name: float(value) for name, value in row.items()} for row in table] == rows
    assert [row["learning_rate"] for row in rows] == [0.0075, 0.01, 0.01, 0.01]
    assert all(row["grad_norm"] > 0 for row in rows)


# ------------------------------------------------------------------------------------------------------------ decisions

OTHER = LayerPair("blocks.1", "blocks.2")


def deciding(calls: list[int]) -> Callable[[int, Backbone], Decision]:
    """Decides for PAIR after step 4 and for no pair after step 9; the evidence depends on the averaged model."""

    def direct(step: int, averaged: Backbone) -> Decision:
        calls.append(step)
        assert not averaged.module.training
        weight_sum = float(averaged.module.get_parameter("final_layer.linear.weight").detach().sum())
        return Decision({4: (PAIR,), 9: ()}[step], {"weight_sum": weight_sum, "because": f"step {step}"})

    return direct


def test_decided_pairs_are_aligned_from_the_next_step(tmp_path: Path) -> None:
    plan, calls = replace(PLAN, pairs=(OTHER,), log_every=1), []
    trained = train(tiny_sit(), tiny_samples(NUM), plan, tmp_path, direct=deciding(calls), direct_at=(4, 9))
    assert calls == [4, 9]
    expected = few_lines(tiny_sit(), plan, lambda step: (OTHER,) if step < 4 else (PAIR,) if step < 9 else ())
    for name, tensor in expected.items():
        if not name.endswith("qkv.bias"):  # see above
            torch.testing.assert_close(trained.module.get_parameter(name).detach(), tensor, rtol=1e-4, atol=3e-5)
    columns = [[key for key in row if key.startswith("cosine")] for row in log(tmp_path)]
    assert columns == [[f"cosine {OTHER}"]] * 4 + [[f"cosine {PAIR}"]] * 5 + [[]] * 4
    rows = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 9]
    assert [row["pairs"] for row in rows] == [[["blocks.0", "blocks.2"]], []]
    assert [row["record"]["because"] for row in rows] == ["step 4", "step 9"]


def test_a_resumed_run_does_not_repeat_decisions(tmp_path: Path) -> None:
    calls: list[int] = []
    options = {"direct": deciding(calls), "direct_at": (4, 9)}
    plan = replace(PLAN, checkpoint_every=100)
    train(tiny_sit(), tiny_samples(NUM), plan, tmp_path / "whole", **options)
    for step in (3, 5, 10):
        with pytest.raises(Interruption):
            train(tiny_sit(), tiny_samples(NUM), plan, tmp_path / "again", progress=interrupt_at(step), **options)
    train(tiny_sit(), tiny_samples(NUM), plan, tmp_path / "again", **options)
    assert calls == [4, 9, 4, 9]
    assert model(tmp_path / "again") == model(tmp_path / "whole")
    again, whole = (log(tmp_path / name) for name in ("again", "whole"))
    assert again == whole
    assert (tmp_path / "again" / "decisions.jsonl").read_text() == (tmp_path / "whole" / "decisions.jsonl").read_text()


def test_a_decision_before_the_first_step_equals_a_plan(tmp_path: Path) -> None:
    def direct(step: int, averaged: Backbone) -> Decision:
        return Decision((PAIR,), {})

    train(tiny_sit(), tiny_samples(NUM), PLAN, tmp_path / "decided", direct=direct, direct_at=[0])
    train(tiny_sit(), tiny_samples(NUM), replace(PLAN, pairs=(PAIR,)), tmp_path / "planned")
    decided, planned = (load_file(tmp_path / name / "model.safetensors") for name in ("decided", "planned"))
    assert all(torch.equal(decided[name], tensor) for name, tensor in planned.items())


# ------------------------------------------------------------------------------------------------------- interruptions


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(tiny_sit(), tiny_samples(NUM), replace(PLAN, pairs=(PAIR,)), folder)
    return folder


@pytest.mark.parametrize("step", [1, 4, 5, 11, 13])
def test_a_run_interrupted_by_an_exception_ends_bit_equal(tmp_path: Path, whole: Path, step: int) -> None:
    plan = replace(PLAN, pairs=(PAIR,))
    with pytest.raises(Interruption):
        train(tiny_sit(), tiny_samples(NUM), plan, tmp_path, progress=interrupt_at(step))
    steps: list[int] = []
    train(tiny_sit(), tiny_samples(NUM), plan, tmp_path, progress=lambda now, _, __: steps.append(now))
    assert steps == list(range(step // 4 * 4 + 1, 14)) if step < 13 else steps == []
    assert model(tmp_path) == model(whole)
    assert log(tmp_path) == log(whole)


@pytest.mark.parametrize(
    ("name", "time"), [("step-0000008.pt", 1), ("step-0000012.pt", 1), ("log.csv", 3), ("model.safetensors", 1)]
)
def test_a_run_interrupted_while_writing_ends_bit_equal(
    tmp_path: Path, whole: Path, name: str, time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, replaced = replace(PLAN, pairs=(PAIR,)), []

    def interrupted(before: Path, after: Path) -> None:
        replaced.append(Path(after).name)
        if replaced.count(name) == time:
            raise Interruption
        Path(before).rename(after)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", interrupted)
        with pytest.raises(Interruption):
            train(tiny_sit(), tiny_samples(NUM), plan, tmp_path)
    train(tiny_sit(), tiny_samples(NUM), plan, tmp_path)
    assert model(tmp_path) == model(whole)
    assert log(tmp_path) == log(whole)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    "options",
    [
        {"projector_width": 8, "warmup_steps": 2, "decay": "cosine", "stop_step": 8, "noise_range": (0.3, 0.9)},
        {"teacher_decay": 0.9, "noise_gap": 0.2},
    ],
    ids=["projector and schedule", "EMA teacher and noise gap"],
)
def test_every_kind_of_alignment_ends_bit_equal(tmp_path: Path, options: dict[str, Any]) -> None:
    """Projectors and teachers are part of the state; a decision creates new ones for its pair."""
    plan = replace(PLAN, pairs=(OTHER,), sync=SyncOptions(**options), checkpoint_every=3, steps=10)
    decisions = {"direct": deciding([]), "direct_at": (4,)}
    train(tiny_sit(), tiny_samples(NUM), plan, tmp_path / "whole", **decisions)
    for step in (4, 7):
        with pytest.raises(Interruption):
            train(tiny_sit(), tiny_samples(NUM), plan, tmp_path / "again", progress=interrupt_at(step), **decisions)
    train(tiny_sit(), tiny_samples(NUM), plan, tmp_path / "again", **decisions)
    assert model(tmp_path / "again") == model(tmp_path / "whole")
    assert log(tmp_path / "again") == log(tmp_path / "whole")
    train(tiny_sit(), tiny_samples(NUM), replace(plan, sync=SyncOptions()), tmp_path / "plain", **decisions)
    assert model(tmp_path / "plain") != model(tmp_path / "whole")


def test_the_last_checkpoints_are_kept_and_a_damaged_one_is_skipped(tmp_path: Path, whole: Path) -> None:
    plan = replace(PLAN, pairs=(PAIR,), keep_last=2)
    with pytest.raises(Interruption):
        train(tiny_sit(), tiny_samples(NUM), plan, tmp_path, progress=interrupt_at(13))
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    paths = sorted((tmp_path / "checkpoints").glob("*.pt"))
    assert [path.name for path in paths] == ["step-0000012.pt", "step-0000013.pt"]
    paths[1].write_bytes(paths[1].read_bytes()[:-100])
    steps: list[int] = []
    with pytest.warns(UserWarning, match=r"step-0000013.pt is damaged; continuing from step-0000012.pt"):
        train(tiny_sit(), tiny_samples(NUM), plan, tmp_path, progress=lambda step, *_: steps.append(step))
    assert steps == [13]
    assert log(tmp_path) == log(whole)
    tensors, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path, whole))
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert sorted((tmp_path / "checkpoints").glob("*.pt")) == paths
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"step-0000013.pt and all older ones are damaged; delete them to start"):
        train(tiny_sit(), tiny_samples(NUM), plan, tmp_path)


def test_a_run_of_the_first_version_is_continued(tmp_path: Path, whole: Path) -> None:
    """It kept one checkpoint, `state.pt`, with one average, and told neither the later fields nor the heads."""
    plan = replace(PLAN, pairs=(PAIR,))
    with pytest.raises(Interruption):
        train(tiny_sit(), tiny_samples(NUM), plan, tmp_path, progress=interrupt_at(9))
    content = torch.load(tmp_path / "checkpoints" / "step-0000008.pt")
    old = {name: content[name] for name in ("step", "module", "optimizer", "log")} | {"ema": content["averages"][0.8]}
    torch.save(old, tmp_path / "state.pt")
    shutil.rmtree(tmp_path / "checkpoints")
    fields_of_plan = set(json.loads((tmp_path / "training.json").read_text())["plan"])
    assert fields_of_plan == {
        *("batch_size", "learning_rate", "warmup_steps", "weight_decay", "clip_norm", "ema_decay", "label_drop"),
        *("pairs", "weight", "precision", "compile", "seed"),
    }
    record = json.loads((tmp_path / "training.json").read_text())
    assert record.pop("num_heads") == 2
    write_record(tmp_path / "training.json", record)
    train(tiny_sit(), tiny_samples(NUM), plan, tmp_path)
    assert model(tmp_path) == model(whole)
    assert log(tmp_path) == log(whole)
    assert not (tmp_path / "state.pt").exists()


LONG = replace(PLAN, steps=120, pairs=(PAIR,), checkpoint_every=3, log_every=5, keep_last=2)


def long_runs(tell: Any, *folders: Path) -> None:
    for folder in folders:
        train(tiny_sit(), tiny_samples(12), LONG, folder, progress=tell)


def test_a_run_killed_five_times_at_random_steps_ends_bit_equal(tmp_path: Path) -> None:
    folders = tmp_path / "killed", tmp_path / "whole"
    for _ in range(5):
        kill_after(random.randint(1, 20), long_runs, folders[0])
    long_runs(None, *folders)
    assert model(folders[0]) == model(folders[1])
    assert log(folders[0]) == log(folders[1])
    assert [path.name for path in sorted((folders[0] / "checkpoints").glob("*.pt"))] == [
        "step-0000117.pt",
        "step-0000120.pt",
    ]


class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(16, 16), nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.drop(self.layer(x.flatten(1))).view_as(x)


def test_a_network_with_dropout_ends_bit_equal(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = wrap(Dropout(), layers="layer", schedule="flow", prediction="velocity", shape=SHAPE)
    state = torch.random.get_rng_state()
    train(backbone, tiny_samples(NUM), PLAN, tmp_path / "whole")
    with pytest.raises(Interruption):
        train(backbone, tiny_samples(NUM), PLAN, tmp_path / "again", progress=interrupt_at(6))
    train(backbone, tiny_samples(NUM), PLAN, tmp_path / "again")
    assert model(tmp_path / "again") == model(tmp_path / "whole")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_finished_run_returns_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = train(tiny_sit(), tiny_samples(NUM), PLAN, tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert sorted(path.name for path in stamps) == [
        "checkpoints",
        "checksums.json",
        "log.csv",
        "log.jsonl",
        "model.safetensors",
        "training.json",
    ]
    monkeypatch.setattr(loop, "_step", None)
    again = train(tiny_sit(), tiny_samples(NUM), PLAN, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps
    for name, tensor in trained.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name])


def test_more_steps_extend_a_finished_run(tmp_path: Path) -> None:
    for steps in (6, 13):
        train(tiny_sit(), tiny_samples(NUM), replace(PLAN, steps=steps), tmp_path / "grown")
    train(tiny_sit(), tiny_samples(NUM), PLAN, tmp_path / "whole")
    assert model(tmp_path / "grown") == model(tmp_path / "whole")
    assert log(tmp_path / "grown") == log(tmp_path / "whole")


def test_an_extended_run_replaces_the_model_of_the_shorter_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is killed after its last checkpoint, before its model is written."""

    def killed(*_: object, **__: object) -> None:
        raise Interruption

    train(tiny_sit(), tiny_samples(NUM), replace(PLAN, steps=6), tmp_path / "grown")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", killed)
        with pytest.raises(Interruption):
            train(tiny_sit(), tiny_samples(NUM), PLAN, tmp_path / "grown")
    for name in ("grown", "whole"):
        train(tiny_sit(), tiny_samples(NUM), PLAN, tmp_path / name)
    assert model(tmp_path / "grown") == model(tmp_path / "whole")


def test_fewer_steps_than_done_are_refused(tmp_path: Path) -> None:
    train(tiny_sit(), tiny_samples(NUM), PLAN, tmp_path)
    before = model(tmp_path)
    with pytest.raises(
        ValueError, match="has 13 steps already, more than the 6 of this plan; pass more --steps or another --out"
    ):
        train(tiny_sit(), tiny_samples(NUM), replace(PLAN, steps=6), tmp_path)
    assert model(tmp_path) == before


def test_zero_steps_return_the_start(tmp_path: Path) -> None:
    backbone = tiny_sit()
    trained = train(backbone, tiny_samples(NUM), replace(PLAN, steps=0), tmp_path)
    for name, tensor in backbone.module.state_dict().items():
        assert torch.equal(tensor, trained.module.state_dict()[name])
    assert (tmp_path / "model.safetensors").is_file()


# ------------------------------------------------------------------------------------------------------------- refusals


def test_another_run_is_refused(tmp_path: Path) -> None:
    train(tiny_sit(), tiny_samples(NUM), replace(PLAN, steps=2), tmp_path)
    before = contents(tmp_path)
    others: dict[str, tuple[Backbone, Any, TrainingPlan]] = {
        "plan.learning_rate": (tiny_sit(), tiny_samples(NUM), replace(PLAN, learning_rate=1e-3)),
        "plan.pairs, plan.weight": (tiny_sit(), tiny_samples(NUM), replace(PLAN, pairs=(PAIR,), weight=0.2)),
        "plan.seed": (tiny_sit(), tiny_samples(NUM), replace(PLAN, seed=4)),
        "plan.sync": (tiny_sit(), tiny_samples(NUM), replace(PLAN, sync=SyncOptions(centered=True))),
        "plan.time_mean, plan.time_sampling": (
            tiny_sit(),
            tiny_samples(NUM),
            replace(PLAN, time_sampling="logit-normal", time_mean=0.5),
        ),
        "data": (tiny_sit(), tiny_samples(NUM, seed=1), PLAN),
        "num_heads": (with_heads(tiny_sit(), 4), tiny_samples(NUM), PLAN),
        "start": (tiny_sit(seed=1), tiny_samples(NUM), PLAN),
        "schedule_hash": (tiny_sit(schedule=LinearPath(0, 1)), tiny_samples(NUM), PLAN),
        "prediction": (tiny_sit(prediction="x0"), tiny_samples(NUM), PLAN),
    }
    for different, (backbone, samples, plan) in others.items():
        with pytest.raises(ValueError, match=rf"holds a training of another run \(different: {different}\); choose"):
            train(backbone, samples, plan, tmp_path)
    assert contents(tmp_path) == before


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"is not empty and contains other files \(thesis.tex\); choose another --out"):
        train(tiny_sit(), tiny_samples(NUM), PLAN, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_a_damaged_checkpoint_is_reported(tmp_path: Path, keep: int) -> None:
    train(tiny_sit(), tiny_samples(NUM), replace(PLAN, steps=2), tmp_path)
    path = tmp_path / "checkpoints" / "step-0000002.pt"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"step-0000002.pt is damaged; delete it to start this run again$"):
        train(tiny_sit(), tiny_samples(NUM), PLAN, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    loss, good_steps = loop.prediction_loss, iter(range(7))
    train(tiny_sit(), tiny_samples(NUM), replace(PLAN, steps=4), tmp_path / "four")

    def breaking(*arguments: Any) -> Tensor:
        return loss(*arguments) * (1 if next(good_steps, None) is not None else value)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "prediction_loss", breaking)
        with pytest.raises(
            ValueError, match=rf"the loss is {value} at step 8; lower the learning rate .*step-0000004.pt is kept in"
        ) as error:
            train(tiny_sit(), tiny_samples(NUM), PLAN, tmp_path / "broken")
    assert "\n" not in str(error.value)
    kept, four = (torch.load(tmp_path / n / "checkpoints" / "step-0000004.pt") for n in ("broken", "four"))
    assert kept["step"] == 4
    assert all(torch.equal(kept["module"][name], four["module"][name]) for name in four["module"])
    assert not (tmp_path / "broken" / "model.safetensors").exists()


def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, good_steps = loop.prediction_loss, iter(range(7))

    def breaking(backbone: Backbone, batch: TrainingBatch) -> Tensor:
        values = loss(backbone, batch)
        if next(good_steps, None) is not None:
            return values
        weight = next(p for p in backbone.module.parameters() if p.requires_grad)
        return values + (weight.sum() * 0).abs().sqrt()  # 0, with the gradient 0 / 0

    monkeypatch.setattr(loop, "prediction_loss", breaking)
    with pytest.raises(
        ValueError, match=r"the gradient norm is nan at step 8; lower the learning rate .*step-0000004.pt is kept in"
    ):
        train(tiny_sit(), tiny_samples(NUM), replace(PLAN, clip_norm=0.0), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").glob("*.pt")] == ["step-0000004.pt"]


def test_weights_that_overflow_never_reach_a_checkpoint(tmp_path: Path) -> None:
    """The gradient is finite, but the decayed weight is not."""
    plan = replace(PLAN, weight_decay=1e25, learning_rate=1e20, checkpoint_every=1)
    train(tiny_sit(), tiny_samples(NUM), replace(plan, steps=0), tmp_path)
    with pytest.raises(ValueError, match=r"is not finite at step 1; lower .*step-0000000.pt is kept in"):
        train(tiny_sit(), tiny_samples(NUM), plan, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").glob("*.pt")] == ["step-0000000.pt"]


def test_divergence_at_the_first_step_reports_that_there_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = loop.prediction_loss
    monkeypatch.setattr(loop, "prediction_loss", lambda *arguments: loss(*arguments) * math.nan)
    with pytest.raises(ValueError, match=r"the loss is nan at step 1; .* \(there is no checkpoint yet\)$"):
        train(tiny_sit(), tiny_samples(NUM), PLAN, tmp_path)


class FailingSamples(TensorSamples):
    reads = 0

    def batch(self, indices: Any) -> Any:
        self.reads += 1
        if self.reads > 6:
            raise OSError("the disk is gone")
        return super().batch(indices)


def test_unreadable_data_stops_at_its_step_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    whole, steps = tiny_samples(NUM), []
    samples = FailingSamples(whole.x, whole.labels)
    with pytest.raises(OSError, match="the disk is gone"):
        train(tiny_sit(), samples, PLAN, tmp_path, progress=lambda step, *_: steps.append(step))
    assert steps == [1, 2, 3, 4]  # 5 of 12 samples per step: the third and the fifth batch are read in two parts
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
    train(tiny_sit(), whole, PLAN, tmp_path)
    train(tiny_sit(), whole, PLAN, tmp_path.with_name("whole"))
    assert model(tmp_path) == model(tmp_path.with_name("whole"))


@pytest.mark.parametrize(
    ("backbone", "samples", "message"),
    [
        (
            tiny_sit(),
            tiny_samples(6, shape=(1, 6, 6)),
            r"samples have shape \(1, 6, 6\), .* takes \(1, 4, 4\); pass --size",
        ),
        (tiny_sit(), tiny_samples(0), "there are no samples to train on"),
        (tiny_sit(num_classes=5), tiny_samples(6), "has 5 classes, the data has 3; pass data with the same labels"),
    ],
)
def test_data_that_does_not_match_is_refused(tmp_path: Path, backbone: Backbone, samples: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        train(backbone, samples, PLAN, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
