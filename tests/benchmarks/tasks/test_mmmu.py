"""MMMU: both parsers' quirks, rounding by hand, questions without a picture, hostile files."""

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
from tinyllava_edge.benchmarks.tasks.mmmu import DISCIPLINES, INVALID, SUBJECTS, TASK
from tinyllava_edge.benchmarks.tasks.mmmu_parse import (
    fixed_choice,
    normalise,
    open_matches,
    parse_choice,
    parse_open,
)
from tinyllava_edge.errors import DataError

OPTIONS = {"A": "dog", "B": "big dog", "C": "cat"}
CHOICE = {"question_type": "multiple-choice", "all_choices": ["A", "B", "C"], "index2ans": OPTIONS}
ROWS: list[dict[str, Any]] = [
    {"id": "validation_Art_1", "prompt": "Which?\nA. dog", "image": "one.png", **CHOICE},
    {"id": "validation_Art_Theory_2", "prompt": "Both?", **CHOICE},
    {"id": "validation_Math_3", "prompt": "How much?", "image": "sub/two.png", "question_type": "short-answer"},
    {"id": "validation_Math_4", "prompt": "How many?", "question_type": "short-answer"},
    {"id": "validation_Math_5", "prompt": "What?", "image": "three.png", "question_type": "short-answer"},
]
GOLD: dict[str, dict[str, Any]] = {
    "validation_Art_1": {"question_type": "multiple-choice", "ground_truth": "B"},
    "validation_Art_Theory_2": {"question_type": "multiple-choice", "ground_truth": "A"},
    "validation_Math_3": {"question_type": "short-answer", "ground_truth": "1,000"},
    "validation_Math_4": {"question_type": "short-answer", "ground_truth": "4"},
    "validation_Math_5": {"question_type": "short-answer", "ground_truth": ["$MgS$", "MgS"]},
}


def write_set(root: Path) -> Path:
    """Three pictures; one choice and one open question without any."""
    (root / "all_images" / "sub").mkdir(parents=True)
    (root / "eval").mkdir()
    for name in ("one.png", "sub/two.png", "three.png"):
        Image.new("RGB", (4, 4)).save(root / "all_images" / name)
    (root / "anns_for_eval.json").write_text(json.dumps(ROWS))
    (root / "eval" / "answer_dict_val.json").write_text(json.dumps(GOLD))
    return root


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("A or B", "B"),  # the last one
        ("B (A)", "A"),  # brackets come first
        ("Both (A) and (C), then (A)", "A"),
        ("'B!'", ""),  # each mark is stripped once, in the official order
        ("B.\n", ""),
        ("D", ""),
        ("a cat", ""),  # texts only count in answers of more than five words
        ("it may well be a cat there", "C"),
        ("it may well be a big dog", "A"),  # the option that starts last: dog comes after big
        ("", ""),
    ],
)
def test_choice_parser_has_the_official_quirks(answer: str, letter: str) -> None:
    assert parse_choice(answer, OPTIONS) == letter


@given(st.text(alphabet="ABCD (). '!dogcatbi\n"))
def test_choice_parser_names_an_option_or_nothing(answer: str) -> None:
    assert parse_choice(answer, OPTIONS) in ("", *OPTIONS)


def test_the_fixed_choice_hangs_on_the_id_alone() -> None:
    drawn = [fixed_choice(f"validation_Art_{k}", "ABCD") for k in range(400)]
    assert drawn == [fixed_choice(f"validation_Art_{k}", "ABCD") for k in range(400)]
    assert all(70 < drawn.count(letter) < 130 for letter in "ABCD")
    assert fixed_choice("validation_Art_1", "ABCD") == "A"  # sha256sum ends in f0, modulo 4


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1,234.567", [1234.57]),
        ("A", [" a", "a "]),
        ("The Sky ", ["the sky"]),
        ("1e3", [1000.0]),
        ("1/64", ["1/64"]),
        ("", [""]),
    ],
)
def test_normalise(text: str, found: list[Any]) -> None:
    assert normalise(text) == found


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("The answer is 5.", [5.0]),
        ("x = 3.456", [3.46]),
        ("so it is 4\nthus 1,200", [4.0, 1200.0, 200.0]),  # the pattern without commas sees the end
        ("It is a. The answer is B", [" b", "b "]),  # no split at the full stop: lowered before
        ("Nothing", ["nothing"]),
        ("is :", ["is :"]),
        ("", [""]),
        ("about 7 or 8", ["about 7 or 8", 7.0, 8.0]),
    ],
)
def test_open_parser_by_hand(answer: str, found: list[Any]) -> None:
    assert parse_open(answer) == found


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("1,000", "It is 1000.001", True),
        ("4", "14", False),
        ("embryonic", "an embryonic one", True),
        ("embryonic", "embryo", False),
        (["24/7", "3.429"], "The result is 3.43", True),
        (["$MgS$", "MgS"], "mgs", True),
        ("A", "it is A bit", True),  # one letter with a space on one side is enough
        ("A", "it is alpha", False),
    ],
)
def test_open_answers_are_matched_as_upstream(gold: str | list[str], answer: str, right: bool) -> None:
    assert open_matches(gold, parse_open(answer)) is right


@given(st.text())
def test_open_parser_reads_everything(answer: str) -> None:
    assert parse_open(answer)


def test_thirty_subjects() -> None:
    assert len(SUBJECTS) == 30 and len(DISCIPLINES) == 6


