"""MME: the parser's quirks, points by hand, both layouts, the official file, hostile directories."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tinyllava_edge.benchmarks.answer_files import read_answers, write_answers
from tinyllava_edge.benchmarks.evaluation import record_of
from tinyllava_edge.benchmarks.results import AnswerRecord
from tinyllava_edge.benchmarks.tasks.mme import COGNITION, PERCEPTION, TASK, parse
from tinyllava_edge.errors import DataError

TASKS = (*PERCEPTION, *COGNITION)
SUFFIX = "\nAnswer the question using a single word or phrase."


def write_set(root: Path) -> Path:
    """Two pictures of `count`, one of `artwork` in two directories, one of each other task; two spaces in requests."""
    release = root / "MME_Benchmark_release_version"
    flat, nested = release / "count", release / "artwork"
    for folder in (nested / "images", nested / "questions_answers_YN", *(release / task for task in TASKS)):
        folder.mkdir(parents=True, exist_ok=True)
    pictures = [("1", flat / "1.jpg"), ("2", flat / "2.png"), ("77", nested / "images" / "77.jpg")]
    pictures += [("x", release / task / "x.jpg") for task in TASKS if task not in ("count", "artwork")]
    for name, path in pictures:
        Image.new("RGB", (4, 4)).save(path)
        texts = nested / "questions_answers_YN" if path.parent.name == "images" else path.parent
        (texts / f"{name}.txt").write_text(
            f"Is {name} one?  Please answer yes or no.\tYes\nIs {name} zero? Please answer yes or no.\tNo\n"
        )
    (release / "eval_tool").mkdir()
    return root


def answered(root: Path, said: dict[str, str]) -> list[AnswerRecord]:
    """Records of those questions of the set that are in `said`, by id."""
    return [record_of(TASK, question, said[question.id]) for question in TASK.load(root) if question.id in said]


SAID = {
    "count/1.jpg#1": "Yes",
    "count/1.jpg#2": "No.",
    "count/2.png#1": "\tye\ns",
    "count/2.png#2": "not at all",
    "artwork/images/77.jpg#1": "It is yes",
    "artwork/images/77.jpg#2": "Nope\nreally",
}
OTHER = {f"{task}/x.jpg#{n}": "?" for task in TASKS if task not in ("count", "artwork") for n in (1, 2)}
ALL = {key: text for task in TASKS for key, text in {**SAID, **OTHER}.items() if key.startswith(f"{task}/")}


@pytest.mark.parametrize(
    ("answer", "counts_as"),
    [
        ("Yes", "yes"),
        ("YES.", "yes"),
        ("no", "no"),
        ("Not", "no"),
        ("none", "no"),
        ("nope", "no"),
        ("a no", "no"),
        (" yes", "yes"),
        ("  yes", "other"),
        ("it is yes", "other"),
        ("", "other"),
        ("noyes", "no"),
        ("eyes", "yes"),
    ],
)
def test_parser_has_the_official_quirks(answer: str, counts_as: str) -> None:
    assert parse(answer) == counts_as


@given(st.text(alphabet="yesno NOYES\t\n\r.İ", max_size=8))
def test_breaks_never_change_what_an_answer_counts_as(answer: str) -> None:
    for mark in "\t\n\r":
        assert parse(answer) == parse(answer.replace(mark, " "))


def test_fourteen_tasks() -> None:
    assert (len(PERCEPTION), len(COGNITION), len({*PERCEPTION, *COGNITION})) == (10, 4, 14)


@pytest.mark.parametrize("below", [".", "MME", "MME/MME_Benchmark_release_version"])
def test_layouts_and_prompts(tmp_path: Path, below: str) -> None:
    questions = TASK.load(write_set(tmp_path / "MME") if below == "." else write_set(tmp_path / "MME").parent / below)
    assert [question.id for question in questions] == list(ALL)  # the sum's order of tasks
    asked = {question.id: question for question in questions}
    one, two = asked["count/1.jpg#1"], asked["count/1.jpg#2"]
    assert one.prompt == "Is 1 one?" + SUFFIX and two.prompt == "Is 1 zero?" + SUFFIX
    nested = asked["artwork/images/77.jpg#1"]
    assert nested.unit == "artwork/77" and nested.image == "artwork/images/77.jpg"


def test_points_by_hand(tmp_path: Path) -> None:
    found = TASK.metrics(answered(write_set(tmp_path), SAID))
    # count: 3 of 4 questions, 1 of 2 pictures; artwork: 1 of 2, none
    assert found["count/acc"] == 75 and found["count/acc+"] == 50 and found["count/score"] == 125
    assert found["artwork/score"] == 50
    assert found["perception"] == 175 and found["tasks"] == 2 and "cognition" not in found
    whole = TASK.metrics(answered(tmp_path, ALL))  # the other answers are neither yes nor no
    assert whole == found | {
        key: 0 for key in whole if key.split("/")[0] in {*TASKS, "cognition"} - {"count", "artwork"}
    } | {"tasks": 14}


def test_half_a_pair_counts_nowhere(tmp_path: Path) -> None:
    records = answered(write_set(tmp_path), SAID)
    assert TASK.metrics(records[:3]) == TASK.metrics(records[:2])
    assert TASK.metrics([]) == {}


def test_submission_has_one_line_an_answer(tmp_path: Path) -> None:
    assert TASK.submission is not None
    folder = TASK.submission(answered(write_set(tmp_path), SAID), tmp_path / "out" / "run.submission")
    assert sorted(path.name for path in folder.iterdir()) == ["artwork.txt", "count.txt"]
    lines = (folder / "count.txt").read_text().split("\n")
    assert lines[0] == "1.jpg\tIs 1 one?  Please answer yes or no.\tYes\tYes" and lines[-1] == ""
    assert lines[2].split("\t")[3] == " ye s" and len(lines) == 5


def test_answer_file_comes_back(tmp_path: Path) -> None:
    records = answered(write_set(tmp_path), SAID)
    path = tmp_path / "answers.jsonl"
    write_answers(path, TASK, records, "tiny")
    with pytest.raises(DataError, match="24 of 30 questions have no answer"):
        read_answers(path, TASK, TASK.load(tmp_path))
    write_answers(path, TASK, answered(tmp_path, ALL), "tiny")
    again = read_answers(path, TASK, TASK.load(tmp_path))
    assert [record.given for record in again] == list(ALL.values())


def test_join_forgives_what_the_official_converter_forgives() -> None:
    bare = {"question_id": "artwork/77.jpg", "prompt": "Is it?"}
    asked = {"question_id": "artwork/images/77.jpg", "prompt": "Is it?  Please answer yes or no." + SUFFIX}
    assert TASK.line_key(bare) == TASK.line_key(asked)
    assert TASK.line_key(bare) != TASK.line_key({**bare, "prompt": "Is it not?"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("One?\tYes\n", "1 questions and 1 pictures"),
        ("One?\tYes\nTwo?\tNo\nThree?\tNo\n", "3 questions"),
        ("", "0 questions"),
        ("One?\tYes\nTwo? No\n", "1.txt:2: not a question"),
        ("One?\tYes\nTwo?\tMaybe\n", "1.txt:2: not a question"),
    ],
)
def test_question_files_are_checked(tmp_path: Path, text: str, says: str) -> None:
    path = write_set(tmp_path) / "MME_Benchmark_release_version" / "count" / "1.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=says):
        TASK.load(tmp_path)
    path.write_bytes(b"\xff\xfe?\tYes\nTwo?\tNo\n")
    with pytest.raises(DataError, match="1.txt: can't be read"):
        TASK.load(tmp_path)


def test_missing_pictures_and_directories(tmp_path: Path) -> None:
    release = write_set(tmp_path) / "MME_Benchmark_release_version"
    (release / "count" / "2.png").unlink()
    with pytest.raises(DataError, match="2.txt: 2 questions and 0 pictures"):
        TASK.load(tmp_path)
    (release / "artwork" / "questions_answers_YN" / "77.txt").unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="lacks existence, .*code_reasoning of MME's 14 task directories .*github.com"):
        TASK.load(tmp_path / "empty")
    (release / "OCR").rename(release / "ocr")
    with pytest.raises(DataError, match="lacks OCR of MME's 14"):
        TASK.load(tmp_path)


def test_explain_line() -> None:
    mark = TASK.mark(TASK.from_line({"text": "nothing", "answers": "No"}), "nothing")
    assert (mark.parsed, mark.score) == ("no", 1.0)
    with pytest.raises(DataError, match="one string"):
        TASK.from_line({"text": "x", "answers": ["yes", "no"]})
