"""Figures as SVG elements inside an HTML page, in the colors of the page.

The title of a figure becomes its caption, so that it wraps with the page. Points and cells have an area with a
`data-tip`, which the script of the page shows under the pointer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from layerprobe.analyses.figures import BACKGROUND, INK, spots_of, to_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INVALID_IN_XML = re.compile(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Drawing:
    """A figure for a page.

    Attributes:
        svg: Well-formed markup without scripts, style sheets or references to anything outside the element.
        caption: What the figure shows, its title.
    """

    svg: str
    caption: str


def inline_svg(figure: Figure, prefix: str) -> Drawing:
    """Renders a figure as one SVG element that scales with the page, and takes its title out of it.

    Args:
        figure: Figure to render.
        prefix: Prefix of all ids of the element, unique in the page: figures number theirs alike.
    """
    caption = " ".join(_valid(figure.get_suptitle()).split())
    figure.suptitle("")
    root = ElementTree.fromstring(_valid(to_svg(figure)))
    for parent in root.iter():
        # HTML knows SVG elements by their plain names.
        parent.tag = _plain(parent.tag)
        for child in [child for child in parent if _plain(child.tag) in ("metadata", "style")]:
            parent.remove(child)
        if "QuadMesh" in parent.get("id", ""):
            parent.set("shape-rendering", "crispEdges")  # no seams between the cells of a heatmap
        parent.attrib = {_plain(key): _localized(key, value, prefix) for key, value in parent.attrib.items()}
    for spot in spots_of(figure):
        place = {"x": spot.x, "y": spot.y, "width": spot.width, "height": spot.height}
        area = {name: f"{value:.1f}" for name, value in place.items()} | {
            "class": "spot",
            "data-tip": _valid(spot.text),
        }
        ElementTree.SubElement(root, "rect", area)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": _description(figure)}
    return Drawing(ElementTree.tostring(root, encoding="unicode"), caption)


def _description(figure: Figure) -> str:
    """What is drawn, panel by panel: titles and axes."""
    panels = [
        ", ".join(filter(None, (axes.get_title(loc="left"), axes.get_ylabel(), axes.get_xlabel())))
        for axes in figure.axes
        if axes.axison and axes.get_title(loc="left")
    ]
    return " ".join(_valid(f"Chart. {'. '.join(panels)}.").split())


def _valid(text: str) -> str:
    return _INVALID_IN_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def _plain(name: str) -> str:
    """The name of an element or attribute without its namespace."""
    return name.rpartition("}")[2]


def _localized(key: str, value: str, prefix: str) -> str:
    """An attribute's value with the ids and the colors of the page."""
    if key == "id":
        return f"{prefix}-{value}"
    if key == "d":  # a hundredth of a point is finer than any screen
        return " ".join(re.sub(r"(\.\d\d)\d+", r"\1", value).split())
    if _plain(key) == "href":
        return re.sub("^#", f"#{prefix}-", value)
    value = value.replace("url(#", f"url(#{prefix}-")
    return value.replace(INK, "var(--ink)").replace(BACKGROUND, "var(--paper)")
