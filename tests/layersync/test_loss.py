"""LayerSync against an explicit formula, in every way that a training loop may run a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from residual_network import WEIGHT, Network, X, cosines_of, residuals, task
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layerprobe.analyses.measures import effective_rank as effective_rank_of_features
from layerprobe.layersync.loss import LayerSync
from layerprobe.layersync.options import SyncOptions
from layerprobe.layersync.pair import LayerPair

ONE, TWO = [("blocks.0", "blocks.2")], [("blocks.0", "blocks.2"), ("blocks.1", "blocks.3")]


def reference(network: Network, pairs: list[tuple[str, str]], x: Tensor = X) -> tuple[Tensor, list[float]]:
    """The loss of the task plus the regularizer, with tokens and norms computed by hand."""
    tokens, regularizer, cosines = {}, torch.zeros(()), []
    for i, block in enumerate(network.blocks):
        x = tokens[f"blocks.{i}"] = x + torch.tanh(x @ block.fc.weight.T + block.fc.bias)
    for student, teacher in pairs:
        s, t = tokens[student], tokens[teacher].detach()
        cosine = ((s * t).sum(-1) / (s.square().sum(-1).sqrt() * t.square().sum(-1).sqrt())).mean()
        regularizer = regularizer - WEIGHT * cosine
        cosines.append(float(cosine.detach()))
    return task(network.head(x)) + regularizer, cosines


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def expected(pairs: list[tuple[str, str]], x: Tensor = X) -> tuple[Tensor, dict[str, Tensor]]:
    network = Network()
    loss, _ = reference(network, pairs, x)
    loss.backward()
    return loss.detach(), gradients(network)


def num_hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def assert_trains_as_expected(
    network: nn.Module, call: Callable[[Tensor], Tensor], pairs: list[tuple[str, str]] = TWO
) -> None:
    """Loss and gradients of one step inside the block equal those of the formula."""
    expected_loss, expected_gradients = expected(pairs)
    with LayerSync(network, pairs, weight=WEIGHT) as sync:
        loss = task(call(X)) + sync.loss()
        loss.backward()
    assert_equal_gradients(network, expected_gradients)
    torch.testing.assert_close(loss.detach(), expected_loss)


def assert_equal_gradients(network: nn.Module, expected_gradients: dict[str, Tensor]) -> None:
    got = gradients(network)
    assert got.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        # float32: sums over some hundred tokens in another order.
        torch.testing.assert_close(
            got[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- the formula


@pytest.mark.parametrize("pairs", [ONE, TWO, [("blocks.0", "blocks.3"), ("blocks.1", "blocks.3")]])
def test_loss_and_gradients_equal_the_formula(pairs: list[tuple[str, str]]) -> None:
    network = Network()
    _, cosines = reference(network, pairs)
    assert_trains_as_expected(network, network, pairs)
    with LayerSync(network, pairs, weight=WEIGHT) as sync:
        network(X)
        assert sync.loss().item() == pytest.approx(-WEIGHT * sum(cosines), rel=1e-5)
        assert {str(pair): float(value) for pair, value in sync.cosines.items()} == pytest.approx(
            {f"{student} <- {teacher}": cosine for (student, teacher), cosine in zip(pairs, cosines, strict=True)}
        )
        assert not any(value.requires_grad for value in sync.cosines.values())


def test_two_pairs_are_the_sum_of_each() -> None:
    network, losses = Network(), {}
    for name, pairs in (("first", TWO[:1]), ("second", TWO[1:]), ("both", TWO)):
        with LayerSync(network, pairs, weight=WEIGHT) as sync:
            network(X)
            losses[name] = sync.loss().item()
    assert losses["both"] == pytest.approx(losses["first"] + losses["second"], rel=1e-6)
    assert min(abs(losses["first"]), abs(losses["second"])) > 0.05  # so neither is lost in the sum


def test_loss_scales_with_the_weight() -> None:
    network, losses = Network(), []
    for weight in (0.0, 0.2, 0.4):
        with LayerSync(network, ONE, weight=weight) as sync:
            network(X)
            losses.append(sync.loss().item())
    assert losses == pytest.approx([0, losses[2] / 2, losses[2]])


def test_teacher_gets_no_gradient() -> None:
    network = Network()
    with LayerSync(network, [("blocks.0", "blocks.2")], weight=1.0) as sync:
        network(X)
        sync.loss().backward()
    moved = {name.partition(".fc")[0] for name in gradients(network)}
    assert moved == {"blocks.0"}  # not blocks.1 and blocks.2, on which the teacher depends


def test_gradient_descent_moves_the_student_towards_the_teacher() -> None:
    network = Network()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    with LayerSync(network, ONE, weight=1.0) as sync:
        losses = []
        for _ in range(30):
            network(X)
            loss = sync.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.02
    assert losses[-1] > -1


def test_maps_and_tuples_are_aligned_position_by_position() -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), WithExtras()

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.b(self.a(x))[0]
            return output

    class WithExtras(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x.roll(1, 1) + 1, None

    network, x = Maps(), torch.randn(2, 2, 5, 3, generator=torch.Generator().manual_seed(0))
    with LayerSync(network, [("a", "b")], weight=1.0) as sync:
        network(x)
        loss = sync.loss()
    student = network.a(x)
    teacher = student.roll(1, 1) + 1
    cosine = (student * teacher).sum(1) / (student.norm(dim=1) * teacher.norm(dim=1))
    torch.testing.assert_close(loss, -cosine.mean())


# --- pairs


def test_order_is_that_of_the_forward_pass() -> None:
    network = Network()
    with LayerSync(network, [("head", "blocks.3")], weight=1.0) as sync:
        network(X)
        with pytest.raises(ValueError, match=r"^student head runs after teacher blocks.3; swap them$"):
            sync.loss()


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], r"^no layer pair given; pass at least one \(student, teacher\)$"),
        ([*ONE, *ONE], "^a layer pair is given twice: blocks.0 <- blocks.2, blocks.0 <- blocks.2$"),
        ([("blocks.0", "blocks.4")], "^blocks.4 is not in Network, which has blocks.0 to blocks.3, head, unused$"),
        (("blocks.0", "blocks.2"), r"^'blocks.0' is not a \(student, teacher\) pair; pass a list of pairs"),
        ([("blocks.0", "blocks.1", "blocks.2")], r"is not a \(student, teacher\) pair"),
        ([("blocks.2", "blocks.0")], "comes after teacher"),
    ],
)
def test_invalid_pairs_are_refused(pairs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerSync(Network(), pairs, weight=1.0)


# --- which forward pass is used


def test_every_hook_is_removed_after_the_block() -> None:
    network = Network()
    with LayerSync(network, TWO, weight=1.0) as sync:
        assert num_hooks(network) == 6  # four layers, and the network before and after
        network(X)
    assert num_hooks(network) == 0
    network(X)
    with pytest.raises(ValueError, match="no forward pass with gradients was recorded; call the module inside"):
        sync.loss()


def test_every_hook_is_removed_after_an_exception() -> None:
    network = Network()
    with pytest.raises(KeyError, match="mine"), LayerSync(network, TWO, weight=1.0):
        raise KeyError("mine")
    assert num_hooks(network) == 0
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), LayerSync(network, ONE, weight=1.0):
        network(torch.zeros(1, 1, 3))
    assert num_hooks(network) == 0


def test_no_hook_is_left_if_a_layer_is_gone_when_the_block_begins() -> None:
    network = Network()
    sync = LayerSync(network, TWO, weight=1.0)
    network.blocks = network.blocks[:3]
    with pytest.raises(ValueError, match=r"^blocks.3 is not in Network"), sync:
        pass
    assert num_hooks(network) == 0


def test_a_block_can_be_entered_again_but_not_twice_at_once() -> None:
    network = Network()
    sync = LayerSync(network, ONE, weight=1.0)
    for _ in range(2):
        with sync:
            network(X)
            sync.loss()
            with pytest.raises(ValueError, match=r"^this LayerSync is already active; leave its block first$"):
                sync.__enter__()
    assert num_hooks(network) == 0


def test_each_pass_gives_its_loss_once() -> None:
    network = Network()
    with LayerSync(network, ONE, weight=1.0) as sync:
        network(X)
        network(2 * X)  # a forward pass without a call of loss()
        with pytest.warns(UserWarning, match=r"^2 forward passes with gradients, but only the latest is aligned; call"):
            latest = sync.loss().item()
        with pytest.raises(ValueError, match="no forward pass with gradients was recorded"):
            sync.loss()
        network(2 * X)
        assert sync.loss().item() == latest


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_passes_without_gradients_in_between_are_ignored(mode: Callable[[], Any]) -> None:
    network = Network()
    with LayerSync(network, TWO, weight=WEIGHT) as sync:
        with mode():
            network(3 * X)
        with pytest.raises(ValueError, match="no forward pass with gradients"):
            sync.loss()
        output = network(X)
        with mode():
            network(3 * X)
        loss = task(output) + sync.loss()
        with mode():
            network(3 * X)
        loss.backward()
    expected_loss, expected_gradients = expected(TWO)
    torch.testing.assert_close(loss.detach(), expected_loss)
    assert_equal_gradients(network, expected_gradients)


def test_gradient_accumulation_sums_the_gradients_of_the_parts() -> None:
    network = Network()
    with LayerSync(network, TWO, weight=WEIGHT) as sync:
        for part in (X[:2], X[2:]):
            loss = (task(network(part)) + sync.loss()) * len(part) / len(X)
            loss.backward()
    assert_equal_gradients(network, expected(TWO)[1])  # all tokens weigh the same, so the parts give the whole


@pytest.mark.parametrize("whole", [False, True])
def test_backward_before_the_regularizer(whole: bool) -> None:
    network = Network(reentrant=None if whole else False)
    with LayerSync(network, TWO, weight=WEIGHT) as sync:
        output = checkpoint(network, X, use_reentrant=False) if whole else network(X)
        task(output).backward(retain_graph=True)
        sync.loss().backward()
    assert_equal_gradients(network, expected(TWO)[1])


def test_layers_that_do_not_run_or_run_twice_are_refused() -> None:
    network = Network()
    with LayerSync(network, [("blocks.0", "unused")], weight=1.0) as sync:
        network(X)
        with pytest.raises(ValueError, match=r"^unused did not run in the forward pass; name a layer that does$"):
            sync.loss()

    class Twice(Network):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.blocks[0](x))

    twice = Twice()
    with LayerSync(twice, ONE, weight=1.0) as sync:
        twice(X)
        with pytest.raises(
            ValueError, match=r"^blocks.0 ran 2 times in one forward pass; name a layer that runs once$"
        ):
            sync.loss()


def test_layers_called_by_themselves_are_not_recorded() -> None:
    network = Network()
    with LayerSync(network, ONE, weight=1.0) as sync:
        for _ in range(2):
            network.blocks[0](X)
            network.blocks[2](X)
            with pytest.raises(ValueError, match="no forward pass with gradients was recorded"):
                sync.loss()
            network(X)
            sync.loss()


def test_calling_forward_directly_is_detected() -> None:
    network = Network()
    with LayerSync(network, ONE, weight=1.0) as sync:
        network.forward(X)
        with pytest.raises(ValueError, match="no forward pass with gradients was recorded; call the module"):
            sync.loss()


def test_layers_of_other_shapes_are_refused() -> None:
    network = Network()
    with LayerSync(network, [("blocks.0", "head")], weight=1.0) as sync:
        network(X)
        with pytest.raises(
            ValueError,
            match=r"^blocks.0 returns tokens of shape \(7, 16\), head of \(7, 3\); align layers of equal shape$",
        ):
            sync.loss()


def test_a_frozen_student_is_refused_and_a_frozen_teacher_is_not() -> None:
    network = Network()
    network.blocks[0].requires_grad_(False)
    with LayerSync(network, TWO, weight=1.0) as sync:
        network(X)
        with pytest.raises(ValueError, match=r"^blocks.0 has no gradient \(frozen, or under reentrant checkpointing\)"):
            sync.loss()
    network = Network()
    network.blocks[2].requires_grad_(False)
    with LayerSync(network, ONE, weight=1.0) as sync:
        network(X)
        sync.loss().backward()
    assert gradients(network).keys() == {"blocks.0.fc.weight", "blocks.0.fc.bias"}


# --- precision, checkpointing, compilation


def test_autocast_is_near_float32_and_the_cosine_is_in_float32() -> None:
    network, expected_loss = Network(), expected(TWO)[0]
    with LayerSync(network, TWO, weight=WEIGHT) as sync, torch.autocast("cpu", torch.bfloat16):
        loss = task(network(X).float()) + sync.loss()
        assert sync.cosines[LayerPair(*TWO[0])].dtype == torch.float32
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected_loss), abs=0.02)  # 8 significant bits in each product
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(network).values())


def test_bfloat16_tokens_are_compared_in_float32() -> None:
    network = Network().to(torch.bfloat16)
    with LayerSync(network, ONE, weight=1.0) as sync:
        network(X.to(torch.bfloat16))
        outputs = {recorded.name: recorded.output for recorded in sync._student_pass._outputs}
        loss = sync.loss()
    student, teacher = (outputs[name].float() for name in ONE[0])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, -(student * teacher).sum(-1).div(student.norm(dim=-1) * teacher.norm(dim=-1)).mean()
    )


def test_non_reentrant_checkpointing_equals_plain_training() -> None:
    network = Network(reentrant=False)
    assert_trains_as_expected(network, network)


@pytest.mark.parametrize("whole", [False, True])
def test_steps_after_a_recomputed_backward_pass_are_unaffected(whole: bool) -> None:
    network = Network(reentrant=None if whole else False)
    with LayerSync(network, TWO, weight=WEIGHT) as sync:
        for _ in range(3):
            network.zero_grad()
            output = checkpoint(network, X, use_reentrant=False) if whole else network(X)
            loss = task(output) + sync.loss()
            loss.backward()
            assert not sync._student_pass._outputs  # recomputed outputs are not recorded
            with pytest.raises(ValueError, match="no forward pass with gradients was recorded"):
                sync.loss()
    assert_equal_gradients(network, expected(TWO)[1])


@pytest.mark.parametrize("student", ["blocks.0", "blocks.1"])  # inside a segment, and at its end
def test_reentrant_checkpointing_is_refused(student: str) -> None:
    network = Network(reentrant=True)
    with LayerSync(network, [(student, "blocks.2")], weight=1.0) as sync:
        network(X.clone().requires_grad_())
        with pytest.raises(
            ValueError,
            match=rf"^{student} has no gradient .*; train it, or checkpoint with use_reentrant=False$",
        ):
            sync.loss()


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_far_off_and_empty_tokens_give_finite_gradients(offset: float) -> None:
    network = Network()
    with torch.no_grad():
        network.blocks[0].fc.bias.zero_()
    x = (X + offset).clone()
    x[:, 0] = 0  # tanh(0) = 0: the student's token is exactly zero and has no direction
    with LayerSync(network, ONE, weight=WEIGHT) as sync:
        output = network(x)
        assert not sync._student_pass._outputs[0].output[:, 0].any()
        loss = sync.loss() + 0 * output.sum()
        loss.backward()
    assert bool(loss.isfinite())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(network).values())


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_in_place(network: Network) -> Callable[[Tensor], Tensor]:
    network.compile(backend="aot_eager")
    return network


def compiled_around(network: Network) -> Callable[[Tensor], Tensor]:
    compiled: Callable[[Tensor], Tensor] = torch.compile(network, backend="aot_eager")
    return compiled


def compiled_by_block(network: Network) -> Callable[[Tensor], Tensor]:
    for block in network.blocks:
        block.compile(backend="aot_eager")
    return network


# Hooks must become part of the graphs, so a backend without code generation is sufficient. Dynamo accesses .grad of
# non-leaf tensors and suppresses the warning, which fails if warnings are errors.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiling", [compiled_in_place, compiled_around, compiled_by_block])
@pytest.mark.parametrize("run_before", [False, True])
def test_compiled_equals_eager(compiling: Callable[[Network], Callable[[Tensor], Tensor]], run_before: bool) -> None:
    network = Network()
    call = compiling(network)
    if run_before:  # Graphs without hooks exist when the block begins.
        call(X)
    assert_trains_as_expected(network, call)
    # After the block, the graphs contain no hooks.
    network.zero_grad()
    task(call(X)).backward()
    plain = Network()
    task(plain(X)).backward()
    assert_equal_gradients(network, gradients(plain))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiling", [compiled_in_place, compiled_by_block])
def test_compiled_training_with_checkpointing_and_evaluation(
    compiling: Callable[[Network], Callable[[Tensor], Tensor]],
) -> None:
    network = Network(reentrant=False)
    call = compiling(network)
    with LayerSync(network, TWO, weight=WEIGHT) as sync:
        for _ in range(2):
            network.zero_grad()
            output = call(X)
            with torch.no_grad():
                call(3 * X)
            loss = task(output) + sync.loss()
            loss.backward()
            assert not sync._student_pass._outputs
    assert_equal_gradients(network, expected(TWO)[1])


def test_the_caller_chooses_the_aligned_tokens() -> None:
    network = Network()
    with LayerSync(network, ONE, weight=1.0, tokens=lambda output, name: output[:, 1:]) as sync:
        network(X)
        aligned = sync.loss()
    with LayerSync(network, ONE, weight=1.0) as whole:
        network(X)
        assert not torch.allclose(aligned, whole.loss())
    student = network.blocks[0](X)
    teacher = network.blocks[2](network.blocks[1](student))
    assert torch.allclose(aligned, -torch.cosine_similarity(student[:, 1:], teacher[:, 1:], dim=-1).mean())


def regularizer_of(
    network: Network, *, pairs: Any = ONE, x: Tensor = X, **call: Any
) -> tuple[float, dict[str, Tensor]]:
    """Value and gradients of the regularizer alone."""
    options = call.pop("options")
    network.zero_grad()
    with LayerSync(network, pairs, weight=WEIGHT, options=options) as sync:
        output = network(x)
        loss = sync.loss(**call)
        (loss + 0 * output.sum()).backward()
    return float(loss.detach()), gradients(network)


def test_every_pair_has_its_weight() -> None:
    network = Network()
    first, second = (regularizer_of(network, pairs=[pair], options=SyncOptions()) for pair in TWO)
    value, slopes = regularizer_of(network, pairs=TWO, options=SyncOptions(pair_weights=(2.0, -0.5)))
    assert value == pytest.approx(2 * first[0] - 0.5 * second[0])
    for name, slope in slopes.items():
        torch.testing.assert_close(slope, 2 * first[1][name] - 0.5 * second[1][name])
    with pytest.raises(ValueError, match=r"^1 weights for 2 layer pairs; pass one per pair$"):
        LayerSync(network, TWO, weight=1.0, options=SyncOptions(pair_weights=(1.0,)))


def test_schedule_scales_the_loss_and_stops_it() -> None:
    network, options = Network(), SyncOptions(warmup_steps=1, stop_step=3)
    full, slopes = regularizer_of(network, options=SyncOptions())
    half, halves = regularizer_of(network, options=options, step=0)
    assert half == pytest.approx(full / 2)
    torch.testing.assert_close(halves["blocks.0.fc.weight"], slopes["blocks.0.fc.weight"] / 2)
    assert regularizer_of(network, options=options, step=1)[0] == full
    with LayerSync(network, ONE, weight=WEIGHT, options=options) as sync:
        network(X)
        loss = sync.loss(step=3)
        assert loss == 0
        assert not loss.requires_grad
        assert float(sync.cosines[LayerPair(*ONE[0])]) == pytest.approx(-full / WEIGHT)  # the log continues
        assert sync.statistics()["gradient norm blocks.0 <- blocks.2"] == 0
        network(X)
        with pytest.raises(ValueError, match=r"^the weight depends on the step; pass loss\(step=...\)$"):
            sync.loss()


def test_only_samples_in_the_noise_range_are_aligned() -> None:
    network, options = Network(), SyncOptions(noise_range=(0.2, 0.8))
    level = torch.tensor([0.1, 0.2, 0.5, 0.8, 0.81], dtype=torch.float64)
    outputs = residuals(network)
    cosines = cosines_of(outputs["blocks.0"], outputs["blocks.2"]).detach()[1:4]
    value, slopes = regularizer_of(network, options=options, noise_level=level)
    assert value == pytest.approx(-WEIGHT * float(cosines.sum()) / (5 * 7), rel=1e-5)
    inside, of_inside = regularizer_of(network, x=X[1:4], options=SyncOptions())
    assert value == pytest.approx(inside * 3 / 5, rel=1e-5)
    torch.testing.assert_close(slopes["blocks.0.fc.weight"], of_inside["blocks.0.fc.weight"] * 3 / 5)
    with LayerSync(network, ONE, weight=WEIGHT, options=options) as sync:
        network(X)
        sync.loss(noise_level=level)
        assert float(sync.cosines[LayerPair(*ONE[0])]) == pytest.approx(float(cosines.mean()))
        network(X)
        with pytest.raises(
            ValueError, match=r"^only a range of noise levels is aligned; pass loss\(noise_level=...\)$"
        ):
            sync.loss()


def test_a_batch_without_a_sample_in_the_range_gives_zero() -> None:
    network, options = Network(), SyncOptions(noise_range=(0.2, 0.8))
    value, slopes = regularizer_of(network, options=options, noise_level=torch.full((5,), 0.9))
    assert value == 0
    assert not any(slope.any() for slope in slopes.values())  # nor nan
    with LayerSync(network, ONE, weight=WEIGHT, options=options) as sync:
        network(X)
        sync.loss(noise_level=torch.zeros(5))
        assert sync.statistics() == {}


@pytest.mark.parametrize("part", [1, 2, 4])
def test_accumulation_is_exact_with_a_noise_range(part: int) -> None:
    network, options = Network(), SyncOptions(noise_range=(0.3, 1.0))
    x, level = torch.cat([X, X + 1])[:8], torch.tensor([0.9, 0.1, 0.1, 0.1, 0.5, 0.2, 0.7, 0.8])
    _, expected_gradients = regularizer_of(network, x=x, options=options, noise_level=level)
    network.zero_grad()
    with LayerSync(network, ONE, weight=WEIGHT, options=options) as sync:
        for start in range(0, 8, part):
            output = network(x[start : start + part])
            loss = sync.loss(noise_level=level[start : start + part]) + 0 * output.sum()
            (loss * part / 8).backward()
    assert_equal_gradients(network, expected_gradients)


def test_padding_never_counts() -> None:
    network, mask = Network(), torch.arange(7) < torch.tensor([7, 5, 3, 1, 2]).unsqueeze(1)
    value, slopes = regularizer_of(network, options=SyncOptions(), mask=mask)
    short = [regularizer_of(network, x=X[i : i + 1, : int(mask[i].sum())], options=SyncOptions()) for i in range(5)]
    assert value == pytest.approx(sum(loss for loss, _ in short) / 5)
    torch.testing.assert_close(
        slopes["blocks.0.fc.weight"], torch.stack([s["blocks.0.fc.weight"] for _, s in short]).mean(0)
    )
    padded = torch.where(mask.unsqueeze(-1), X, torch.tensor(50.0))
    assert regularizer_of(network, x=padded, options=SyncOptions(), mask=mask)[0] == value


def test_centered_cosine_is_that_of_centered_tokens() -> None:
    network = Network()
    outputs = residuals(network)
    s, t = (outputs[name] - outputs[name].mean((0, 1)) for name in ONE[0])
    value, slopes = regularizer_of(network, options=SyncOptions(centered=True))
    assert value == pytest.approx(-WEIGHT * float(cosines_of(s, t).mean().detach()), rel=1e-5)
    assert {name.partition(".fc")[0] for name in slopes if slopes[name].any()} == {"blocks.0"}


# --- projector


def test_projector_stands_between_the_student_and_the_cosine() -> None:
    network, options = Network(), SyncOptions(projector_width=32)
    pairs = [*ONE, ("blocks.1", "head")]  # a projector also maps between widths
    sync = LayerSync(network, pairs, weight=WEIGHT, options=options)
    assert not list(sync.parameters())
    sync.prepare(X)
    assert num_hooks(network) == 0
    heads = sync.projectors.heads
    with sync:
        network(X)
        loss = sync.loss()
        loss.backward()
        statistics = sync.statistics()
    outputs = residuals(network)
    outputs["head"] = network.head(outputs["blocks.3"])
    cosines = [
        cosines_of(head(outputs[s]), outputs[t].detach()).mean() for head, (s, t) in zip(heads, pairs, strict=True)
    ]
    torch.testing.assert_close(loss, -WEIGHT * sum(cosines))
    got, moved = [p.grad.clone() for p in sync.parameters()], gradients(network)
    assert moved.keys() == {f"blocks.{i}.fc.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    torch.testing.assert_close(
        got, list(torch.autograd.grad(-WEIGHT * sum(cosines), list(sync.parameters()), retain_graph=True))
    )
    (at_student,) = torch.autograd.grad(-WEIGHT * cosines[0], outputs["blocks.0"])
    assert statistics["gradient norm blocks.0 <- blocks.2"] == pytest.approx(float(at_student.norm()), rel=1e-4)


def test_projectors_are_created_before_use_or_refused() -> None:
    network = Network()
    with LayerSync(network, ONE, weight=1.0, options=SyncOptions(projector_width=4)) as sync:
        network(X)
        with pytest.raises(
            ValueError, match=r"^the projectors do not exist yet; call prepare\(\) before creating the optimizer"
        ):
            sync.loss()
    with pytest.raises(
        ValueError, match=r"^there is no projector to prepare; pass SyncOptions\(projector_width=...\)$"
    ):
        LayerSync(network, ONE, weight=1.0).prepare(X)


# --- separate teacher


def test_averaged_teacher_gives_the_teachers_tokens() -> None:
    network, options = Network(), SyncOptions(teacher_decay=0.9)
    sync, old = LayerSync(network, ONE, weight=WEIGHT, options=options), residuals(Network())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1
    with sync:
        network(X)
        with sync.teaching() as teacher:
            teacher(X)
        loss = sync.loss()
        loss.backward()
        network(X)
        with pytest.raises(
            ValueError, match=r"^the teacher did not run; call it inside `with sync.teaching\(\)` before loss\(\)$"
        ):
            sync.loss()
    student = residuals(network)["blocks.0"]
    torch.testing.assert_close(loss, -WEIGHT * cosines_of(student, old["blocks.2"]).mean())
    assert not any(p.requires_grad or p.grad is not None for p in sync.teacher.parameters())
    assert num_hooks(network) == num_hooks(sync.teacher) == 0


def test_averaged_teacher_follows_the_network() -> None:
    network = Network()
    network.register_buffer("counter", torch.zeros(()))
    sync = LayerSync(network, ONE, weight=1.0, options=SyncOptions(teacher_decay=0.75))
    before = network.head.weight.detach().clone()
    for step in range(1, 3):
        with torch.no_grad():
            network.head.weight += 1
            network.counter += 1
        sync.update_teacher()
        expected_weight = before + sum(0.25 * 0.75 ** (step - k) * k for k in range(1, step + 1))
        torch.testing.assert_close(sync.teacher.head.weight, expected_weight)
    assert sync.teacher.counter == 2
    with pytest.raises(ValueError, match=r"^there is no teacher to update; pass SyncOptions\(teacher_decay=...\)$"):
        LayerSync(network, ONE, weight=1.0).update_teacher()


@pytest.mark.parametrize("teacher_first", [False, True])
def test_noise_gap_shows_the_network_itself_other_inputs(teacher_first: bool) -> None:
    network, options = Network(), SyncOptions(noise_gap=0.2)
    cleaner = 0.5 * X

    def teach() -> None:
        with sync.teaching() as teacher:
            assert teacher is network
            assert not teacher.training
            teacher(cleaner)
        assert network.training

    with LayerSync(network, ONE, weight=WEIGHT, options=options) as sync:
        if teacher_first:
            teach()
        network(X)
        if not teacher_first:
            teach()
        loss = sync.loss()
    s, t = residuals(network)["blocks.0"], residuals(network, cleaner)["blocks.2"]
    torch.testing.assert_close(loss, -WEIGHT * cosines_of(s, t.detach()).mean())


def test_default_options_need_no_second_pass_and_no_state() -> None:
    network, passes = Network(), []
    network.register_forward_hook(lambda *_: passes.append(1))
    with LayerSync(network, ONE, weight=1.0) as sync:
        network(X)
        sync.loss()
        assert len(passes) == 1
        with (
            pytest.raises(ValueError, match=r"^the teacher has no separate forward pass; pass SyncOptions"),
            sync.teaching(),
        ):
            pass
    assert sync.teacher is sync.projectors is None
    assert sync.state_dict() == {}


def test_state_is_carried_to_another_process() -> None:
    options = SyncOptions(projector_width=8, teacher_decay=0.5)

    def prepared(seed: int) -> LayerSync:
        sync = LayerSync(Network(seed=seed), ONE, weight=1.0, options=options)
        torch.manual_seed(seed)
        sync.prepare(X)
        return sync

    first, second = prepared(1), prepared(2)
    with first:
        first.module(X)
        with first.teaching() as teacher:
            teacher(X)
        first.loss()
        first.statistics()
    state = first.state_dict()
    second.load_state_dict(state)
    assert second.state_dict().keys() == state.keys()
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in state.items())
    plain = LayerSync(Network(), ONE, weight=1.0)
    with pytest.raises(
        ValueError,
        match=r"^the state contains projectors and teacher, this LayerSync has none; pass the same options",
    ):
        plain.load_state_dict(state)


# --- statistics


def test_statistics_are_those_of_the_loss() -> None:
    network = Network()
    with LayerSync(network, TWO, weight=WEIGHT, options=SyncOptions(pair_weights=(1.0, 2.0))) as sync:
        network(X)
        sync.loss().backward()
        numbers = sync.statistics()
        assert numbers == sync.statistics()  # repeated calls return the same
        network(X)
        with pytest.raises(ValueError, match=r"^there is no latest loss; call statistics\(\) between loss\(\) and"):
            sync.statistics()
    outputs = {name: tokens.detach().requires_grad_() for name, tokens in residuals(network).items()}
    for (student, teacher), weight in zip(TWO, (WEIGHT, 2 * WEIGHT), strict=True):
        s, t, pair = outputs[student], outputs[teacher].detach(), f"{student} <- {teacher}"
        cosines = cosines_of(s, t)
        (slope,) = torch.autograd.grad(weight * cosines.mean(), s)
        # The component of the teacher's direction orthogonal to the student, divided by the norm of the student.
        closed = (weight / 35) * ((1 - cosines**2) / s.square().sum(-1)).sum().sqrt()
        assert numbers[f"cosine {pair}"] == pytest.approx(float(cosines.mean().detach()))
        assert numbers[f"gradient norm {pair}"] == pytest.approx(float(slope.norm()), rel=1e-4)
        assert numbers[f"gradient norm {pair}"] == pytest.approx(float(closed.detach()), rel=1e-4)
        rank = effective_rank_of_features(s.detach().flatten(0, 1).numpy())
        assert numbers[f"effective rank {student}"] == pytest.approx(rank, rel=1e-4)
        assert numbers[f"collapse {student}"] == 0
    assert len(numbers) == 8


def test_collapse_is_reported() -> None:
    network, alarms = Network(), []
    with LayerSync(network, ONE, weight=1.0) as sync:
        for spread in (1.0, 1.0, 0.0):  # finally every token is the same
            network(spread * X + 1)
            sync.loss()
            alarms.append(sync.statistics()["collapse blocks.0"])
    assert alarms == [0, 0, 1]


# --- other layouts


def test_two_streams_and_sequence_first() -> None:
    class Streams(nn.Module):
        """As in MM-DiT: every block takes and returns text and image tokens, here with the sequence first."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Both() for _ in range(3))

        def forward(self, text: Tensor, image: Tensor) -> Tensor:
            for block in self.blocks:
                text, image = block(text, image)
            return image

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
            return text + 1, image + torch.tanh(self.fc(image)) + text.mean(0)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Streams()
    text, image = X[:, :3].transpose(0, 1), X.transpose(0, 1)
    mask = torch.arange(7).expand(5, 7) < 4
    with LayerSync(network, ONE, weight=1.0, tokens=lambda output, name: output[1].transpose(0, 1)) as sync:
        network(text, image)
        loss = sync.loss(mask=mask)
        assert sync.statistics()["effective rank blocks.0"] > 1
    images = []
    for block in network.blocks:
        text, image = block(text, image)
        images.append(image.transpose(0, 1))
    torch.testing.assert_close(loss, -cosines_of(images[0], images[2])[:, :4].mean())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_network_with_a_noise_gap_is_compiled_once() -> None:
    network, options = Network(), SyncOptions(noise_gap=0.2)
    network.compile(backend="eager")

    def step() -> Tensor:
        network(X)
        with sync.teaching() as teacher:
            teacher(0.5 * X)
        loss = sync.loss()
        sync.statistics()
        return loss

    with LayerSync(network, ONE, weight=WEIGHT, options=options) as sync:
        losses = [step(), step()]
        with torch.compiler.set_stance("fail_on_recompile"):
            losses += [step(), step()]
    s, t = residuals(network)["blocks.0"], residuals(network, 0.5 * X)["blocks.2"]
    torch.testing.assert_close(losses, 4 * [-WEIGHT * cosines_of(s, t.detach()).mean()])


