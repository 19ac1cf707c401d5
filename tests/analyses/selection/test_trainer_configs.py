"""Configurations are read as their trainers read them: formats, defaults, and what is refused."""

from __future__ import annotations

import pytest

from layerprobe.analyses.selection import TRAINERS, ReadPair, check_pair, read_pair, read_settings, recognized

SCRIPT = r"""
# torchrun train.py --encoder-depth 3
torchrun --nproc_per_node=$N train.py --model "SiT-XL/2" \
    --loss-type "layer_sync" --reg-weight=0.5 \
    --encoder-depth 8 --gt-encoder-depth 16   # as in the paper
"""


def read(key: str, text: str, num_blocks: int | None = 28) -> ReadPair:
    return read_pair(TRAINERS[key], read_settings(text), num_blocks)


def pair_of(key: str, text: str) -> tuple[int, int | None]:
    facts = read(key, text).facts
    return facts.student, facts.teacher


def found(key: str, text: str) -> list[str]:
    return [finding.code for finding in check_pair(read(key, text).facts)]


def test_a_script_is_read_with_its_comments_and_continued_lines() -> None:
    settings = read_settings(SCRIPT)
    assert recognized(settings).key == "layersync"
    facts = read_pair(TRAINERS["layersync"], settings).facts
    assert (facts.student, facts.teacher, facts.weight) == (7, 15, 0.5)


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".json", '{"--layersync_enabled": "true", "layersync_student_block": "8", "layersync_teacher_block": 20}'),
        (".toml", "[loss]\nlayersync_enabled = true\nlayersync_student_block = 8\nlayersync_teacher_block = 20"),
        (".yaml", "layersync_enabled: true\nlayersync_student_block: 8\nlayersync_teacher_block: 20"),
        ("", "--layersync_enabled --layersync_student_block=8 --layersync_teacher_block 20"),
    ],
)
def test_formats_give_the_same_options(suffix: str, text: str) -> None:
    settings = read_settings(text, suffix)
    assert settings == {"layersync_enabled": True, "layersync_student_block": 8, "layersync_teacher_block": 20}


def test_a_list_of_words_is_read_as_after_an_option() -> None:
    text = 'self_flow = true\nself_flow_args = ["student_block_idx=10", "teacher_block_idx=30"]'
    facts = read_pair(TRAINERS["musubi-ltx2"], read_settings(text, ".toml")).facts
    assert (facts.student, facts.teacher) == (10, 30)
    other = "--crepa_args student_block_idx=1 --self_flow --self_flow_args student_block_idx=10 teacher_block_idx=30"
    assert pair_of("musubi-ltx2", other) == (10, 30)


@pytest.mark.parametrize(
    ("key", "text", "pair", "codes"),
    [
        ("simpletuner", '{"layersync_enabled": true, "layersync_student_block": 8}', (7, 7), ["LP001"]),
        ("simpletuner", '{"layersync_student_block": 8, "layersync_teacher_block": 20}', (7, 19), ["LP012"]),
        (
            "simpletuner",
            "--layersync_enabled --layersync_student_block 0 --layersync_teacher_block 1",
            (0, 0),
            ["LP001", "LP004", "LP013"],
        ),
        (
            "simpletuner-crepa",
            "--crepa_enabled --crepa_feature_source backbone --crepa_block_index 8",
            (8, 8),
            ["LP001"],
        ),
        (
            "simpletuner-crepa",
            "--crepa_enabled --crepa_block_index 8 --crepa_teacher_block_index 19",
            (8, 19),
            ["LP012"],
        ),
        ("takenoko", "--enable_layer_sync", (7, 7), ["LP001"]),
        ("takenoko", "--layersync_enabled --layersync_teacher_block 20", (7, 19), []),
        ("takenoko", "--enable_layer_sync --layer_sync_target_block 40", (7, 39), ["LP009"]),
        (
            "takenoko",
            "--enable_layer_sync --layer_sync_target_block 20 --layer_sync_detach_guidance=false",
            (7, 19),
            ["LP011"],
        ),
        ("layersync", "--reg-weight 0.2", (7, 7), ["LP001"]),
        ("layersync", "--encoder-depth 12", (11, 7), ["LP008"]),
        ("layersync", "--encoder-depth 0 --gt-encoder-depth 20", (-1, 19), ["LP009"]),
        ("layersync", "--loss-type vanilla --gt-encoder-depth 20", (7, 19), ["LP012"]),
        ("sra", "--block-out-s 8", (7, 7), ["LP001"]),
        ("sra-dts", "--block-out-s 8 --block-out-t 20", (7, 19), ["LP012"]),
        ("sra-dts", "--block-out-s 8 --block-out-t 20 --no-use-alignment-loss", (7, 19), ["LP012"]),
        ("self-flow", "--no-self-flow --student-layer 8 --teacher-layer 20", (7, 19), ["LP012"]),
        ("musubi-ltx2", "--self_flow --self_flow_args lambda_self_flow=0.8", (16, 32), ["LP009", "LP002"]),
        ("repa", "--encoder-depth 8 --enc-type dinov2-vit-b", (7, None), []),
    ],
)
def test_defaults_and_traps(key: str, text: str, pair: tuple[int, int | None], codes: list[str]) -> None:
    assert pair_of(key, text) == pair
    assert found(key, text) == codes


