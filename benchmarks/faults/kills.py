"""Jobs that are killed (SIGKILL) at random moments and repeated until they end, with the bytes that are left then."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jobs import Undisturbed, start
from outcome import LIMIT_S, Outcome, Result

SHARES = {"train": 8, "extract": 4, "sample": 3, "sample npz": 2, "probe": 2, "analyze": 2, "confirm": 1}
MOST_KILLS = 6  # in a chain


def run(count: int, seed: int) -> Iterator[Result]:
    """Kills this often; every kill ends as its chain does."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        undisturbed = Undisturbed(Path(place, "whole"))
        done = 0
        while done < count:
            name = rng.choices(list(SHARES), list(SHARES.values()))[0]
            shares = [rng.random() for _ in range(min(rng.randint(2, MOST_KILLS), count - done))]
            folder = Path(place, "chain")
            kills, outcome = chain(name, shares, folder, undisturbed)
            shutil.rmtree(folder)
            what = ", ".join(f"{share:.3f}" for share in shares)
            yield from [Result(name, f"chain from {done}, kills at {what}", outcome)] * kills
            done += kills


def chain(name: str, shares: list[float], folder: Path, undisturbed: Undisturbed) -> tuple[int, Outcome]:
    """Returns how often the job was killed, and how the last try ended."""
    seconds = undisturbed.seconds(name)
    undisturbed.prepare(name, folder)
    kills = 0
    for share in shares:
        outcome = start(name, folder).end(share * seconds)
        if outcome.kind != "HANG":  # It ended before.
            break
        kills += 1
    else:
        outcome = start(name, folder).end(LIMIT_S + seconds)
    return kills, undisturbed.compare(name, folder, outcome)
