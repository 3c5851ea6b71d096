"""VQAv2 on a made-up set of three pictures in the official layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tinyllava_edge.benchmarks.evaluation import record_of
from tinyllava_edge.benchmarks.results import AnswerRecord
from tinyllava_edge.benchmarks.tasks import vqav2
from tinyllava_edge.benchmarks.tasks.base import Question, Task
from tinyllava_edge.errors import DataError

SUFFIX = "\nAnswer the question using a single word or phrase."
# id, picture, question, answer type, question type, ten answers
ROWS: list[tuple[int, int, str, str, str, list[str]]] = [
    (42000, 42, "Is it red?", "yes/no", "is it", ["yes"] * 10),
    (42001, 42, "How many?", "number", "how many", ["2"] * 3 + ["two"] * 3 + ["3"] * 4),
    (73000, 73, "What is it?", "other", "what is", ["t-shirt"] * 2 + ["shirt"] * 8),
    (74000, 74, "Who?", "other", "none of the above", ["mcdonald's"] * 9 + ["kfc"]),
]


def annotations() -> list[dict[str, Any]]:
    return [
        {
            "question_type": asked,
            "multiple_choice_answer": answers[-1],
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": k} for k, a in enumerate(answers, 1)],
            "image_id": picture,
            "answer_type": kind,
            "question_id": identity,
        }
        for identity, picture, _, kind, asked, answers in ROWS
    ]


def questions() -> list[dict[str, Any]]:
    return [{"image_id": row[1], "question": row[2], "question_id": row[0]} for row in ROWS]


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def val(tmp_path: Path) -> Path:
    header = {"info": {}, "data_type": "mscoco", "data_subtype": "val2014", "license": {}}
    write(tmp_path / vqav2.ANNOTATIONS, {**header, "annotations": annotations()})
    write(tmp_path / vqav2.QUESTIONS, {**header, "task_type": "Open-Ended", "questions": questions()})
    (tmp_path / "val2014").mkdir()
    for number in (42, 73, 74):
        Image.new("RGB", (4, 3), (number, 0, 0)).save(tmp_path / "val2014" / f"COCO_val2014_{number:012d}.jpg")
    return tmp_path


@pytest.fixture
def testdev(tmp_path: Path) -> Path:
    (tmp_path / "test2015").mkdir()
    ids = [11000, 11001, 12000, 12001, 13000, 14000, 14001]
    files = {n: f"COCO_test2015_{n:012d}.jpg" for n in (11, 12, 13, 14)}
    rows = [{"question_id": i, "image": files[i // 1000], "text": f"What {i}?{SUFFIX}"} for i in ids]
    write_lines(tmp_path / vqav2.ALL, rows)
    write_lines(tmp_path / vqav2.ASKED, [rows[1], rows[2], rows[5]])
    for name in files.values():
        Image.new("RGB", (4, 3)).save(tmp_path / "test2015" / name)
    return tmp_path


def answered(task: Task, asked: list[Question], texts: list[str]) -> list[AnswerRecord]:
    return [record_of(task, question, text) for question, text in zip(asked, texts, strict=True)]


def test_load(val: Path) -> None:
    first, second, *_ = vqav2.TASK.load(val)
    assert (first.id, first.prompt) == ("42000", f"Is it red?{SUFFIX}")
    assert first.image == "COCO_val2014_000000000042.jpg"
    assert first.pictures == (val / "val2014" / first.image,)
    assert first.gold == ["yes"] * 10
    assert (first.expected, first.kind, first.facts) == ("yes", "yes/no", {"question_type": "is it"})
    assert second.image == first.image


def test_load_from_the_archives_folders(val: Path) -> None:
    for name, folder in ((vqav2.ANNOTATIONS, "annotations"), (vqav2.QUESTIONS, "questions")):
        (val / folder).mkdir()
        (val / name).rename(val / folder / name)
    assert len(vqav2.TASK.load(val)) == 4


def test_scores_and_metrics_by_hand(val: Path) -> None:
    """`Yes` against ten `yes` is 0; `Two.` matches six of ten; `t shirt` two, so 0.6; `McDonald's` nine."""
    records = answered(vqav2.TASK, vqav2.TASK.load(val), ["Yes", "Two.", "t shirt", "McDonald's"])
    assert [record.score for record in records] == pytest.approx([0, 1, 0.6, 1])
    assert [record.parsed for record in records] == ["Yes", "2", "t shirt", "mcdonald's"]
    assert vqav2.TASK.metrics(records) == {
        "overall": 65.0,
        "answer_type/yes/no": 0.0,
        "answer_type/number": 100.0,
        "answer_type/other": 80.0,
        "question_type/is it": 0.0,
        "question_type/how many": 100.0,
        "question_type/what is": 60.0,
        "question_type/none of the above": 100.0,
    }


def test_always_normalised_is_another_protocol(val: Path) -> None:
    task = vqav2.ALWAYS_NORMALISED
    assert task.mark(task.load(val)[0], "Yes.").score == 1
    assert vqav2.TASK.mark(task.load(val)[0], "Yes.").score == 0
    assert task.protocol != vqav2.TASK.protocol
    assert task.name != vqav2.TASK.name


def test_rounding_is_of_the_percentage() -> None:
    some = AnswerRecord("1", "a", "q", "", "", task="vqav2_val", score=1.0)
    records = [some, replace(some, score=0.0), replace(some, score=0.3)]
    assert vqav2.TASK.metrics(records) == {"overall": 43.33}
    assert vqav2.TASK.metrics([replace(some, score=None)]) == {}


def test_unanimity_is_judged_after_stripping() -> None:
    question = vqav2.TASK.from_line({"answers": ["yes", " yes", "yes\n"]})
    assert vqav2.TASK.mark(question, "Yes").score == 0
    assert vqav2.TASK.mark(question, "\tyes ").score == pytest.approx(2 / 3)


def test_steps_for_explain() -> None:
    names = dict(vqav2.TASK.mark(vqav2.TASK.from_line({"answers": ["a", "the two."]}), "The Two.").steps)
    assert names == {
        "stripped": "The Two.",
        "punctuation": "The Two",
        "digits and articles": "2",
        "compared as": "2",
        "with": " | 2",
    }
    agreed = vqav2.TASK.mark(vqav2.TASK.from_line({"answers": "two"}), "Two")
    assert ("normalised", "no: all annotators agree") in agreed.steps
    unlabelled = vqav2.TASK.mark(vqav2.TASK.from_line({"text": "Two"}), "Two")
    assert (unlabelled.parsed, unlabelled.score) == ("2", None)


def test_submission_holds_raw_answers(val: Path) -> None:
    records = answered(vqav2.TASK, vqav2.TASK.load(val), ["Yes", "Two.", "é", ""])
    assert vqav2.TASK.submission is not None
    path = vqav2.TASK.submission(records, val / "out" / "int8.v1")
    assert path == val / "out" / "int8.v1.json"
    assert json.loads(path.read_text()) == [
        {"question_id": 42000, "answer": "Yes"},
        {"question_id": 42001, "answer": "Two."},
        {"question_id": 73000, "answer": "é"},
        {"question_id": 74000, "answer": ""},
    ]
    for foreign in ("q1", "-3", "²", ""):
        with pytest.raises(DataError, match="no VQAv2 question id"):
            vqav2.TASK.submission([replace(records[0], id=foreign)], val / "out2")


def test_llava_lines_join_by_number(val: Path) -> None:
    question = vqav2.TASK.load(val)[0]
    line = vqav2.TASK.question_line(question)
    assert line == {"question_id": 42000, "prompt": question.prompt}
    assert vqav2.TASK.line_key(line) == vqav2.TASK.line_key({"question_id": "42000"}) == "42000"


Change = Callable[[list[dict[str, Any]], list[dict[str, Any]]], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, a: q.append(q[0]), "occurs twice"),
        (lambda q, a: a.append(a[0]), "occurs twice"),
        (lambda q, a: q.pop(), "3 questions for 4 annotations"),
        (lambda q, a: a.pop(), "has no 74000"),
        (lambda q, a: q[0].update(image_id=73), "has no 42000 on picture 73"),
        (lambda q, a: q[0].pop("question"), "question 0: lacks `question`"),
        (lambda q, a: q[0].update(question_id="42000"), "`question_id` is a str"),
        (lambda q, a: q[0].update(question_id=True), "`question_id` is a bool"),
        (lambda q, a: a[0].update(answers=[]), "annotation 0: no answers"),
        (lambda q, a: a[1].update(answers={}), "annotation 1: `answers` is a dict"),
        (lambda q, a: a[0]["answers"][1].update(answer_id=1), "two with one `answer_id`"),
        (lambda q, a: a[0]["answers"][1].update(answer=5), "`answer` is a int"),
        (lambda q, a: a[0]["answers"].append("yes"), "lacks `answer_id`"),
        (lambda q, a: a[0].update(answer_type=None), "`answer_type` is a NoneType"),
        (lambda q, a: (q[0].update(image_id=5), a[0].update(image_id=5)), "COCO_val2014_000000000005.jpg"),
    ],
)
def test_damaged_files(val: Path, change: Change, message: str) -> None:
    rows, labels = questions(), annotations()
    change(rows, labels)
    write(val / vqav2.QUESTIONS, {"questions": rows})
    write(val / vqav2.ANNOTATIONS, {"annotations": labels})
    with pytest.raises(DataError) as caught:
        vqav2.TASK.load(val)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"questions": 3}', '{"questions": []}', "\xff", "[" * 10**5])
def test_unreadable_questions(val: Path, text: str) -> None:
    (val / vqav2.QUESTIONS).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="questions.json"):
        vqav2.TASK.load(val)


def test_missing_files_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        vqav2.TASK.load(tmp_path)
    assert all(name in caught.value.message for name in (vqav2.QUESTIONS, vqav2.ANNOTATIONS, "val2014"))


def test_testdev_asks_llavas_prompts_and_uploads_all_ids(testdev: Path) -> None:
    task = vqav2.TESTDEV
    asked = task.load(testdev)
    assert [question.id for question in asked] == ["11001", "12000", "14000"]
    assert asked[0].prompt == f"What 11001?{SUFFIX}"
    assert asked[0].pictures == (testdev / "test2015" / "COCO_test2015_000000000011.jpg",)
    assert asked[0].facts == {"place": 1, "of": 7, "unasked_before": [11000]}
    assert asked[1].facts == {"place": 2, "of": 7, "unasked_after": [12001, 13000]}
    records = answered(task, asked, ["Yes.", "mcdonald's", ""])
    assert [(record.parsed, record.score) for record in records] == [("yes", None), ("mcdonald 's", None), ("", None)]
    assert task.metrics(records) == {}
    assert task.submission is not None
    stored = [AnswerRecord.from_sample(record.to_sample("edge", "b", "picture", 0, "e")) for record in records]
    path = task.submission(stored[::-1], testdev / "up")  # whatever order they come in
    assert json.loads(path.read_text()) == [
        {"question_id": 11000, "answer": ""},
        {"question_id": 11001, "answer": "yes"},
        {"question_id": 12000, "answer": "mcdonald 's"},
        {"question_id": 12001, "answer": ""},
        {"question_id": 13000, "answer": ""},
        {"question_id": 14000, "answer": ""},
        {"question_id": 14001, "answer": ""},
    ]
    for part in ([], records[1:], records[:2], [*records, records[0]]):
        with pytest.raises(DataError, match="part of test-dev"):
            task.submission(part, testdev / "part")
    assert not (testdev / "part.json").exists()


def test_testdev_file_where_every_id_is_asked(testdev: Path) -> None:
    (testdev / vqav2.ASKED).write_bytes((testdev / vqav2.ALL).read_bytes())
    asked = vqav2.TESTDEV.load(testdev)
    assert [question.facts for question in asked] == [{"place": k, "of": 7} for k in range(7)]


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (vqav2.ASKED, '{"question_id": 11000', ":4: not a JSON line"),
        (vqav2.ASKED, "[]", ":4: not a JSON object"),
        (vqav2.ASKED, '{"question_id": 5, "image": "x.jpg", "text": "a"}', ":4: id 5 is not in"),
        (vqav2.ASKED, '{"question_id": 11000, "image": "x.jpg", "text": "a"}', ":4: the prompt does not end"),
        (vqav2.ASKED, '{"question_id": 11000, "image": 7, "text": "a"}', ":4: `image` is a int"),
        (vqav2.ALL, '{"question_id": 11000}', ":8: id 11000 occurs twice"),
        (vqav2.ALL, '{"question_id": "x"}', ":8: `question_id` is a str"),
    ],
)
def test_testdev_damaged_lines(testdev: Path, name: str, line: str, message: str) -> None:
    with (testdev / name).open("a") as handle:
        handle.write(line + "\n")
    with pytest.raises(DataError) as caught:
        vqav2.TESTDEV.load(testdev)
    assert message in caught.value.message


@pytest.mark.parametrize("image", ["../val.jpg", "/etc/passwd", "a\\b.jpg", "", "c:x.jpg"])
def test_testdev_pictures_stay_inside(testdev: Path, image: str) -> None:
    write_lines(testdev / vqav2.ASKED, [{"question_id": 11000, "image": image, "text": f"a{SUFFIX}"}])
    with pytest.raises(DataError, match="not a plain path"):
        vqav2.TESTDEV.load(testdev)
