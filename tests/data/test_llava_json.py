"""LLaVA JSON: good rows come through whole, each kind of bad row is named, and files that are cut off are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tinyllava_edge.data.llava_json import read, write_bad_rows
from tinyllava_edge.errors import DataError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "a").mkdir(parents=True)
    for name in ("a/1.png", "2.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    return folder


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[k % 2], "value": value} for k, value in enumerate(values)]


def good(**changes: Any) -> dict[str, Any]:
    return {"id": "g", "image": "a/1.png", "conversations": talk("<image>\nWhat?", "A cat."), **changes}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_a_list_and_json_lines_give_the_same_rows(tmp_path: Path, images: Path) -> None:
    rows = [
        good(id=7, tier="colour", question_type="open"),
        {"id": "t", "conversations": talk("Hi", "Hello", "Bye", "Tschüss")},
    ]
    listed = read(write(tmp_path / "d.json", rows), images)
    lines = tmp_path / "d.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    lined = read(lines, images)
    assert [(r.id, r.image, r.turns, r.tier, r.question_type, r.number) for r in listed.rows] == [
        (r.id, r.image, r.turns, r.tier, r.question_type, r.number) for r in lined.rows
    ]
    first, second = listed.rows
    assert (first.id, first.image, first.tier, first.question_type) == ("7", "a/1.png", "colour", "open")
    assert (first.turns[0].question, first.turns[0].answer) == ("<image>\nWhat?", "A cat.")
    assert second.image is None and [turn.answer for turn in second.turns] == ["Hello", "Tschüss"]
    assert len(read([tmp_path / "d.json", lines], images).rows) == 4


BAD: dict[str, tuple[Any, str]] = {
    "a list": ([], "not an object"),
    "no id": ({"conversations": talk("a", "b")}, "`id`"),
    "true as id": (good(id=True), "`id`"),
    "number as image": (good(image=3), "not text"),
    "absolute": (good(image="/etc/passwd"), "leaves the image directory"),
    "drive": (good(image="C:/x.png"), "leaves the image directory"),
    "parent": (good(image="../outside.png"), "leaves the image directory"),
    "hidden parent": (good(image="a/../../outside.png"), "leaves the image directory"),
    "backslash": (good(image="a\\1.png"), "forward slashes"),
    "nul": (good(image="a\0.png"), "forward slashes"),
    "missing picture": (good(image="a/9.png"), "is not in"),
    "long name": (good(image="x" * 5000), "is not in"),
    "a directory": (good(image="a"), "is not in"),
    "no talk": (good(conversations=[]), "`conversations`"),
    "odd": (good(conversations=talk("<image>\nWhat?")), "needs an answer"),
    "starts with gpt": (good(conversations=talk("<image>\na", "b")[::-1]), "expected 'human'"),
    "human twice": (good(conversations=[{"from": "human", "value": "<image>"}] * 2), "expected 'gpt'"),
    "other speaker": (good(conversations=[{"from": "system", "value": "x"}] * 2), "expected 'human'"),
    "number as value": (good(conversations=[{"from": "human", "value": 1}, {"from": "gpt", "value": "b"}]), "no text"),
    "blank": (good(conversations=talk("<image>\nWhat?", " \n")), "message 2 is empty"),
    "no marker": (good(conversations=talk("What?", "b")), "0 <image> marker(s) for 1"),
    "two markers": (good(conversations=talk("<image><image>", "b")), "2 <image> marker(s) for 1"),
    "marker without picture": ({"id": 1, "conversations": talk("<image>", "b")}, "1 <image> marker(s) for 0"),
    "marker in answer": (good(conversations=talk("<image>\na", "<image>")), "an answer that holds"),
    "half a surrogate": (good(conversations=talk("<image>\n\ud800", "b")), "surrogate"),
    "tier": (good(tier=1), "`tier`"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_refused_by_name_and_reason(case: str, tmp_path: Path, images: Path) -> None:
    row, reason = BAD[case]
    path = write(tmp_path / "d.json", [good(), row, good()])
    with pytest.raises(DataError) as error:
        read(path, images)
    assert f"{path}: row 2" in error.value.message and reason in error.value.message
    found = read(path, images, max_bad=1)
    assert len(found.rows) == 2 and [bad.row for bad in found.bad] == [2] and reason in found.bad[0].reason


def test_bad_rows_are_counted_and_written(tmp_path: Path, images: Path) -> None:
    path = write(tmp_path / "d.json", [good(), good(id="x", image="no.png"), 5])
    with pytest.raises(DataError, match=r"row 2 \(id 'x'\).*2 bad rows, 1 allowed"):
        read(path, images, max_bad=1)
    found = read(path, images, max_bad=2)
    write_bad_rows(tmp_path / "bad_rows.jsonl", found.bad)
    lines = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert [(line["file"], line["row"], line["id"]) for line in lines] == [(str(path), 2, "x"), (str(path), 3, "")]


@pytest.mark.parametrize(
    "text",
    ["", "  \n", '[{"id": 1, "conv', '{"id": 1}\n{"id": 2, "co', "nonsense", "[" * 100_000, "[]"],
    ids=["empty", "blank", "cut list", "cut line", "words", "deep", "no rows"],
)
def test_a_damaged_file_is_refused(text: str, tmp_path: Path, images: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(DataError, match="d.json"):
        read(path, images, max_bad=9)


def test_a_missing_file_and_one_that_is_not_utf8_are_refused(tmp_path: Path, images: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "none.json", images)
    (tmp_path / "d.json").write_bytes(b'[{"id": "\xff"}]')
    with pytest.raises(DataError, match="UTF-8"):
        read(tmp_path / "d.json", images)


def test_links_below_the_image_directory_are_followed(tmp_path: Path, images: Path) -> None:
    (images / "linked").symlink_to(images / "a")
    assert read(write(tmp_path / "d.json", [good(image="linked/1.png")]), images).rows[0].image == "linked/1.png"
