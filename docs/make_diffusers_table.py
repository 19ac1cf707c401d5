"""Writes what was checked of diffusers classes into diffusers.md and the package.

The checks are those in tests/helpers/diffusers_checks.py; `layerprobe doctor --families` prints the package's record.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Runs the checks of every class and replaces the table and the record."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from diffusers_checks import HEADER, record, table

    from layerprobe.backbones.diffusers.verified import RECORD, installed_versions

    page = ROOT / "docs" / "diffusers.md"

    with tempfile.TemporaryDirectory() as folder:
        classes = record(Path(folder))
    content = json.dumps({"versions": installed_versions(), "classes": classes}, indent=1, ensure_ascii=False)
    RECORD.write_text(content + "\n", encoding="utf-8")
    new_table = table(classes)
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
