"""LLaVA-Bench (In-the-Wild): the judge's prompt, pairs of ratings, official means, the join by id, hostile files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tinyllava_edge.benchmarks.results import AnswerRecord
from tinyllava_edge.benchmarks.tasks.base import Question
from tinyllava_edge.benchmarks.tasks.llava_wild import TASK, load, mark_replies, metrics, read, request
from tinyllava_edge.errors import DataError

QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 0, "image": "001.jpg", "text": "What is the name?", "category": "conv"},
    {"question_id": 1, "image": "001.jpg", "text": "Describe it.", "category": "detail"},
    {"question_id": 2, "image": "002.jpg", "text": "Why?", "category": "complex"},
]
CONTEXTS: list[dict[str, Any]] = [
    {"id": 2, "image": "002.jpg", "caption": ["A dog.", "A cat."]},
    {"id": 1, "image": "001.jpg", "caption": "A beach."},
]
ANSWERS: list[dict[str, Any]] = [
    {"question_id": 2, "text": "Because.", "answer_id": "c", "model_id": "gpt-4", "metadata": {}},
    {"question_id": "0", "text": "Waikiki.", "answer_id": "a"},
    {"question_id": 1, "text": "Sand\nand sea.", "answer_id": "b"},
]
PROMPT = """[Context]
A beach.

[Question]
What is the name?

[Assistant 1]
Waikiki.

[End of Assistant 1]

[Assistant 2]
I | do
not know

[End of Assistant 2]

[System]
We would like to request your feedback on the performance of two AI assistants in response to the user question \
displayed above. The user asks the question on observing an image. For your reference, the visual content in the image \
is represented with a few sentences describing the image.\x20
Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an \
overall score on a scale of 1 to 10, where a higher score indicates better overall performance.
Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, \
respectively. The two scores are separated by a space.
In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential bias and \
ensuring that the order in which the responses were presented does not affect your judgment.

