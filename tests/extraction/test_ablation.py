"""Skipping a block equals taking it out of the network, with the same noise for all, and leaves the network alone."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tiny import tiny_samples, tiny_sit
from torch import Tensor, nn

from layerprobe.backbones.base import Backbone, wrap
from layerprobe.data.samples import TensorSamples
from layerprobe.extraction.ablation import LOSS_INCREASE, VELOCITY_CHANGE, LayerAblation, ablate_layers
from layerprobe.noise.schedules import DDPM, EDM, LinearPath

LEVELS = (0.2, 0.7)
ROUNDING = {"rtol": 2e-5, "atol": 1e-6}


def own_noise(sample_id: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    stream = np.random.Philox(key=np.array([seed, sample_id], np.uint64))
    return torch.from_numpy(np.random.Generator(stream).standard_normal(math.prod(shape), np.float32)).view(shape)


class Skip(nn.Module):
    """What stands in a network from which a block was taken out."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


def taken_out(backbone: Backbone, name: str) -> Backbone:
    module = copy.deepcopy(backbone.module)
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, Skip())
    return replace(backbone, module=module)


@torch.no_grad()
def by_hand(backbone: Backbone, samples: TensorSamples, layer: str, level: float, seed: int = 0) -> np.ndarray:
    """Both scores per sample, shape (2, n), one sample at a time; on the linear path."""
    without, rows = taken_out(backbone, layer), []
    for x, sample_id in zip(samples.x, samples.ids.tolist(), strict=True):
        noise = own_noise(sample_id, samples.shape, seed)
        x_t, time = ((1 - level) * x + level * noise)[None], torch.tensor([level])
        v, v_skip = (model(x_t, time)[0].double() for model in (backbone, without))
        errors = [float(((u - (noise - x)) ** 2).mean()) for u in (v, v_skip)]
        rows.append((float((v - v_skip).norm() ** 2 / v.norm() ** 2), errors[1] - errors[0]))
    return np.array(rows).T


def num_changed(module: nn.Module) -> int:
    """Hooks that are still there, and layers whose forward is not their own."""
    parts = list(module.modules())
    hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in parts)
    return hooks + sum("forward" in vars(part) for part in parts)


def test_equals_taking_the_block_out() -> None:
    backbone, samples = tiny_sit(depth=4), tiny_samples(7, first_id=30)
    found = ablate_layers(backbone, samples, LEVELS, split="test", seed=5)
    assert found.layers == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")
    for i, layer in enumerate(found.layers):
        for j, level in enumerate(LEVELS):
            change, increase = by_hand(backbone, samples, layer, level, seed=5)
            np.testing.assert_allclose(found.velocity_change[i, j], change, **ROUNDING)
            np.testing.assert_allclose(found.loss_increase[i, j], increase, **ROUNDING)
    assert found.velocity_change.min() > 1e-3  # so the comparison tells blocks apart
    assert not found.reasons
    assert num_changed(backbone.module) == 0


def test_parts_of_blocks_can_be_skipped_whatever_the_order_of_the_names() -> None:
    backbone, samples = tiny_sit(), tiny_samples(4)
    layers = ("blocks.2", "blocks.1.mlp", "blocks.1", "blocks.0.attn")
    found = ablate_layers(backbone, samples, (0.4,), split="test", layers=layers)
    for i, layer in enumerate(layers):
        np.testing.assert_allclose(found.velocity_change[i, 0], by_hand(backbone, samples, layer, 0.4)[0], **ROUNDING)