def test_wrappers_are_removed() -> None:
    network = Network()
    with LayerSync(torch.compile(network, backend="eager"), ONE, weight=1.0) as sync:
        assert sync.module is network


# --- one line at the first step


def loss_of(network: nn.Module, pairs: Any = ONE, **call: Any) -> Tensor:
    options = call.pop("options", SyncOptions())
    with LayerSync(network, pairs, weight=WEIGHT, options=options) as sync:
        network(X)
        return sync.loss(**call)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -0.3])
def test_weights_that_are_negative_or_not_finite_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=rf"^the weight is {weight:g}; pass a finite number of at least 0, since"):
        LayerSync(Network(), ONE, weight=weight)


def test_the_weight_may_be_a_tensor_and_change_but_not_be_a_function() -> None:
    network = Network()
    with LayerSync(network, ONE, weight=torch.tensor(0.5)) as sync:  # type: ignore[arg-type]
        losses = []
        for weight in (0.5, 1.0):
            sync.weight = weight
            network(X)
            losses.append(float(sync.loss().detach()))
    assert losses[1] == pytest.approx(2 * losses[0])
    with pytest.raises(
        ValueError, match=r"^the weight is a function; pass a number, and for a schedule SyncOptions or"
    ):
        LayerSync(network, ONE, weight=lambda step: 0.3)  # type: ignore[arg-type, return-value]


