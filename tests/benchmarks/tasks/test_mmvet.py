"""MM-Vet: the judge's prompt letter for letter, what its replies mean, the official means, and hostile files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tinyllava_edge.benchmarks.results import AnswerRecord
from tinyllava_edge.benchmarks.tasks.base import Question
from tinyllava_edge.benchmarks.tasks.mmvet import TASK, load, mark_replies, metrics, read, request
from tinyllava_edge.errors import DataError

ROWS: dict[str, dict[str, Any]] = {
    "v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5", "capability": ["math", "ocr"]},
    "v1_1": {"imagename": "v1_1.jpg", "question": "Who?", "answer": "Ann<OR>Anne", "capability": ["rec"]},
    "v1_2": {"imagename": "v1_1.jpg", "question": "Where?", "answer": "home", "capability": ["rec", "know", "spat"]},
}
TABLE_SHA256 = "d1b3e0a5b4e72c888b77164489d705bba4dd149934fff564dfba6443d81afe3f"  # of `prompt` in mm-vet_evaluator.py
AGAIN = "\nPredict the correctness of the answer (digit): "


def write(root: Path, rows: Any = None) -> Path:
    """The official layout with two small pictures."""
    (root / "images").mkdir(parents=True)
    Image.new("RGB", (8, 6), "red").save(root / "images" / "v1_0.png")
    Image.new("RGB", (8, 6), "blue").save(root / "images" / "v1_1.jpg")
    whole = {id_: {**row, "imagesource": "x"} for id_, row in ROWS.items()} if rows is None else rows
    text = whole if isinstance(whole, str) else json.dumps(whole)
    (root / "mm-vet.json").write_text(text, encoding="utf-8")
    return root


def record(question: Question, *replies: str) -> AnswerRecord:
    facts = {**question.facts, "replies": list(replies), "judge": "j"}
    return AnswerRecord(question.id, question.image, question.prompt, question.expected, "x", task="mmvet", facts=facts)


@pytest.mark.parametrize("below", ["", "mm-vet"])
def test_load(tmp_path: Path, below: str) -> None:
    write(tmp_path / below)
    first, second, third = load(tmp_path)
    assert (first.id, first.prompt, first.expected, first.image) == ("v1_0", "What is x?", "-1<AND>-5", "v1_0.png")
    assert first.pictures == (tmp_path / below / "images" / "v1_0.png",)
    assert first.facts == {"capability": ["ocr", "math"]} and first.kind == "ocr_math"  # one order for each set
    assert second.kind == "rec" and third.kind == "rec_know_spat"


def test_the_table_is_the_official_one() -> None:
    table = request(Question("v1_0", "q", gold="a"), "p", 0).prompt.removesuffix("\nq | a | p | ")
    assert hashlib.sha256(table.encode()).hexdigest() == TABLE_SHA256
    assert table.startswith("Compare the ground truth and prediction from AI models,") and table.endswith(" | 1.0\n")
    assert table.count("\n") == 11 and table.count("What is x in the equation? | -1 <AND> -5 | ") == 5


def test_request() -> None:
    question = Question("v1_0", "What is x?", gold="-1<AND>-5<OR>3")
    tries = [request(question, "a | b\nc", number) for number in range(5)]
    row = "\n\nWhat is x? | -1 <AND> -5 <OR> 3 | a | b\nc | "  # bars and newlines of an answer are not escaped
    assert tries[0].prompt.endswith(row) and not tries[0].prompt.endswith(AGAIN)
    assert {attempt.prompt for attempt in tries[1:]} == {tries[0].prompt + AGAIN}
    assert [attempt.temperature for attempt in tries] == [0.0, 0.0, 0.5, 1.0, 1.5]  # as the official loop has them
    assert {(attempt.system, attempt.max_tokens) for attempt in tries} == {("", 3)}


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("0.5", 0.5), ("1", 1.0), ("0", 0.0), ("1.0 (right)", 1.0), ("0.7\n", 0.7), ("\t0.3", 0.3), ("-0.0", 0.0),
        ("٠.٥", 0.5), ("1e-1", 0.1), ("0_1", 1.0), ("0.5 " * 2500, 0.5),
        ("", None), (" 0.5", None), ("nan", None), ("inf", None), ("1e9", None), ("1.01", None), ("-0.1", None),
        ("8, 9", None), ("0.3,", None), ("Score: 1", None), ("½", None), ("0x1", None), ("x" * 10_000, None),
    ],
)  # fmt: skip
def test_read(reply: str, value: float | None) -> None:
    assert read(reply) == value


@given(st.text() | st.floats().map(str) | st.text("0123456789.e-+ ,\n", max_size=8))
def test_read_gives_a_share_or_nothing(reply: str) -> None:
    value = read(reply)
    assert value is None or 0 <= value <= 1


def test_mark() -> None:
    question = Question("v1_0", "q", gold="a")
    assert TASK.mark(question, "p").score is None
    second = mark_replies(question, "p", ["x", "0.4"])
    assert (second.score, second.parsed) == (0.4, "0.4")
    given_up = mark_replies(question, "p", ["no"] * 5)
    assert (given_up.score, given_up.parsed) == (0.0, "unreadable")
    assert mark_replies(question, "p", ["no"] * 5 + ["1.0"]).score == 0.0  # a sixth reply is never read
    for replies in ([], ["no"] * 4):
        with pytest.raises(DataError, match="v1_0"):
            mark_replies(question, "p", replies)


def test_metrics(tmp_path: Path) -> None:
    first, second, third = load(write(tmp_path))
    found = metrics([record(first, "0.5"), record(second, "x", "1"), record(third, *["x"] * 5)])
    assert found == {
        "total": 50.0, "rec": 50.0, "ocr": 50.0, "know": 0.0, "spat": 0.0, "math": 50.0,
        "integration/ocr_math": 50.0, "integration/rec": 100.0, "integration/rec_know_spat": 0.0,
    }  # fmt: skip
    assert TASK.headline in found


def test_rounding_is_numpys() -> None:
    """Python's own round gives 0.1 for 0.15 (just below it), numpy's 0.2."""
    needs = {"capability": ["rec"]}
    records = [
        AnswerRecord(str(k), "", "", "", "", facts={**needs, "replies": ["0.3" if k == 0 else "0"]}) for k in range(200)
    ]
    assert metrics(records)["total"] == 0.2 and round(0.15, 1) == 0.1


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"capability": ["rec"]}, "has not been judged"),
        ({"capability": ["rec"], "replies": []}, "none readable"),
        ({"capability": ["rec"], "replies": ["x"]}, "none readable"),
        ({"capability": ["rec"], "replies": "0.5"}, "has not been judged"),
        ({"capability": ["rec"], "replies": [0.5]}, "has not been judged"),
        ({"replies": ["1"]}, "capability"),
        ({"capability": ["rec", 1], "replies": ["1"]}, "capability"),
        ({"capability": "rec", "replies": ["1"]}, "capability"),
    ],
)
def test_metrics_of_answers_that_are_not_judged(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        metrics([AnswerRecord("v1_9", "", "", "", "x", facts=facts)])


def test_metrics_of_nothing() -> None:
    with pytest.raises(DataError):
        metrics([])


def test_ids_of_llavas_files(tmp_path: Path) -> None:
    for question in load(write(tmp_path)):
        assert TASK.line_key(TASK.question_line(question)) == question.id
    assert TASK.question_line(load(tmp_path)[0]) == {"question_id": 0, "prompt": "What is x?"}
    assert {TASK.line_key({"question_id": id_}) for id_ in (7, "7", "v1_7")} == {"v1_7"}
    for odd in ("v1_07", "x", "v1_" + "9" * 5000):
        assert TASK.question_line(Question(odd, ""))["question_id"] == odd
    with pytest.raises(KeyError):
        TASK.line_key({})


def test_submission(tmp_path: Path) -> None:
    records = [AnswerRecord("v1_0", "", "", "", 'a | "b"\né'), AnswerRecord("v1_1", "", "", "", "")]
    assert TASK.submission is not None
    path = TASK.submission(records, tmp_path / "TinyLLaVA-3.1B")
    assert path.name == "TinyLLaVA-3.1B.json"
    assert json.loads(path.read_text(encoding="utf-8")) == {"v1_0": 'a | "b"\né', "v1_1": ""}


def test_from_line() -> None:
    question = TASK.from_line({"text": "3", "question": "1+2?", "answer": "3"})
    assert (question.prompt, question.gold) == ("1+2?", "3") and TASK.mark(question, "3").score is None
    with pytest.raises(DataError):
        TASK.from_line({"text": "3", "answer": 3})


def change(**values: Any) -> dict[str, Any]:
    return {"v1_0": {**ROWS["v1_0"], **values}}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "not readable"),
        ("{", "not readable"),
        ("[" * 100_000, "not readable"),
        ("[]", "not a JSON object"),
        ("{}", "no questions"),
        ('{"v1_0": {}, "v1_0": {}}', "occurs twice"),
        ('{"v1_0": 3}', "lacks `imagename`"),
        (change(imagename="../mm-vet.json"), "not a plain path"),
        (change(imagename="/etc/passwd"), "not a plain path"),
        (change(imagename="gone.png"), "missing"),
        (change(question=None), "`question` is a NoneType"),
        (change(question="\ud800"), "surrogates not allowed"),
        (change(answer=5), "`answer` is a int"),
        (change(capability="rec"), "`capability` is a str"),
        (change(capability=[]), "`capability` is"),
        (change(capability=["rec", "total"]), "`capability` is"),
        (change(capability=[["rec"]]), "`capability` is"),
    ],
)
def test_hostile_files(tmp_path: Path, rows: Any, message: str) -> None:
    write(tmp_path, rows)
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path)
    assert str(tmp_path) in error.value.message and "\n" not in error.value.message


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mm-vet\.json.*images"):
        load(tmp_path)
