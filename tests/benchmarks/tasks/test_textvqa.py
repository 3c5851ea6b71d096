"""TextVQA on a made-up set of three pictures in the official layout."""

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
from tinyllava_edge.benchmarks.tasks import textvqa
from tinyllava_edge.errors import DataError

SUFFIX = "Answer the question using a single word or phrase."


def rows() -> list[dict[str, Any]]:
    common = {"image_classes": ["Sign"], "flickr_original_url": "", "image_width": 4, "image_height": 3}
    asked = [
        (34602, "003a8ae2ef43b901", "what is the brand of this camera?", ["dakota"] * 7 + ["clos culombu"] * 3),
        (34603, "003a8ae2ef43b901", "What Year?", ["1,990"] * 4 + ["1990"] * 4 + ["two"] * 2),
        (34604, "0054c91397f2fe05", "what does it say?", ["McDonald's"] * 9 + ["stop"]),
        (34605, "005635e119b9f32f", "what is on it?", ["nokia"] * 10),
    ]
    return [
        {
            "question_id": identity,
            "image_id": picture,
            "question": text,
            "answers": answers,
            "set_name": "val",
            **common,
        }
        for identity, picture, text, answers in asked
    ]


def llava_rows() -> list[dict[str, Any]]:
    return [
        {
            "question_id": row["image_id"],
            "image": f"{row['image_id']}.jpg",
            "text": f"{row['question']}\nReference OCR token: LLAVA, {number}\n{SUFFIX}",
            "category": "default",
        }
        for number, row in enumerate(rows())
    ]


def rosetta() -> list[dict[str, Any]]:
    return [
        {"image_id": "003a8ae2ef43b901", "ocr_tokens": ["DAKOTA", "DIGI\nTAL"], "ocr_info": []},
        {"image_id": "0054c91397f2fe05", "ocr_tokens": [], "ocr_info": []},
        {"image_id": "005635e119b9f32f", "ocr_tokens": ["a, b", "c"], "ocr_info": []},
    ]


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, found: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / textvqa.ANNOTATIONS, {"dataset_type": "val", "dataset_version": "0.5.1", "data": rows()})
    write_lines(tmp_path / textvqa.PROMPTS, llava_rows())
    (tmp_path / "train_images").mkdir()
    for row in rows():
        Image.new("RGB", (4, 3)).save(tmp_path / "train_images" / f"{row['image_id']}.jpg")
    return tmp_path


def test_load_without_tokens(data: Path) -> None:
    questions = textvqa.TASK.load(data)
    assert [question.id for question in questions] == ["34602", "34603", "34604", "34605"]
    assert questions[1].prompt == f"What Year?\n{SUFFIX}"
    assert questions[1].pictures == (data / "train_images" / "003a8ae2ef43b901.jpg",)
    assert questions[1].gold == rows()[1]["answers"]
    assert questions[0].expected == "dakota"


def test_load_llavas_prompts_in_the_annotations_order(data: Path) -> None:
    write_lines(data / textvqa.PROMPTS, llava_rows()[::-1])
    questions = textvqa.OCR.load(data)
    assert [question.id for question in questions] == ["34602", "34603", "34604", "34605"]
    assert questions[1].prompt == f"What Year?\nReference OCR token: LLAVA, 1\n{SUFFIX}"
    assert textvqa.OCR.protocol != textvqa.TASK.protocol


def test_prompts_are_joined_in_lower_case(data: Path) -> None:
    found = llava_rows()
    found[1]["text"] = found[1]["text"].replace("What Year?", "what year?")
    write_lines(data / textvqa.PROMPTS, found)
    assert textvqa.OCR.load(data)[1].prompt.startswith("what year?\n")


def test_prompts_built_from_rosetta_tokens(data: Path) -> None:
    (data / textvqa.PROMPTS).unlink()
    write(data / textvqa.TOKENS, {"data": [*rosetta(), rosetta()[0]]})
    prompts = [question.prompt for question in textvqa.OCR.load(data)]
    assert prompts[1] == f"What Year?\nReference OCR token: DAKOTA, DIGI TAL\n{SUFFIX}"
    assert prompts[2] == f"what does it say?\nReference OCR token: \n{SUFFIX}"
    assert [textvqa.question_of(prompt) for prompt in prompts] == [row["question"] for row in rows()]