def test_a_layer_is_not_aligned_to_itself_under_another_name() -> None:
    network = Network()
    network.alias = network.blocks[0]
    with pytest.raises(ValueError, match=r"^alias and blocks.0 are the same layer, which would learn nothing from"):
        LayerSync(network, [("alias", "blocks.0")], weight=1.0)
    with pytest.raises(ValueError, match=r"^blocks.0 and blocks.1:input return the same tensor, which learns nothing"):
        loss_of(network, [("blocks.0", "blocks.1:input")])


def test_noise_levels_are_checked_also_without_a_range() -> None:
    network = Network()
    with pytest.raises(ValueError, match=r"^a noise level is 500, which is outside \[0, 1\]; pass sigma / "):
        loss_of(network, noise_level=torch.full((5,), 500.0))
    with pytest.raises(ValueError, match=r"^the noise levels are of torch.int64, like the times of a scheduler; pass"):
        loss_of(network, noise_level=torch.zeros(5, dtype=torch.long), options=SyncOptions(noise_range=(0.2, 1.0)))


def test_a_mask_without_a_token_is_refused_and_a_sample_of_padding_is_not() -> None:
    network, mask = Network(), torch.ones(5, 7, dtype=torch.bool)
    mask[1] = False
    others = torch.tensor([0, 2, 3, 4])
    assert float(loss_of(network, mask=mask).detach()) == pytest.approx(
        0.8 * regularizer_of(network, x=X[others], options=SyncOptions())[0], rel=1e-5
    )
    with pytest.raises(ValueError, match=r"^the mask counts no token; pass True for tokens that count"):
        loss_of(network, mask=~mask & mask)


