"""Sphinx configuration. The site builds with warnings as errors: `make docs`."""

import re
import sys
from pathlib import Path

import layerprobe

sys.path.insert(0, str(Path(__file__).parent))  # for option_tables

project = "layerprobe"
author = copyright = "The layerprobe authors"
release = version = layerprobe.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "option_tables"]
myst_heading_anchors = 3
myst_enable_extensions = ["attrs_inline"]  # `--flag`{.flag}
nb_execution_mode = "off"  # the notebooks are kept with their outputs
exclude_patterns = ["_build"]

html_theme = "furo"
html_extra_path = ["llms.txt"]
html_static_path = ["_static"]
html_css_files = ["layerprobe.css"]
html_title = f"layerprobe {release}"

default_role = "code"  # single backticks in docstrings mark code, as in Markdown
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_use_ivar = True  # otherwise every attribute of a record is indexed twice

# Docstrings are written to be read in the source: `*` and `|` are mathematics, and an indented paragraph is code. In
# reStructuredText they would be emphasis, a substitution and a block quote. Their tables are those of Markdown.
_SECTION = re.compile(r"[A-Z]\w*:$")
_CODE_SPAN = re.compile(r"(`+[^`]+`+)")
_MARKUP = re.compile(r"[*|]|(?<=\w)_(?!\w)")


def plain_docstring(app, what, name, obj, options, lines):
    """Translates a docstring to reStructuredText in place, before napoleon reads its sections."""
    translated: list[str] = []
    rows: list[str] = []
    section = code = False
    previous = ""
    for line in [*lines, ""]:
        if line.startswith("|"):
            rows.append(line)
            continue
        translated += _list_table(rows) if rows else []
        rows = []
        indented = line.startswith("    ")
        if line and not indented:
            section, code = bool(_SECTION.match(line)), False
        elif indented and not section and not code:
            code = not previous
            if code:
                translated += ["::", ""]
            else:  # a hanging indent, as after "Source:"
                line = line.lstrip()
        translated.append(line if code else _escape(line))
        previous = line
    lines[:] = translated


def _list_table(rows: list[str]) -> list[str]:
    """Translates a table of Markdown."""
    table = [".. list-table::", "   :header-rows: 1", ""]
    for row in (rows[0], *rows[2:]):  # the second is the line below the heads
        cells = [_escape(cell.strip()) for cell in row.strip("| ").split(" | ")]
        table += [f"   {'* ' if place == 0 else '  '}- {cell}" for place, cell in enumerate(cells)]
    return [*table, ""]


def _escape(line: str) -> str:
    parts = _CODE_SPAN.split(line)
    parts[::2] = [_MARKUP.sub(r"\\\g<0>", part) for part in parts[::2]]
    parts[2::2] = [re.sub(r"^(?=\w)", r"\\ ", part) for part in parts[2::2]]  # `Layer`s
    return "".join(parts)


def skip_torch_text(app, what, name, obj, skip, options):
    """Leaves out a `forward` without a docstring, which would show the generic one of torch."""
    return True if name == "forward" and not obj.__doc__ else None


def setup(app):
    """Registers the hooks with Sphinx."""
    app.connect("autodoc-skip-member", skip_torch_text)
    app.connect("autodoc-process-docstring", plain_docstring, priority=100)  # napoleon's is 500
