"""A record is read whole and of the right types, or refused in one line; a folder belongs to one run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from layerprobe.checksums import Damaged
from layerprobe.files import write_text
from layerprobe.records import check_same, claim, differences, parse, read_record, typed, write_record

RECORD = {"plan": {"steps": 3, "levels": (0.1, 0.5)}, "data": "abc"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_result_is_replaced_by_the_same_one_only(tmp_path: Path) -> None:
    path = tmp_path / "samples.json"
    check_same(path, RECORD, what="samples")
    write_text(path, json.dumps(RECORD | {"scores": [1, 2]}))
    check_same(path, RECORD, what="samples")
    other = RECORD | {"plan": {"steps": 4, "levels": (0.1, 0.5)}}
    with pytest.raises(ValueError, match=r"holds samples of another command \(different: plan.steps\); choose another"):
        check_same(path, other, what="samples")


def test_a_folder_is_claimed_once_and_again_by_the_same_run(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    claim(folder, "plan.json", RECORD, what="features")
    before = contents(folder)
    assert json.loads(before["plan.json"]) == {"plan": {"steps": 3, "levels": [0.1, 0.5]}, "data": "abc"}
    (folder / "shard").write_text("work")
    stamp = (folder / "plan.json").stat().st_mtime_ns
    claim(folder, "plan.json", RECORD, what="features")
    assert (folder / "plan.json").stat().st_mtime_ns == stamp
    assert contents(folder) == before | {"shard": b"work"}


def test_another_run_is_refused_with_the_differences(tmp_path: Path) -> None:
    claim(tmp_path / "run", "plan.json", RECORD, what="features")
    before = contents(tmp_path)
    other = {"plan": {"steps": 4, "levels": (0.1, 0.5), "seed": 1}, "data": "abd"}
    with pytest.raises(ValueError, match=r"holds features of another run \(different: data, plan.seed, plan.steps\)"):
        claim(tmp_path / "run", "plan.json", other, what="features")
    assert contents(tmp_path) == before


def test_at_most_four_differences_are_named(tmp_path: Path) -> None:
    claim(tmp_path, "plan.json", dict.fromkeys("abcdef", 1), what="features")
    with pytest.raises(ValueError, match=r"\(different: a, b, c, d\); choose another --out$"):
        claim(tmp_path, "plan.json", dict.fromkeys("abcdef", 2), what="features")


@pytest.mark.parametrize("name", ["thesis.tex", ".hidden", "sub/file"])
def test_a_folder_with_other_files_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(
        ValueError, match=rf"is not empty and contains other files \({name.split('/')[0]}\); choose another"
    ):
        claim(tmp_path, "plan.json", RECORD, what="features")
    assert contents(tmp_path) == before


def test_the_remains_of_an_interrupted_claim_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "plan.json.partial").write_text("{")
    claim(tmp_path, "plan.json", RECORD, what="features")
    assert json.loads((tmp_path / "plan.json").read_text())["data"] == "abc"


def test_two_processes_may_claim_a_folder_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = Path.iterdir

    def slowly(folder: Path) -> list[Path]:
        entries = list(listed(folder))
        write_text(folder / "plan.json", json.dumps(RECORD))
        return entries

    monkeypatch.setattr(Path, "iterdir", slowly)
    claim(tmp_path, "plan.json", RECORD, what="features")
    with pytest.raises(ValueError, match="of another run"):
        claim(tmp_path, "plan.json", {"data": "other"}, what="features")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match="run is a file, not a folder; choose another --out"):
        claim(tmp_path / "run", "plan.json", RECORD, what="features")
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "message"), [("{", "plan.json is damaged"), ("[1]", r"it is \[1\], not an object")]
)
def test_an_invalid_record_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValueError, match=message) as refused:
        claim(tmp_path, "plan.json", RECORD, what="features")
    assert "\n" not in str(refused.value)
    assert (tmp_path / "plan.json").read_text() == content


def test_differences_are_dotted_keys() -> None:
    before = {"a": {"b": [1, 2], "c": 1}, "d": None}
    assert differences(before, {"a": {"b": [1, 2], "c": 1}, "d": None}) == []
    assert differences(before, {"a": {"b": [2, 1], "c": 1}, "e": 0}) == ["a.b", "e"]
    assert differences(before, {"a": 5}) == ["a"]


@dataclass(frozen=True)
class Part:
    name: str
    size: float = 1.0


class Shape(TypedDict):
    parts: tuple[Part, ...]
    by_step: dict[int, float]
    kind: Literal["a", "b"]
    limit: NotRequired[int | None]


GOOD: dict[str, Any] = {"parts": [{"name": "x", "size": 2}], "by_step": {"5": 0.5}, "kind": "a"}


def test_values_come_back_as_their_types() -> None:
    assert parse(Shape, GOOD) == {"parts": (Part("x", 2),), "by_step": {5: 0.5}, "kind": "a"}
    assert parse(Shape, GOOD | {"limit": None})["limit"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "c"}, 'kind is "c", not one of a, b'),
        ({"parts": [{"size": 2}]}, "no key 'name' in parts"),
        ({"parts": [{"name": "x", "color": 1}]}, "unknown key 'color' in parts"),
        ({"parts": {}}, "parts is {}, not a list"),
        ({"by_step": {"x": 1}}, 'by_step is "x", not a number as key'),
        ({"by_step": {"1": True}}, "by_step.1 is true, not a number"),
        ({"limit": 1.5}, "limit is 1.5, not a whole number"),
        ({"limit": 10**30}, "limit is 1000.*, not a whole number"),
        ({"new": 1}, "unknown key 'new'"),
    ],
)
def test_a_record_of_other_values_is_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "record.json"
    write_record(path, GOOD | change)
    with pytest.raises(Damaged, match=rf"record.json is damaged \({message}.*\); make it again$") as refused:
        read_record(path, typed(Shape), remedy="make it again")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"\xff\xfe", "it is no text"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nested more than 100 deep"),
    ],
)
def test_a_file_that_is_no_record_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(Damaged, match=rf"record.json is damaged \(.*{message}.*\); make it again$"):
        read_record(tmp_path / "record.json", typed(dict), remedy="make it again")


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "record.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(Damaged, match=r"MB are too much"):
        read_record(tmp_path / "record.json", typed(dict), remedy="make it again")


def test_a_record_of_a_newer_version_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for newer in ({"layerprobe": "99.0"}, {}):
        path.write_text(json.dumps(GOOD | {"new": 1} | newer))
        if not newer:
            (tmp_path / "environment.json").write_text(json.dumps({"layerprobe": "99.0"}))
        with pytest.raises(Damaged, match=r"is of layerprobe 99.0, and this is .*; update layerprobe to read it$"):
            read_record(path, typed(Shape), remedy="make it again")


def test_a_damaged_claim_is_made_again_by_the_same_run_only(tmp_path: Path) -> None:
    claim(tmp_path, "plan.json", RECORD, what="features")
    before = contents(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(Damaged, match=r"plan.json is damaged"):
        claim(tmp_path, "plan.json", {"data": "other"}, what="features")
    claim(tmp_path, "plan.json", RECORD, what="features")
    assert contents(tmp_path) == before