@pytest.mark.parametrize("layer", ["blocks.0", "blocks.2"])
def test_tokens_that_are_not_finite_are_refused_unless_they_are_padding(layer: str) -> None:
    network, mask = Network(), torch.ones(5, 7, dtype=torch.bool)
    mask[:, 6] = False

    def spoil(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :6], output[:, 6:] * float("nan")], 1)

    expected_loss = loss_of(network, mask=mask).detach()
    network.get_submodule(layer).register_forward_hook(spoil)
    with pytest.raises(ValueError, match=r"^the tokens of blocks.\d are not finite; look for an overflow, or leave"):
        loss_of(network)
    loss = loss_of(network, mask=mask)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected_loss)


def test_what_is_aligned_is_said_once_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    network = Network()
    sync = LayerSync(network, TWO, weight=1.0)
    assert sync.aligned == ()
    for x in (X, X, X[:1, :3]):
        with sync:
            network(x)
            sync.loss()
    assert capsys.readouterr().err.splitlines() == [
        "layerprobe: blocks.0 <- blocks.2: 7 tokens of width 16",
        "layerprobe: blocks.1 <- blocks.3: 7 tokens of width 16",
    ]
    assert sync.aligned[0] == "blocks.0 <- blocks.2: 3 tokens of width 16"  # of the latest loss


