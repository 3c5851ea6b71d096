"""Answer files in LLaVA's format, there and back; everything that would misalign is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinyllava_edge.benchmarks.answer_files import read_answers, write_answers
from tinyllava_edge.benchmarks.evaluation import record_of
from tinyllava_edge.benchmarks.tasks.base import Question
from tinyllava_edge.benchmarks.tasks.llava_json import EXACT
from tinyllava_edge.errors import DataError

QUESTIONS = [Question(str(k), f"number {k}?", image=f"{k}.png", expected=str(k)) for k in range(3)]
HOSTILE = ["", "\n", "Yes. No", "é\u2028x", '{"a": 1}', "a\tb", "\x00", "🙂", "[1]"]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def line(name: Any, text: Any = "1", **more: Any) -> dict[str, Any]:
    return {"question_id": name, "prompt": "?", "text": text, **more}


def test_there_and_back(tmp_path: Path) -> None:
    questions = [replace(QUESTIONS[0], id=str(k)) for k in range(len(HOSTILE))]
    records = [record_of(EXACT, q, text) for q, text in zip(questions, HOSTILE, strict=True)]
    write_answers(tmp_path / "a.jsonl", EXACT, records, "m")
    assert read_answers(tmp_path / "a.jsonl", EXACT, questions) == records
    first = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])
    assert set(first) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}


def test_the_files_order_does_not_matter_and_numbers_are_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [line(2, "2"), line(0, "0"), line("1", "x")])
    assert [record.correct for record in read_answers(path, EXACT, QUESTIONS)] == [True, False, True]


@pytest.mark.parametrize(
    "value",
    [
        [{"question_id": k, "answer": str(k)} for k in range(3)],
        [{"questionId": str(k), "prediction": str(k)} for k in range(3)],
        {str(k): str(k) for k in range(3)},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_official_results_formats(value: Any, indent: int | None, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(value, indent=indent))
    assert all(record.correct for record in read_answers(tmp_path / "a.json", EXACT, QUESTIONS))


def test_a_map_on_one_long_line(tmp_path: Path) -> None:
    """MM-Vet's results in compact JSON take more than a look ahead of some kilobytes."""
    questions = [replace(QUESTIONS[0], id=f"v1_{k}") for k in range(218)]
    (tmp_path / "a.json").write_text(json.dumps({question.id: "0" * 100 for question in questions}))
    assert len(read_answers(tmp_path / "a.json", EXACT, questions)) == 218


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([line(0), line(1)], "1 of 3 questions have no answer, e.g. 2"),
        ([line(0), line(1), line(1), line(2)], "a.jsonl:3: a second answer to '1'"),
        ([line(0), line(1), line(9)], "a.jsonl:3: answers '9', which is no question"),
        ([line(0), {"text": "x"}, line(2)], "a.jsonl:2: lacks 'question_id'"),
        ([line(0), line(1, None), line(2)], "a.jsonl:2: `text` is no string"),
        ([line(0), line(1, 5), line(2)], "`text` is no string"),
        ([line(0), ["x"]], "a.jsonl:2: not a JSON object"),
        ([], "is empty"),
        (["text"], "not a JSON object"),
    ],
)
def test_what_would_misalign_is_refused(lines: list[Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        read_answers(write(tmp_path / "a.jsonl", lines), EXACT, QUESTIONS)


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read"):
        read_answers(tmp_path / "none.jsonl", EXACT, QUESTIONS)
    path = write(tmp_path / "a.jsonl", [line(0), line(1), line(2)])
    path.write_text(path.read_text()[:-9])
    with pytest.raises(DataError, match="a.jsonl:3: not a JSON line"):
        read_answers(path, EXACT, QUESTIONS)
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(DataError, match="not readable JSON"):
        read_answers(path, EXACT, QUESTIONS)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="a.jsonl"):
        read_answers(path, EXACT, QUESTIONS)
    path.write_text('["x"]')
    with pytest.raises(DataError, match="entry 0: not an object"):
        read_answers(path, EXACT, QUESTIONS)


def test_a_question_that_the_set_asks_twice_takes_its_lines_in_order(tmp_path: Path) -> None:
    """As TextVQA may, where lines are joined by picture and words."""
    task = replace(EXACT, line_key=lambda line: str(line["prompt"]), question_line=lambda q: {"prompt": "?"})
    twins = [QUESTIONS[0], QUESTIONS[1]]
    path = write(tmp_path / "a.jsonl", [line(0, "0"), line(0, "1")])
    assert [record.correct for record in read_answers(path, task, twins)] == [True, True]
    with pytest.raises(DataError, match="1 of 2 questions have no answer"):
        read_answers(write(path, [line(0)]), task, twins)
    with pytest.raises(DataError, match="a second answer"):
        read_answers(write(path, [line(0), line(0), line(0)]), task, twins)
