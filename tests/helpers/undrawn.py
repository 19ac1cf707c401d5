"""Figures that are built but not drawn: drawing takes most of the time of a short run, and other tests see to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import pytest
from matplotlib.figure import Figure


@contextmanager
def undrawn() -> Iterator[None]:
    """Files of figures are written, but empty."""

    def blank(figure: Figure, file: IO[bytes], *, format: str, **_: object) -> None:
        file.write(b'<svg viewBox="0 0 1 1"/>' if format == "svg" else b"")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", blank)
        patch.setattr(Figure, "draw_without_rendering", lambda figure: None)
        yield
