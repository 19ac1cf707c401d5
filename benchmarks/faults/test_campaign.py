"""A small part of the campaign, and that it notices what it is for."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import kills
import pairs
from configs import mutated
from jobs import Undisturbed, contents
from outcome import Case, Outcome, run_batch

ENDED = Outcome("ok", 0, "", 1.0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("whole"))


def test_killed_samples_are_the_same(undisturbed: Undisturbed, tmp_path: Path) -> None:
    count, outcome = kills.chain("sample npz", [0.3, 0.8], tmp_path, undisturbed)
    assert count <= 2
    assert outcome.kind == "ok", outcome


def test_two_processes_in_one_folder_leave_the_same(undisturbed: Undisturbed, tmp_path: Path) -> None:
    outcome = pairs.trial("sample npz", tmp_path, undisturbed, later=0.1, until=0.5, first_dies=True)
    assert outcome.kind == "ok", outcome


def test_other_bytes_are_noticed(undisturbed: Undisturbed) -> None:
    folder = undisturbed.folder("sample npz")
    assert undisturbed.compare("sample npz", folder, ENDED) == ENDED
    file = folder / "out/samples.npz"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    changed = undisturbed.compare("sample npz", folder, ENDED)
    file.write_bytes(whole)
    assert (changed.kind, changed.text) == ("CHANGED", "different: samples.npz")


def test_speeds_are_not_compared(tmp_path: Path) -> None:
    found = []
    for loss, speed in ((1, 10), (1, 20), (2, 10)):
        (tmp_path / "log.csv").write_text(f"step,loss,samples_per_s\n1,{loss},{speed}\n")
        (tmp_path / "log.jsonl").write_text(f'{{"step": 1, "loss": {loss}, "samples_per_s": {speed}}}\n')
        found.append(contents(tmp_path))
    assert found[0] == found[1]
    assert all(found[0][name] != found[2][name] for name in ("log.csv", "log.jsonl"))


def test_a_batch_goes_on_behind_a_case_that_hangs_or_crashes() -> None:
    def pipe(folder: Path) -> list[str]:
        import time

        time.sleep(60 if folder.name.isdigit() else 0)  # in the batch alone
        return ["inspect", "none"]

    cases = [Case("", "", lambda folder: ["inspect", str(folder / "none")]), Case("", "", pipe)] * 2
    assert [outcome.kind for outcome in run_batch(cases, limit_s=1.5)] == ["refused"] * 4


def test_mutations_are_seeded() -> None:
    tree = {"depth": 2, "network": {"layers": [1, 2]}}
    assert [str(mutated(tree, random.Random(i))) for i in range(20)] == [
        str(mutated(tree, random.Random(i))) for i in range(20)
    ]
    assert tree == {"depth": 2, "network": {"layers": [1, 2]}}