def test_scores_and_metrics_by_hand(data: Path) -> None:
    """Three of ten are 0.9; `2` matches two; `McDonald's` becomes `mcdonald 's` on both sides; `Nokia` is unanimous."""
    questions = textvqa.TASK.load(data)
    texts = ["Clos Culombu.", "two", "mcdonald's", "Nokia"]
    records = [record_of(textvqa.TASK, question, text) for question, text in zip(questions, texts, strict=True)]
    assert [record.score for record in records] == pytest.approx([0.9, 0.6, 1, 1])
    assert [record.parsed for record in records] == ["clos culombu", "2", "mcdonald 's", "nokia"]
    assert textvqa.TASK.metrics(records) == {"accuracy": 87.5}
    assert textvqa.TASK.metrics([replace(records[0], score=None)]) == {}
    assert textvqa.TASK.mark(questions[1], "1990").score == 1


def test_steps_for_explain() -> None:
    mark = textvqa.TASK.mark(textvqa.TASK.from_line({"answers": "Two"}), "2, the?")
    assert mark.score == 1
    assert mark.steps == (
        ("tokenised", "2 the"),
        ("stripped", "2 the"),
        ("punctuation", "2 the"),
        ("digits and articles", "2"),
        ("compared as", "2"),
        ("with", " | ".join("2" * 10)),
    )
    assert textvqa.TASK.mark(textvqa.TASK.from_line({}), "Two").score is None
    with pytest.raises(DataError, match="holds 3"):
        textvqa.TASK.from_line({"answers": ["a", "b", "c"]})


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("what?\nReference OCR token: A, B\nsuffix", "what?"),
        ("Reference OCR token: A, B\nwhat?\nsuffix", "what?"),
        ("Reference OCR token:A\nwhat? Reference OCR token: x\nsuffix", "what? Reference OCR token: x"),
        ("what?\nsuffix", "what?"),
        ("what? Reference OCR token: A\nsuffix", "what? Reference OCR token: A"),
        ("OCR tokens: A. Question: What? Short answer:", "What?"),
    ],
)
def test_question_of(prompt: str, question: str) -> None:
    assert textvqa.question_of(prompt) == question


@pytest.mark.parametrize(
    "prompt", ["", "what?", "what?\nno token line\nsuffix", "a\nReference OCR token: A\nb\nc", "OCR tokens: A"]
)
def test_other_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(DataError, match="none of TextVQA's"):
        textvqa.question_of(prompt)


@given(st.text(st.characters(blacklist_characters="\n", codec="utf-8")), st.lists(st.text("A,b: ")))
def test_question_survives_its_prompt(question: str, tokens: list[str]) -> None:
    tokens_line = f"Reference OCR token: {', '.join(tokens)}"
    prompts = ((textvqa.TASK, f"{question}\n{SUFFIX}"), (textvqa.OCR, f"{question}\n{tokens_line}\n{SUFFIX}"))
    for task, prompt in prompts:
        if not question.startswith(("Reference OCR token:", "OCR tokens: ")):
            line = {"question_id": "p", "prompt": prompt}
            assert task.line_key(line) == textvqa.join_key("p", question)


def test_answer_lines_join_and_can_be_written(data: Path) -> None:
    for task in (textvqa.TASK, textvqa.OCR):
        questions = task.load(data)
        keys = [task.line_key(task.question_line(question)) for question in questions]
        assert len(set(keys)) == 4
        assert task.question_line(questions[0]) == {"question_id": "003a8ae2ef43b901", "prompt": questions[0].prompt}
        assert task.submission is not None
        path = task.submission([record_of(task, question, "Nokia.") for question in questions], data / task.name)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [task.line_key(line) for line in lines] == keys
        assert {line["text"] for line in lines} == {"Nokia."}


def test_answer_lines_of_another_kind() -> None:
    with pytest.raises(KeyError):
        textvqa.TASK.line_key({"question_id": "x"})
    with pytest.raises(DataError, match="`prompt` is a int"):
        textvqa.TASK.line_key({"question_id": "x", "prompt": 3})


def test_answers_of_the_other_protocol_are_refused(data: Path) -> None:
    """OCR tokens are worth points: LLaVA's own answer files may not pass as answers without them."""
    for task, other, says in ((textvqa.TASK, textvqa.OCR, "with OCR"), (textvqa.OCR, textvqa.TASK, "without OCR")):
        line = other.question_line(other.load(data)[0])
        with pytest.raises(DataError, match=says) as caught:
            task.line_key(line)
        assert caught.value.hint.endswith(other.name)