def test_figures_by_hand(tmp_path: Path) -> None:
    questions = TASK.load(write_set(tmp_path))
    assert [question.kind for question in questions] == ["Art", "Art_Theory", "Math", "Math", "Math"]
    assert questions[2].pictures == (tmp_path / "all_images" / "sub" / "two.png",)
    records = [record_of(TASK, q, text) for q, text in zip(questions, ["(B)", "A", "4", "4", "MgS"], strict=True)]
    fixed = fixed_choice("validation_Art_Theory_2", "ABC")
    assert records[1].parsed == fixed and records[3].parsed == INVALID and records[3].score == 0
    right = 2 + (fixed == "A")
    found = TASK.metrics(records)
    assert found["accuracy"] == round(100 * right / 5, 1)
    assert found["subject/Math"] == 33.3 and found["subject/Art"] == 100 and found["discipline/Science"] == 33.3
    assert found["discipline/Art and Design"] == 50 + 50 * (fixed == "A") and "discipline/Business" not in found
    assert TASK.submission is not None
    written = json.loads(TASK.submission(records, tmp_path / "run.submission").read_text())
    assert written == {
        "validation_Art_1": "B",
        "validation_Art_Theory_2": fixed,
        "validation_Math_3": "4",
        "validation_Math_4": INVALID,
        "validation_Math_5": "MgS",
    }
    path = tmp_path / "answers.jsonl"
    write_answers(path, TASK, records, "tiny")
    assert TASK.metrics(read_answers(path, TASK, questions)) == found


def test_labels_may_lie_beside_the_questions(tmp_path: Path) -> None:
    root = write_set(tmp_path)
    (root / "eval" / "answer_dict_val.json").rename(root / "answer_dict_val.json")
    assert len(TASK.load(root)) == 5


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"id": "validation_Cooking_1"}, "lacks 'validation_Cooking_1'"),
        ({"id": 1}, "row 0: `id` is a int"),
        ({"id": "validation_Math_3"}, "occurs twice"),
        ({"prompt": None}, "row 0: `prompt` is a NoneType"),
        ({"image": "../one.png"}, "not a plain path"),
        ({"image": "four.png"}, "is missing"),
        ({"image": ""}, "`image` is not a file name"),
        ({"image": ["one.png"]}, "`image` is not a file name"),
        ({"all_choices": []}, "don't belong together"),
        ({"all_choices": ["A", "D"]}, "don't belong together"),
        ({"all_choices": [["A"]]}, "don't belong together"),
        ({"index2ans": {"A": 1, "B": "x", "C": "y"}}, "don't belong together"),
        ({"question_type": 5}, "`question_type` is a int"),
    ],
)
def test_damaged_rows_are_named(tmp_path: Path, more: dict[str, Any], says: str) -> None:
    root = write_set(tmp_path)
    (root / "anns_for_eval.json").write_text(json.dumps([{**ROWS[0], **more}, *ROWS[1:]]))
    with pytest.raises(DataError, match=says):
        TASK.load(root)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("anns_for_eval.json", {}, "not a list"),
        ("anns_for_eval.json", [], "holds no questions"),
        ("anns_for_eval.json", ["x"], "row 0: lacks `id`"),
        ("eval/answer_dict_val.json", [], "no object"),
        ("eval/answer_dict_val.json", {}, "lacks 'validation_Art_1'"),
        ("eval/answer_dict_val.json", {**GOLD, "validation_Art_1": "B"}, "lacks `ground_truth`"),
        (
            "eval/answer_dict_val.json",
            {**GOLD, "validation_Art_1": {"question_type": "multiple-choice", "ground_truth": [1]}},
            "something else than strings",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, value: Any, says: str) -> None:
    root = write_set(tmp_path)
    (root / name).write_text(json.dumps(value))
    with pytest.raises(DataError, match=says):
        TASK.load(root)
    for text in ('[{"id": "\\ud800"}]', "[{"):
        (root / name).write_text(text)
        with pytest.raises(DataError, match="not readable JSON"):
            TASK.load(root)
    (root / name).write_text('{"id": 1, "id": 2}')
    with pytest.raises(DataError, match="'id' occurs twice"):
        TASK.load(root)


def test_unknown_subject(tmp_path: Path) -> None:
    root = write_set(tmp_path)
    row = {**ROWS[0], "id": "validation_Cooking_1"}
    (root / "anns_for_eval.json").write_text(json.dumps([row]))
    (root / "eval" / "answer_dict_val.json").write_text(json.dumps({"validation_Cooking_1": GOLD["validation_Art_1"]}))
    with pytest.raises(DataError, match="none of the 30 subjects"):
        TASK.load(root)


def test_explain_line() -> None:
    choice = TASK.from_line({"text": "B!", "options": OPTIONS, "answers": "B"})
    assert TASK.mark(choice, "B!").score == 1
    assert dict(TASK.mark(choice, "none").steps)["letter"] == "none: fixed by the id"
    opened = TASK.from_line({"text": "x = 5", "answers": ["5", "five"]})
    mark = TASK.mark(opened, "x = 5")
    assert mark.score == 1 and dict(mark.steps)["searched for the answer"] == "5.0"
    assert TASK.mark(TASK.from_line({"text": "x"}), "x").score is None
    with pytest.raises(DataError, match="neither a string nor a list"):
        TASK.from_line({"text": "x", "answers": [1]})
