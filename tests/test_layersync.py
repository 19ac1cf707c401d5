"""LayerSync against its formula written out by hand, in every way that a training loop may run a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layerprobe.layersync import LayerPair, LayerSync, depth_heuristic, layer_of_depth

WEIGHT = 0.3
X = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0))
ONE, TWO = [("blocks.0", "blocks.2")], [("blocks.0", "blocks.2"), ("blocks.1", "blocks.3")]


class Network(nn.Module):
    """Residual blocks; with checkpointing, every two of them are run again in the backward pass."""

    def __init__(self, depth: int = 4, *, reentrant: bool | None = None, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList(Block() for _ in range(depth))
            self.head = nn.Linear(16, 3)
            self.unused = nn.Linear(16, 16)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for start in range(0, len(self.blocks), 2):
            segment = nn.Sequential(*self.blocks[start : start + 2])
            x = segment(x) if self.reentrant is None else checkpoint(segment, x, use_reentrant=self.reentrant)
        output: Tensor = self.head(x)
        return output


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + torch.tanh(self.fc(x))
        return output


def reference(network: Network, pairs: list[tuple[str, str]], x: Tensor = X) -> tuple[Tensor, list[float]]:
    """The task's loss plus the regulariser, from the formula: tokens by hand, norms by hand."""
    tokens, regulariser, cosines = {}, torch.zeros(()), []
    for i, block in enumerate(network.blocks):
        x = tokens[f"blocks.{i}"] = x + torch.tanh(x @ block.fc.weight.T + block.fc.bias)
    for student, teacher in pairs:
        s, t = tokens[student], tokens[teacher].detach()
        cosine = ((s * t).sum(-1) / (s.square().sum(-1).sqrt() * t.square().sum(-1).sqrt())).mean()
        regulariser = regulariser - WEIGHT * cosine
        cosines.append(float(cosine.detach()))
    return task(network.head(x)) + regulariser, cosines


def task(output: Tensor) -> Tensor:
    return (output - 1).square().mean()


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
    """Loss and gradients of one step inside the block equal the formula's."""
    wanted_loss, wanted = expected(pairs)
    with LayerSync(network, pairs, weight=WEIGHT) as sync:
        loss = task(call(X)) + sync.loss()
        loss.backward()
    assert_equal_gradients(network, wanted)
    torch.testing.assert_close(loss.detach(), wanted_loss)


def assert_equal_gradients(network: nn.Module, wanted: dict[str, Tensor]) -> None:
    got = gradients(network)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
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


def test_teacher_is_not_moved() -> None:
    network = Network()
    with LayerSync(network, [("blocks.0", "blocks.2")], weight=1.0) as sync:
        network(X)
        sync.loss().backward()
    moved = {name.partition(".fc")[0] for name in gradients(network)}
    assert moved == {"blocks.0"}  # not blocks.1 and blocks.2, on which the teacher depends


def test_gradient_descent_brings_the_student_to_the_teacher() -> None:
    network = Network()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    with LayerSync(network, ONE, weight=1.0) as sync:
        seen = []
        for _ in range(30):
            network(X)
            loss = sync.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(float(loss.detach()))
    assert seen[-1] < seen[0] - 0.02
    assert seen[-1] > -1


def test_maps_and_tuples_are_aligned_per_place() -> None:
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


def test_pairs_of_a_layer_with_itself_or_an_earlier_one_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^blocks.3 cannot be its own teacher: a layer aligned to itself learns nothing$"
    ):
        LayerPair("blocks.3", "blocks.3")
    with pytest.raises(ValueError, match=r"^student blocks.10 comes after teacher blocks.9; swap them$"):
        LayerPair("blocks.10", "blocks.9")  # as numbers, not as text
    with pytest.raises(ValueError, match="comes after teacher"):
        LayerSync(Network(), [("blocks.2", "blocks.0")], weight=1.0)
    assert str(LayerPair("blocks.9", "blocks.10")) == "blocks.9 <- blocks.10"
    LayerPair("down.3", "up.0")  # names of different places say nothing about their order


def test_order_is_that_of_the_forward_pass() -> None:
    network = Network()
    with LayerSync(network, [("head", "blocks.3")], weight=1.0) as sync:
        network(X)
        with pytest.raises(ValueError, match=r"^student head runs after teacher blocks.3; swap them$"):
            sync.loss()


def test_depths_count_from_one_and_names_from_zero() -> None:
    assert layer_of_depth(8) == "blocks.7"
    assert layer_of_depth(1, prefix="layers") == "layers.0"
    with pytest.raises(ValueError, match=r"^depth counts from 1, got 0; depth 1 is blocks.0$"):
        layer_of_depth(0)


@pytest.mark.parametrize(("depth", "student", "teacher"), [(2, 1, 2), (3, 1, 2), (5, 2, 3), (8, 2, 5), (28, 8, 17)])
def test_depth_heuristic_is_a_third_and_two_thirds_down(depth: int, student: int, teacher: int) -> None:
    pair = depth_heuristic(tuple(layer_of_depth(i + 1) for i in range(depth)))
    assert pair == LayerPair(layer_of_depth(student), layer_of_depth(teacher))


@pytest.mark.parametrize("depth", range(2, 61))
def test_depth_heuristic_gives_a_pair_at_every_depth(depth: int) -> None:
    depth_heuristic(tuple(layer_of_depth(i + 1) for i in range(depth)))  # LayerPair itself refuses a wrong one