@pytest.mark.parametrize("schedule", [LinearPath(0, 1), DDPM.from_name("linear"), EDM()])
@pytest.mark.parametrize("prediction", ["velocity", "eps"])
def test_is_about_the_velocity_under_every_convention(schedule: Any, prediction: Any) -> None:
    """The velocity is d x_t / d level; eps, say, is turned into it before the comparison."""
    backbone, samples, level = tiny_sit(schedule=schedule, prediction=prediction), tiny_samples(5), 0.6
    noise = torch.stack([own_noise(i, samples.shape) for i in range(5)])
    levels = torch.full((5,), level, dtype=torch.float64)
    x_t = schedule.corrupt(samples.x, noise, levels)
    after, before = (schedule.corrupt(samples.x.double(), noise.double(), levels + h) for h in (1e-6, -1e-6))
    rate = (after - before) / 2e-6
    with torch.no_grad():
        v, v_skip = (model(x_t, levels.float()).double() for model in (backbone, taken_out(backbone, "blocks.1")))
    change = ((v - v_skip) ** 2).flatten(1).sum(1) / (v**2).flatten(1).sum(1)
    increase = ((v_skip - rate) ** 2 - (v - rate) ** 2).flatten(1).mean(1)
    found = ablate_layers(backbone, samples, (level,), split="test")
    np.testing.assert_allclose(found.velocity_change[1, 0], change, rtol=1e-4)
    np.testing.assert_allclose(found.loss_increase[1, 0], increase, rtol=1e-4, atol=1e-5)


def test_a_block_that_adds_nothing_contributes_exactly_nothing() -> None:
    backbone = tiny_sit()
    modulation: Any = backbone.module.blocks[1].adaLN_modulation[1]  # type: ignore[index, union-attr]
    modulation.weight.data.zero_()
    modulation.bias.data.zero_()
    found = ablate_layers(backbone, tiny_samples(6), LEVELS, split="test")
    assert (found.velocity_change[1] == 0).all()
    assert (found.loss_increase[1] == 0).all()
    assert (found.velocity_change[[0, 2]] > 0).all()


def test_a_block_that_harms_has_a_negative_loss_increase() -> None:
    """A network that is right but for one block, which adds 1 to the velocity: without it the loss falls by 1."""

    class Harmed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.right, self.wrong = nn.Identity(), Add(1.0)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.wrong(self.right((x - 0.5) / t.view(-1, 1, 1, 1)))  # x_0 is 0.5, so v = (x_t - x_0) / level

    samples = TensorSamples(torch.full((4, 1, 4, 4), 0.5))
    backbone = wrap(Harmed(), layers="*", schedule="flow", prediction="velocity", shape=(1, 4, 4))
    found = ablate_layers(backbone, samples, (0.5,), split="test")
    # The velocity is eps - 0.5 and the network gives 1 more.
    velocity = torch.stack([own_noise(i, (1, 4, 4)) for i in range(4)]).flatten(1).double() - 0.5
    np.testing.assert_allclose(found.velocity_change[1, 0], 16 / ((velocity + 1) ** 2).sum(1), rtol=1e-5)
    np.testing.assert_allclose(found.loss_increase[1, 0], -1, rtol=1e-5)
    assert (found.velocity_change[0] == 0).all()


class Add(nn.Module):
    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = amount

    def forward(self, x: Tensor) -> Tensor:
        return x + self.amount


def test_any_batch_size_gives_the_same_numbers() -> None:
    backbone, samples = tiny_sit(), tiny_samples(7)
    one, five, all_at_once = (
        ablate_layers(backbone, samples, LEVELS, split="test", batch_size=size) for size in (1, 5, 100)
    )
    for other in (five, all_at_once):
        np.testing.assert_allclose(other.velocity_change, one.velocity_change, **ROUNDING)
        np.testing.assert_allclose(other.loss_increase, one.loss_increase, **ROUNDING)


def test_what_stands_before_the_skipped_block_is_not_computed_again() -> None:
    backbone, counts = tiny_sit(depth=6), [0] * 6
    for i, block in enumerate(backbone.module.blocks):  # type: ignore[arg-type]
        block.attn.register_forward_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))
    ablate_layers(backbone, tiny_samples(4), (0.5,), split="test")
    # Once in the whole pass, and once for each block before it that is skipped.
    assert counts == [1, 2, 3, 4, 5, 6]


