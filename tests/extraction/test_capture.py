"""Hooks record what the network computes, change nothing, and are gone whatever happened."""

from __future__ import annotations

import gc
import re
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerprobe.capture import as_tokens, capture, find_layer, match_layers


class Network(nn.Module):
    """Maps, tokens, vectors and a tuple; `ran` tells which blocks have run, `repeat` runs the last one again."""

    def __init__(self, *, fail_at: int | None = None, repeat: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.ModuleList(Block(4, fails=i == fail_at) for i in range(12))
        self.pair = Pair()
        self.head = nn.Linear(4, 2)
        self.unused = nn.Linear(4, 4)
        self.repeat = repeat

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        if self.repeat:
            tokens = self.blocks[-1](tokens)
        output: Tensor = self.head(self.pair(tokens)[0].mean(1))
        return output

    @property
    def ran(self) -> list[int]:
        return [i for i, block in enumerate(self.blocks) if block.count]


class Block(nn.Module):
    def __init__(self, width: int, *, fails: bool) -> None:
        super().__init__()
        self.fc, self.fails, self.count = nn.Linear(width, width), fails, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("the block is broken")
        self.count += 1
        output: Tensor = x + self.fc(x)
        return output


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x * 2, "attention weights"


X = torch.linspace(-1, 1, 3 * 25).view(3, 1, 5, 5)


def num_hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def by_hand(network: Network) -> dict[str, Tensor]:
    maps = network.stem(X)
    seen, tokens = {"stem": maps.flatten(2).transpose(1, 2)}, maps.flatten(2).transpose(1, 2)
    for i, block in enumerate(network.blocks):
        tokens = seen[f"blocks.{i}"] = tokens + block.fc(tokens)
    seen["pair"] = tokens * 2
    seen["head"] = network.head(seen["pair"].mean(1)).unsqueeze(1)
    return seen


def test_records_what_each_layer_gives_and_leaves_the_output_alone() -> None:
    network = Network()
    expected, untouched = by_hand(network), network(X)
    with capture(network, ["head", "blocks.3", "stem", "pair"]) as outputs:
        output = network(X)
        assert num_hooks(network) == 4
    assert torch.equal(output, untouched)
    assert list(outputs) == ["stem", "blocks.3", "pair", "head"]  # as they ran, not as they were named
    for name, tokens in outputs.items():
        torch.testing.assert_close(tokens, expected[name])
    assert num_hooks(network) == 0


def test_keeps_the_graph_for_those_who_want_gradients() -> None:
    network = Network()
    with capture(network, ["blocks.2"]) as outputs:
        network(X)
    outputs["blocks.2"].sum().backward()
    assert network.stem.weight.grad is not None
    assert network.head.weight.grad is None


def test_transform_is_applied_at_once() -> None:
    network = Network()
    with capture(network, ["stem", "blocks.0"], transform=lambda tokens: tokens.mean(1)) as outputs:
        network(X)
    for name in ("stem", "blocks.0"):
        torch.testing.assert_close(outputs[name], by_hand(network)[name].mean(1))


def test_a_layer_named_twice_is_recorded_once() -> None:
    network = Network()
    with capture(network, ["stem", "stem"], stop_early=True) as outputs:
        network(X)
    assert list(outputs) == ["stem"]
    assert network.ran == []


def test_stop_early_leaves_the_later_layers_alone() -> None:
    network, after = Network(), []
    with capture(network, ["blocks.4", "blocks.1"], stop_early=True) as outputs:
        network(X)
        after.append("the rest of the block")
    assert network.ran == [0, 1, 2, 3, 4]
    assert after == []
    for name in ("blocks.1", "blocks.4"):
        torch.testing.assert_close(outputs[name], by_hand(network)[name])
    assert num_hooks(network) == 0


def test_nothing_of_the_forward_pass_outlives_it() -> None:
    """A traceback that holds its own frames would keep the activations until the garbage collector comes."""
    network, alive = Network(), []
    network.blocks[3].register_forward_hook(lambda _, __, output: alive.append(weakref.ref(output)))
    gc.disable()
    try:
        with capture(network, ["blocks.4"], transform=lambda tokens: tokens.mean(1), stop_early=True), torch.no_grad():
            network(X)
        assert [reference() for reference in alive] == [None]
    finally:
        gc.enable()


def test_without_stop_early_the_network_runs_to_its_end() -> None:
    network = Network()
    with capture(network, ["blocks.1"]):
        network(X)
    assert network.ran == list(range(12))


def test_an_inner_block_does_not_swallow_the_stop_of_an_outer_one() -> None:
    network = Network()
    with (
        capture(network, ["blocks.0"], stop_early=True) as outer,
        capture(network, ["blocks.5"], stop_early=True) as inner,
    ):
        network(X)
    assert list(outer) == ["blocks.0"]
    assert list(inner) == []
    assert num_hooks(network) == 0


@pytest.mark.parametrize("stop_early", [False, True])
def test_hooks_are_gone_after_an_exception_in_the_network(stop_early: bool) -> None:
    network = Network(fail_at=2)
    with (
        pytest.raises(RuntimeError, match="the block is broken"),
        capture(network, ["stem", "blocks.5"], stop_early=stop_early),
    ):
        network(X)
    assert num_hooks(network) == 0


def test_hooks_are_gone_after_an_exception_in_the_block_or_in_the_transform() -> None:
    network = Network()
    with pytest.raises(KeyError, match="mine"), capture(network, ["stem"]):
        raise KeyError("mine")
    assert num_hooks(network) == 0

    def broken(tokens: Tensor) -> Tensor:
        raise ZeroDivisionError("the transform is broken")

    with pytest.raises(ZeroDivisionError, match="the transform"), capture(network, ["stem"], transform=broken):
        network(X)
    assert num_hooks(network) == 0


def test_hooks_are_gone_when_a_later_name_is_unknown() -> None:
    network = Network()
    with (
        pytest.raises(ValueError, match=r"^blocks.12 is not in Network, which has stem, blocks.0 to blocks.11, pair"),
        capture(network, ["stem", "blocks.12"]),
    ):
        pass
    assert num_hooks(network) == 0


def test_a_layer_that_does_not_run_is_an_error() -> None:
    network = Network()
    for stop_early in (False, True):
        with (
            pytest.raises(ValueError, match=r"^unused did not run in the forward pass; name a layer that does$"),
            capture(network, ["stem", "unused"], stop_early=stop_early),
        ):
            network(X)
    with pytest.raises(ValueError, match="stem did not run"), capture(network, ["stem"]):
        pass
    assert num_hooks(network) == 0


def test_every_layer_that_does_not_run_is_named() -> None:
    with pytest.raises(ValueError, match=r"^unused, stem did not run"), capture(Network(), ["unused", "stem"]):
        pass


def test_lists_of_modules_match_no_pattern_and_name_their_parts() -> None:
    assert "blocks" not in match_layers(Network(), "*")
    with pytest.raises(ValueError, match=r"^blocks is a list of modules, which never runs itself; name its parts, blo"):
        match_layers(Network(), "blocks")


def test_a_layer_that_runs_twice_is_an_error() -> None:
    network = Network(repeat=True)
    with (
        pytest.raises(ValueError, match=r"^blocks.11 ran twice in one forward pass; name a layer that runs once$"),
        capture(network, ["blocks.11"]),
    ):
        network(X)
    assert num_hooks(network) == 0


@pytest.mark.parametrize(
    ("output", "shape"),
    [
        (torch.zeros(2, 5, 3), (2, 5, 3)),  # tokens
        (torch.zeros(2, 3), (2, 1, 3)),  # vectors
        (torch.zeros(2, 3, 4, 5), (2, 20, 3)),  # maps in two dimensions
        (torch.zeros(2, 3, 2, 4, 5), (2, 40, 3)),  # and in three
        ((torch.zeros(2, 5, 3), None), (2, 5, 3)),
        ([torch.zeros(2, 3, 4, 5), "more"], (2, 20, 3)),
    ],
)
def test_every_kind_of_output_becomes_tokens(output: Any, shape: tuple[int, ...]) -> None:
    assert as_tokens(output, "layer").shape == shape


def test_maps_become_tokens_in_row_major_order() -> None:
    maps = torch.arange(2 * 3 * 2 * 4).view(2, 3, 2, 4)
    tokens = as_tokens(maps, "layer")
    for row in range(2):
        for column in range(4):
            assert torch.equal(tokens[:, row * 4 + column], maps[:, :, row, column])


@pytest.mark.parametrize(
    ("output", "seen"),
    [
        (None, "NoneType"),
        ((), "tuple"),
        ({"sample": torch.zeros(2, 3)}, "dict"),
        (((torch.zeros(2, 3),),), "tuple"),
        (torch.zeros(3), r"shape \(3,\)"),
        (torch.zeros(()), r"shape \(\)"),
    ],
)
def test_other_outputs_are_refused_in_one_line(output: Any, seen: str) -> None:
    with pytest.raises(ValueError, match=f"^head returns {seen}, which is neither tokens .* name another layer$"):
        as_tokens(output, "head")


def test_patterns_name_layers_in_the_order_of_the_module() -> None:
    network = Network()
    blocks = tuple(f"blocks.{i}" for i in range(12))
    assert match_layers(network, ["blocks.*"]) == blocks  # 10 comes after 9, and nothing inside the blocks
    assert match_layers(network, "blocks.*") == blocks
    assert match_layers(network, ["head", "blocks.1*", "stem"]) == (
        "stem",
        "blocks.1",
        "blocks.10",
        "blocks.11",
        "head",
    )
    assert match_layers(network, ["blocks.*.fc"]) == tuple(f"{name}.fc" for name in blocks)
    assert match_layers(network, ["stem", "ste*"]) == ("stem",)
    assert match_layers(network, ["*"]) == ("stem", "pair", "head", "unused")


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("block.*", "blocks.*"), ("blocksx0", "blocks.0"), ("blocks.12", ""), ("", ""), ("blocks.0.*.fc", "")],
)
def test_patterns_that_match_nothing_are_refused(pattern: str, hint: str) -> None:
    ending = re.escape(f"; did you mean {hint}?" if hint else "")
    with pytest.raises(
        ValueError, match=rf" is not in Network, which has stem, blocks.0 to blocks.11, pair, head, unused{ending}$"
    ):
        match_layers(Network(), ["stem", pattern])
    with pytest.raises(ValueError, match=r"^no layer is named; name some of Network, which has stem"):
        match_layers(Network(), [])


