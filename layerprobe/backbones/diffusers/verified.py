"""Which classes of diffusers were checked, with which versions, and what an entry for another class needs."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from layerprobe.backbones.diffusers.class_table import CLASSES
from layerprobe.backbones.diffusers.diffusers_class import SAMPLES, TIMES
from layerprobe.backbones.diffusers.folders import exported_class
from layerprobe.backbones.diffusers.generic import TEXT_WIDTHS
from layerprobe.backbones.diffusers.weights import quiet_libraries
from layerprobe.files import import_optional

RECORD = Path(__file__).parents[2] / "assets" / "families.json"
_PACKAGES = ("diffusers", "torch")
_LIST = re.compile(r"self\.(\w+) = nn\.ModuleList\(")


def installed_versions() -> dict[str, str]:
    """Returns the installed versions of what the checks depend on; "none" for what is missing."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    return versions


def verified_families() -> dict[str, Any]:
    """Returns the record of the checks: `versions`, and in `classes` what was checked of each class."""
    record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return record


def other_classes() -> list[str]:
    """Returns the denoisers of the installed diffusers that have no entry; [] without diffusers."""
    if installed_versions()["diffusers"] == "none":
        return []
    with quiet_libraries():  # Optional packages that a class lacks concern no one who asks for a list.
        return sorted(name for name in _denoisers() if name not in CLASSES)


def _denoisers() -> Iterator[str]:
    """Yields the models of diffusers that take a time and a noisy sample."""
    diffusers = import_optional("diffusers", "diffusers")
    for name in dir(diffusers):
        if re.search(r"Transformer|UNet|DiT", name) and not re.search("ControlNet|Adapter|Motion.*Adapter", name):
            model_class = exported_class(name, "ModelMixin")
            parameters = inspect.signature(model_class.forward).parameters if model_class else {}
            if set(TIMES) & set(parameters) and set(SAMPLES) & set(parameters):
                yield name


def entry_to_fill_in(name: str) -> str:
    """Returns the source of an entry for a class without one, with what its code says and questions for the rest.

    Raises:
        ValueError: If the class has an entry already, or diffusers has no such model.
    """
    if name in CLASSES:
        raise ValueError(f"{name} has an entry already; open its folder by path")
    model_class = exported_class(name, "ModelMixin")
    if model_class is None:
        raise ValueError(
            f"{name} is not a model of diffusers {installed_versions()['diffusers']}; pass a class that `layerprobe "
            "doctor --families` lists"
        )
    config = inspect.signature(model_class.__init__).parameters
    forward = inspect.signature(model_class.forward).parameters
    lists = _LIST.findall(inspect.getsource(model_class)) or ["LIST_OF_BLOCKS"]
    width = next((key for key in TEXT_WIDTHS if key in config), None)
    size = "(c.in_channels, c.sample_size, c.sample_size)" if "sample_size" in config else None
    known = {"self", "return_dict", "attention_kwargs", *SAMPLES, *TIMES}
    arguments = [key for key, p in forward.items() if key not in known and p.default is p.empty]
    optional = [key for key, p in forward.items() if key not in known and p.default is not p.empty]
    blocks = ", ".join(f'"{item}.*"' for item in lists)
    lines = [
        f"# {inspect.getsourcefile(model_class)}",
        f'CLASSES["{name}"] = DiffusersClass(',
        f"    layers=({blocks},),  # the lists of blocks that hold the sample, in running order",
        "    patch=lambda c: (c.patch_size, c.patch_size),  # edges of a token: (h, w), (f, h, w) or (l,)",
        *([f"    size=lambda c: {size},"] if size else []),
        *(
            [f"    text=lambda c: (77, c.{width}, 0),  # tokens, width, pooled width of the empty condition"]
            if width
            else []
        ),
        "    arguments=lambda c, shape, text: {  # as its pipeline passes them; tensors with one row",
        *[f'        "{key}": {"text.tokens" if key == "encoder_hidden_states" else "..."},' for key in arguments],
        *[f'        # "{key}": ...,' for key in optional],
        "    },",
        "    # second=(...) or first=(...): lists whose outputs hold the sample after or before the text",
        "    # packed=True: its pipeline cuts the patches",
        "    times=...,  # what its pipeline passes as time at data and at noise: (0, 1), (0, 1000) or (1, 0)",
        '    # trained=("flow", "velocity"), if there is only one published training',
        ")",
    ]
    return "\n".join(lines)
