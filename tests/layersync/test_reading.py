"""What is aligned: the sample's own tokens, or one line that says why they are not known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers_models import CASES
from residual_network import X
from torch import Tensor, nn
from torch.nn import functional as F

from layerprobe.layersync.loss import LayerSync
from layerprobe.layersync.options import SyncOptions

FLUX = next(case for case in CASES if case.id == "FluxTransformer2DModel")
PAIR = ("transformer_blocks.0", "single_transformer_blocks.1")
SAMPLE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def plain(network: nn.Module) -> Callable[[], Tensor]:
    """The loss written out from the raw outputs of the two blocks of Flux, whose image is the second of a pair."""
    raw: dict[str, Any] = {}
    for name in PAIR:
        network.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: raw.update({name: output}))
    return lambda: -0.3 * F.cosine_similarity(raw[PAIR[0]][1], raw[PAIR[1]][1].detach(), dim=-1).mean()


class Inside(nn.Module):
    """A user's own module around the network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.net = network

    def forward(self, batch: dict[str, Any]) -> Any:
        return self.net(**batch)


def with_peft(network: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    wrapped: nn.Module = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=["to_q"]))
    for parameter in wrapped.parameters():
        parameter.requires_grad_(True)
    return wrapped


def with_accelerate(network: nn.Module) -> nn.Module:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True, mixed_precision="no")
    prepared: nn.Module = accelerator.prepare(network)
    return prepared


WRAPPERS = {
    "plain": (lambda network: network, ""),
    "DataParallel without a second device": (nn.DataParallel, ""),
    "peft": (with_peft, ""),
    "peft, names of the wrapper": (with_peft, "base_model.model."),
    "accelerate": (with_accelerate, ""),
    "inside": (lambda network: Inside(network), "net."),
}
COMPILED = (lambda network: torch.compile(network, backend="eager"), "")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # read by Dynamo
@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        *(pytest.param(*wrapper, id=name) for name, wrapper in WRAPPERS.items()),
        pytest.param(*COMPILED, id="compiled", marks=pytest.mark.slow),
    ],
)
def test_the_image_of_flux_is_aligned_in_every_wrapper(
    wrap: Callable[[nn.Module], nn.Module], prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    network = FLUX.build().double()
    expected = plain(network)
    wrapped = wrap(network)
    with LayerSync(wrapped, [tuple(prefix + name for name in PAIR)], weight=0.3) as sync:
        for _ in range(2):
            if isinstance(wrapped, Inside):
                wrapped(arguments(SAMPLE.double()))
            else:
                wrapped(**arguments(SAMPLE.double()))
            loss, by_hand = sync.loss(), expected()
            weights = list(network.transformer_blocks[0].parameters())
            slopes = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            expected_slopes = torch.autograd.grad(by_hand, weights, allow_unused=True)
            torch.testing.assert_close(loss, by_hand)
            for slope, other in zip(slopes, expected_slopes, strict=True):
                torch.testing.assert_close(slope, other)
    line = f"{prefix}transformer_blocks.0 <- {prefix}single_transformer_blocks.1: 16 tokens of width 32"
    assert sync.aligned == (line,)
    assert capsys.readouterr().err == f"layerprobe: {line}\n"  # once


def arguments(x: Tensor) -> dict[str, Any]:
    """What FluxPipeline passes, with random text."""
    text = torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(2)).to(x)  # as many tokens as the image
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    ids = torch.stack([torch.zeros(4, 4), rows, columns], -1).reshape(16, 3).to(x)
    return {
        "hidden_states": x.reshape(2, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 16),
        "timestep": torch.tensor([0.3, 0.6]).to(x),
        "pooled_projections": torch.zeros(2, 10).to(x),
        "encoder_hidden_states": text,
        "txt_ids": torch.zeros(16, 3).to(x),
        "img_ids": ids,
    }


def test_a_projector_sees_the_image_too(capsys: pytest.CaptureFixture[str]) -> None:
    network = FLUX.build()
    sync = LayerSync(network, [PAIR], weight=0.3, options=SyncOptions(projector_width=4, teacher_decay=0.5))
    sync.prepare(**arguments(SAMPLE))
    with sync:
        network(**arguments(SAMPLE))
        with sync.teaching() as teacher:
            teacher(**arguments(SAMPLE))
        sync.loss()
    assert sync.aligned == ("transformer_blocks.0 <- single_transformer_blocks.1: 16 tokens of width 32",)


# --- networks of no known class


class Of(nn.Module):
    """Two layers that return what a function makes of tokens (B, T, D)."""

    def __init__(self, make: Callable[[Tensor], Any], layer: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.fc, self.a, self.b = nn.Linear(16, 16), Made(make, layer()), Made(make, layer())

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        self.a(self.fc(x))
        self.b(self.fc(x) + 1)
        return x


class Made(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any], layer: nn.Module) -> None:
        super().__init__()
        self.make, self.layer = make, layer

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