def test_layers_are_found_by_name_and_others_named_in_the_error() -> None:
    network = Network()
    assert find_layer(network, "blocks.3.fc") is network.blocks[3].fc
    for name in ("blocks.3.weight", "stem.weight", "blocks.3.fc.fc"):
        with pytest.raises(ValueError, match=rf"^{name} is not in Network, which has"):
            find_layer(network, name)
    with pytest.raises(ValueError, match=r"^x is not in Linear, which has no submodules$"):
        find_layer(nn.Linear(2, 2), "x")


class Attending(nn.Module):
    """A pre-normalized block that calls its attention by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(4), Keyword()

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = x + self.attn(hidden_states=self.norm(x) * (1 + scale))
        return out


class Keyword(nn.Module):
    def forward(self, *, hidden_states: Tensor) -> Tensor:
        return 2 * hidden_states


def test_inputs_of_layers_are_recorded() -> None:
    network, x, scale = Attending(), torch.randn(2, 3, 4), torch.randn(4)
    with capture(network, ["attn:input", "attn", "norm:input"]) as outputs:
        network(x, scale)
    modulated = network.norm(x) * (1 + scale)
    assert list(outputs) == ["norm:input", "attn:input", "attn"]  # as they ran
    assert torch.equal(outputs["norm:input"], x)
    assert torch.equal(outputs["attn:input"], modulated)
    assert torch.equal(outputs["attn"], 2 * modulated)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_patterns_of_inputs() -> None:
    network = nn.ModuleDict({"a": nn.Sequential(Attending(), Attending())})
    assert match_layers(network, "a.*.attn:input") == ("a.0.attn:input", "a.1.attn:input")
    assert match_layers(network, ["a.*", "a.0:input"]) == ("a.0:input", "a.0", "a.1")
    with pytest.raises(ValueError, match="b:input is not in"):
        match_layers(network, "b:input")


def test_what_the_tokens_are_is_the_callers_to_say() -> None:
    network = nn.Sequential(nn.Identity())
    sequence_first = torch.randn(5, 2, 4)  # with the condition's token at the front
    with capture(network, ["0"], tokens=lambda output, name: output[1:].transpose(0, 1)) as outputs:
        network(sequence_first)
    assert torch.equal(outputs["0"], sequence_first[1:].transpose(0, 1))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("block.3", "blocks.3"),
        ("module.blocks.3", "blocks.3"),
        ("blocks.3.fcc", "blocks.3.fc"),
        ("steam:input", "stem"),
        ("nothing", None),
        ("blocks.12", None),
    ],
)
def test_a_similar_name_is_suggested(name: str, hint: str | None) -> None:
    ending = rf"unused; did you mean {hint}\?$" if hint else "unused$"
    with pytest.raises(ValueError, match=ending):
        find_layer(Network(), name)
    if name == "block.3":
        wrapped = nn.ModuleDict({"base": Network()})
        with pytest.raises(ValueError, match=r"; did you mean base.blocks.3\?$"):
            find_layer(wrapped, "blocks.3")


def test_changes_in_place_after_the_layer_are_noticed() -> None:
    class Adds(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self[0](x)
            h += 1
            return h

    network, x = Adds(nn.Linear(4, 4)), torch.randn(2, 3, 4)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"^the output of 0 was changed in place"), capture(network, ["0"]):
            network(x)
        with capture(network, ["0"], transform=torch.clone) as outputs:
            network(x)
        torch.testing.assert_close(outputs["0"], network[0](x))


def test_several_streams_and_nested_tensors_are_refused() -> None:
    text, image = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)
    with pytest.raises(ValueError, match=r"^a returns 2 tensors of shapes \(2, 3, 4\) and \(2, 5, 4\), and which one"):
        as_tokens((text, image), "a")
    nested = torch.nested.nested_tensor([text[0], image[0]], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"^a returns a nested tensor, which is neither tokens"):
        as_tokens(nested, "a")
    assert as_tokens((text, None, torch.zeros(2, 4), [image]), "a") is text
