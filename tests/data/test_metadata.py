from __future__ import annotations

from pathlib import Path

import pytest

from layerprobe.data.metadata import read_metadata


def test_cells_of_both_formats(tmp_path: Path) -> None:
    table, lines = tmp_path / "metadata.csv", tmp_path / "a" / "metadata.jsonl"
    lines.parent.mkdir()
    table.write_text("file_name,take,zip,note\na/0.png,10,007,\na/1.png,2,10,x\n")
    lines.write_text('{"file_name": "../a/1.png", "hue": 3}\n\n')
    files = [tmp_path / "a" / f"{i}.png" for i in range(3)]
    assert read_metadata([table, lines], files) == {
        files[0]: {"take": 10, "zip": "007", "note": ""},
        files[1]: {"take": 2, "zip": "10", "note": "x", "hue": 3},
    }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "file_name,label\n0.png,1,2\n", "has a row without file_name or with too many cells; fix it"),
        ("metadata.csv", "path,label\n0.png,1\n", "has a row without file_name"),
        ("metadata.csv", "file_name,label\n9.png,1\n", "names 9.png, which does not exist; fix or remove that row"),
        ("metadata.csv", f"file_name,label\n0.png,{'x' * 200000}\n", "is not a table of commas and quotes .*; fix it"),
        ("metadata.csv", 'file_name,label\n0.png,"1\n', "is not a table of commas and quotes"),
        ("metadata.csv", "file_name,label\n0.png,1\n0.png,2\n", "tells label of 0.png twice, with different values"),
        ("metadata.jsonl", '{"file_name": 3}\n', "has a row without file_name"),
        ("metadata.jsonl", "[" * 100000, "line 1 of .*metadata.jsonl is not a JSON object"),
        ("metadata.jsonl", '{"file_name": "0.png"}\n[1\n', "line 2 of .*metadata.jsonl is not a JSON object"),
    ],
)
def test_damage_is_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_metadata([tmp_path / name], [tmp_path / "0.png"])
