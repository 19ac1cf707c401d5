"""Networks of the user's own: importing a factory by name and loading weights into what it returns."""

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
from layerprobe.noise import NoiseSchedule, Prediction


def import_object(spec: str, option: str) -> Any:
    """ "file.py:name" or "package.module:name"; the user's own code, named by the user, is the only code that runs.

    Raises:
        ValueError: If it cannot be imported; the message names the option that asked for it.
    """
    place, _, name = spec.rpartition(":")
    if not place:
        raise ValueError(f"{option} {spec} names no object; pass file.py:name or package.module:name")
    try:
        if place.endswith(".py"):
            # A name of its own: a user's `random.py` must not stand for the library's. Dataclasses look it up.
            alias = f"layerprobe_user_{Path(place).stem}"
            loader = importlib.util.spec_from_file_location(alias, place)
            assert loader is not None and loader.loader is not None
            module = sys.modules[alias] = importlib.util.module_from_spec(loader)
            loader.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        return getattr(module, name)
    except (ImportError, OSError, AttributeError, SyntaxError) as error:
        raise ValueError(
            f"{option} {spec} cannot be imported ({first_line(error)}); pass file.py:name or package.module:name"
        ) from error


def refuse_other_options(known: Sequence[str], asked: Mapping[str, Any], why: str) -> None:
    """Nothing that was asked for is passed over in silence."""
    surplus = [f"--{name.replace('_', '-')}" for name in asked if name not in known]
    if surplus:
        raise ValueError(f"{why}: {surplus[0]} has no effect; leave it out")


def user_backbone(
    model: str | Callable[[], Any],
    layers: str | Sequence[str] | None = None,
    schedule: str | NoiseSchedule | None = None,
    prediction: Prediction | None = None,
    shape: Sequence[int] | None = None,
    num_classes: int | None = None,
) -> Backbone:
    made = _make(model)
    if isinstance(made, Backbone):
        options = {"schedule": schedule, "prediction": prediction, "shape": shape, "num_classes": num_classes}
        given = {name: value for name, value in options.items() if value is not None}
        refuse_other_options((), given, f"{model} gives a whole Backbone")
        return made if layers is None else with_layers(made, layers)
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"{model} gives a {type(made).__name__}; it must give a torch.nn.Module or a layerprobe Backbone"
        )
    needed = {"layers": layers, "schedule": schedule, "prediction": prediction, "shape": shape}
    missing = [f"--{name}" for name, value in needed.items() if value is None]
    if missing:
        raise ValueError(f"{type(made).__name__} is not a known family; pass {', '.join(missing)}")
    assert layers is not None and schedule is not None and prediction is not None and shape is not None
    return wrap(
        made, layers=layers, schedule=schedule, prediction=prediction, shape=shape, num_classes=num_classes or 0
    )


def _make(model: str | Callable[[], Any]) -> Any:
    """What a factory gives; a module or backbone is what it is."""
    factory = import_object(model, "--model") if isinstance(model, str) else model
    if isinstance(factory, (nn.Module, Backbone)) or not callable(factory):
        return factory
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ValueError(f"{model} wants arguments ({error}); pass a function without any that makes it") from error
    return factory()


def with_layers(backbone: Backbone, layers: str | Sequence[str]) -> Backbone:
    return replace(backbone, layers=match_layers(backbone.module, layers))


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
