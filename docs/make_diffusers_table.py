"""Writes the table of covered classes into diffusers.md, from a run of the checks in tests/test_diffusers.py."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Runs the checks of every class and replaces the table."""
    sys.path.insert(0, str(ROOT / "tests"))
    from test_diffusers import DOCS, HEADER, table

    with tempfile.TemporaryDirectory() as folder:
        made = table(Path(folder))
    text = DOCS.read_text(encoding="utf-8")
    # The table ends where lines no longer begin with a bar.
    before = re.compile(re.escape(HEADER.split("|")[0] + "| class |") + r".*?(?=\n[^|]|\Z)", re.DOTALL)
    if len(before.findall(text)) != 1:
        sys.exit(f"{DOCS} has no table that begins with '| class |'; put such a line where it belongs")
    DOCS.write_text(before.sub(lambda _: made, text), encoding="utf-8")


if __name__ == "__main__":
    main()
