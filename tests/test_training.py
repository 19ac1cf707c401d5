"""Training is what its few lines say, sees the same batches whatever it aligns, and can be killed at any moment."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import SHAPE, kill_after, tiny_samples, tiny_sit
from torch import Tensor, nn
from torch.nn import functional as F

from layerprobe import training as training_module
from layerprobe.backbones.base import Backbone, wrap
from layerprobe.checkpoints import open_checkpoint
from layerprobe.layersync import LayerPair
from layerprobe.noise import DDPM, LinearPath
from layerprobe.training import (
    HELD_OUT_LEVELS,
    TrainingBatch,
    TrainingPlan,
    batches,
    held_out_loss,
    prediction_loss,
    train,
)

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


def numbers(purpose: int, sample_id: int, epoch: int) -> np.random.Generator:
    """The stream of a sample: key (seed, id), counter (0, 0, draw, purpose)."""
    key, counter = np.array([PLAN.seed, sample_id], np.uint64), np.array([0, 0, epoch, purpose], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def equal(a: TrainingBatch, b: TrainingBatch) -> bool:
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(TrainingBatch)]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


def model(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def log(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(row.pop("samples_per_s") > 0 for row in rows)
    return rows


class Interruption(Exception):
    pass


def interrupt_at(step: int) -> Callable[[int, int, float], None]:
    def progress(now: int, steps: int, loss: float) -> None:
        if now == step:
            raise Interruption

    return progress


# -------------------------------------------------------------------------------------------------------------- batches


def test_epochs_follow_one_another_without_a_gap() -> None:
    samples, plan = tiny_samples(NUM, first_id=30), replace(PLAN, steps=24)  # 10 epochs of 12 in 24 batches of 5
    x = torch.cat([batch.x for batch in batches(samples, plan)])
    rows = [int((samples.x == one).flatten(1).all(1).nonzero()) for one in x]
    epochs = [rows[i : i + NUM] for i in range(0, len(rows), NUM)]
    assert len(epochs) == 10
    assert all(sorted(epoch) == list(range(NUM)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10


def test_noise_and_level_of_a_sample_depend_on_seed_id_and_epoch_only() -> None:
    samples = tiny_samples(NUM, first_id=30)
    for size in (5, 12, 40):  # 40: more than three epochs in one batch
        plan = replace(PLAN, steps=3, batch_size=size)
        for index, batch in enumerate(batches(samples, plan)):
            for place in range(size):
                row = int((samples.x == batch.x[place]).flatten(1).all(1).nonzero())
                epoch = (index * size + place) // NUM
                eps = numbers(0, 30 + row, epoch).standard_normal(16, np.float32).reshape(SHAPE)
                np.testing.assert_array_equal(batch.eps[place].numpy(), eps)
                assert batch.level[place].item() == numbers(1, 30 + row, epoch).random()


def test_what_is_aligned_and_how_does_not_change_the_batches() -> None:
    samples = tiny_samples(NUM)
    other = replace(PLAN, pairs=(PAIR,), weight=0.7, learning_rate=1.0, warmup_steps=0, ema_decay=0.5, clip_norm=0.0)
    assert all(equal(a, b) for a, b in zip(batches(samples, PLAN), batches(samples, other), strict=True))
    reseeded = batches(samples, replace(PLAN, seed=4))
    assert not any(equal(a, b) for a, b in zip(batches(samples, PLAN), reseeded, strict=True))


@pytest.mark.parametrize("start", [1, 5, 12, 13])
def test_batches_from_the_middle_are_the_tail_of_all(start: int) -> None:
    samples = tiny_samples(NUM)
    whole, tail = list(batches(samples, PLAN)), list(batches(samples, PLAN, start=start))
    assert len(whole) == 13
    assert len(tail) == 13 - start
    assert all(equal(a, b) for a, b in zip(whole[start:], tail, strict=True))


def test_labels_are_dropped_at_the_rate_asked_for() -> None:
    samples, plan = tiny_samples(300), replace(PLAN, steps=20, batch_size=300)
    dropped = []
    for batch in batches(samples, plan):
        assert batch.condition is not None
        rows = [int((samples.x == one).flatten(1).all(1).nonzero()) for one in batch.x[:20]]
        true = samples.labels[rows]  # type: ignore[index]
        assert all(seen in (label, 3) for seen, label in zip(batch.condition[:20], true, strict=True))
        dropped.append(batch.condition == 3)
    share = torch.stack(dropped).float().mean().item()
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 6000)  # four standard deviations of the binomial
    for rate, seen in ((0.0, False), (1.0, True)):
        only = next(iter(batches(samples, replace(plan, label_drop=rate))))
        assert only.condition is not None
        assert ((only.condition == 3) == seen).all()


def test_unlabelled_samples_have_no_condition() -> None:
    assert all(batch.condition is None for batch in batches(tiny_samples(NUM, labelled=False), PLAN))


# ----------------------------------------------------------------------------------------------------------------- loss


@pytest.fixture
def batch() -> TrainingBatch:
    return next(iter(batches(tiny_samples(NUM), PLAN)))


@pytest.mark.parametrize("data_time", [1, 0])
def test_the_loss_of_flow_matching(batch: TrainingBatch, data_time: int) -> None:
    """Official SiT predicts data - noise at a time that is 1 at the data; others noise - data at the noise level."""
    backbone = tiny_sit(schedule=LinearPath(data_time, 1 - data_time))
    level = batch.level.float().view(-1, 1, 1, 1)
    x_t = (1 - level) * batch.x + level * batch.eps
    wanted, time = (batch.x - batch.eps, 1 - level) if data_time else (batch.eps - batch.x, level)
    expected = (backbone.module(x_t, time.flatten(), batch.condition) - wanted).square().mean((1, 2, 3))
    # Rounding of a float32 network; the squared error is of order 1.
    torch.testing.assert_close(prediction_loss(backbone, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_loss_of_ddpm(batch: TrainingBatch, prediction: Any) -> None:
    schedule = DDPM.from_name("linear")
    backbone = tiny_sit(schedule=schedule, prediction=prediction)
    level = batch.level.view(-1, 1, 1, 1)
    norm = torch.sqrt(level**2 + (1 - level) ** 2)
    alpha, sigma = ((1 - level) / norm).float(), (level / norm).float()
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    log_snr = 2 * (torch.log1p(-batch.level) - torch.log(batch.level))
    time = (torch.log(abar / (1 - abar)) - log_snr[:, None]).abs().argmin(1)
    wanted = {"eps": batch.eps, "x0": batch.x, "v": alpha * batch.eps - sigma * batch.x}[prediction]
    output = backbone.module(alpha * batch.x + sigma * batch.eps, time, batch.condition)
    expected = (output - wanted).square().mean((1, 2, 3))
    torch.testing.assert_close(prediction_loss(backbone, batch), expected, rtol=1e-5, atol=1e-5)


def test_a_model_without_classes_ignores_labels(batch: TrainingBatch) -> None:
    backbone = tiny_sit(num_classes=0)
    torch.testing.assert_close(
        prediction_loss(backbone, batch), prediction_loss(backbone, replace(batch, condition=None))
    )


def test_held_out_loss_equals_a_plain_loop() -> None:
    backbone, samples = tiny_sit(), tiny_samples(7, first_id=20)
    expected = dict.fromkeys(HELD_OUT_LEVELS, 0.0)
    for level in HELD_OUT_LEVELS:
        for row in range(7):
            stream = np.random.Philox(key=np.array([9, 20 + row], np.uint64), counter=np.zeros(4, np.uint64))
            eps = torch.from_numpy(np.random.Generator(stream).standard_normal(16, np.float32)).view(SHAPE)
            x_t = (1 - level) * samples.x[row] + level * eps
            with torch.no_grad():
                output = backbone.module(x_t[None], torch.tensor([1 - level]), torch.tensor([3]))
            expected[level] += (output[0] - (samples.x[row] - eps)).square().mean().item() / 7
    for size in (2, 256):
        assert held_out_loss(backbone, samples, seed=9, batch_size=size) == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- training


def few_lines(backbone: Backbone, plan: TrainingPlan) -> dict[str, Tensor]:
    """The whole recipe by hand, with hooks instead of LayerSync; gives the averaged weights."""
    module: Any = backbone.module
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    ema = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=plan.learning_rate, weight_decay=plan.weight_decay, foreach=False
    )
    outputs: dict[str, Tensor] = {}
    for i, block in enumerate(module.blocks):
        block.register_forward_hook(lambda _, __, out, name=f"blocks.{i}": outputs.update({name: out}))
    for step, batch in enumerate(batches(tiny_samples(NUM), plan)):
        level = batch.level.float().view(-1, 1, 1, 1)
        velocity = module((1 - level) * batch.x + level * batch.eps, 1 - level.flatten(), batch.condition)
        loss = F.mse_loss(velocity, batch.x - batch.eps)
        for pair in plan.pairs:
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


@pytest.mark.parametrize("pairs", [(), (PAIR,), (PAIR, LayerPair("blocks.0", "blocks.1"))], ids=len)
def test_training_equals_a_few_lines(tmp_path: Path, pairs: tuple[LayerPair, ...]) -> None:
    plan = replace(PLAN, pairs=pairs)
    trained = train(tiny_sit(), tiny_samples(NUM), plan, tmp_path)
    expected = few_lines(tiny_sit(), plan)
    for name, tensor in expected.items():
        found = trained.module.get_parameter(name).detach()
        if name.endswith("qkv.bias"):  # A softmax ignores the bias of the keys: its gradient is nothing but rounding.
            found, tensor = found[[*range(16), *range(32, 48)]], tensor[[*range(16), *range(32, 48)]]
        # Adam divides by the gradient's size, so the rounding of a small gradient grows to 1e-3 of a step of 1e-2.
        torch.testing.assert_close(found, tensor, rtol=1e-4, atol=3e-5)


def test_alignment_changes_training_through_its_loss_only(tmp_path: Path) -> None:
    for name, pairs, weight in (("none", (), 0.3), ("without weight", (PAIR,), 0.0), ("aligned", (PAIR,), 0.3)):
        train(tiny_sit(), tiny_samples(NUM), replace(PLAN, pairs=pairs, weight=weight), tmp_path / name)
    none, same, aligned = (load_file(tmp_path / n / "model.safetensors") for n in ("none", "without weight", "aligned"))
    assert all(torch.equal(none[name], same[name]) for name in none)
    assert not torch.equal(none["blocks.0.attn.qkv.weight"], aligned["blocks.0.attn.qkv.weight"])
    first = [log(tmp_path / name)[0]["loss"] for name in ("none", "without weight")]
    assert first[0] == first[1]


def test_the_start_is_left_alone_and_the_result_is_what_the_file_holds(tmp_path: Path) -> None:
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
    backbone, seen = tiny_sit(), {}

    def observe(step: int, observed: Backbone) -> None:
        assert not observed.module.training
        seen[step] = observed.module.state_dict()

    trained = train(backbone, tiny_samples(NUM), PLAN, tmp_path, observe=observe, observe_at=(0, 5, 13))
    assert list(seen) == [0, 5, 13]
    shorter = train(backbone, tiny_samples(NUM), replace(PLAN, steps=5), tmp_path / "shorter")
    for name in seen[0]:
        assert torch.equal(seen[0][name], backbone.module.state_dict()[name])
        assert torch.equal(seen[5][name], shorter.module.state_dict()[name])
        assert torch.equal(seen[13][name], trained.module.state_dict()[name])


def test_the_log_has_a_row_every_so_many_steps(tmp_path: Path) -> None:
    told: list[tuple[int, int, float]] = []
    plan = replace(PLAN, pairs=(PAIR,))
    train(tiny_sit(), tiny_samples(NUM), plan, tmp_path, progress=lambda *state: told.append(state))
    assert [(step, steps) for step, steps, _ in told] == [(step, 13) for step in range(1, 14)]
    rows = log(tmp_path)
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert [row["loss"] for row in rows] == [told[step - 1][2] for step in (3, 6, 9, 12)]
    assert all(-1 <= row["cosine blocks.0 <- blocks.2"] <= 1 for row in rows)


def test_half_precision_trains_nearly_the_same(tmp_path: Path) -> None:
    ends = {}
    for precision in ("float32", "bfloat16"):
        told: list[float] = []
        train(
            tiny_sit(),
            tiny_samples(NUM),
            replace(PLAN, precision=precision),
            tmp_path / precision,
            progress=lambda _, __, loss, told=told: told.append(loss),
        )
        ends[precision] = told
    assert ends["bfloat16"] != ends["float32"]
    # bfloat16 keeps 3 digits, and the losses are near 1.
    np.testing.assert_allclose(ends["bfloat16"], ends["float32"], rtol=0.05)


# ------------------------------------------------------------------------------------------------------- interruptions


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(tiny_sit(), tiny_samples(NUM), replace(PLAN, pairs=(PAIR,)), folder)
    return folder


@pytest.mark.parametrize("step", [1, 4, 5, 11, 13])
def test_interrupted_by_an_exception_it_ends_bit_equal(tmp_path: Path, whole: Path, step: int) -> None:
    plan = replace(PLAN, pairs=(PAIR,))
    with pytest.raises(Interruption):
        train(tiny_sit(), tiny_samples(NUM), plan, tmp_path, progress=interrupt_at(step))
    steps: list[int] = []
    train(tiny_sit(), tiny_samples(NUM), plan, tmp_path, progress=lambda now, _, __: steps.append(now))
    assert steps == list(range(step // 4 * 4 + 1, 14)) if step < 13 else steps == []
    assert model(tmp_path) == model(whole)
    assert log(tmp_path) == log(whole)


@pytest.mark.parametrize("name", ["state.pt", "log.jsonl", "model.safetensors"])
def test_interrupted_while_writing_it_ends_bit_equal(
    tmp_path: Path, whole: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, replaced = replace(PLAN, pairs=(PAIR,)), []

    def interrupted(before: Path, after: Path) -> None:
        replaced.append(Path(after).name)
        if replaced.count(name) == (1 if name == "model.safetensors" else 3):
            raise Interruption
        Path(before).rename(after)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", interrupted)
        with pytest.raises(Interruption):
            train(tiny_sit(), tiny_samples(NUM), plan, tmp_path)
    train(tiny_sit(), tiny_samples(NUM), plan, tmp_path)
    assert model(tmp_path) == model(whole)
    assert log(tmp_path) == log(whole)


CHILD = """
import sys
from tiny import tiny_samples, tiny_sit
from layerprobe.layersync import LayerPair
from layerprobe.training import TrainingPlan, train
plan = TrainingPlan(
    steps=120, batch_size=5, learning_rate=1e-2, ema_decay=0.8, seed=3, checkpoint_every=3, log_every=5,
    pairs=(LayerPair("blocks.0", "blocks.2"),),
)
train(tiny_sit(), tiny_samples(12), plan, sys.argv[1], progress=lambda step, *_: print(step, flush=True))
"""


def test_killed_at_a_random_step_it_ends_bit_equal(tmp_path: Path) -> None:
    kill_after(random.randint(4, 100), CHILD, tmp_path / "again")
    plan = TrainingPlan(
        steps=120,
        batch_size=5,
        learning_rate=1e-2,
        ema_decay=0.8,
        seed=3,
        checkpoint_every=3,
        log_every=5,
        pairs=(PAIR,),
    )
    assert (tmp_path / "again" / "state.pt").is_file()
    for name in ("whole", "again"):
        train(tiny_sit(), tiny_samples(NUM), plan, tmp_path / name)
    assert model(tmp_path / "again") == model(tmp_path / "whole")
    assert log(tmp_path / "again") == log(tmp_path / "whole")


class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(16, 16), nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.drop(self.layer(x.flatten(1))).view_as(x)


def test_a_network_with_random_numbers_of_its_own_ends_bit_equal_too(tmp_path: Path) -> None:
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
    assert sorted(path.name for path in stamps) == ["log.jsonl", "model.safetensors", "state.pt", "training.json"]
    monkeypatch.setattr(training_module, "_step", None)
    again = train(tiny_sit(), tiny_samples(NUM), PLAN, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps
    for name, tensor in trained.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name])


def test_more_steps_continue_a_finished_run(tmp_path: Path) -> None:
    for steps in (6, 13):
        train(tiny_sit(), tiny_samples(NUM), replace(PLAN, steps=steps), tmp_path / "grown")
    train(tiny_sit(), tiny_samples(NUM), PLAN, tmp_path / "whole")
    assert model(tmp_path / "grown") == model(tmp_path / "whole")
    assert log(tmp_path / "grown") == log(tmp_path / "whole")


def test_a_continued_run_never_keeps_the_shorter_runs_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed after its last checkpoint, before its model is written."""

    def killed(*_: object, **__: object) -> None:
        raise Interruption

    train(tiny_sit(), tiny_samples(NUM), replace(PLAN, steps=6), tmp_path / "grown")
    with monkeypatch.context() as patch:
        patch.setattr(training_module, "save_checkpoint", killed)
        with pytest.raises(Interruption):
            train(tiny_sit(), tiny_samples(NUM), PLAN, tmp_path / "grown")
    for name in ("grown", "whole"):
        train(tiny_sit(), tiny_samples(NUM), PLAN, tmp_path / name)
    assert model(tmp_path / "grown") == model(tmp_path / "whole")


