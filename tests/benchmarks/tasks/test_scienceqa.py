"""ScienceQA: the parser's quirks, slices by hand, prompts from either file, hostile files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tinyllava_edge.benchmarks.answer_files import read_answers, write_answers
from tinyllava_edge.benchmarks.evaluation import record_of
from tinyllava_edge.benchmarks.scoring import score_samples
from tinyllava_edge.benchmarks.tasks.scienceqa import FAILED, LENIENT, LETTERS, TASK, index_of, parse, parse_lenient
from tinyllava_edge.errors import DataError

SUFFIX = "\nAnswer with the option's letter from the given choices directly."


def problem(**more: Any) -> dict[str, Any]:
    """A row of problems.json."""
    row = {
        "question": "Which?",
        "choices": ["one", "two"],
        "answer": 1,
        "hint": "",
        "image": None,
        "grade": "grade4",
        "subject": "natural science",
        "split": "test",
    }
    return {**row, **more}


PROBLEMS = {
    "4": problem(hint="Look.", image="image.png"),
    "9": problem(subject="social science", grade="grade9", choices=["a", "b", "c"], answer=2, image="image.png"),
    "11": problem(subject="language science", hint="Read."),
    "12": problem(subject="language science", grade="grade12", answer=0, image="image.png"),
}
PROMPTS = {
    "4": "<image>\nContext: Look.\nWhich?\nA. one\nB. two",
    "9": "<image>\nWhich?\nA. a\nB. b\nC. c",
    "11": "Context: Read.\nWhich?\nA. one\nB. two",
    "12": "<image>\nWhich?\nA. one\nB. two",
}


def write_set(root: Path, *, prompts: bool = True) -> Path:
    """Three pictures and a question without one."""
    for name, row in PROBLEMS.items():
        if row["image"]:
            (root / "images" / "test" / name).mkdir(parents=True)
            Image.new("P", (4, 4)).save(root / "images" / "test" / name / "image.png")
    (root / "problems.json").write_text(json.dumps({**PROBLEMS, "1": problem(split="train")}))
    (root / "pid_splits.json").write_text(json.dumps({"train": ["1"], "test": list(PROBLEMS)}))
    if prompts:
        rows = []
        for name, text in PROMPTS.items():
            talk = [{"from": "human", "value": text}, {"from": "gpt", "value": LETTERS[PROBLEMS[name]["answer"]]}]
            image = {"image": f"{name}/image.png"} if "<image>" in text else {}
            rows.append({"id": name, **image, "conversations": talk})
        (root / "llava_test_CQM-A.json").write_text(json.dumps(rows))
    return root


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [
        ("B", "B"),
        ("B. two", "B"),
        ("B. ", "B"),
        ("The answer is B.", "B"),
        ("I think The answer is C!", "C"),
        ("B.", FAILED),
        ("B.two", FAILED),
        ("b", FAILED),
        ("(B)", FAILED),
        ("The answer is B", FAILED),
        ("The answer is B\n", FAILED),
        ("The answer is B. The answer is C.", FAILED),
        ("F", FAILED),
        ("", FAILED),
        (" B", FAILED),
    ],
)
def test_parser_has_the_official_quirks(answer: str, parsed: str) -> None:
    assert parse(answer) == parsed


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [
        ("b", "B"),
        ("B.", "B"),
        ("(b)", "B"),
        ("**C**", "C"),
        ("(B) two", "B"),
        ("B: two", "B"),
        ("The answer is (B)", "B"),
        ("Answer: d.", "D"),
        ("A dog", FAILED),
        ("F", FAILED),
        ("", FAILED),
    ],
)
def test_lenient_parser(answer: str, parsed: str) -> None:
    assert parse_lenient(answer) == parsed


@given(st.text(alphabet="ABFb(). Thenswri\n"))
def test_lenient_only_adds(answer: str) -> None:
    if parse(answer) != FAILED:
        assert parse_lenient(answer) == parse(answer)
    assert parse_lenient(answer) in (*LETTERS, *"FGHIJKLMNOPQRSTUVWXYZ", FAILED)


def test_a_letter_beyond_the_choices_is_wrong() -> None:
    assert [index_of(letter, 2) for letter in ("A", "B", "C", FAILED)] == [0, 1, -1, -1]


def test_prompts_from_either_file_are_the_same(tmp_path: Path) -> None:
    read = TASK.load(write_set(tmp_path / "with"))
    built = TASK.load(write_set(tmp_path / "without", prompts=False))
    assert [question.prompt for question in read] == [question.prompt for question in built]
    assert read[0].prompt == "Context: Look.\nWhich?\nA. one\nB. two" + SUFFIX
    assert [len(question.pictures) for question in read] == [1, 1, 0, 1]
    assert read[0].pictures[0] == tmp_path / "with" / "images" / "test" / "4" / "image.png"


def test_slices_by_hand(tmp_path: Path) -> None:
    questions = TASK.load(write_set(tmp_path))
    said = ["B", "(C)", "B. two", "E"]  # right, unread, right, beyond the choices
    records = [record_of(TASK, question, text) for question, text in zip(questions, said, strict=True)]
    assert TASK.metrics(records) == {
        "img_accuracy": 33.33,
        "accuracy": 50.0,
        "subject/natural": 100.0,
        "subject/social": 0.0,
        "subject/language": 50.0,
        "context/text": 100.0,
        "context/image": 33.33,
        "grade/1-6": 100.0,
        "grade/7-12": 0.0,
    }
    lenient = [record_of(LENIENT, question, text) for question, text in zip(questions, said, strict=True)]
    assert LENIENT.metrics(lenient)["img_accuracy"] == 66.67 and LENIENT.protocol != TASK.protocol
    assert TASK.submission is not None
    written = json.loads(TASK.submission(records, tmp_path / "run.submission").read_text())
    assert written["results"] == {"4": 1, "9": -1, "11": 1, "12": -1} and written["correct"] == 2


def test_a_figure_states_the_questions_that_it_rests_on(tmp_path: Path) -> None:
    questions = TASK.load(write_set(tmp_path))
    records = [record_of(TASK, question, "A") for question in questions]
    lines = score_samples(TASK, records, "edge", "b", "picture", "e", "m")
    counts = {line.stage.partition("/")[2]: line.detail["n"] for line in lines}
    assert (counts["img_accuracy"], counts["accuracy"], counts["context/image"]) == (3, 4, 3)
    assert counts["grade/1-6"] + counts["grade/7-12"] == 4


def test_answer_file_comes_back_with_the_marker(tmp_path: Path) -> None:
    questions = TASK.load(write_set(tmp_path))
    records = [record_of(TASK, question, "B") for question in questions]
    path = tmp_path / "answers.jsonl"
    write_answers(path, TASK, records, "tiny")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert ["<image>" in line["prompt"] for line in lines] == [True, True, False, True]
    assert TASK.metrics(read_answers(path, TASK, questions)) == TASK.metrics(records)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"answer": 2}, "answer 2 of 2 choices"),
        ({"answer": "1"}, "`answer` is a str"),
        ({"answer": True}, "`answer` is a bool"),
        ({"choices": ["one"]}, "two to five strings"),
        ({"choices": ["one", 2]}, "two to five strings"),
        ({"choices": list("abcdef")}, "two to five strings"),
        ({"image": "../../secret.png"}, "not a plain path"),
        ({"image": "other.png"}, "is missing"),
        ({"image": None}, "disagree on a picture"),
        ({"hint": None}, "`hint` is a NoneType"),
    ],
)
def test_damaged_problems_are_named(tmp_path: Path, more: dict[str, Any], says: str) -> None:
    root = write_set(tmp_path)
    (root / "problems.json").write_text(json.dumps({**PROBLEMS, "4": problem(image="image.png") | more}))
    with pytest.raises(DataError, match=says) as caught:
        TASK.load(root)
    assert "'4'" in caught.value.message


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    root = write_set(tmp_path)
    path = root / "llava_test_CQM-A.json"
    rows = json.loads(path.read_text())
    for wrong, says in ((rows[:3], "3 prompts, not those of the 4"), ([*rows, rows[0]], "'4' occurs twice"), ({}, "0")):
        path.write_text(json.dumps(wrong))
        with pytest.raises(DataError, match=says):
            TASK.load(root)
    path.write_text(path.read_text()[:-1])
    with pytest.raises(DataError, match="CQM-A.json: not readable JSON"):
        TASK.load(root)
    path.unlink()
    (root / "pid_splits.json").write_text(json.dumps({"test": ["4", "4"]}))
    with pytest.raises(DataError, match="'4' occurs twice"):
        TASK.load(root)
    (root / "problems.json").write_text('{"4": {}, "4": {}}')
    with pytest.raises(DataError, match="'4' occurs twice"):
        TASK.load(root)
    write_set(tmp_path / "again")
    (root / "problems.json").write_text((tmp_path / "again" / "problems.json").read_text())
    (root / "pid_splits.json").write_text(json.dumps({"test": ["4", ["x"]]}))
    with pytest.raises(DataError, match="is missing"):
        TASK.load(root)


def test_explain_line() -> None:
    question = TASK.from_line({"text": "C", "options": ["one", "two"], "answers": "B"})
    mark = TASK.mark(question, "C")
    assert (mark.parsed, mark.score, dict(mark.steps)["number of the choice"]) == ("C", 0.0, "-1")
    assert TASK.mark(TASK.from_line({"text": "B"}), "B").score is None
    with pytest.raises(DataError, match="no letter of 2 choices"):
        TASK.from_line({"text": "B", "options": {"A": "x", "B": "y"}, "answers": "C"})
    with pytest.raises(DataError, match="options"):
        TASK.from_line({"text": "B", "options": 7})
