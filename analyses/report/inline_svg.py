"""Figures as SVG elements inside an HTML page, in the colors of the page."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from layerprobe.analyses.figures import BACKGROUND, INK, to_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INVALID_IN_XML = re.compile(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def inline_svg(figure: Figure, prefix: str) -> str:
    """Renders a figure as one SVG element that scales with the page.

    Args:
        figure: Figure to render.
        prefix: Prefix of all ids of the element, unique in the page: figures number theirs alike.

    Returns:
        Well-formed markup without scripts, style sheets or references to anything outside the element.
    """
    root = ElementTree.fromstring(_INVALID_IN_XML.sub("\N{REPLACEMENT CHARACTER}", to_svg(figure)))
    for parent in root.iter():
        # HTML knows SVG elements by their plain names.
        parent.tag = _plain(parent.tag)
        for child in [child for child in parent if _plain(child.tag) in ("metadata", "style")]:
            parent.remove(child)
        parent.attrib = {_plain(key): _localized(key, value, prefix) for key, value in parent.attrib.items()}
    title = " ".join(figure.get_suptitle().split())
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    return ElementTree.tostring(root, encoding="unicode")


def _plain(name: str) -> str:
    """The name of an element or attribute without its namespace."""
    return name.rpartition("}")[2]


def _localized(key: str, value: str, prefix: str) -> str:
    """An attribute's value with the ids and the colors of the page."""
    if key == "id":
        return f"{prefix}-{value}"
    if _plain(key) == "href":
        return re.sub("^#", f"#{prefix}-", value)
    value = value.replace("url(#", f"url(#{prefix}-")
    return value.replace(INK, "var(--ink)").replace(BACKGROUND, "var(--paper)")
