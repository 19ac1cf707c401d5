"""The trial finds what no file tells, leaves the network as it was, and says nothing of a network that is in order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerprobe.backbones.base import Backbone, wrap
from layerprobe.backbones.trial import tried

TOLD: dict[str, Any] = {"layers": "body", "schedule": "flow", "prediction": "eps", "shape": (3, 4, 4)}
OTHER = r"let the factory return wrap\(..., forward=...\)"


class Net(nn.Module):
    """A convolution, a table of 11 labels, a buffer and a counter; `kind` is what is odd about it."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.body, self.labels, self.kind = nn.Conv2d(3, 3, 1), nn.Embedding(11, 3), kind
        self.drop = nn.Dropout()
        self.register_buffer("total", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls += 1
        if self.kind == "random":
            x = x + torch.randn_like(x)
        elif self.kind == "dropout":
            x = F.dropout(x)
        elif self.kind == "buffer":
            self.total += x.mean()
            x = x + self.total
        elif self.kind == "counter":
            x = x * self.calls
        elif self.kind == "cache":
            self.cached = x
        elif self.kind == "batch":
            x = x - x.mean(0)
        elif self.kind == "in place":
            x *= 2
        elif self.kind == "infinite":
            x = x / (t - 0.88).view(-1, 1, 1, 1)
        output: Tensor = self.drop(self.body(x))
        if y is not None:
            output = output + self.labels(y)[:, :, None, None]
        return torch.cat([output, output], 1) if self.kind == "variance" else output


def found(network: nn.Module, **options: Any) -> list[str]:
    return list(tried(wrap(network, **(TOLD | options))).assumptions)


def test_a_network_in_order_gets_one_sentence_about_its_call_and_one_about_its_null_label() -> None:
    call, null = found(Net(), num_classes=10)
    assert call == (
        "its forward gets x = noisy samples, t = time, y = label; otherwise let the factory return wrap(..., "
        "forward=...)"
    )
    assert null.startswith("the null label is 10, the last of the 11 rows of labels; otherwise pass --num-classes")


def test_a_label_that_is_not_passed_is_told() -> None:
    assert "its forward does not get y; pass --num-classes for a label, or" in found(Net())[1]


def test_another_null_label_is_suspected_from_the_size_of_the_table() -> None:
    (null,) = [text for text in found(Net(), num_classes=4) if "null" in text]
    assert null.startswith("the null label is 4, but labels has 11 rows; pass --num-classes 10 if its last row is")


def test_a_learned_variance_is_told() -> None:
    (variance,) = [text for text in found(Net("variance")) if "variance" in text]
    assert variance.startswith("the first 3 of 6 output channels are the prediction, the others a learned variance")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("random", "between two equal calls: it draws random numbers or keeps a state; make its forward repeatable"),
        ("dropout", "between two equal calls: it draws random numbers or keeps a state"),
        ("counter", "between two equal calls: it draws random numbers or keeps a state"),
        ("buffer", "between two equal calls: its buffer total changes"),
        ("batch", "alone and in a batch of two: the network mixes samples; check its axes"),
    ],
)
def test_outputs_that_depend_on_more_than_the_sample_are_told(kind: str, said: str) -> None:
    torch.manual_seed(0)
    assert any(said in text for text in found(Net(kind)))


@pytest.mark.parametrize("kind", ["", "cache", "buffer", "counter", "random", "dropout"])
def test_the_network_and_the_random_numbers_stay_as_they_were(kind: str) -> None:
    torch.manual_seed(1)
    network = Net(kind).train()
    backbone = wrap(network, **TOLD)
    network.train()
    before, names = copy.deepcopy(network.state_dict()), dict(vars(network))
    random = torch.get_rng_state()
    tried(backbone)
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())
    assert vars(network) == names
    assert network.training
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "in place",
            r"^Net changes its input x in place, which is needed after the call; begin its forward with x = x",
        ),
        ("infinite", r"^Net returns values that are not finite at noise level 0.88, its time 0.88; check --schedule"),
    ],
)
def test_a_network_that_cannot_be_used_is_refused(kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        found(Net(kind))


class TimeFirst(Net):
    def forward(self, t: Tensor, x: Tensor, action: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return x


class LabelSecond(Net):
    def forward(self, x: Tensor, y: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        return x


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (
            TimeFirst(),
            {},
            rf"^TimeFirst.forward\(t, x, action\) would get x, time in this order; {OTHER}, such as",
        ),
        (TimeFirst(), {}, r"lambda module, x, time, label: module\(t=time, x=x\)$"),
        # Integer times in a table of labels would raise nothing.
        (LabelSecond(), {"num_classes": 10, "schedule": "ddpm-linear"}, r"module\(x=x, y=label, t=time\)$"),
    ],
)
def test_another_order_of_the_arguments_is_refused(network: Net, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        found(network, **options)


def test_tensors_without_values_are_named() -> None:
    network = Net()
    network.register_buffer("grid", torch.zeros(2, device="meta"), persistent=False)
    with pytest.raises(ValueError, match=r"^grid of Net has no values: it was made on the meta device and is not in"):
        found(network)


def test_a_layer_that_changes_nothing_is_told() -> None:
    (same,) = [text for text in found(Net(), layers=["body", "drop"]) if "same" in text]
    assert same.startswith("body and drop return the same: their numbers are equal; leave one out of --layers")


def test_channels_first_of_a_sequence_are_suspected() -> None:
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv1d(3, 3, 1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            output: Tensor = self.body(x)
            return output

    def read(**options: Any) -> Backbone:
        return tried(wrap(Frames(), **(TOLD | {"shape": (3, 16)} | options)))

    assert "body is read as 3 tokens of width 16, and samples have 16 frames" in read().assumptions[-1]
    transposed = read(tokens=lambda output, name: output.transpose(1, 2))
    assert not any("frames" in text for text in transposed.assumptions)