def test_the_first_samples_are_used_and_progress_counts_rows() -> None:
    told: list[tuple[int, int]] = []
    backbone, samples = tiny_sit(), tiny_samples(12)
    found = ablate_layers(
        backbone, samples, LEVELS, split="test", num_samples=5, batch_size=4, progress=lambda *state: told.append(state)
    )
    assert found.velocity_change.shape == (3, 2, 5)
    assert told == [(4, 10), (8, 10), (10, 10)]
    np.testing.assert_allclose(
        ablate_layers(backbone, samples, LEVELS, split="test").velocity_change[..., :5],
        found.velocity_change,
        **ROUNDING,
    )


# -------------------------------------------------------------------------------------------------- all sorts of layers


class Two(NamedTuple):
    text: Tensor
    image: Tensor


class Streams(nn.Module):
    """Two streams by keyword; gives both and a constant."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(wide, wide), nn.Linear(3, wide)

    def forward(self, *, text: Tensor, image: Tensor) -> Two:
        pooled = self.text(text).mean(1, keepdim=True)
        return Two(text + 0.3 * image.mean(), image + self.image(image) + pooled)


class Odd(nn.Module):
    """Streams as named tuples, weights beside the output, in-place work, a long skip, and layers that change shape."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 4, 2, stride=2), nn.ConvTranspose2d(8, 1, 2, stride=2)
        self.streams, self.weighing, self.inplace = Streams(4), Weighing(4), InPlace(4)
        self.named = Named()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        maps = self.down(x)
        tokens, grid = maps.flatten(2).transpose(1, 2), maps.shape
        text = t.view(-1, 1, 1).expand(-1, 2, 3)
        both = self.streams(text=text, image=tokens)
        weighed, weights = self.weighing(both.image)
        weighed = self.inplace(weighed * weights.mean() + both.text.mean())
        weighed.mul_(self.named(weighed)["factor"])
        return self.up(torch.cat([weighed.transpose(1, 2).reshape(grid), maps], 1))


class Weighing(nn.Module):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(wide, wide), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(x @ x.transpose(1, 2), -1)
        return x + self.drop(weights @ self.fc(x)), weights


class InPlace(nn.Module):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.fc = nn.Linear(wide, wide)

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.fc(x))


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"factor": x.mean() + 2}


@pytest.fixture
def odd() -> Backbone:
    torch.manual_seed(0)
    return wrap(Odd(), layers="*", schedule="flow", prediction="velocity", shape=(1, 6, 6))


def stream_in_place_of(odd: Backbone, layer: str, x_t: Tensor, level: Tensor) -> Tensor:
    """The velocity with one layer replaced by a hand-made function."""
    module: Any = copy.deepcopy(odd.module)
    if layer == "streams":
        module.streams.forward = lambda *, text, image: Two(text, image)
    if layer == "weighing":  # the weights stay what they were
        module.weighing.forward = lambda x: (x, torch.softmax(x @ x.transpose(1, 2), -1))
    if layer == "inplace":
        module.inplace.forward = lambda x: x
    return replace(odd, module=module)(x_t, level)


def test_streams_tuples_and_in_place_work(odd: Backbone) -> None:
    samples, runs = tiny_samples(5, shape=(1, 6, 6)), []
    hook = odd.module.streams.image.register_forward_hook(lambda *_: runs.append("streams"))  # type: ignore[union-attr]
    odd.module.train()  # it is read in evaluation mode all the same
    found = ablate_layers(odd, samples, (0.3,), split="test", layers=("streams", "weighing", "inplace"))
    odd.module.eval()
    hook.remove()
    assert runs == ["streams"]  # what it gave is reused, though later layers work in place
    level = torch.full((5,), 0.3)
    noise = torch.stack([own_noise(i, (1, 6, 6)) for i in range(5)])
    with torch.no_grad():
        v = odd(0.7 * samples.x + 0.3 * noise, level)
        for i, layer in enumerate(found.layers):
            gap = stream_in_place_of(odd, layer, 0.7 * samples.x + 0.3 * noise, level) - v
            expected = gap.flatten(1).square().sum(1) / v.flatten(1).square().sum(1)
            assert expected.min() > 1e-7
            np.testing.assert_allclose(found.velocity_change[i, 0], expected, rtol=1e-3)


