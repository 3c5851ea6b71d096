"""GQA on a made-up set of three pictures in the official layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tinyllava_edge.benchmarks.evaluation import record_of
from tinyllava_edge.benchmarks.tasks import gqa
from tinyllava_edge.errors import DataError


def row(
    question: str, answer: str, image: str, structural: str, semantic: str, balanced: bool = True
) -> dict[str, Any]:
    return {
        "semantic": [{"operation": "select", "argument": "x", "dependencies": []}],
        "entailed": [],
        "equivalent": [],
        "question": question,
        "imageId": image,
        "isBalanced": balanced,
        "groups": {"global": None, "local": "x"},
        "answer": answer,
        "semanticStr": "",
        "annotations": {},
        "types": {"detailed": "x", "semantic": semantic, "structural": structural},
        "fullAnswer": "",
    }


def rows() -> dict[str, dict[str, Any]]:
    return {
        "201": row("Is it overcast?", "no", "n161313", "verify", "global"),
        "202": row("What colour is it?", "light blue", "n161313", "query", "attr"),
        "203": row("Which side?", "left", "n235859", "choose", "rel"),
        "204": row("What is it?", "dog", "n5", "query", "cat"),
        "205": row("Not asked?", "dog", "n5", "query", "cat", balanced=False),
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / gqa.QUESTIONS).write_text(json.dumps(rows()))
    (tmp_path / "images").mkdir()
    for name in ("n161313", "n235859", "n5"):
        Image.new("RGB", (4, 3)).save(tmp_path / "images" / f"{name}.jpg")
    return tmp_path


def test_load_asks_balanced_questions_only(data: Path) -> None:
    questions = gqa.TASK.load(data)
    assert [question.id for question in questions] == ["201", "202", "203", "204"]
    first = questions[0]
    assert first.prompt == "Is it overcast?\nAnswer the question using a single word or phrase."
    assert first.pictures == (data / "images" / "n161313.jpg",)
    assert (first.image, first.gold, first.expected) == ("n161313.jpg", "no", "no")
    assert (first.kind, first.facts) == ("verify", {"semantic": "global"})
    assert gqa.TASK.question_line(first) == {"question_id": "201", "prompt": first.prompt}


def test_load_from_llavas_data_folder(data: Path) -> None:
    inner = data / "data"
    inner.mkdir()
    for name in (gqa.QUESTIONS, "images"):
        (data / name).rename(inner / name)
    assert len(gqa.TASK.load(data)) == 4


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("No", "no"),
        ("No.", "no"),
        ("no...", "no"),
        ("no. ", "no. "),
        (" no", " no"),
        ("no!", "no!"),
        ("A dog", "a dog"),
        ("two", "two"),
        (".", ""),
        ("", ""),
    ],
)
def test_parse(text: str, parsed: str) -> None:
    mark = gqa.TASK.mark(gqa.TASK.from_line({"answers": "no"}), text)
    assert (mark.parsed, mark.score) == (parsed, float(parsed == "no"))


@given(st.text())
def test_parse_only_takes_full_stops_and_case(text: str) -> None:
    parsed = gqa.TASK.mark(gqa.TASK.from_line({}), text).parsed
    assert not parsed.endswith(".")
    assert text.lower().startswith(parsed)
    assert set(text.lower()[len(parsed) :]) <= {"."}


def test_metrics_by_hand(data: Path) -> None:
    questions = gqa.TASK.load(data)
    texts = ["No.", "light blue", "Left", "a dog"]
    records = [record_of(gqa.TASK, question, text) for question, text in zip(questions, texts, strict=True)]
    assert gqa.TASK.metrics(records) == {
        "accuracy": 75.0,
        "binary": 100.0,
        "open": 50.0,
        "structural/verify": 100.0,
        "structural/query": 50.0,
        "structural/choose": 100.0,
        "semantic/global": 100.0,
        "semantic/attr": 100.0,
        "semantic/rel": 100.0,
        "semantic/cat": 0.0,
    }
    third = [replace(records[0], score=score) for score in (1.0, 0.0, 0.0)]
    assert gqa.TASK.metrics(third)["accuracy"] == 33.33
    assert gqa.TASK.metrics(third)["open"] == 0.0
    assert gqa.TASK.metrics([replace(records[0], score=None)]) == {}


def test_submission(data: Path) -> None:
    records = [record_of(gqa.TASK, question, "No.") for question in gqa.TASK.load(data)]
    assert gqa.TASK.submission is not None
    path = gqa.TASK.submission(records[:2], data / "testdev_balanced_predictions")
    assert path.name == "testdev_balanced_predictions.json"
    wanted = [{"questionId": "201", "prediction": "no"}, {"questionId": "202", "prediction": "no"}]
    assert json.loads(path.read_text()) == wanted


def test_explain_lines() -> None:
    mark = gqa.TASK.mark(gqa.TASK.from_line({"answers": ["dog"]}), "Dog.")
    assert mark.score == 1
    assert mark.steps == (("without final full stops", "Dog"), ("compared as", "dog"), ("with", "dog"))
    assert gqa.TASK.mark(gqa.TASK.from_line({}), "Dog.").score is None
    for wrong in (["a", "b"], [], 5, [1]):
        with pytest.raises(DataError, match="`answers`"):
            gqa.TASK.from_line({"answers": wrong})


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found["201"].pop("answer"), "question '201': lacks `answer`"),
        (lambda found: found["201"].update(answer=1), "`answer` is a int"),
        (lambda found: found["201"].update(isBalanced=1), "`isBalanced` is a int"),
        (lambda found: found["201"].update(types={}), "lacks `structural`"),
        (lambda found: found["201"].update(types=[]), "`types` is a list"),
        (lambda found: found.update({"201": 5}), "lacks `isBalanced`"),
        (lambda found: found["201"].update(imageId="../secret"), "not a plain path"),
        (lambda found: found["201"].update(imageId="n7"), "n7.jpg"),
        (lambda found: [entry.update(isBalanced=False) for entry in found.values()], "holds no questions"),
    ],
)
def test_damaged_files(data: Path, change: Change, message: str) -> None:
    found = rows()
    change(found)
    (data / gqa.QUESTIONS).write_text(json.dumps(found))
    with pytest.raises(DataError) as caught:
        gqa.TASK.load(data)
    assert message in caught.value.message
    assert gqa.QUESTIONS in caught.value.message


def test_an_id_that_occurs_twice(data: Path) -> None:
    one = json.dumps(rows()["201"])
    (data / gqa.QUESTIONS).write_text(f'{{"201": {one}, "201": {one}}}')
    with pytest.raises(DataError, match="key '201' occurs twice"):
        gqa.TASK.load(data)


@pytest.mark.parametrize("text", ["", "[]", "{", "3", "{}", "[" * 10**5])
def test_unreadable(data: Path, text: str) -> None:
    (data / gqa.QUESTIONS).write_text(text)
    with pytest.raises(DataError, match=gqa.QUESTIONS):
        gqa.TASK.load(data)
