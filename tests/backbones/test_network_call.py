"""Each way in which a user's network can fail gets one line: the call, the exception, its place, what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerprobe.backbones.base import layer_shapes, wrap
from layerprobe.backbones.network_call import call_module

Forward = Callable[..., Any]
HERE = r" \(\S*test_network_call.py:\d+\); "


class Net(nn.Module):
    """A convolution, a table of 10 labels and one of 500 times; `run` is the forward pass."""

    def __init__(self, run: Forward) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 3, 1)
        self.labels, self.times = nn.Embedding(10, 3), nn.Embedding(500, 3)
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1))
        self.forward = run.__get__(self)  # type: ignore[method-assign]


@dataclass
class Output:
    sample: Tensor


def by_label(self: Any, x: Tensor, t: Tensor, y: Tensor) -> Any:
    return self.body(x) + self.labels(y)[:, :, None, None]


def by_row(self: Any, x: Tensor, t: Tensor, y: Tensor) -> Any:
    return self.body(x) + self.labels.weight[y][:, :, None, None]


def by_optional_label(self: Any, x: Tensor, t: Tensor, y: Tensor | None = None) -> Any:
    return self.body(x) if y is None else by_label(self, x, t, y)


def by_one_hot(self: Any, x: Tensor, t: Tensor, y: Tensor) -> Any:
    return self.body(x) + F.one_hot(y, 10)[:, :3, None, None]


def by_time(self: Any, x: Tensor, t: Tensor) -> Any:
    return self.body(x) + self.times(t)[:, :, None, None]


def by_times_row(self: Any, x: Tensor, t: Tensor) -> Any:
    return self.body(x) + self.times.weight[t][:, :, None, None]


def by_linear_time(self: Any, x: Tensor, t: Tensor) -> Any:
    return self.body(x) + F.linear(t[:, None], torch.ones(3, 1))[:, :, None, None]


def by_flat_time(self: Any, x: Tensor, t: Tensor) -> Any:
    return self.body(x) + F.linear(t, torch.ones(3, 1))[:, :, None, None]


def plain(self: Any, x: Tensor, t: Tensor) -> Any:
    return self.body(x)


def raises(self: Any, x: Tensor, t: Tensor) -> Any:
    raise ValueError("x must\nbe whitened")


def ends(self: Any, x: Tensor, t: Tensor) -> Any:
    raise SystemExit(1)


def elsewhere(self: Any, x: Tensor, t: Tensor) -> Any:
    return self.body(x) + torch.ones(1, device="meta")


def of_one(self: Any, x: Tensor) -> Any:
    return self.body(x)


def returning(change: Callable[[Tensor], Any]) -> Forward:
    return lambda self, x, t: change(self.body(x))


FLOAT = r"^Net\(x: \(2, 3, 4, 4\) float32, time: \(2,\) float32 = 0.5 and 0.88\)"
LABEL = r"^Net\(x: \(2, 3, 4, 4\) float32, time: \(2,\) float32 = 0.5 and 0.88, label: \(2,\) int64 = 10\)"
INTEGER = r"^Net\(x: \(2, 3, 4, 4\) float32, time: \(2,\) int64 = 258 and 627\)"
NULL = "pass --num-classes 9 if 9 is its null label; if it was trained without one, "
OTHER = r"let the factory return wrap\(..., forward=...\)"
CASES: dict[str, tuple[Forward, dict[str, Any], str]] = {
    "no null row": (
        by_label,
        {"num_classes": 10},
        f"{LABEL} raised IndexError: index out of range in self{HERE}labels has 10 rows and none for the null label "
        f"10: {NULL}{OTHER} with a label of its own$",
    ),
    "no null row of a parameter": (
        by_row,
        {"num_classes": 10},
        f"{LABEL} raised IndexError: .*{HERE}its table has 10 rows and none for the null label 10: {NULL}{OTHER}",
    ),
    "no null row, optional label": (
        by_optional_label,
        {"num_classes": 10},
        f"{NULL}--num-classes 0 to call it without a label$",
    ),
    "one-hot label": (
        by_one_hot,
        {"num_classes": 10},
        f"RuntimeError: .*{HERE}its one-hot vector has no place for the null label 10: {NULL}",
    ),
    "label not passed": (
        by_label,
        {},
        rf"{FLOAT} raised TypeError: \S*by_label\(\) missing 1 required positional argument: 'y'; "
        rf"pass --num-classes if y is the class label, otherwise {OTHER}$",
    ),
    "label not taken": (
        plain,
        {"num_classes": 10},
        rf"{LABEL} raised TypeError: .*; pass --num-classes 0 if it takes no label, or {OTHER}$",
    ),
    "no time": (of_one, {}, rf"{FLOAT} raised TypeError: .*; {OTHER}$"),
    "float time into a table": (
        by_time,
        {},
        f"{FLOAT} raised RuntimeError: Expected .*indices.*{HERE}the schedule gives float times: pass --schedule "
        "ddpm-linear, ddpm-scaled_linear or ddpm-cosine if it was trained with times 0 to 999$",
    ),
    "float time as an index": (by_times_row, {}, f"{FLOAT} raised IndexError: .*{HERE}the schedule gives float times"),
    "short table": (
        by_time,
        {"schedule": "ddpm-linear"},
        f"{INTEGER} raised IndexError: .*{HERE}times has 500 rows and none for time 627: pass the --schedule that it",
    ),
    "integer time into arithmetic": (
        by_linear_time,
        {"schedule": "ddpm-linear"},
        f"{INTEGER} raised RuntimeError: .*{HERE}the schedule gives integer times: use time.float",
    ),
    "time without an axis": (by_flat_time, {}, rf"{HERE}time has shape \(2,\): use time\[:, None\] in its forward$"),
    "other channels": (
        plain,
        {"shape": (1, 4, 4)},
        f"{HERE}--shape 1,4,4 has 1 channels, but the network takes 3: pass the shape it was trained on$",
    ),
    "channels last": (plain, {"shape": (4, 4, 3)}, f"{HERE}write channels first: --shape 3,4,4$"),
    "no channels": (plain, {"shape": (4, 4)}, f"{HERE}--shape 4,4 has no channels: write channels first, such as"),
    "another device": (elsewhere, {}, f"{HERE}make its tensors on the device of its input, cpu: device=x.device"),
    "its own error": (
        raises,
        {},
        f"{FLOAT} raised ValueError: x must be whitened{HERE}check --shape 3,4,4 and the network, or {OTHER}$",
    ),
    "end of the program": (ends, {}, f"{FLOAT} raised SystemExit: 1{HERE}check --shape"),
    "tuple": (
        returning(lambda x: (x, None)),
        {},
        rf"{FLOAT} returns tuple of 0: \(2, 3, 4, 4\) float32, 1: NoneType, not one tensor of shape \(2, 3, 4, 4\); "
        rf"{OTHER}, with a function that takes the prediction from it$",
    ),
    "dictionary": (returning(lambda x: {"out": x}), {}, r"returns dict of out: \(2, 3, 4, 4\) float32, not one tensor"),
    "dataclass": (returning(Output), {}, r"returns Output of sample: \(2, 3, 4, 4\) float32, not one tensor"),
    "loss": (
        returning(lambda x: x.mean()),
        {},
        rf"returns a tensor of shape \(\), not .*; return the part of it that denoises \(inner\?\), or {OTHER}$",
    ),
    "output with channels last": (returning(lambda x: x.movedim(1, -1)), {}, "; let it return channels first$"),
    "output that would broadcast": (
        returning(lambda x: x[:, :1]),
        {},
        rf"returns a tensor of shape \(2, 1, 4, 4\), not .*; pass the --shape it was trained on, or {OTHER}$",
    ),
    "other batch": (returning(lambda x: x[:1]), {}, "; let its forward keep nothing of the size of an earlier batch$"),
}


@pytest.mark.parametrize(("run", "options", "message"), CASES.values(), ids=CASES)
def test_a_failing_call_is_told_in_one_line(run: Forward, options: dict[str, Any], message: str) -> None:
    told: dict[str, Any] = {"layers": "body", "schedule": "flow", "prediction": "eps", "shape": (3, 4, 4)}
    network = Net(run)
    backbone = wrap(network, **(told | options))
    with pytest.raises(ValueError, match=message) as caught:
        layer_shapes(backbone)
    assert "\n" not in str(caught.value)
    assert (caught.value.__cause__ is None) == (" returns " in str(caught.value))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_type_are_named(dtype: torch.dtype) -> None:
    backbone = wrap(Net(plain).to(dtype), layers="body", schedule="flow", prediction="eps", shape=(3, 4, 4))
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"its weights are {name}, but it is called with float32: return network.fl"):
        layer_shapes(backbone)


def test_a_network_without_forward_names_its_part() -> None:
    whole = nn.Module()
    whole.net, whole.blocks = nn.Sequential(nn.Conv2d(3, 3, 1)), nn.ModuleList([nn.Linear(3, 3)])
    backbone = wrap(whole, layers="net", schedule="flow", prediction="eps", shape=(3, 4, 4))
    with pytest.raises(ValueError, match=r"NotImplementedError: .*; return the part of it that denoises \(net\?\), or"):
        layer_shapes(backbone)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda module, x, time: x, r"takes 3 .*; pass a function \(module, x, time, label\) -> prediction$"),
        (lambda module, x, time, label: module(x), r"\); correct the function that was passed as forward$"),
        (lambda module, x, time, label: x[:, 0], "; let the function that was passed as forward return the prediction"),
    ],
)
def test_a_forward_function_is_told_apart_from_the_network(forward: Forward, message: str) -> None:
    backbone = wrap(Net(plain), layers="body", schedule="flow", prediction="eps", shape=(3, 4, 4), forward=forward)
    start = r"^forward\(Net, x: \(2, 3, 4, 4\) float32, time: \(2,\) float32 = 0.5 and 0.88, label: None\) r"
    with pytest.raises(ValueError, match=f"{start}.*{message}"):
        layer_shapes(backbone)


def test_what_layerprobe_itself_says_stays_as_it_is() -> None:
    twice = Net(lambda self, x, t: self.body(self.body(x)))
    with pytest.raises(ValueError, match=r"^body ran twice in one forward pass; name a layer that runs once$"):
        layer_shapes(wrap(twice, layers="body", schedule="flow", prediction="eps", shape=(3, 4, 4)))


def test_a_layer_with_the_sequence_first_is_refused() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            output: Tensor = self.layer(x.permute(2, 0, 1)).permute(1, 2, 0)
            return output

    backbone = wrap(Sequence(), layers="layer", schedule="flow", prediction="eps", shape=(3, 5))
    with pytest.raises(ValueError, match=r"^layer returns \(5, 2, 3\) for 2 samples, which are not its first axis; "):
        layer_shapes(backbone)


def test_the_first_half_of_twice_the_channels_is_the_prediction() -> None:
    x, t = torch.randn(2, 3, 4, 4), torch.rand(2)
    module = Net(lambda self, x, t: torch.cat([x, x + 1], 1))
    assert torch.equal(call_module(module, x, t, None), x)