def test_depth_heuristic_needs_two_layers() -> None:
    with pytest.raises(ValueError, match=r"^a pair needs two layers, got 1$"):
        depth_heuristic(("blocks.0",))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], r"^no layer pair given; pass at least one \(student, teacher\)$"),
        ([*ONE, *ONE], "^a layer pair is given twice: blocks.0 <- blocks.2, blocks.0 <- blocks.2$"),
        ([("blocks.0", "blocks.4")], "^blocks.4 is not in Network, which has blocks.0 to blocks.3, head, unused$"),
        (("blocks.0", "blocks.2"), r"^'blocks.0' is not a \(student, teacher\) pair; pass a list of pairs"),
        ([("blocks.0", "blocks.1", "blocks.2")], r"is not a \(student, teacher\) pair"),
    ],
)
def test_pairs_that_are_none_are_refused(pairs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerSync(Network(), pairs, weight=1.0)


# --- the forward pass it belongs to


def test_every_hook_is_gone_after_the_block() -> None:
    network = Network()
    with LayerSync(network, TWO, weight=1.0) as sync:
        assert num_hooks(network) == 5  # four layers and the network
        network(X)
    assert num_hooks(network) == 0
    network(X)
    with pytest.raises(ValueError, match="no forward pass with gradients was recorded; call the module inside"):
        sync.loss()


def test_every_hook_is_gone_after_an_exception() -> None:
    network = Network()
    with pytest.raises(KeyError, match="mine"), LayerSync(network, TWO, weight=1.0):
        raise KeyError("mine")
    assert num_hooks(network) == 0
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), LayerSync(network, ONE, weight=1.0):
        network(torch.zeros(1, 1, 3))
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
        network(2 * X)  # a forward pass whose loss nobody wanted
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
    wanted_loss, wanted = expected(TWO)
    torch.testing.assert_close(loss.detach(), wanted_loss)
    assert_equal_gradients(network, wanted)


def test_gradient_accumulation_sums_the_gradients_of_the_parts() -> None:
    network = Network()
    with LayerSync(network, TWO, weight=WEIGHT) as sync:
        for part in (X[:2], X[2:]):
            loss = (task(network(part)) + sync.loss()) * len(part) / len(X)
            loss.backward()
    assert_equal_gradients(network, expected(TWO)[1])  # all tokens weigh alike, so the parts give the whole


@pytest.mark.parametrize("whole", [False, True])
def test_backward_before_the_loss_is_asked_for(whole: bool) -> None:
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


def test_calling_forward_itself_is_noticed() -> None:
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
            match=r"^blocks.0 gives tokens of shape \(7, 16\), head of \(7, 3\); align layers of equal shape$",
        ):
            sync.loss()


def test_a_frozen_student_is_refused_and_a_frozen_teacher_is_not() -> None:
    network = Network()
    network.blocks[0].requires_grad_(False)
    with LayerSync(network, TWO, weight=1.0) as sync:
        network(X)
        with pytest.raises(
            ValueError, match=r"^blocks.0 carries no gradient \(frozen, or under reentrant checkpointing\)"
        ):
            sync.loss()
    network = Network()
    network.blocks[2].requires_grad_(False)
    with LayerSync(network, ONE, weight=1.0) as sync:
        network(X)
        sync.loss().backward()
    assert gradients(network).keys() == {"blocks.0.fc.weight", "blocks.0.fc.bias"}


# --- precision, checkpointing, compilation


def test_autocast_is_near_float32_and_the_cosine_is_in_float32() -> None:
    network, wanted = Network(), expected(TWO)[0]
    with LayerSync(network, TWO, weight=WEIGHT) as sync, torch.autocast("cpu", torch.bfloat16):
        loss = task(network(X).float()) + sync.loss()
        assert sync.cosines[LayerPair(*TWO[0])].dtype == torch.float32
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(wanted), abs=0.02)  # 8 significant bits in each product
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(network).values())


def test_bfloat16_tokens_are_compared_in_float32() -> None:
    network = Network().to(torch.bfloat16)
    with LayerSync(network, ONE, weight=1.0) as sync:
        network(X.to(torch.bfloat16))
        outputs = dict(sync._outputs)
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
def test_steps_after_a_recomputed_backward_pass_are_clean(whole: bool) -> None:
    network = Network(reentrant=None if whole else False)
    with LayerSync(network, TWO, weight=WEIGHT) as sync:
        for _ in range(3):
            network.zero_grad()
            output = checkpoint(network, X, use_reentrant=False) if whole else network(X)
            loss = task(output) + sync.loss()
            loss.backward()
            assert not sync._outputs  # what the backward pass runs again is not kept
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
            match=rf"^{student} carries no gradient .*; train it, or checkpoint with use_reentrant=False$",
        ):
            sync.loss()


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_far_off_and_empty_tokens_give_finite_gradients(offset: float) -> None:
    network = Network()
    with torch.no_grad():
        network.blocks[0].fc.bias.zero_()
    x = (X + offset).clone()
    x[:, 0] = 0  # tanh(0) = 0: the student's token is exactly zero, which has no direction
    with LayerSync(network, ONE, weight=WEIGHT) as sync:
        output = network(x)
        assert not dict(sync._outputs)["blocks.0"][:, 0].any()
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


# The graphs are what the hooks have to get into, so a backend without code generation will do. Dynamo looks at the
# gradients of tensors that have none and hides the warning, which it cannot where warnings are errors.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiling", [compiled_in_place, compiled_around, compiled_by_block])
@pytest.mark.parametrize("run_before", [False, True])
def test_compiled_equals_eager(compiling: Callable[[Network], Callable[[Tensor], Tensor]], run_before: bool) -> None:
    network = Network()
    call = compiling(network)
    if run_before:  # Graphs without hooks are there when the block begins.
        call(X)
    assert_trains_as_expected(network, call)
    # Neither are the hooks left in graphs when the block is over.
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
            assert not sync._outputs
    assert_equal_gradients(network, expected(TWO)[1])


def test_what_is_aligned_is_the_callers_to_say() -> None:
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
