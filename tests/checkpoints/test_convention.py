"""The convention check finds what a network was trained under, and refuses everything else."""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from places import HELPERS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from layerprobe.backbones.base import Backbone, wrap
from layerprobe.checkpoints.convention import (
    FIRST,
    LOG_SNRS,
    ConventionCheck,
    Fit,
    _is_ruled_out,
    _on_all,
    _power,
    _wiener_error,
    check_convention,
)
from layerprobe.checkpoints.convention_text import convention_cautions, convention_lines, convention_message
from layerprobe.checkpoints.opening import embedded_checkpoint, open_checkpoint
from layerprobe.data.embedded_digits import digits
from layerprobe.data.loading import load
from layerprobe.data.samples import Samples, Subset, TensorSamples
from layerprobe.noise.predictions import Prediction, target
from layerprobe.noise.schedules import schedule_from_name

CONVENTIONS: tuple[tuple[str, Prediction], ...] = (
    ("sit", "velocity"),
    ("flow", "velocity"),
    ("flow-1000", "velocity"),
    ("ddpm-linear", "eps"),
    ("ddpm-cosine", "eps"),
    ("ddpm-scaled_linear", "v"),
    ("ddpm-cosine", "x0"),
    ("edm", "x0"),
)


class Denoiser(nn.Module):
    """The least network that can learn: pixels and sinusoids of the time into an MLP, and the input times a gain."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64 + 64, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 64)
        )
        self.gain = nn.Sequential(nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * torch.exp(torch.linspace(math.log(100), math.log(1e-3), 32))
        time = torch.cat([angles.sin(), angles.cos()], 1)
        out: Tensor = self.layers(torch.cat([x.flatten(1) / (1 + x.flatten(1).std(1, keepdim=True)), time], 1))
        return out.view_as(x) + self.gain(time).view(-1, 1, 1, 1) * x


@functools.cache
def trained(
    schedule_name: str, prediction: Prediction, steps: int = 700, value_range: tuple[int, int] = (-1, 1)
) -> Backbone:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = wrap(
            Denoiser(),
            layers="layers.2",
            schedule=schedule_name,
            prediction=prediction,
            shape=(1, 8, 8),
            name="denoiser",
        )
    (low, high), schedule = value_range, backbone.schedule
    x = low + (data().batch(range(len(data()))).x + 1) / 2 * (high - low)
    optimizer = torch.optim.Adam(backbone.module.parameters(), 2e-3)
    for _ in range(steps):
        batch = x[torch.randint(len(x), (128,), generator=generator)]
        eps = torch.randn(batch.shape, generator=generator)
        log_snr = 12 * torch.rand(128, generator=generator, dtype=torch.float64) - 6
        level = schedule.level_of_log_snr(log_snr).clamp(*schedule.level_range)
        wanted = target(prediction, schedule, x=batch, eps=eps, level=level)
        output = backbone.predict(schedule.corrupt(batch, eps, level), level.float())
        optimizer.zero_grad()
        (output - wanted).square().mean().backward()
        optimizer.step()
    return backbone


@functools.cache
def data() -> Samples:
    return digits().train


@pytest.mark.parametrize(("schedule", "prediction"), CONVENTIONS)
def test_the_convention_of_training_is_found_and_every_other_refused(schedule: str, prediction: Prediction) -> None:
    backbone = trained(schedule, prediction)
    found = check_convention(backbone, data())
    assert found.verdict == "fits"
    assert (found.fits[0].schedule, found.fits[0].prediction) == (schedule, prediction)
    assert convention_message(found).startswith(
        f"the weights fit --schedule {schedule} --prediction {prediction}: the denoising error"
    )
    for wrong, wrong_prediction in CONVENTIONS:
        if (wrong, wrong_prediction) != (schedule, prediction):
            declared = replace(backbone, schedule=schedule_from_name(wrong), prediction=wrong_prediction)
            refused = check_convention(declared, data())
            assert refused.verdict == "misfit", (wrong, wrong_prediction)
            assert re.search(
                rf"but 0\.\d+ times under --schedule {schedule} --prediction {prediction};", convention_message(refused)
            )


@pytest.mark.parametrize("path", ["sit-gvp", "sit-vp"])
def test_sits_curved_paths_are_found_where_the_linear_one_is_declared(path: str) -> None:
    backbone = trained(path, "velocity")
    assert check_convention(backbone, data()).verdict == "fits"
    refused = check_convention(replace(backbone, schedule=schedule_from_name("sit")), data())
    assert refused.verdict == "misfit"
    assert re.search(rf"but 0\.\d+ times under --schedule {path} --prediction velocity;", convention_message(refused))


@pytest.mark.parametrize("name", ["mnist", "fashion"])
def test_checkpoints_that_nobody_here_trained(name: str, shared_data: Path, shared_checkpoints: Path) -> None:
    samples = load(shared_data / "mnist", num_train=100, num_validation=20, num_test=20).train
    says = {"layers": "b*", "shape": (1, 28, 28)}
    model = f"{HELPERS / 'ddpm_unet.py'}:DDPMUNet"
    path = shared_checkpoints / f"ddpm_{name}.pt"
    conventions: tuple[tuple[str, Prediction], ...] = (
        ("ddpm-linear", "eps"),
        ("ddpm-scaled_linear", "eps"),
        ("flow", "eps"),
    )
    opened = open_checkpoint(path, model=model, schedule="ddpm-linear", prediction="eps", **says)
    for schedule, prediction in conventions:
        # Set afterwards: opened under a schedule of float times, its table of times fails the trial call.
        backbone = replace(opened, schedule=schedule_from_name(schedule), prediction=prediction)
        found = check_convention(backbone, samples, num_samples=32)
        right = (schedule, prediction) == ("ddpm-linear", "eps")
        assert found.verdict == ("fits" if right else "misfit"), (schedule, prediction)
        assert (found.fits[0].schedule, found.fits[0].prediction) == ("ddpm-linear", "eps")


def test_the_embedded_checkpoint_fits_and_its_labels_help() -> None:
    found = check_convention(open_checkpoint("digits"), data())
    assert found.verdict == "fits"
    assert found.cautions == ()
    assert found.condition["true labels"] < found.condition["null"] < found.condition["wrong labels"]


def test_labels_that_are_numbered_otherwise_are_noticed() -> None:
    x = data().batch(range(64))
    assert x.labels is not None
    renumbered = TensorSamples(x.x, (x.labels + 3) % 10)
    found = check_convention(open_checkpoint("digits"), renumbered)
    assert found.verdict == "fits"  # the null label does not care
    assert "the classes may be numbered differently" in convention_cautions(found)[0]


@functools.cache
def official(folder: Path) -> Path:
    """The embedded weights as the official code saves them: no file states heads and classes."""
    path = folder / "official.safetensors"
    save_file(load_file(embedded_checkpoint()), path)
    return path


def opened(folder: Path, **options: Any) -> Backbone:
    return open_checkpoint(official(folder), family="sit", device="cpu", **({"num_heads": 4} | options))


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_a_wrong_number_of_heads_is_refused_and_the_right_one_named(heads: int, tmp_path: Path) -> None:
    found = check_convention(opened(tmp_path, num_heads=heads), data())
    assert found.verdict == "misfit"
    assert re.search(
        rf"do not fit --schedule sit --prediction velocity --num-heads {heads}: .* but 0\.5\d* times under --schedule "
        r"sit --prediction velocity --num-heads 4; pass these",
        convention_message(found),
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_right_number_of_heads_fits(seed: int, tmp_path: Path) -> None:
    found = check_convention(opened(tmp_path), data(), num_samples=32, seed=seed)
    assert (found.verdict, found.cautions) == ("fits", ())
    assert len({fit.num_heads for fit in found.fits}) == 2


def test_heads_that_the_weights_do_not_decide_are_told() -> None:
    check = check_convention(open_checkpoint("digits", device="cpu"), data(), num_samples=8)
    rival = replace(check.declared, num_heads=8, scores=check.declared.scores + 0.005)
    undecided = replace(check, fits=(*check.fits, rival))
    assert undecided.cautions == ("another number of heads fits as well",)
    assert convention_cautions(undecided)[0].startswith("8 attention heads fit about as well as 4: the weights do not")
    worse = replace(rival, scores=check.declared.scores + 0.02)
    assert replace(check, fits=(*check.fits, worse)).cautions == ()


def test_heads_and_schedule_are_named_together(tmp_path: Path) -> None:
    wrong = opened(tmp_path, num_heads=8, schedule="flow")
    message = convention_message(check_convention(wrong, data()))
    assert "under --schedule sit --prediction velocity --num-heads 4; pass these" in message


def test_a_network_that_was_trained_on_other_values_is_told_its_range() -> None:
    backbone = trained("sit", "velocity", value_range=(0, 1))
    found = check_convention(backbone, data())
    assert found.verdict == "misfit"
    assert "under --schedule sit --prediction velocity --value-range 0,1; pass these" in convention_message(found)
    right = check_convention(backbone.with_value_range((0, 1)), data())
    assert (right.verdict, right.fits[0]) == ("fits", right.declared)
    wrong = check_convention(trained("sit", "velocity").with_value_range((0, 255)), data())
    assert "under --schedule sit --prediction velocity --value-range -1,1; pass these" in convention_message(wrong)


def test_a_label_table_without_a_null_label_is_noticed(tmp_path: Path) -> None:
    tensors = load_file(embedded_checkpoint())
    name = "y_embedder.embedding_table.weight"
    path = tmp_path / "without-dropout.safetensors"
    save_file(tensors | {name: tensors[name][:10].clone()}, path)
    options: dict[str, Any] = {"family": "sit", "num_heads": 4, "device": "cpu"}
    last = open_checkpoint(path, **options)
    assert last.num_classes == 9
    assert "pass --num-classes 10 if all rows are classes" in last.assumptions[0]
    found = check_convention(last, data(), num_samples=32)
    assert "the data has 10 classes, but the network 9 and a null label:" in convention_cautions(found)[0]
    labels = data().labels
    assert labels is not None
    fewer = Subset(data(), (labels < 9).nonzero().flatten(), name="without nines")
    batch = fewer.batch(range(64))
    found = check_convention(last, TensorSamples(batch.x, batch.labels))
    assert "the null label denoises like a wrong label: its row may be a class" in convention_cautions(found)[0]
    mean = open_checkpoint(path, num_classes=10, **options)
    found = check_convention(mean, data(), num_samples=32)
    assert (found.verdict, found.cautions) == ("fits", ())


@pytest.mark.parametrize("factor", [1 / 0.18215, 0.18215, 0.5])
def test_a_forgotten_scale_is_named(factor: float) -> None:
    scaled = TensorSamples(data().batch(range(64)).x * factor)
    found = check_convention(open_checkpoint("digits"), scaled)
    assert found.verdict == "misfit"
    right = f"--value-range {-float(f'{1 / factor:.5g}'):g},{float(f'{1 / factor:.5g}'):g}"
    assert f"under --schedule sit --prediction velocity {right};" in convention_message(found)


def test_a_network_without_training_is_unclear() -> None:
    backbone = wrap(Denoiser(), layers="layers.2", schedule="flow", prediction="velocity", shape=(1, 8, 8))
    found = check_convention(backbone, data())
    assert found.verdict == "unclear"
    assert convention_message(found).startswith("this network does not denoise this data under any known convention")
    assert len(found.fits) >= 20
    assert found.fits[0].score == min(fit.score for fit in found.fits) < found.declared.score


def test_a_network_of_other_data_is_unclear() -> None:
    noise = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)).sign()
    assert check_convention(open_checkpoint("digits"), TensorSamples(noise)).verdict == "unclear"


def test_networks_that_cannot_be_asked_otherwise_are_asked_as_declared() -> None:
    class Table(Denoiser):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x, nn.functional.embedding(t, torch.arange(1000.0)[:, None])[:, 0])

    learned = trained("ddpm-linear", "eps")
    table = Table()
    table.load_state_dict(learned.module.state_dict())
    found = check_convention(replace(learned, module=table), data())
    assert found.verdict == "fits"
    assert {fit.schedule for fit in found.fits} == {"ddpm-linear", "ddpm-scaled_linear", "ddpm-cosine"}


def test_the_linear_denoiser_is_the_best_one() -> None:
    """For white data of variance 4 and noise of variance 1 the error is 4 / 5, and no factor on x_t does better."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(2000, 2, 4, 4, generator=generator) + 10
    error = float(_wiener_error(_power(x), torch.tensor(1.0)))
    assert error == pytest.approx(0.8, rel=0.01)
    noisy = x + torch.randn(x.shape, generator=generator)
    tried = [float(((a * (noisy - 10) + 10 - x) ** 2).mean()) for a in np.linspace(0.5, 1, 26)]
    assert min(tried) == pytest.approx(error, rel=0.01)


