"""Opens a user's own network: calls a factory and wraps what it returns as a backbone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from layerprobe.backbones import Backbone, wrap
from layerprobe.capture import match_layers
from layerprobe.checkpoints.user_code import import_object, run_user_code
from layerprobe.noise import NoiseSchedule, Prediction


def refuse_other_options(allowed: Sequence[str], options: Mapping[str, Any], reason: str) -> None:
    """Refuses options that would have no effect, rather than ignore them.

    Raises:
        ValueError: If an option is not among the allowed ones; the message starts with the reason.
    """
    surplus = [f"--{name.replace('_', '-')}" for name in options if name not in allowed]
    if surplus:
        raise ValueError(f"{reason}: {surplus[0]} has no effect; leave it out")


def user_backbone(
    model: str | Callable[[], Any],
    layers: str | Sequence[str] | None = None,
    schedule: str | NoiseSchedule | None = None,
    prediction: Prediction | None = None,
    shape: Sequence[int] | None = None,
    num_classes: int | None = None,
) -> Backbone:
    """Wraps a user's network, or what a factory returns, as a backbone; arguments as in `open_checkpoint`.

    Raises:
        ValueError: If the factory cannot be imported or called, returns something else, or a needed option is missing.
    """
    network = _unwrapped(_make(model))
    if isinstance(network, Backbone):
        options = {"schedule": schedule, "prediction": prediction, "shape": shape, "num_classes": num_classes}
        passed = {name: value for name, value in options.items() if value is not None}
        refuse_other_options((), passed, f"{model} returns a complete Backbone")
        return network if layers is None else with_layers(network, layers)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{model} returns {_kind(network)}; it must return a torch.nn.Module or a layerprobe Backbone")
    if isinstance(network, torch.jit.ScriptModule):
        raise ValueError(f"{model} returns TorchScript, whose layers cannot be read; return the network it was made of")
    if any(is_lazy(parameter) for parameter in network.parameters()):
        raise ValueError(f"{model} returns lazy layers, which have no weights yet; call the network once before")
    needed = {"layers": layers, "schedule": schedule, "prediction": prediction, "shape": shape}
    missing = [f"--{name}" for name, value in needed.items() if value is None]
    if missing:
        raise ValueError(f"{type(network).__name__} is not a known family; pass {', '.join(missing)}")
    assert layers is not None and schedule is not None and prediction is not None and shape is not None
    return wrap(
        network, layers=layers, schedule=schedule, prediction=prediction, shape=shape, num_classes=num_classes or 0
    )


def _make(model: str | Callable[[], Any]) -> Any:
    """Calls a factory; a module or backbone is returned as it is."""
    factory = import_object(model, "--model") if isinstance(model, str) else model
    if isinstance(factory, (nn.Module, Backbone)) or not callable(factory):
        return factory
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ValueError(
            f"{model} needs arguments ({error}); pass a function without arguments that returns the network"
        ) from error
    spec = model if isinstance(model, str) else ""
    return run_user_code(factory, spec, f"{model} fails", "correct the function that returns the network")


def _unwrapped(network: Any) -> Any:
    """Returns the network inside torch.compile and data parallelism, whose layers then have their own names."""
    if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrapped(network.module)
    original = getattr(network, "_orig_mod", None)
    return _unwrapped(original) if isinstance(original, nn.Module) else network


def _kind(made: Any) -> str:
    if made is None:
        return "nothing, without a return statement"
    if isinstance(made, type):
        return f"the class {made.__name__} and not an object of it"
    if isinstance(made, (tuple, list)):
        return f"a {type(made).__name__} of {', '.join(type(part).__name__ for part in made[:4])}"
    return f"a {type(made).__name__}"


def with_layers(backbone: Backbone, layers: str | Sequence[str]) -> Backbone:
    """Returns the backbone with other layers, given by names or patterns."""
    return replace(backbone, layers=match_layers(backbone.module, layers))
