"""`layerprobe check` as a shell would use it: the pair, the findings, the exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerprobe.cli.parsing import blocks


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.sh"
    path.write_text("python train.py --encoder-depth 8 --gt-encoder-depth 20 --reg-weight 0.2\n", encoding="utf-8")
    return path


def test_a_good_pair_is_named_with_the_nearest_published_ones(script: Path, cli) -> None:
    code, out, err = cli("check", script, "--blocks", 28)
    assert (code, err) == (0, "")
    assert "pair      blocks.7 <- blocks.19 of 28 blocks" in out
    assert "nothing speaks against it" in out
    assert out.count("\npublished ") == 3
    assert "Self-Flow, SiT-XL/2: 8 <- 20 (0.29, 0.71)" in out


def test_cautions_leave_the_exit_code_at_0_and_errors_make_it_1(script: Path, cli) -> None:
    code, out, _ = cli("check", script, "--blocks", 20)
    assert (code, "LP004 caution: the teacher is at 1.00" in out) == (0, True)
    code, out, _ = cli("check", script, "--blocks", 12, "--json")
    record = json.loads(out)
    assert (code, record["failed"], record["published"]) == (1, True, [])
    assert [finding["code"] for finding in record["findings"]] == ["LP009", "LP002"]
    assert record["findings"][0]["text"] == "the teacher would be block 19, and the last one is blocks.11."


def test_without_the_number_of_blocks_the_layers_are_named_all_the_same(script: Path, cli) -> None:
    code, out, _ = cli("check", script)
    assert (code, "blocks.7 <- blocks.19\n" in out, "Pass --blocks" in out) == (0, True, True)


def test_two_lists_of_blocks_are_counted_through(tmp_path: Path, cli) -> None:
    config = tmp_path / "config.toml"
    config.write_text("self_flow = true\nstudent_feature_layer = 7\nteacher_feature_layer = 17\n", encoding="utf-8")
    code, out, _ = cli("check", config, "--blocks", "double_blocks:5,single_blocks:20")
    assert (code, "single_blocks.2 <- single_blocks.12 of 25 blocks" in out) == (0, True)


def test_bad_input_is_one_line_and_exit_code_2(script: Path, tmp_path: Path, cli) -> None:
    for arguments, part in (
        ((tmp_path / "none.json",), "there is no configuration"),
        ((script, "--for", "flux"), "train.sh: unknown trainer 'flux'; use simpletuner"),
        ((script, "--for", "sra"), "train.sh: this has no option of SRA"),
        ((script, "--blocks", "many"), "--blocks many is not a number of blocks; write 28, or"),
    ):
        code, out, err = cli("check", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert part in err


def test_blocks_are_a_number_or_named_lists() -> None:
    assert blocks("2") == ("blocks.0", "blocks.1")
    assert blocks("double:2, single:1") == ("double.0", "double.1", "single.0")
    for text in ("0", "2,3", "a:b", "double:2,3", ""):
        with pytest.raises(ValueError, match="is not a number of blocks"):
            blocks(text)
