"""The same job in one folder twice at the same time; one of them is killed, and the other one must be right."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from jobs import Undisturbed, start
from outcome import LIMIT_S, Outcome, Result

SHARES = {"train": 4, "extract": 3, "sample": 2, "sample npz": 1, "probe": 1}


def run(count: int, seed: int) -> Iterator[Result]:
    """Runs this many trials."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        undisturbed = Undisturbed(Path(place, "whole"))
        for _ in range(count):
            name = rng.choices(list(SHARES), list(SHARES.values()))[0]
            later, until, first_dies = 0.5 * rng.random(), rng.random(), rng.random() < 0.5
            folder = Path(place, "pair")
            outcome = trial(name, folder, undisturbed, later=later, until=until, first_dies=first_dies)
            shutil.rmtree(folder)
            died = "first" if first_dies else "second"
            yield Result(name, f"second at {later:.3f}, {died} killed {until:.3f} later", outcome)


def trial(
    name: str, folder: Path, undisturbed: Undisturbed, *, later: float, until: float, first_dies: bool
) -> Outcome:
    seconds = undisturbed.seconds(name)
    undisturbed.prepare(name, folder)
    first = start(name, folder)
    time.sleep(later * seconds)
    second = start(name, folder)
    dies, lives = (first, second) if first_dies else (second, first)
    dies.end(until * seconds)
    outcome = lives.end(LIMIT_S + 3 * seconds)
    if outcome.kind == "refused" and "in use" in outcome.text:  # The other one held the folder.
        outcome = start(name, folder).end(LIMIT_S + seconds)
    return undisturbed.compare(name, folder, outcome)