def test_what_cannot_be_skipped_is_nan_with_a_reason(odd: Backbone) -> None:
    found = ablate_layers(
        odd, tiny_samples(3, shape=(1, 6, 6)), LEVELS, split="test", layers=("down", "inplace", "named", "up")
    )
    assert found.reasons == {
        "down": "no output shape ((4, 3, 3)) equals an input shape ((1, 6, 6))",
        "named": "its output is of type dict, not a tensor",
        "up": "no output shape ((1, 6, 6)) equals an input shape ((8, 3, 3))",
    }
    assert np.isnan(found.velocity_change[[0, 2, 3]]).all()
    assert np.isfinite(found.velocity_change[1]).all()
    rows = [row for row in found.rows() if row["layer"] == "named"]
    assert len(rows) == 4
    assert all(math.isnan(row["value"]) and row["note"] == "its output is of type dict, not a tensor" for row in rows)


def test_what_goes_into_a_layer_cannot_be_skipped() -> None:
    found = ablate_layers(tiny_sit(), tiny_samples(3), (0.5,), split="test", layers=("blocks.1.attn:input", "blocks.1"))
    assert found.reasons == {"blocks.1.attn:input": "the input of a layer cannot be skipped"}
    assert np.isnan(found.velocity_change[0]).all()
    assert np.isfinite(found.velocity_change[1]).all()