@pytest.mark.parametrize("thing", ["blocks", {"network": 1}])
def test_other_things_than_modules_are_refused(thing: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{type(thing).__name__} is not a torch.nn.Module; pass the network"):
        LayerSync(thing, ONE, weight=1.0)


# --- the end of the alignment, and the log


def _aligned_for(steps: int, sync: LayerSync, network: Network) -> list[float]:
    losses = []
    for _ in range(steps):
        network(X)
        losses.append(float(sync.loss().detach()))
    return losses


def test_a_pair_ends_when_its_running_cosine_reaches_the_stop_and_a_resumed_one_stays_ended() -> None:
    network, said = Network(), list[str]()
    _, (near, far) = reference(network, TWO)
    assert near != far
    stop = (near + far) / 2  # between the two, so that one pair ends at once and the other goes on
    last, first = (TWO[0], TWO[1]) if near < far else (TWO[1], TWO[0])
    with LayerSync(network, TWO, weight=WEIGHT, stop_cosine=stop, say=said.append) as sync:
        losses = _aligned_for(3, sync, network)
        assert losses == pytest.approx([-WEIGHT * (near + far), *2 * [-WEIGHT * min(near, far)]], rel=1e-5)
        assert [sync.has_ended(LayerPair(*pair)) for pair in (first, last)] == [True, False]
        network(X)
        sync.loss().backward()
        state = sync.state_dict()
    assert [line for line in said if "reached" in line] == [
        f"{first[0]} <- {first[1]}: the cosine has reached {max(near, far):.3f} of {stop:g}; the alignment ends"
    ]
    # Only the student that is still aligned, and what it depends on, is pulled.
    deepest = int(last[0].removeprefix("blocks."))
    moved = {name.partition(".fc")[0] for name, g in gradients(network).items() if g.any()}
    assert moved == {f"blocks.{i}" for i in range(deepest + 1)}
    resumed = LayerSync(network, TWO, weight=WEIGHT, stop_cosine=stop)
    resumed.load_state_dict(state)
    assert resumed.has_ended(LayerPair(*first))
    assert not resumed.has_ended(LayerPair(*last))


def test_the_running_cosine_moves_by_a_hundredth_and_needs_a_counted_token() -> None:
    network = Network()
    options = SyncOptions(noise_range=(0.5, 1.0))
    with LayerSync(network, ONE, weight=WEIGHT, options=options, stop_cosine=1.0) as sync:
        for scale, level in ((1.0, 0.9), (3.0, 0.9), (1.0, 0.1)):
            network(scale * X)
            sync.loss(noise_level=torch.full((len(X),), level))
    _, (first,) = reference(network, ONE)
    _, (second,) = reference(network, ONE, 3 * X)
    (running,) = (value for name, value in sync.state_dict().items() if name.startswith("running cosine"))
    assert float(running) == pytest.approx(0.99 * first + 0.01 * second, rel=1e-6)


def test_logs_have_the_names_and_numbers_of_simpletuner() -> None:
    network = Network()
    _, cosines = reference(network, TWO)
    with LayerSync(network, TWO, weight=WEIGHT) as sync:
        with pytest.raises(ValueError, match=r"there is no latest loss; call logs\(\) between loss\(\) and"):
            sync.logs()
        network(X)
        loss = float(sync.loss().detach())
        assert sync.logs() == pytest.approx({"layersync_loss": loss, "layersync_similarity": sum(cosines) / 2})
    with LayerSync(network, ONE, weight=WEIGHT, options=SyncOptions(noise_range=(0.5, 1.0))) as sync:
        network(X)
        loss = float(sync.loss(noise_level=torch.tensor([0.9, 0.1, 0.1, 0.1, 0.6])).detach())
        assert sync.logs()["layersync_loss"] == pytest.approx(loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stop_cosine": 1.1}, r"^stop_cosine must be above 0 and at most 1, got 1\.1$"),
        (
            {"stop_cosine": 0.9, "options": SyncOptions(projector_width=4)},
            r"pass only one of stop_cosine and projector",
        ),
    ],
)
def test_a_stop_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerSync(Network(), ONE, weight=WEIGHT, **arguments)
