"""What is printed cannot control the terminal, hide its order or fill the screen."""

from __future__ import annotations

from layerprobe.files import one_line
from layerprobe.messages import as_written, did_you_mean, safe, safe_lines, unknown


def test_only_what_does_not_print_is_escaped() -> None:
    assert safe("\x1b[31mred\u202e\u2066 \u200b\0\ud800") == r"\x1b[31mred\u202e\u2066 \u200b\x00\ud800"
    assert safe("line\nline\ttab\u2028") == r"line\nline\ttab\u2028"
    plain = "Łódź 猫 σ × é e\u0301 \u00a0blocks.7"  # letters, signs, combining marks and wide spaces are shown
    assert safe(plain) == plain
    assert safe_lines("a\x07\nb") == "a\\x07\nb"


def test_long_messages_keep_their_beginning_and_their_remedy() -> None:
    text = safe("x.npy has " + "9" * 5000 + "; copy it again", 100)
    assert len(text) == 100
    assert text.startswith("x.npy has 999")
    assert text.endswith("9; copy it again")
    assert safe("x" * 100, 100) == "x" * 100


def test_the_line_of_an_error_is_safe() -> None:
    assert one_line(ValueError("\x1b[2J" + "x" * 500 + "\nmore")).startswith(r"\x1b[2Jxxx")
    assert len(one_line(ValueError("x" * 500))) == 160


def test_a_similar_name_is_found_in_any_case() -> None:
    assert did_you_mean("CAK", ["Cka", "confirmation"]) == "; did you mean Cka?"
    assert did_you_mean("token-maps", ["cka"]) == ""


def test_an_unknown_name_is_told_with_those_that_are_known() -> None:
    assert unknown("path", "lnear", ["linear", "gvp", "vp"]) == (
        "unknown path 'lnear'; use linear, gvp or vp; did you mean linear?"
    )
    assert unknown("path", "xy", ["linear"]) == "unknown path 'xy'; use linear"
    assert (as_written("cka", ["CKA"]), as_written("other", ["CKA"])) == ("CKA", "other")
