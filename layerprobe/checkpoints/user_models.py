"""Opens a user's own network: imports a factory by name and wraps what it returns as a backbone."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from layerprobe.backbones import Backbone, wrap
from layerprobe.capture import match_layers
from layerprobe.files import one_line
from layerprobe.noise import NoiseSchedule, Prediction


def import_object(spec: str, option: str) -> Any:
    """Imports "file.py:name" or "package.module:name"; no other code of a user or a checkpoint is ever run.

    Args:
        spec: The name, as the user wrote it.
        option: Command-line option that the user passed it with, for the error.

    Raises:
        ValueError: If it cannot be imported.
    """
    location, _, name = spec.rpartition(":")
    if not location:
        raise ValueError(f"{option} {spec} names no object; pass file.py:name or package.module:name")
    try:
        if location.endswith(".py"):
            # Registered because dataclasses look their module up; the prefix keeps a user's `random.py` apart.
            alias = f"layerprobe_user_{Path(location).stem}"
            loader = importlib.util.spec_from_file_location(alias, location)
            assert loader is not None and loader.loader is not None
            module = sys.modules[alias] = importlib.util.module_from_spec(loader)
            loader.loader.exec_module(module)
        else:
            module = importlib.import_module(location)
        return getattr(module, name)
    except (ImportError, OSError, AttributeError, SyntaxError) as error:
        raise ValueError(
            f"{option} {spec} cannot be imported ({one_line(error)}); pass file.py:name or package.module:name"
        ) from error


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
    network = _make(model)
    if isinstance(network, Backbone):
        options = {"schedule": schedule, "prediction": prediction, "shape": shape, "num_classes": num_classes}
        passed = {name: value for name, value in options.items() if value is not None}
        refuse_other_options((), passed, f"{model} returns a complete Backbone")
        return network if layers is None else with_layers(network, layers)
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"{model} returns a {type(network).__name__}; it must return a torch.nn.Module or a layerprobe Backbone"
        )
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
    return factory()


def with_layers(backbone: Backbone, layers: str | Sequence[str]) -> Backbone:
    """Returns the backbone with other layers, given by names or patterns."""
    return replace(backbone, layers=match_layers(backbone.module, layers))
