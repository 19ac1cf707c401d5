"""Writes the table of covered classes into diffusers.md, from a run of tests/helpers/diffusers_checks.py."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Runs the checks of every class and replaces the table."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from diffusers_checks import HEADER, table

    page = ROOT / "docs" / "diffusers.md"

    with tempfile.TemporaryDirectory() as folder:
        made = table(Path(folder))
    text = page.read_text(encoding="utf-8")
    # The table ends where lines no longer begin with a bar.
    before = re.compile(re.escape(HEADER.split("|")[0] + "| class |") + r".*?(?=\n[^|]|\Z)", re.DOTALL)
    if len(before.findall(text)) != 1:
        sys.exit(f"{page} has no table that begins with '| class |'; put such a line where it belongs")
    page.write_text(before.sub(lambda _: made, text), encoding="utf-8")


if __name__ == "__main__":
    main()