def test_two_streams_of_one_shape_are_not_guessed_at() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twins = Swap()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            a, b = self.twins(x, 2 * x)
            return a - b

    class Swap(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return b, a

    backbone = wrap(Twins(), layers="twins", schedule="flow", prediction="velocity", shape=(1, 4, 4))
    shapes = "(1, 4, 4) and (1, 4, 4)"
    reason = f"several outputs have the same shape ({shapes}), so the matching inputs are ambiguous"
    assert ablate_layers(backbone, tiny_samples(3), (0.5,), split="test").reasons == {"twins": reason}


def test_a_block_that_leaves_something_behind_is_computed_again() -> None:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = Leave(), Add(0.5), Add(0.25)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.first.left = torch.zeros(())
            return self.third(self.second(self.first(x))) + self.first.left

    class Leave(nn.Module):
        left: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.left = torch.tensor(3.0)
            return 2 * x

    backbone = wrap(Memory(), layers="*", schedule="flow", prediction="velocity", shape=(1, 4, 4))
    samples = tiny_samples(4)
    found = ablate_layers(backbone, samples, (0.0,), split="test")
    v = (2 * samples.x + 0.75 + 3).flatten(1)
    for layer, gap in enumerate((samples.x.flatten(1) + 3, torch.tensor(0.5), torch.tensor(0.25))):
        expected = gap.expand(4, 16).square().sum(1) / v.square().sum(1)
        np.testing.assert_allclose(found.velocity_change[layer, 0], expected, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ rows and limits


def test_rows_fit_the_quality_table_and_their_intervals_hold_the_mean() -> None:
    from layerprobe.analyses.tables.quality import QUALITY_COLUMNS

    found = ablate_layers(tiny_sit(), tiny_samples(12), LEVELS, split="validation")
    rows = found.rows(source="other")
    assert all(tuple(row) == QUALITY_COLUMNS for row in rows)
    assert len(rows) == 2 * 3 * 2
    for row in rows:
        i, j = row["layer_index"], LEVELS.index(row["noise_level"])
        assert found.layers[i] == row["layer"]
        scores = {VELOCITY_CHANGE: found.velocity_change, LOSS_INCREASE: found.loss_increase}[row["metric"]][i, j]
        assert row["value"] == pytest.approx(scores.mean())
        assert scores.min() < row["low"] < row["value"] < row["high"] < scores.max()
        assert (row["source"], row["split"], row["note"]) == ("other", "validation", "")
    assert found.rows(seed=3) == found.rows(seed=3) != found.rows(seed=4)


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    rng, covered = np.random.default_rng(0), []
    for seed in range(200):
        scores = rng.exponential(size=(1, 1, 60))
        row = LayerAblation("test", ("a",), (0.5,), scores, scores, {}).rows(seed=seed)[0]
        covered.append(row["low"] <= 1 <= row["high"])
    # The percentile bootstrap of 60 skewed numbers covers a little less than 95 %: 0.93, give or take 0.02.
    assert 0.88 <= np.mean(covered) <= 0.98


def test_a_velocity_of_zero_has_no_relative_change() -> None:
    backbone = tiny_sit()
    backbone.module.final_layer.linear.weight.data.zero_()  # type: ignore[union-attr]
    backbone.module.final_layer.linear.bias.data.zero_()  # type: ignore[union-attr]
    for row in ablate_layers(backbone, tiny_samples(4), (0.5,), split="test").rows():
        if row["metric"] == VELOCITY_CHANGE:
            assert math.isnan(row["value"]) and math.isnan(row["low"]) and math.isnan(row["high"])
            assert row["note"] == "the velocity is zero or not finite"
        else:
            assert (row["value"], row["note"]) == (0, "")


def test_the_network_is_as_it_was_after_an_exception_and_in_training_mode() -> None:
    backbone, left = tiny_sit(), iter(range(4))
    backbone.module.train()
    own = backbone.module.blocks[0].forward  # type: ignore[index, union-attr]
    backbone.module.blocks[0].forward = own  # type: ignore[index, union-attr]

    def failing(_: object, __: object) -> None:
        if next(left, None) is None:
            raise ZeroDivisionError("broken")

    hook = backbone.module.final_layer.register_forward_pre_hook(failing)  # type: ignore[union-attr]
    with pytest.raises(ZeroDivisionError, match="broken"):
        ablate_layers(backbone, tiny_samples(4), (0.5,), split="test")
    hook.remove()
    assert num_changed(backbone.module) == 1
    assert vars(backbone.module.blocks[0])["forward"] is own  # type: ignore[index]
    assert all(part.training for part in backbone.module.modules())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = Add(1.0), Add(1.0)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.used(self.used(x))


@pytest.mark.parametrize(
    ("layers", "levels", "message"),
    [
        (("used",), (0.5,), "^used ran twice in one forward pass; name a layer that runs once$"),
        (("unused",), (0.5,), "^unused did not run in the forward pass; name a layer that does$"),
        (("absent",), (0.5,), "^absent is not in Twice, which has used, unused$"),
        (("used",), (0.5, 1.5), r"lie between 0 \(clean\) and 1 \(pure noise\), got \[0.5, 1.5\]"),
        (("used",), (), r"lie between 0 \(clean\) and 1 \(pure noise\), got \[\]"),
        (("used",), (float("nan"),), r"lie between 0 \(clean\)"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(layers: Any, levels: Any, message: str) -> None:
    backbone = wrap(Twice(), layers="*", schedule="flow", prediction="velocity", shape=(1, 4, 4))
    with pytest.raises(ValueError, match=message) as refused:
        ablate_layers(backbone, tiny_samples(3), levels, split="test", layers=layers)
    assert "\n" not in str(refused.value)
    assert num_changed(backbone.module) == 0


def test_no_samples_show_nothing() -> None:
    with pytest.raises(ValueError, match="layer ablation got 0 samples; pass at least 1"):
        ablate_layers(tiny_sit(), tiny_samples(3), (0.5,), split="test", num_samples=0)