def test_fewer_steps_than_are_done_are_refused(tmp_path: Path) -> None:
    train(tiny_sit(), tiny_samples(NUM), PLAN, tmp_path)
    before = model(tmp_path)
    with pytest.raises(ValueError, match="holds 13 steps, more than the 6 wanted; pass more --steps or another --out"):
        train(tiny_sit(), tiny_samples(NUM), replace(PLAN, steps=6), tmp_path)
    assert model(tmp_path) == before


def test_no_steps_give_the_start(tmp_path: Path) -> None:
    backbone = tiny_sit()
    trained = train(backbone, tiny_samples(NUM), replace(PLAN, steps=0), tmp_path)
    for name, tensor in backbone.module.state_dict().items():
        assert torch.equal(tensor, trained.module.state_dict()[name])
    assert (tmp_path / "model.safetensors").is_file()


# ------------------------------------------------------------------------------------------------------------- refusals


def test_another_run_is_refused(tmp_path: Path) -> None:
    train(tiny_sit(), tiny_samples(NUM), replace(PLAN, steps=2), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    others: dict[str, tuple[Backbone, Any, TrainingPlan]] = {
        "plan.learning_rate": (tiny_sit(), tiny_samples(NUM), replace(PLAN, learning_rate=1e-3)),
        "plan.pairs, plan.weight": (tiny_sit(), tiny_samples(NUM), replace(PLAN, pairs=(PAIR,), weight=0.2)),
        "plan.seed": (tiny_sit(), tiny_samples(NUM), replace(PLAN, seed=4)),
        "data": (tiny_sit(), tiny_samples(NUM, seed=1), PLAN),
        "start": (tiny_sit(seed=1), tiny_samples(NUM), PLAN),
        "schedule_hash": (tiny_sit(schedule=LinearPath(0, 1)), tiny_samples(NUM), PLAN),
        "prediction": (tiny_sit(prediction="x0"), tiny_samples(NUM), PLAN),
    }
    for different, (backbone, samples, plan) in others.items():
        with pytest.raises(ValueError, match=rf"holds a training of another run \(different: {different}\); choose"):
            train(backbone, samples, plan, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_how_long_a_run_is_and_how_often_it_writes_is_not_its_identity() -> None:
    missing = {field.name for field in fields(TrainingPlan)} - set(PLAN.identity())
    assert missing == {"steps", "checkpoint_every", "log_every"}


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"is not empty and holds other things \(thesis.tex\); choose another --out"):
        train(tiny_sit(), tiny_samples(NUM), PLAN, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_a_damaged_state_is_named(tmp_path: Path, keep: int) -> None:
    train(tiny_sit(), tiny_samples(NUM), replace(PLAN, steps=2), tmp_path)
    (tmp_path / "state.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"state.pt is damaged; delete it to start this run again$"):
        train(tiny_sit(), tiny_samples(NUM), PLAN, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_the_last_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    loss, left = training_module.prediction_loss, iter(range(7))
    train(tiny_sit(), tiny_samples(NUM), replace(PLAN, steps=4), tmp_path / "four")

    def breaking(*arguments: Any) -> Tensor:
        return loss(*arguments) * (1 if next(left, None) is not None else value)

    with monkeypatch.context() as patch:
        patch.setattr(training_module, "prediction_loss", breaking)
        with pytest.raises(ValueError, match=rf"the loss is {value} at step 8; lower the learning rate") as error:
            train(tiny_sit(), tiny_samples(NUM), PLAN, tmp_path / "broken")
    assert "\n" not in str(error.value)
    kept, four = (torch.load(tmp_path / name / "state.pt") for name in ("broken", "four"))
    assert kept["step"] == 4
    assert all(torch.equal(kept["module"][name], four["module"][name]) for name in four["module"])
    assert not (tmp_path / "broken" / "model.safetensors").exists()


def test_a_finite_loss_with_a_gradient_that_is_not_never_reaches_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, left = training_module.prediction_loss, iter(range(7))

    def breaking(backbone: Backbone, batch: TrainingBatch) -> Tensor:
        values = loss(backbone, batch)
        if next(left, None) is not None:
            return values
        weight = next(p for p in backbone.module.parameters() if p.requires_grad)
        return values + (weight.sum() * 0).abs().sqrt()  # 0, with the gradient 0 / 0

    monkeypatch.setattr(training_module, "prediction_loss", breaking)
    with pytest.raises(ValueError, match=r"is not finite after step 8; lower the learning rate \(checkpoint kept in"):
        train(tiny_sit(), tiny_samples(NUM), replace(PLAN, clip_norm=0.0), tmp_path)
    assert torch.load(tmp_path / "state.pt")["step"] == 4


@pytest.mark.parametrize(
    ("backbone", "samples", "message"),
    [
        (
            tiny_sit(),
            tiny_samples(6, shape=(1, 6, 6)),
            r"samples have shape \(1, 6, 6\), .* takes \(1, 4, 4\); pass --size",
        ),
        (tiny_sit(), tiny_samples(0), "there are no samples to train on"),
        (tiny_sit(num_classes=5), tiny_samples(6), "knows 5 classes, the data has 3; pass data with the same labels"),
    ],
)
def test_data_that_does_not_fit_is_refused(tmp_path: Path, backbone: Backbone, samples: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        train(backbone, samples, PLAN, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"steps": -1}, "need steps >= 0"),
        ({"learning_rate": 0.0}, "learning_rate > 0"),
        ({"learning_rate": float("nan")}, "learning_rate > 0"),
        ({"label_drop": 1.5}, r"label_drop in \[0, 1\]"),
        ({"ema_decay": 1.0}, r"ema_decay in \[0, 1\); got 13, 0.01, 0.25, 1.0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"clip_norm": -1.0}, "clip_norm must be at least 0, got -1.0"),
        ({"clip_norm": float("nan")}, "clip_norm must be at least 0, got nan"),
        ({"weight": float("inf")}, "the weight of the alignment must be finite, got inf"),
        ({"precision": "bf16"}, "unknown precision 'bf16'; use float32 or bfloat16"),
        ({"seed": -1}, "seed must be between 0 and"),
    ],
)
def test_impossible_plans_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        replace(PLAN, **options)
    assert "\n" not in str(error.value)
