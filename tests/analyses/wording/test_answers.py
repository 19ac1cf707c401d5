"""Single answers in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from layerprobe.analyses.selection.answers import (
    Answers,
    Cell,
    ControlGain,
    EncoderDepth,
    Pruning,
    RichestFeatures,
    Separable,
)
from layerprobe.analyses.wording.answers import answer_lines

BEST = Cell("blocks.2", 0.1, 0.9, 0.88, 0.92)
GAIN = ControlGain(BEST, "raw input", replace(BEST, layer="input", value=0.8), replace(BEST, value=0.1, low=0.05))
UNSURE = replace(GAIN, gain=replace(BEST, value=0.1, low=-0.05))
FEATURES = RichestFeatures("probe accuracy", BEST, (replace(BEST, layer="blocks.1"),), GAIN)
ENCODER = EncoderDepth(
    layer="blocks.1",
    depth=0.25,
    by="curve",
    published=(0.25, 0.38),
    share=0.81,
    metric="probe accuracy",
    quality=Cell("blocks.1", None, 0.5, 0.45, 0.55),
    richest=Cell("blocks.5", None, 0.6),
    similarity=(("CKA with dinov2", 0.3),),
    one_shape=False,
)
PRUNING = Pruning((), (), Cell("blocks.3", None, 0.04, 0.03, 0.05), 8)
SEPARABLE = Separable(replace(GAIN, control="random weights", cell=replace(BEST, noise_level=0.5)), 0.7, (0.1, 0.9))
ALL = Answers(True, FEATURES, GAIN, ENCODER, PRUNING, SEPARABLE)


def line(answers: Answers, question: str) -> tuple[str, str]:
    (found,) = [line for line in answer_lines(answers) if line.question == question]
    return found.short, found.sentence


def test_every_answer_has_its_numbers_and_intervals() -> None:
    assert [(found.short, found.sentence) for found in answer_lines(ALL)] == [
        (
            "blocks.2 at 0.1",
            "blocks.2 at noise level 0.1: probe accuracy 0.900 (0.880 to 0.920) on the test split, "
            "+0.100 (+0.050 to +0.920) above the raw input. "
            "The data cannot tell blocks.1 at 0.1 from it.",
        ),
        (
            "+0.10 blocks.2 at 0.1",
            "blocks.2 at noise level 0.1: +0.100 (+0.050 to +0.920) above the raw input, the better control there "
            "(probe accuracy 0.900 against 0.800 on the test split).",
        ),
        (
            "up to noise level 0.5",
            "Up to noise level 0.5 a layer is surely above both controls, with half of the largest gain over guessing. "
            "There blocks.2 has probe accuracy 0.900 (0.880 to 0.920) on the test split, +0.100 (+0.050 to +0.920) "
            "above the same network with random weights. At 0.7 none is.",
        ),
        (
            "blocks.1",
            "blocks.1, at 0.25 of the depth: published trainings with an outside encoder, as in REPA, gained most with "
            "layers at 0.25 to 0.38 (at 0.25 on average 0.81 of the best gain). Of these depths the layer knows least "
            "here: probe accuracy 0.500 (0.450 to 0.550), 0.100 below the richest, blocks.5. Its mean CKA with dinov2 "
            "is 0.300. The published networks have layers of one shape, this one has not.",
        ),
        (
            "none for sure",
            "No layer for sure. The least needed is blocks.3: when it is skipped, the loss rises by 0.0400 (0.0300 to "
            "0.0500).",
        ),
    ]


def test_what_is_not_certain_is_said() -> None:
    short, sentence = line(replace(ALL, training=UNSURE), "training added most")
    assert short == "not surely anywhere"
    assert sentence.startswith("Not surely anywhere. Most at blocks.2")
    no_better = replace(ALL, features=replace(FEATURES, over_control=UNSURE))
    assert "+0.100 (-0.050 to +0.920) above the raw input, which is not sure." in line(no_better, "richest features")[1]
    no_controls = replace(ALL, features=replace(FEATURES, over_control=None))
    assert "on the validation split" in line(no_controls, "richest features")[1]
    short, sentence = line(replace(ALL, separable=replace(SEPARABLE, best=UNSURE)), "classes separable")
    assert short == "not confirmed on test"
    assert "The test split does not confirm it." in sentence
    assert line(replace(ALL, separable=Separable(None, None, (0.1, 0.9))), "classes separable") == (
        "at no measured level",
        "At no measured noise level from 0.1 to 0.9 is a layer surely above both controls, with half of the largest "
        "gain over guessing.",
    )
    highest = replace(ALL, separable=replace(SEPARABLE, next_level=None))
    assert "highest measured level" in line(highest, "classes separable")[1]
    edge = replace(ALL, features=replace(FEATURES, level_end="lowest"))
    assert line(edge, "richest features")[1].endswith("This is the lowest measured level; a lower one may be richer.")


def test_what_was_not_measured_says_how_to_measure_it() -> None:
    nothing = answer_lines(Answers(has_labels=False))
    assert {found.short for found in nothing} == {"not measured"}
    assert "pass data with classes" in line(Answers(has_labels=False), "training added most")[1]
    assert "the run has no controls" in line(Answers(has_labels=True), "training added most")[1]
    assert answer_lines(Answers(has_labels=True, is_meaningless=True)) == ()


def test_a_label_free_stand_in_is_named() -> None:
    features = RichestFeatures("noise-LiDAR", Cell("blocks.2", 0.3, 12.34, 12.0, 12.6), (), None)
    assert line(replace(ALL, features=features), "richest features")[1] == (
        "Without labels, noise-LiDAR stands in for probe accuracy: 12.3 (12 to 12.6) for blocks.2 at noise level 0.3."
    )


def test_layers_that_could_be_pruned_are_listed() -> None:
    once = replace(ALL, pruning=replace(PRUNING, least_needed=Cell("blocks.3", None, -0.1, -0.2, -0.1)))
    assert line(once, "could be pruned")[1].endswith("on average, but surely rises at one noise level or more.")
    cells = [replace(BEST, layer=f"blocks.{i}", noise_level=None) for i in range(5)]
    short, sentence = line(
        replace(ALL, pruning=replace(PRUNING, spare=tuple(cells[:4]), undecided=(cells[4],))), "could be pruned"
    )
    assert short == "4 of 8 layers"
    assert sentence.startswith("blocks.0, blocks.1, blocks.2 and 1 more, each alone:")
    assert sentence.endswith("Of blocks.4 the data cannot say.")


@pytest.mark.parametrize("layer", ["down_blocks.1.attentions.0.transformer_blocks.0", "transformer_blocks.12"])
def test_short_answers_fit_a_tile_and_keep_the_end_of_a_long_name(layer: str) -> None:
    cell = replace(BEST, layer=layer)
    named = Answers(True, replace(FEATURES, best=cell), replace(GAIN, cell=cell), replace(ENCODER, layer=layer))
    lines = answer_lines(named)
    assert all(len(found.short) <= 25 for found in lines)
    assert lines[0].short.startswith("…") and f"{layer[-10:]} at 0.1" in lines[0].short