def test_of_two_equal_questions_the_later_ones_answers_count(data: Path) -> None:
    found = rows()
    found.append({**found[1], "question_id": 1, "question": "what YEAR?", "answers": ["1991"] * 10})
    write(data / textvqa.ANNOTATIONS, {"data": found})
    again = {**llava_rows()[1], "text": f"what YEAR?\nReference OCR token: Z\n{SUFFIX}"}
    write_lines(data / textvqa.PROMPTS, [*llava_rows(), again])
    questions = {question.id: question for question in textvqa.OCR.load(data)}
    assert questions["34603"].gold == questions["1"].gold == ["1991"] * 10
    assert questions["34603"].prompt.startswith("What Year?\nReference OCR token: LLAVA")
    assert questions["1"].prompt.startswith("what YEAR?\nReference OCR token: Z")


Change = Callable[[list[dict[str, Any]]], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found[0]["answers"].pop(), "question 0: `answers` is not 10 texts"),
        (lambda found: found[0]["answers"].append("x"), "`answers` is not 10 texts"),
        (lambda found: found[0].update(answers=[1] * 10), "`answers` is not 10 texts"),
        (lambda found: found[0].update(answers="abcdefghij"), "`answers` is a str"),
        (lambda found: found[1].pop("question"), "question 1: lacks `question`"),
        (lambda found: found[1].update(question="a\nb"), "two lines"),
        (lambda found: found[0].update(question_id="34602"), "`question_id` is a str"),
        (lambda found: found[0].update(question_id=34603), "id '34603' occurs twice"),
        (lambda found: found[0].update(image_id="../x"), "not a plain path"),
        (lambda found: found[0].update(image_id="absent"), "absent.jpg"),
        (lambda found: found[0].update(image_id=5), "`image_id` is a int"),
        (lambda found: found.clear(), "holds no questions"),
    ],
)
def test_damaged_annotations(data: Path, change: Change, message: str) -> None:
    found = rows()
    change(found)
    write(data / textvqa.ANNOTATIONS, {"data": found})
    with pytest.raises(DataError) as caught:
        textvqa.TASK.load(data)
    assert message in caught.value.message
    assert textvqa.ANNOTATIONS in caught.value.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop(), "lacks '005635e119b9f32f"),
        (lambda found: found.append(found[0]), "is not in TextVQA_0.5.1_val.json"),
        (lambda found: found[0].update(text="another?\nReference OCR token: \n" + SUFFIX), "lacks '003a8ae2ef43b901"),
        (lambda found: found[0].update(text=found[0]["text"] + " "), ":1: not question, OCR line"),
        (lambda found: found[0].update(text=f"what?\n{SUFFIX}"), ":1: not question, OCR line"),
        (lambda found: found[0].update(image="0054c91397f2fe05.jpg"), ":1: `image` is not the picture"),
        (lambda found: found[2].update(question_id=7), ":3: `question_id` is a int"),
        (lambda found: found[2].pop("text"), ":3: lacks `text`"),
    ],
)
def test_damaged_prompts(data: Path, change: Change, message: str) -> None:
    found = llava_rows()
    change(found)
    write_lines(data / textvqa.PROMPTS, found)
    with pytest.raises(DataError) as caught:
        textvqa.OCR.load(data)
    assert message in caught.value.message
    assert textvqa.PROMPTS in caught.value.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop(), "lacks picture '005635e119b9f32f'"),
        (
            lambda found: found.append({**found[0], "ocr_tokens": ["other"]}),
            "entry 3: picture '003a8ae2ef43b901' occurs",
        ),
        (lambda found: found[0].update(ocr_tokens=[1]), "entry 0: `ocr_tokens` holds"),
        (lambda found: found[0].update(ocr_tokens="abc"), "entry 0: `ocr_tokens` is a str"),
        (lambda found: found[0].pop("image_id"), "entry 0: lacks `image_id`"),
    ],
)
def test_damaged_tokens(data: Path, change: Change, message: str) -> None:
    (data / textvqa.PROMPTS).unlink()
    found = rosetta()
    change(found)
    write(data / textvqa.TOKENS, {"data": found})
    with pytest.raises(DataError) as caught:
        textvqa.OCR.load(data)
    assert message in caught.value.message
    assert textvqa.TOKENS in caught.value.message


def test_missing_files_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        textvqa.OCR.load(tmp_path)
    assert all(name in caught.value.message for name in (textvqa.ANNOTATIONS, textvqa.PROMPTS, "train_images"))