"""


def lines(rows: Any) -> str:
    return rows if isinstance(rows, str) else "".join(f"{json.dumps(row)}\n" for row in rows)


def write(root: Path, questions: Any = None, contexts: Any = None, answers: Any = None) -> Path:
    """The official layout with two small pictures; context and answers in another order than the questions."""
    (root / "images").mkdir(parents=True)
    for name in ("001.jpg", "002.jpg"):
        Image.new("RGB", (8, 6), "green").save(root / "images" / name)
    for name, rows, good in (
        ("questions.jsonl", questions, QUESTIONS),
        ("context.jsonl", contexts, CONTEXTS),
        ("answers_gpt4.jsonl", answers, ANSWERS),
    ):
        (root / name).write_text(lines(good if rows is None else rows), encoding="utf-8")
    return root


def records(*replies: tuple[str, str]) -> list[AnswerRecord]:
    """One record per category and reply."""
    return [
        AnswerRecord(str(k), "", "", "", "", kind, facts={"replies": [reply]})
        for k, (kind, reply) in enumerate(replies)
    ]


def test_load_joins_by_id(tmp_path: Path) -> None:
    first, second, third = load(write(tmp_path))
    assert (first.id, first.prompt, first.kind, first.expected) == ("0", "What is the name?", "conv", "Waikiki.")
    assert first.pictures == (tmp_path / "images" / "001.jpg",) and first.image == second.image == "001.jpg"
    assert second.expected == "Sand\nand sea."
    assert third.gold == {"reference": "Because.", "context": "A dog.\nA cat."}


def test_request_is_the_official_text(tmp_path: Path) -> None:
    asked = request(load(write(tmp_path))[0], "I | do\nnot know", 0)
    assert asked.prompt == PROMPT
    assert asked.system == "You are a helpful and precise assistant for checking the quality of the answer."
    assert (asked.temperature, asked.max_tokens) == (0.2, 1024)
    assert TASK.judging is not None
    assert (TASK.judging.tries, TASK.judging.official_model) == (1, "gpt-4-0314")


@pytest.mark.parametrize(
    ("reply", "pair"),
    [
        ("8 9", (8, 9)), ("8 9\nBoth are good, 3 4.", (8, 9)), ("8,9", (8, 9)), ("7.5 10", (7.5, 10)),
        ("11 -2", (11, -2)),
        ("8\t9 7", None), ("\t8 9\t", (8, 9)), ("٨ ９", (8, 9)), ("1e9 1", (1e9, 1)),
        ("1_0 9", (10, 9)), ("8 9\r\n", (8, 9)),
        ("8, 9", None), ("8 9 ", None), (" 8 9", None), ("8  9", None), ("Scores: 8 9", None), ("8", None), ("", None),
        ("8 9 10", None), ("\n8 9", None), ("8/10 9/10", None), ("½ 1", None), ("nan 9", None), ("9 inf", None),
        ("8 9" * 3500, None), ("x" * 10_000, None),
    ],
)  # fmt: skip
def test_read(reply: str, pair: tuple[float, float] | None) -> None:
    assert read(reply) == pair


@given(st.text() | st.text("0123456789., \n-e", max_size=8), st.text())
def test_only_the_first_line_counts(reply: str, rest: str) -> None:
    first = reply.split("\n")[0]
    assert read(f"{first}\n{rest}") == read(first)


@pytest.mark.parametrize(
    ("reply", "score", "parsed"),
    [("8 9", 0.9, "8 9"), ("8 12", 1.0, "8 12"), ("8 -1", 0.0, "8 -1"), ("8, 9", 0.0, "unreadable")],
)
def test_mark(reply: str, score: float, parsed: str) -> None:
    found = mark_replies(Question("0", "q"), "a", [reply])
    assert (found.score, found.parsed) == (score, parsed)
    assert TASK.mark(Question("0", "q"), "a").score is None
    with pytest.raises(DataError, match="has not been judged"):
        mark_replies(Question("0", "q"), "a", [])


def test_metrics() -> None:
    found = metrics(records(("conv", "8 6\nwhy"), ("conv", "9 7"), ("complex", "9 3"), ("detail", "10 5")))
    assert found == {
        "relative": 58.3, "reference": 90.0, "model": 52.5, "unreadable": 0,
        "complex/relative": 33.3, "complex/reference": 90.0, "complex/model": 30.0, "complex/unreadable": 0,
        "conv/relative": 76.5, "conv/reference": 85.0, "conv/model": 65.0, "conv/unreadable": 0,
        "detail/relative": 50.0, "detail/reference": 100.0, "detail/model": 50.0, "detail/unreadable": 0,
    }  # fmt: skip
    assert TASK.headline == "relative"


def test_unreadable_pairs_are_averaged_in() -> None:
    found = metrics(records(("conv", "8 6"), ("conv", "8, 9"), ("conv", "9 7")))
    # (8 - 1 + 9)/3 = 5.333 and (6 - 1 + 7)/3 = 4
    assert (found["relative"], found["reference"], found["model"], found["unreadable"]) == (75.0, 53.3, 40.0, 1)


def test_means_are_rounded_before_they_are_divided() -> None:
    found = metrics(records(*[("conv", "1 1")] + [("conv", "0 0.003")] * 7))
    assert found["relative"] == 102.4  # 0.128/0.125; unrounded 0.127625/0.125 is 102.1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no answers"),
        (records(("conv", "x"), ("detail", "")), "none of 2 replies"),
        (records(("conv", "1 5"), ("conv", "x")), "mean ratings of all, 0.0"),
        (records(("conv", "1e308 1"), ("conv", "1e308 1")), "give no ratio"),
        (records(("", "8 9")), "category ''"),
        (records(("all", "8 9")), "category 'all'"),
        ([AnswerRecord("7", "", "", "", "", "conv")], "'7' has not been judged"),
        ([AnswerRecord("7", "", "", "", "", "conv", facts={"replies": [["8", "9"]]})], "has not been judged"),
        ([AnswerRecord("7", "", "", "", "", "conv", facts={"replies": "8 9"})], "has not been judged"),
    ],
)
def test_no_silent_figure(rows: list[AnswerRecord], message: str) -> None:
    with pytest.raises(DataError, match=message):
        metrics(rows)


def test_rule_of_the_data_set(tmp_path: Path) -> None:
    role, rule = "Assistant", PROMPT.split("[System]\n")[1].removesuffix("\n\n")
    rules = {f"llava_bench_{kind}": {"role": role, "prompt": rule} for kind in ("conv", "detail", "complex")}
    write(tmp_path)
    (tmp_path / "rule.json").write_text(json.dumps(rules), encoding="utf-8")
    assert len(load(tmp_path)) == 3
    rules["llava_bench_detail"] = {"role": role, "prompt": rule + " Be kind."}
    for bad in (json.dumps(rules), "{}", "[]", '{"llava_bench_conv": 3}', "{"):
        (tmp_path / "rule.json").write_text(bad, encoding="utf-8")
        with pytest.raises(DataError, match=r"rule\.json"):
            load(tmp_path)


def test_ids_and_submission(tmp_path: Path) -> None:
    questions = load(write(tmp_path))
    assert [TASK.line_key(TASK.question_line(question)) for question in questions] == ["0", "1", "2"]
    assert TASK.question_line(questions[0]) == {"question_id": 0, "prompt": "What is the name?"}
    assert TASK.question_line(Question("07", ""))["question_id"] == "07"
    assert TASK.submission is not None
    answers = [AnswerRecord(question.id, "", question.prompt, "", "a\nb é") for question in questions]
    path = TASK.submission(answers, tmp_path / "model-3.1B")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert path.name == "model-3.1B.jsonl" and [row["question_id"] for row in rows] == [0, 1, 2]
    assert {row["text"] for row in rows} == {"a\nb é"} and rows[2]["prompt"] == "Why?"


def test_from_line() -> None:
    question = TASK.from_line({"text": "Hawaii.", "question": "Where?", "answer": "Waikiki.", "context": "A beach."})
    assert "[Assistant 1]\nWaikiki.\n" in request(question, "Hawaii.", 0).prompt
    with pytest.raises(DataError):
        TASK.from_line({"text": "a", "context": ["b"]})


def changed(rows: list[dict[str, Any]], number: int, **values: Any) -> list[dict[str, Any]]:
    return [{**row, **values} if k == number else row for k, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"questions": ""}, r"questions\.jsonl"),
        ({"questions": "[]"}, r"questions\.jsonl:1: not a JSON object"),
        ({"questions": lines(QUESTIONS) + '{"question'}, r"questions\.jsonl:4: not a JSON line"),
        ({"questions": [*QUESTIONS, QUESTIONS[0]]}, "'0' occurs twice"),
        ({"questions": QUESTIONS[:2]}, r"answers_gpt4\.jsonl: answers '2', which .*questions\.jsonl lacks"),
        ({"questions": changed(QUESTIONS, 1, category="all")}, r"questions\.jsonl:2: `category` is 'all'"),
        ({"questions": changed(QUESTIONS, 1, question_id=True)}, r"questions\.jsonl:2: `question_id` is a bool"),
        ({"questions": changed(QUESTIONS, 1, question_id=1.0)}, "`question_id` is a float"),
        ({"questions": changed(QUESTIONS, 1, text=None)}, "`text` is a NoneType"),
        ({"questions": changed(QUESTIONS, 1, text="\udfff")}, "surrogates not allowed"),
        ({"questions": changed(QUESTIONS, 1, image="../context.jsonl")}, r"context\.jsonl: lacks '\.\./c"),
        ({"questions": changed(QUESTIONS, 1, image="003.jpg")}, r"context\.jsonl: lacks '003\.jpg'"),
        ({"contexts": [*CONTEXTS, CONTEXTS[0]]}, r"context\.jsonl:3: `image` '002\.jpg' occurs twice"),
        ({"contexts": changed(CONTEXTS, 0, caption=[1])}, r"context\.jsonl:1: `caption` is a int"),
        ({"contexts": changed(CONTEXTS, 0, caption={})}, r"context\.jsonl:1: `caption` is a dict"),
        ({"contexts": ""}, r"context\.jsonl: lacks"),
        ({"answers": ANSWERS[:2]}, r"answers_gpt4\.jsonl: lacks '1', which .*questions\.jsonl:2 needs"),
        ({"answers": [*ANSWERS, {"question_id": 0, "text": ""}]}, r"gpt4\.jsonl:4: `question_id` '0' occurs twice"),
        ({"answers": [{"question_id": 0}]}, "lacks `text`"),
    ],
)  # fmt: skip
def test_hostile_files(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    write(tmp_path, **files)
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path)
    assert "\n" not in error.value.message


def test_a_picture_outside_the_folder(tmp_path: Path) -> None:
    write(tmp_path, changed(QUESTIONS, 0, image="../x"), [*CONTEXTS, {"image": "../x", "caption": "c"}])
    with pytest.raises(DataError, match="not a plain path"):
        load(tmp_path)
    (tmp_path / "images" / "001.jpg").unlink()
    (tmp_path / "questions.jsonl").write_text(lines(QUESTIONS), encoding="utf-8")
    with pytest.raises(DataError, match=r"001\.jpg: the picture"):
        load(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"questions\.jsonl.*context\.jsonl.*answers_gpt4\.jsonl.*images"):
        load(tmp_path)
