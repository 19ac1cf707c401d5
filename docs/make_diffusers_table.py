"""Writes the table of tested classes into diffusers.md, from the checks in tests/helpers/diffusers_checks.py."""

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
        new_table = table(Path(folder))
    text = page.read_text(encoding="utf-8")
    # The table ends at the first line that does not begin with a bar.
    old_table = re.compile(re.escape(HEADER.split("|")[0] + "| class |") + r".*?(?=\n[^|]|\Z)", re.DOTALL)
    if len(old_table.findall(text)) != 1:
        sys.exit(
            f"{page} needs exactly one table that begins with '| class |'; put such a line where the table belongs"
        )
    page.write_text(old_table.sub(lambda _: new_table, text), encoding="utf-8")


if __name__ == "__main__":
    main()