def test_the_network_is_left_as_it_was_and_the_answer_repeats() -> None:
    backbone = open_checkpoint("digits")
    backbone.module.train()
    first, second = (check_convention(backbone, data()) for _ in range(2))
    assert backbone.module.training
    assert first.to_dict() == second.to_dict()
    assert first.to_dict()["log_snr"] == list(LOG_SNRS)


def test_too_few_samples() -> None:
    few = TensorSamples(torch.zeros(7, 1, 8, 8))
    with pytest.raises(ValueError, match=r"^the convention check needs 8 samples or more, got 7; pass more data$"):
        check_convention(open_checkpoint("digits"), few)


def test_a_check_survives_its_record_with_its_words() -> None:
    check = check_convention(open_checkpoint("digits", device="cpu"), digits().train)
    record = json.loads(json.dumps(check.to_dict()))
    assert "message" not in record
    assert {fit["samples"] for fit in record["fits"]} == {FIRST, 64}
    read = ConventionCheck.from_dict(record)
    assert read.to_dict() == record
    assert convention_lines(read) == convention_lines(check)
    assert (read.verdict, read.cautions) == (check.verdict, check.cautions)


def _fails_on(error: Exception, *, float_times: bool) -> Backbone:
    """The embedded network, whose calls fail with float times, or with integer times."""
    backbone = open_checkpoint("digits", device="cpu")

    def forward(module: nn.Module, x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        if time.is_floating_point() == float_times:
            raise error
        return backbone.forward(module, x, time, label)

    return replace(backbone, forward=forward)


@pytest.mark.filterwarnings("ignore:.*do not fit into memory")
@pytest.mark.parametrize("float_times", [True, False], ids=["declared", "other"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=["GPU", "CPU", "Python"],
)
def test_memory_that_runs_out_is_no_verdict(error: Exception, float_times: bool) -> None:
    with pytest.raises(type(error)) as raised:
        check_convention(_fails_on(error, float_times=float_times), data(), num_samples=8)
    assert raised.value is error


@pytest.mark.parametrize("error", [AssertionError("times are integers"), KeyError("time")])
def test_a_call_that_fails_in_any_way_only_excludes_its_convention(error: Exception) -> None:
    assert check_convention(_fails_on(error, float_times=False), data(), num_samples=16).verdict == "fits"


def test_a_convention_that_fails_on_later_samples_keeps_its_first_fit_and_the_declared_one_raises() -> None:
    few = Fit("sit", "velocity", None, (-1, 1), (0.5,) * 5, torch.full((FIRST,), -1.0))
    found: list[Any] = [[replace(few, scores=torch.full((64,), -1.0))], ValueError("later")]
    passes: Any = SimpleNamespace(batch=data().batch(range(64)), attempts=lambda readings, n: found)
    tried = [(open_checkpoint("digits", device="cpu"), few)] * 2
    assert [len(fit.scores) for _, fit in _on_all(tried, passes)] == [64, FIRST]
    found.reverse()
    with pytest.raises(ValueError, match=r"^later$"):
        _on_all(tried, passes)


def test_a_network_that_nothing_can_call_is_refused_with_its_error() -> None:
    def forward(module: nn.Module, x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        raise KeyError("text")

    backbone = replace(open_checkpoint("digits", device="cpu"), forward=forward)
    with pytest.raises(ValueError, match=r"raised KeyError: 'text' .*; correct the function that was passed"):
        check_convention(backbone, data(), num_samples=8)


@pytest.mark.parametrize(("declared", "rows"), [("sit", 1720), ("flow", 2160)])
def test_conventions_that_a_few_samples_rule_out_are_tried_on_no_more(declared: str, rows: int) -> None:
    """A network of billions of parameters takes seconds for each sample."""
    passed = []
    backbone = open_checkpoint("digits", device="cpu")

    def forward(module: nn.Module, x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        passed.append(len(x))
        return backbone.forward(module, x, time, label)

    found = check_convention(replace(backbone, forward=forward, schedule=schedule_from_name(declared)), data())
    on_all = [(fit.schedule, fit.prediction) for fit in found.fits if len(fit.scores) == 64]
    assert on_all == [("sit", "velocity"), *([(declared, "velocity")] if declared != "sit" else [])]
    assert sum(passed) == rows


@pytest.mark.parametrize("alike", [-torch.ones(1, 8, 8), data().batch([3]).x[0]], ids=["blank", "one digit"])
def test_samples_in_an_order_rule_out_nothing(alike: Tensor) -> None:
    """The right convention is behind a wrong one, or a linear denoiser, on the samples that come first."""
    backbone = trained("edm", "x0")
    ordered = TensorSamples(torch.cat([alike.expand(FIRST, 1, 8, 8), data().batch(range(56)).x]))
    found = check_convention(replace(backbone, schedule=schedule_from_name("ddpm-cosine")), ordered)
    assert (found.verdict, found.fits[0].schedule, found.fits[0].prediction) == ("misfit", "edm", "x0")


@pytest.mark.parametrize(
    ("behind", "spread", "out"), [(0.3, 0.1, True), (0.1, 0.0, False), (0.3, 0.5, False), (math.inf, 0.0, True)]
)
def test_only_what_is_clearly_behind_is_ruled_out(behind: float, spread: float, out: bool) -> None:
    best = Fit("sit", "velocity", None, (-1, 1), (0.5,) * 5, torch.full((FIRST,), -1.0))
    scores = -1 + behind + spread * torch.tensor([-1.0, 1.0]).repeat(FIRST // 2)
    assert _is_ruled_out(replace(best, scores=scores), best) is out
    assert not _is_ruled_out(best, best)
    untrained = replace(best, scores=scores + 1)
    assert _is_ruled_out(untrained, untrained) is out  # the best of all, and behind the linear denoiser


def test_a_pass_has_no_more_samples_than_the_batch_size() -> None:
    sizes = set()
    backbone = open_checkpoint("digits", device="cpu")

    def forward(module: nn.Module, x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        sizes.add(len(x))
        return backbone.forward(module, x, time, label)

    whole = check_convention(backbone, data(), num_samples=20, batch_size=20)
    parts = check_convention(replace(backbone, forward=forward), data(), num_samples=20, batch_size=6)
    assert sizes == {6, 2}
    assert parts.declared.score == pytest.approx(whole.declared.score, abs=1e-5)
    assert parts.condition == pytest.approx(whole.condition, abs=1e-5)


def test_padded_samples_are_checked_with_their_own_padding() -> None:
    """More samples than one batch, and conventions that are tried on the first of them only."""
    batch = data().batch(range(24))
    mask = torch.ones(24, 8, 8, dtype=torch.bool)
    mask[:, 6:] = False
    found = check_convention(open_checkpoint("digits"), TensorSamples(batch.x, batch.labels, mask=mask))
    assert (found.declared.schedule, found.declared.prediction) == ("sit", "velocity")
    assert all(math.isfinite(fit.score) for fit in found.fits)


def test_other_value_ranges_are_tried_on_pixels_only() -> None:
    wrong = open_checkpoint("digits").with_value_range((-5.49, 5.49))
    batch = data().batch(range(32))
    fits = {
        modality: check_convention(wrong, TensorSamples(batch.x, batch.labels, modality=modality)).fits
        for modality in ("image", "audio")
    }
    assert fits["image"][0].value_range == (-1.0, 1.0)
    assert {fit.value_range for fit in fits["audio"]} == {(-5.49, 5.49)}
