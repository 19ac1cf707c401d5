"""The call of a network that others wrote: what goes in, what comes out, and one line for what goes wrong.

Whatever the network raises becomes one `ValueError` of one line. It tells what was called, what was raised and where in
the user's file, and what to do. The exception itself is its cause.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.files import error_place
from layerprobe.memory import BatchSize, pass_on
from layerprobe.noise import NoiseSchedule

Forward = Callable[..., Tensor]
OTHER_CALL = "let the factory return wrap(..., forward=...)"
_INTEGER_TIMES = "--schedule ddpm-linear, ddpm-scaled_linear or ddpm-cosine"
_OWN_CODE = f"{Path(__file__).resolve().parents[1]}{os.sep}"


@dataclass(frozen=True, eq=False)
class Lookup:
    """The last use of an embedding table in a call.

    Attributes:
        name: Name of the table in the network.
        rows: Number of its rows.
        indices: Rows that were asked for.
    """

    name: str
    rows: int
    indices: Tensor


def call_module(module: nn.Module, x_t: Tensor, native_time: Tensor, condition: Tensor | None) -> Tensor:
    """Calls `module(x_t, time)`, or `module(x_t, time, label)` with a condition; the usual `Backbone.forward`.

    Of an output with 2 C channels the first C are the prediction, as in networks that also learn a variance (Nichol &
    Dhariwal 2021, arXiv:2102.09672).
    """
    output: Tensor = module(x_t, native_time) if condition is None else module(x_t, native_time, condition)
    return output[:, : x_t.shape[1]] if has_variance(output, x_t) else output


def has_variance(output: Any, x_t: Tensor) -> bool:
    """Whether an output has the shape of x_t with twice the channels."""
    return isinstance(output, Tensor) and output.shape == (len(x_t), 2 * x_t.shape[1], *x_t.shape[2:])


def checked(forward: Forward, schedule: NoiseSchedule) -> Forward:
    """Returns the forward function of a backbone with its errors, and outputs of the wrong shape, told in one line.

    Raises:
        ValueError: By the returned function, if the network raises anything or returns anything else than a prediction.
            Memory that ran out, and failures of the device, are not changed.
    """

    def call(module: nn.Module, x_t: Tensor, native_time: Tensor, condition: Tensor | None, *mask: Tensor) -> Tensor:
        with lookups(module) as found:
            try:
                output: Any = forward(module, x_t, native_time, condition, *mask)
            except (Exception, SystemExit) as error:
                pass_on(error)
                if isinstance(error, ValueError) and _is_ours(error):
                    raise
                failed = _Failed(forward, module, schedule, x_t, native_time, condition, tuple(found.values()))
                raise ValueError(f"{failed.call} raised {_raised(error)}; {_advice(error, failed)}") from error
        if not isinstance(output, Tensor) or output.shape != x_t.shape:
            failed = _Failed(forward, module, schedule, x_t, native_time, condition)
            raise ValueError(
                f"{failed.call} returns {_kind(output)}, not one tensor of shape {tuple(x_t.shape)}; "
                f"{_output_advice(output, failed)}"
            )
        return output

    return call


def in_batches(forward: Forward, size: int) -> Forward:
    """Returns the forward function of a backbone in batches of at most `size` samples, which need less memory."""
    sizes = BatchSize(size)

    def call(module: nn.Module, x_t: Tensor, *arguments: Tensor | None) -> Tensor:
        def part(rows: range) -> Tensor:
            batch = [None if each is None else each[rows.start : rows.stop] for each in (x_t, *arguments)]
            return forward(module, *batch)

        return torch.cat([output for _, output in sizes.batches(len(x_t), part)])

    return call


@contextmanager
def lookups(module: nn.Module) -> Iterator[dict[str, Lookup]]:
    """Records the last use of every `nn.Embedding` inside the block, the latest last."""
    found: dict[str, Lookup] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(table: nn.Module, arguments: tuple[Any, ...]) -> None:
            found.pop(name, None)
            if arguments and isinstance(arguments[0], Tensor) and arguments[0].numel():
                assert isinstance(table, nn.Embedding)
                found[name] = Lookup(name, table.num_embeddings, arguments[0])
                _check_rows(arguments[0], table.num_embeddings)

        return record

    tables = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Embedding)]
    handles = [table.register_forward_pre_hook(recorder(name)) for name, table in tables]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _check_rows(indices: Tensor, rows: int) -> None:
    """Raises the error of a CPU for a row that is not there: on CUDA it would end the device for the whole process."""
    if indices.device.type == "cpu":
        return
    low, high = torch.stack(indices.aminmax()).tolist()
    if low < 0 or high >= rows:
        raise IndexError("index out of range in self")


@dataclass(frozen=True, eq=False)
class _Failed:
    """A call that failed: its arguments, and the tables that were used in it, the latest last."""

    forward: Forward
    module: nn.Module
    schedule: NoiseSchedule
    x_t: Tensor
    time: Tensor
    label: Tensor | None
    lookups: tuple[Lookup, ...] = ()

    @property
    def is_usual(self) -> bool:
        return self.forward is call_module

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return (self.x_t, self.time) if self.label is None else (self.x_t, self.time, self.label)

    @property
    def shape(self) -> str:
        """The option for the shape, as it was given."""
        return f"--shape {','.join(map(str, self.x_t.shape[1:]))}"

    @property
    def call(self) -> str:
        """Such as "Net(x: (2, 3, 32, 32) float32, time: (2,) float32 = 0.5 and 0.88, label: (2,) int64 = 10)"."""
        texts = [f"x: {_tensor(self.x_t)}", f"time: {_tensor(self.time)} = {_values(self.time)}"]
        if self.label is not None:
            texts.append(f"label: {_tensor(self.label)} = {_values(self.label)}")
        elif not self.is_usual:
            texts.append("label: None")
        name = type(self.module).__name__
        return f"{name}({', '.join(texts)})" if self.is_usual else f"forward({', '.join([name, *texts])})"


def _raised(error: BaseException) -> str:
    text, place = " ".join(str(error).split())[:240], error_place(error)
    return f"{type(error).__name__}{f': {text}' * bool(text)}{f' ({place})' * bool(place)}"


def _advice(error: BaseException, failed: _Failed) -> str:
    """What to do about an exception, from the likely causes of its type, text and call."""
    causes = (_of_signature, _of_lookup, _of_time, _of_channels, _of_dtype, _of_device, _of_missing_forward)
    found = next((advice for cause in causes if (advice := cause(error, str(error), failed))), None)
    if found is not None:
        return found
    if not failed.is_usual:
        return "correct the function that was passed as forward"
    return f"check {failed.shape} and the network, or {OTHER_CALL}"


def _of_signature(error: BaseException, text: str, failed: _Failed) -> str | None:
    if not isinstance(error, TypeError):
        return None
    if not failed.is_usual:
        called = (failed.module, failed.x_t, failed.time, failed.label)
        takes = "pass a function (module, x, time, label) -> prediction"
        return None if _binds(failed.forward, called) else takes
    if _binds(failed.module.forward, failed.arguments):
        return None
    names = list(inspect.signature(failed.module.forward).parameters)
    if failed.label is None and _binds(failed.module.forward, (*failed.arguments, None)):
        return f"pass --num-classes if {names[2]} is the class label, otherwise {OTHER_CALL}"
    if failed.label is not None and _binds(failed.module.forward, failed.arguments[:2]):
        return f"pass --num-classes 0 if it takes no label, or {OTHER_CALL}"
    return OTHER_CALL


def _binds(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bool:
    try:
        inspect.signature(function).bind(*arguments)
    except (TypeError, ValueError):
        return False
    return True


def _of_lookup(error: BaseException, text: str, failed: _Failed) -> str | None:
    """A row that a table of labels or times does not have."""
    out_of_bounds = re.search(r"index (-?\d+) is out of bounds for dimension \d+ with size (\d+)", text)
    if out_of_bounds:
        table, rows, index = "its table", int(out_of_bounds[2]), int(out_of_bounds[1])
    elif isinstance(error, IndexError) and "out of range" in text and failed.lookups:
        last = failed.lookups[-1]
        table, rows, index = last.name, last.rows, int(last.indices.max())
    elif failed.label is not None and "Class values must be smaller" in text:  # torch's one_hot
        null = int(failed.label[0])
        return f"its one-hot vector has no place for the null label {null}: {_null_advice(null - 1, failed)}"
    else:
        return None
    has = f"{table} has {rows} rows and none for"
    if failed.label is not None and index == int(failed.label[0]):
        return f"{has} the null label {index}: {_null_advice(rows - 1, failed)}"
    return f"{has} {'time ' * (index in failed.time.tolist())}{index}: pass the --schedule that it was trained with"


def _null_advice(last: int, failed: _Failed) -> str:
    optional = _binds(failed.module.forward, failed.arguments[:2])
    without = "--num-classes 0 to call it without a label" if optional else f"{OTHER_CALL} with a label of its own"
    return f"pass --num-classes {last} if {last} is its null label; if it was trained without one, {without}"


def _of_time(error: BaseException, text: str, failed: _Failed) -> str | None:
    """A float time where an integer is needed, or the reverse, or one value where a vector is needed."""
    is_float = failed.time.is_floating_point()
    if is_float and re.search(r"indices.* Long|used as indices must be|Long.*Float", text):
        return f"the schedule gives float times: pass {_INTEGER_TIMES} if it was trained with times 0 to 999"
    if not is_float and re.search(r"long int|\bLong\b|int64", text):
        return "the schedule gives integer times: use time.float() in its forward, or pass another --schedule"
    if f"cannot be multiplied (1x{len(failed.time)} and" in text:
        return f"time has shape ({len(failed.time)},): use time[:, None] in its forward"
    return None


def _of_channels(error: BaseException, text: str, failed: _Failed) -> str | None:
    expected = re.search(r"to have (\d+) channels, but got (\d+) channels", text)
    if len(failed.x_t.shape) == 3 and (expected or "conv2d" in text):
        return f"{failed.shape} has no channels: write channels first, such as --shape 3,32,32"
    if not expected or int(expected[2]) != failed.x_t.shape[1]:
        return None
    channels, shape = int(expected[1]), tuple(failed.x_t.shape[1:])
    if shape[-1] == channels:
        return f"write channels first: --shape {','.join(map(str, (channels, *shape[:-1])))}"
    return f"{failed.shape} has {shape[0]} channels, but the network takes {channels}: pass the shape it was trained on"


def _of_dtype(error: BaseException, text: str, failed: _Failed) -> str | None:
    dtypes = {p.dtype for p in failed.module.parameters() if p.is_floating_point()}
    if dtypes <= {failed.x_t.dtype} or not re.search(r"(?i)half|bfloat16|double|float|dtype|same type", text):
        return None
    names = " and ".join(sorted(_name(dtype) for dtype in dtypes))
    return f"its weights are {names}, but it is called with {_name(failed.x_t.dtype)}: return network.float()"


def _of_device(error: BaseException, text: str, failed: _Failed) -> str | None:
    if not re.search(r"(?i)same device|expected device|CUDA enabled|NVIDIA driver|No CUDA", text):
        return None
    return f"make its tensors on the device of its input, {failed.x_t.device}: device=x.device, without .cuda()"


def _of_missing_forward(error: BaseException, text: str, failed: _Failed) -> str | None:
    return _part_that_denoises(failed) if isinstance(error, NotImplementedError) and "forward" in text else None


def _part_that_denoises(failed: _Failed) -> str:
    lists = (nn.ModuleList, nn.ModuleDict)
    parts = [(name, part) for name, part in failed.module.named_children() if not isinstance(part, lists)]
    children = [name for name, part in parts if next(part.children(), None) is not None]
    named = f" ({', '.join(children[:4])}?)" if children else ""
    return f"return the part of it that denoises{named}, or {OTHER_CALL}"


def _output_advice(output: Any, failed: _Failed) -> str:
    if not failed.is_usual:
        return "let the function that was passed as forward return the prediction"
    if not isinstance(output, Tensor):
        return "let the factory return wrap(..., forward=...), with a function that takes the prediction from it"
    if output.ndim < 2:
        return _part_that_denoises(failed)
    if output.shape[1:] == failed.x_t.shape[1:]:
        return "let its forward keep nothing of the size of an earlier batch"
    if failed.x_t.ndim > 3 and output.shape == failed.x_t.movedim(1, -1).shape:
        return "let it return channels first"
    return f"pass the --shape it was trained on, or {OTHER_CALL}"


def _is_ours(error: BaseException) -> bool:
    """Whether layerprobe's own code raised it, such as the hook that reads a layer."""
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    return innermost.filename.startswith(_OWN_CODE)


def _kind(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    content: Mapping[Any, Any] = {}
    if isinstance(output, Mapping):
        content = output
    elif isinstance(output, (tuple, list)):
        content = dict(enumerate(output))
    elif dataclasses.is_dataclass(output):
        content = vars(output)
    parts = [f"{key}: {_tensor(x) if isinstance(x, Tensor) else type(x).__name__}" for key, x in content.items()]
    return f"{type(output).__name__}" + (f" of {', '.join(parts[:4])}" if parts else "")


def _tensor(x: Tensor) -> str:
    return f"{tuple(x.shape)} {_name(x.dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _values(x: Tensor) -> str:
    return " and ".join(dict.fromkeys(f"{value:.4g}" for value in x.tolist()))