def aligned(network: nn.Module, *inputs: Tensor, **options: Any) -> str:
    with LayerSync(network, [("a", "b")], weight=0.3, say=lambda line: None, **options) as sync:
        network(*inputs)
        sync.loss().backward()
    return sync.aligned[0].removeprefix("a <- b: ")


REFUSED = {
    "text and image": (
        lambda x: (x[:, :3] * 1, x * 1),
        r"^a returns 2 tensors of shapes \(5, 3, 16\) and \(5, 7, 16\), and which one is the sample's is unknown; pass "
        r"the tokens of the sample, such as tokens=lambda output, name: output\[1\]$",
    ),
    "sequence first": (
        lambda x: x.transpose(0, 1),
        r"^a returns 7 rows of tokens for a batch of 5; pass the tokens \(B, T, D\), such as .*transpose\(0, 1\)",
    ),
    "frames in the batch": (lambda x: x.unflatten(2, (2, 8)).flatten(0, 1), "^a returns 35 rows of tokens for a batch"),
    "groups of tokens": (
        lambda x: x.unflatten(2, (4, 4)),
        r"^a returns shape \(5, 7, 4, 4\), which is not known to be",
    ),
    "a dictionary": (lambda x: {"sample": x}, "^a returns dict, which is neither tokens"),
    "text in the same sequence": (
        lambda x: torch.cat([x[:, :4], x], 1),
        r"^a returns 11 tokens, those of two inputs of 7 and 4 in one sequence; pass the tokens of the sample, such as "
        r"tokens=lambda output, name: output\[:, -7:\]$",
    ),
    "nested": (
        lambda x: torch.nested.nested_tensor([x[0], x[1, :3]], layout=torch.jagged),
        "^a returns a nested tensor, which is neither tokens",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_outputs_that_can_be_read_in_several_ways_are_refused(make: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aligned(Of(make), X, torch.zeros(5, 4, 8))


ACCEPTED = {
    "tokens": (lambda x: x * 1, "7 tokens of width 16"),
    "with nothing": (lambda x: (x * 1, None), "7 tokens of width 16"),
    "with a cache": (lambda x: [x * 1, (x, x)], "7 tokens of width 16"),
    "with a vector and a number": (lambda x: (x * 1, x[:, 0], x.sum()), "7 tokens of width 16"),
    "vectors": (lambda x: x.mean(1), "1 tokens of width 16"),
}


@pytest.mark.parametrize(("make", "line"), ACCEPTED.values(), ids=ACCEPTED)
def test_outputs_that_can_be_read_in_one_way_are_aligned(make: Callable[[Tensor], Any], line: str) -> None:
    assert aligned(Of(make), X, torch.zeros(5, 4, 8)) == line


def test_the_caller_may_say_what_the_tokens_are() -> None:
    network = Of(lambda x: (x[:, :3] * 1, x * 1))
    assert aligned(network, X, tokens=lambda output, name: output[0]) == "3 tokens of width 16"
    with pytest.raises(ValueError, match=r"^the function tokens returns tuple for a; return a tensor \(B, T, D\)$"):
        aligned(network, X, tokens=lambda output, name: output)
    with pytest.raises(ValueError, match=r"^the function tokens returns shape \(5, 16\) for a; return a tensor"):
        aligned(network, X, tokens=lambda output, name: output[1][:, 0])


def test_sequences_with_their_channels_first_are_refused() -> None:
    network = Of(lambda x: x * 1, lambda: nn.Conv1d(7, 7, 1))  # of shape (5, 7, 16), which may be 7 channels
    with pytest.raises(
        ValueError, match=r"^a returns shape \(5, 7, 16\), which may be \(B, C, L\) of its convolutions"
    ):
        aligned(network, X)
    told = aligned(network, X, tokens=lambda output, name: output.transpose(1, 2))
    assert told == "16 tokens of width 7"
    assert aligned(Of(lambda x: x * 1, lambda: nn.Conv1d(16, 16, 1)), X) == "7 tokens of width 16"


class Maps(nn.Module):
    """Maps whose layers are convolutions, or have their channels last."""

    def __init__(self, channels: int, *, stride: int = 1, last: bool = False, convolve: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, stride=stride)
        layer = nn.Conv2d(channels, channels, 1) if convolve else nn.Identity()
        self.a, self.b = (Made(lambda x: (x.permute(0, 2, 3, 1) if last else x) * 1, layer) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        self.a(h)
        self.b(h + 1)
        return x


def test_maps_are_known_by_the_grid_of_the_input_or_by_convolutions() -> None:
    x = torch.randn(2, 3, 9, 6, generator=torch.Generator().manual_seed(0))
    for convolve in (True, False):
        assert aligned(Maps(32, stride=2, convolve=convolve), x) == "15 tokens of width 32"
    square = x[:, :, :6]
    assert aligned(Maps(6), square) == "36 tokens of width 6"  # (2, 6, 6, 6): a convolution decides
    for network in (Maps(6, convolve=False), Maps(16, last=True)):
        with pytest.raises(ValueError, match=r"which is not known to be a map \(B, C, \*grid\) of the input; pass"):
            aligned(network, square)
