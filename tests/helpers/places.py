"""Where things lie in the checkout, for tests in any folder."""

from __future__ import annotations

from pathlib import Path

HELPERS = Path(__file__).parent
REPOSITORY = HELPERS.parents[1]
DOCS = REPOSITORY / "docs"
