"""Samples and copies in words."""

from __future__ import annotations

from layerprobe.analyses.wording.samples import copy_sentences, samples_sentence


def test_a_record_without_counts_has_no_sentence() -> None:
    assert samples_sentence({}) == ""


def record(split: str, of: str, num: int, total: int, *, is_left_out: bool) -> dict[str, object]:
    return {"split": split, "of": of, "num": num, "total": total, "is_left_out": is_left_out}


def test_each_split_has_a_sentence_with_its_numbers() -> None:
    assert copy_sentences([]) == []
    assert copy_sentences(
        [
            record("train", "train", 5, 60, is_left_out=False),
            record("test", "train", 10, 40, is_left_out=True),
            record("test", "test", 2, 40, is_left_out=True),
        ]
    ) == [
        "5 of 60 train samples are copies, equal value for value to others (5 of train samples); they stay in.",
        "12 of 40 test samples are copies, equal value for value to others (10 of train, 2 of test samples); they are "
        "left out, and 28 are left.",
    ]


def test_copies_of_another_class_are_told() -> None:
    (sentence,) = copy_sentences(
        [
            record("test", "train", 10, 40, is_left_out=True) | {"num_contradictions": 3},
            record("test", "test", 2, 40, is_left_out=True) | {"num_contradictions": 1},
        ]
    )
    assert sentence.endswith(" 28 are left. 4 of them have another class than the sample that they equal.")
