"""Every code has its sentence, with the names of the layers and the numbers behind it."""

from __future__ import annotations

import pytest

from layerprobe.analyses.selection import (
    CHECKS,
    TRAINERS,
    PairFacts,
    check_pair,
    nearest_published,
    published_pairs,
)
from layerprobe.analyses.wording import finding_text, layer_name, published_text, trainer_notes

LAYERS = tuple(f"double.{i}" for i in range(8)) + tuple(f"single.{i}" for i in range(20))


def text(code: str, **facts: object) -> str:
    pair = {"student": 7, "teacher": 19, "num_blocks": 28} | facts
    findings = check_pair(PairFacts(**pair))  # type: ignore[arg-type]
    return next(finding_text(finding, LAYERS) for finding in findings if finding.code == code)


SENTENCES = {
    "LP001": ({"teacher": 7}, "double.7 is its own teacher"),
    "LP002": ({"student": 14}, "the student single.6 is at 0.54 of the depth"),
    "LP003": ({"teacher": 10}, "the teacher is 0.11 of the depth after the student"),
    "LP004": ({"teacher": 27}, "the teacher is at 1.00 of the depth; the latest published one is at 0.86"),
    "LP005": ({"convention_fits": False}, "do not fit the declared schedule"),
    "LP006": ({"teacher_quality": 0.25, "raw_input": 0.5}, "does not beat the raw input: 0.250 against 0.500"),
    "LP007": ({"teacher_quality": 0.25, "random_weights": 0.5}, "not beat random weights: 0.250 against 0.500"),
    "LP008": ({"student": 9, "teacher": 7}, "the teacher double.7 comes before the student single.1"),
    "LP009": ({"teacher": 28}, "the teacher would be block 28, and the last one is single.19"),
    "LP010": ({"weight": 0.0}, "the weight is 0: nothing is aligned"),
    "LP011": ({"stop_gradient": False}, "the gradient goes into the teacher too"),
    "LP012": ({"switched_off": (("on", "false", "true"),)}, "on is false, so nothing is aligned; it must be true"),
    "LP013": ({"misread": (("block", 0, 1),)}, "block = 0 is read as 1"),
}


@pytest.mark.parametrize("code", [check.code for check in CHECKS])
def test_every_code_has_a_sentence_with_its_numbers(code: str) -> None:
    facts, part = SENTENCES[code]
    sentence = text(code, **facts)
    assert part in sentence
    assert sentence.endswith(".")


def test_the_other_ends() -> None:
    assert "the student is at 0.04 of the depth; the earliest published one is at 0.14" in text("LP004", student=0)
    assert "the student is before the first block, double.0" in text("LP009", student=-1)
    assert "the weight is -1: it pushes the layers apart" in text("LP010", weight=-1.0)


def test_blocks_without_names_are_named_as_in_a_transformer() -> None:
    assert [layer_name(block, LAYERS) for block in (7, 8, 28)] == ["double.7", "single.0", "blocks.28"]


def test_published_pairs_have_their_gain_and_their_share_if_there_is_one() -> None:
    first, *_ = nearest_published(8 / 28, 16 / 28)
    place = "LayerSync, SiT-XL/2: 8 <- 16 (0.29, 0.57)"
    share = "0.94 of the best gain of its study (secondary summary, budget inferred)"
    assert published_text(first) == f"{place}, gain +40% in FID at 100K steps, {share}"
    (motion,) = (pair for pair in published_pairs() if pair.study == "LayerSync motion")
    place = "LayerSync, MDM, motion: 3 <- 6 (0.38, 0.75)"
    assert published_text(motion) == f"{place}, gain +8% in FID at 600K steps (secondary summary)"


def test_notes_tell_the_counting_the_defaults_and_the_traps() -> None:
    notes = {key: " ".join(trainer_notes(trainer)) for key, trainer in TRAINERS.items()}
    assert "counts blocks from 0: 0 is blocks.0" in notes["musubi"]
    assert "stops when they are used" in notes["musubi"]
    assert "Without layersync_teacher_block the student is its own teacher." in notes["simpletuner"]
    assert "0 is the same block as 1" in notes["simpletuner"]
    assert "layersync_lambda = 0 means 0.2." in notes["simpletuner"]
    assert "Without gt-encoder-depth the teacher is 8" in notes["layersync"]
    assert "Nothing is aligned without use-alignment-loss." in notes["sra-dts"]
    assert "Nothing is aligned without crepa_feature_source = backbone." in notes["simpletuner-crepa"]
    assert "nothing is aligned" in notes["takenoko"]
    assert "An external encoder teaches" in notes["repa"]