def test_a_weight_of_zero_is_what_the_trainer_makes_of_it() -> None:
    text = "--layersync_enabled --layersync_student_block 8 --layersync_teacher_block 20 --layersync_lambda 0"
    assert read("simpletuner", text).facts.weight == 0.2
    assert found("simpletuner", text) == ["LP013"]
    assert found("layersync", "--gt-encoder-depth 20 --reg-weight 0") == ["LP010"]


def test_options_that_are_left_out_are_told() -> None:
    assert read("layersync", "--gt-encoder-depth 20").left_out == ("encoder-depth", "reg-weight")
    assert read("layersync", SCRIPT).left_out == ()


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("simpletuner", '{"layersync_enabled": true}', "layersync_student_block is missing, and SimpleTuner"),
        ("musubi", "--self_flow --student_feature_layer 7", "teacher_feature_layer is missing"),
        (
            "simpletuner",
            "--layersync_techer_block 8",
            "layersync_techer_block is not an option .* layersync_teacher_block",
        ),
        ("sra", "--block-out-s eight", "block-out-s is 'eight', which is not a number"),
        ("sra", "--block-out-s nan", "block-out-s is nan, which is not a number"),
        ("sra", "--block-out-s 7.5", "block-out-s is 7.5; write a whole number"),
        ("sra", "--model SiT-B/2", "no option of SRA.* reads block-out-s, block-out-t"),
        (
            "musubi-ltx2",
            "--self_flow_args student_block_ratio=0.3",
            "student_block_ratio decides what is aligned, and is not read here; write student_block_idx",
        ),
        ("takenoko", '{"layer_sync_pairs": [[4, 8]]}', "layer_sync_pairs decides what is aligned"),
    ],
)
def test_what_is_not_read_is_refused(key: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(key, text)


def test_options_of_other_methods_are_no_slips() -> None:
    text = "--crepa_enabled --crepa_feature_source backbone --crepa_block_index 7 --crepa_teacher_block_index 19"
    assert found("simpletuner-crepa", f"{text} --irepa_enabled --crepa_lambda_end 0") == []


def test_options_of_no_trainer_or_of_several_need_a_name() -> None:
    with pytest.raises(ValueError, match=r"of no trainer that is known by them; .* --for one of simpletuner, "):
        recognized(read_settings("--encoder-depth 8"))
    with pytest.raises(ValueError, match=r"of layersync and repa; .* --for one of layersync, repa"):
        recognized(read_settings("--encoder-depth 8 --reg-weight 0.2 --proj-coeff 0.5"))


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [
        (".json", "{", "cannot be read as json"),
        (".toml", "a = ", "cannot be read as toml"),
        (".yaml", "a: [", "cannot be read as yaml"),
        ("", '--a "b', "cannot be read as options .No closing quotation"),
        (".json", "[1]", "has no names and values, but is a list"),
    ],
)
def test_unreadable_texts_are_refused(suffix: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings(text, suffix)
