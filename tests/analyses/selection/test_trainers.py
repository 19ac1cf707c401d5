"""What is written for a trainer is read back as the same pair, and the lines are those that its code would read."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerprobe.analyses.selection import (
    TRAINERS,
    Trainer,
    lines_for,
    read_pair,
    read_settings,
    recognized,
    trainer_named,
)

PAGE = Path(__file__).parents[3] / "docs" / "other-trainers.md"
SUFFIXES = {"json": ".json", "toml": ".toml", "command": ".sh"}


def written(trainer: Trainer, student: int = 7, teacher: int = 19, **options: float) -> str:
    return lines_for(trainer, student, teacher if trainer.teacher else None, 28, **options)


@pytest.mark.parametrize("trainer", TRAINERS.values(), ids=list(TRAINERS))
@pytest.mark.parametrize("pair", [(7, 19), (0, 1), (26, 27)])
def test_lines_are_read_back_as_the_same_pair(trainer: Trainer, pair: tuple[int, int]) -> None:
    settings = read_settings(written(trainer, *pair), SUFFIXES[trainer.form])
    assert recognized(settings) == trainer
    read = read_pair(trainer, settings, 28)
    assert read.facts.student == pair[0]
    assert read.facts.teacher == (pair[1] if trainer.teacher else None)
    assert read.facts.weight == trainer.default_weight
    assert (read.facts.switched_off, read.facts.misread, read.left_out) == ((), (), ())


def test_a_given_weight_is_written() -> None:
    for trainer in TRAINERS.values():
        if trainer.weight:
            settings = read_settings(written(trainer, weight=0.35), SUFFIXES[trainer.form])
            assert read_pair(trainer, settings).facts.weight == 0.35


@pytest.mark.parametrize(
    ("key", "numbers"),
    [
        ("simpletuner", (8, 20)),
        ("simpletuner-crepa", (7, 19)),
        ("musubi", (7, 19)),
        ("musubi-ltx2", (7, 19)),
        ("takenoko", (8, 20)),
        ("layersync", (8, 20)),
        ("sra", (8, 20)),
        ("sra-dts", (8, 20)),
        ("self-flow", (8, 20)),
    ],
)
def test_numbers_are_in_the_counting_of_the_trainer(key: str, numbers: tuple[int, int]) -> None:
    trainer = TRAINERS[key]
    settings = read_settings(written(trainer), SUFFIXES[trainer.form])
    names = (name.replace("-", "_") for name in (trainer.student, trainer.teacher))
    assert tuple(settings[name] for name in names) == numbers


def test_the_page_has_the_lines_and_the_version_of_every_trainer() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for trainer in TRAINERS.values():
        assert f"\n{written(trainer)}\n" in page
        assert f"\n| `{trainer.key}` |" in page


def test_bad_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="no block 28 among 28 blocks; use 0 to 27"):
        lines_for(TRAINERS["sra"], 7, 28, 28)
    with pytest.raises(ValueError, match="aligns with an external encoder and takes no teacher, got 19"):
        lines_for(TRAINERS["repa"], 7, 19, 28)
    with pytest.raises(ValueError, match="takes a teacher layer, got None"):
        lines_for(TRAINERS["sra"], 7, None, 28)
    with pytest.raises(ValueError, match="has no option for the weight; leave out the weight"):
        lines_for(TRAINERS["sra"], 7, 19, 28, weight=0.3)
    with pytest.raises(ValueError, match="unknown trainer 'flux'; use simpletuner, "):
        trainer_named("flux")
