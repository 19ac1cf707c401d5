"""The sample's tokens in networks known by their class, also inside wrappers: those that the network's head reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers_models import CASES, Case
from torch import Tensor, nn

from layerprobe.backbones.known_tokens import known_layer

Call = tuple[tuple[Any, ...], dict[str, Any]]

SHARED = [case for case in CASES if case.image != "only stream" and "batch" not in case.image]
# Without its single-stream blocks, a network ends with a double-stream block.
DOUBLE = [
    Case(case.name, {**case.config, key: 0}, case.direct, case.shape, case.tokens, 2, options={"double": True})
    for case in SHARED
    for key in ("num_single_layers", "num_single_dit_layers")
    if case.config.get(key) and "llama_layers" not in case.config  # which names a text for each block
]
BY_NAME = {case.id: case for case in CASES}


def noisy(case: Case, rows: int = 2) -> Tensor:
    return torch.randn(rows, *case.shape, generator=torch.Generator().manual_seed(1))


def run(case: Case, network: nn.Module, *, grad: bool = True) -> tuple[Tensor, list[tuple[str, Any]], Call]:
    """A forward pass: output, raw outputs of the blocks as they ran, and arguments; by hooks of PyTorch alone."""
    outputs: list[tuple[str, Any]] = []
    calls: list[Call] = []
    handles = [network.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)]
    for name, part in network.named_modules():
        if name.count(".") == 1 and isinstance(network.get_submodule(name.split(".")[0]), nn.ModuleList):
            handles.append(part.register_forward_hook(lambda _, __, output, name=name: outputs.append((name, output))))
    with torch.set_grad_enabled(grad):
        output = case.direct(network, noisy(case), torch.full((2,), 300.0))
    for handle in handles:
        handle.remove()
    return output, outputs, calls[0]


def read_by_the_head(output: Tensor, raw: Any, before: Any = ()) -> Tensor:
    """The rows (n, D) of a block's outputs on which the network's output depends; the block may pass on old ones."""
    parts = [part for part in (raw if isinstance(raw, tuple) else (raw,)) if isinstance(part, Tensor)]
    parts = [part for part in parts if not any(part is old for old in before)]
    slopes = torch.autograd.grad(output.square().sum(), parts, allow_unused=True)
    read = [p[s.any(-1)] for p, s in zip(parts, slopes, strict=True) if s is not None and s.any()]
    return torch.cat(read)


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # of Mochi about itself
@pytest.mark.parametrize("case", [*SHARED, *DOUBLE], ids=lambda case: case.id)
def test_the_tokens_are_those_that_the_head_reads(case: Case) -> None:
    """The text of the last block goes nowhere, so only the sample's tokens have a gradient, and all of them do."""
    network = case.build()
    output, outputs, call = run(case, network)
    name, raw = outputs[-1]
    layer = known_layer(network, name)
    assert layer is not None
    tokens = layer.tokens(raw, *call)
    assert tokens.shape == (2, *case.tokens)
    assert torch.equal(tokens.flatten(0, 1), read_by_the_head(output, raw, outputs[-2][1]))


@pytest.mark.parametrize("name", ["UNet3DConditionModel", "UNetMotionModel", "LatteTransformer3DModel"])
def test_frames_in_the_batch_return_to_their_sample(name: str) -> None:
    case = BY_NAME[name]
    network = case.build()
    _, outputs, call = run(case, network, grad=False)
    for block, output in outputs:
        layer = known_layer(network, block)
        assert layer is not None
        raw = output[0] if isinstance(output, tuple) else output
        if block.startswith("temporal"):  # Every place is a sample of its own: (B T, F, D).
            expected = raw.unflatten(0, (2, -1)).transpose(1, 2).flatten(1, 2)
        else:
            frames = raw.flatten(2).transpose(1, 2) if raw.ndim == 4 else raw
            expected = frames.unflatten(0, (2, 3)).flatten(1, 2)
        assert torch.equal(layer.tokens(output, *call), expected)


def test_the_sample_is_found_behind_captions_of_different_lengths() -> None:
    """Lumina2 puts each sample's image directly behind its own caption, and pads at the end."""
    case = BY_NAME["Lumina2Transformer2DModel"]
    network, x = case.build(), noisy(case)
    text, mask = torch.randn(2, 6, 12), torch.tensor([[True] * 2 + [False] * 4, [True] * 6])
    time = torch.full((2,), 0.7)
    raw: list[Tensor] = []
    network.layers[1].register_forward_hook(lambda _, __, output: raw.append(output))
    arguments = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
    output = network(x, time, **arguments).sample
    layer = known_layer(network, "layers.1")
    assert layer is not None
    tokens = layer.tokens(raw[0], (x, time), arguments)
    assert torch.equal(tokens.flatten(0, 1), read_by_the_head(output, raw[0]))
    assert torch.equal(tokens[0], raw[0][0, 2:18])


class Wrapper(nn.Module):
    """A wrapper that calls `forward` of what it wraps and passes on its names, as peft does."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.inner = network

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.forward(*args, **kwargs)


@pytest.mark.parametrize(
    "name", ["transformer_blocks.1", "inner.transformer_blocks.1", "inner.transformer_blocks.1:input"]
)
def test_a_network_is_known_inside_a_wrapper(name: str) -> None:
    network = BY_NAME["FluxTransformer2DModel"].build()
    layer = known_layer(Wrapper(network), name)
    assert layer is not None
    assert layer.network is network
    assert layer.name == name.removeprefix("inner.")


def test_other_networks_and_classes_of_the_same_name_are_not_known() -> None:
    assert known_layer(nn.Sequential(nn.Linear(2, 2)), "0") is None
    same_name = type("FluxTransformer2DModel", (nn.Sequential,), {})(nn.Linear(2, 2))
    assert known_layer(same_name, "0") is None


def test_a_subclass_is_read_as_its_class() -> None:
    network = BY_NAME["SD3Transformer2DModel"].build()
    network.__class__ = type("Sharded", (type(network),), {})  # as fully_shard does
    layer = known_layer(network, "transformer_blocks.0")
    assert layer is not None
    assert layer.class_name == "SD3Transformer2DModel"


def test_layers_of_the_text_and_foreign_arguments_are_refused() -> None:
    case = BY_NAME["SD3Transformer2DModel"]
    network = case.build()
    _, _, call = run(case, network, grad=False)
    layer = known_layer(network, "transformer_blocks.0.ff_context")
    assert layer is not None
    with pytest.raises(
        ValueError,
        match=r"^transformer_blocks.0.ff_context of SD3Transformer2DModel returns 333 tokens, but the sample has 16; "
        "name one of its blocks, or pass the tokens",
    ):
        layer.tokens(torch.zeros(2, 333, 16), *call)
    with pytest.raises(ValueError, match=r"^the network was not called with the arguments of SD3Transformer2DModel \("):
        layer.tokens(torch.zeros(2, 16, 16), (), {"batch": torch.zeros(2)})
