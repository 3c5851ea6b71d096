"""POPE: the parser's quirks, figures by hand, both versions of the label files, misaligned and hostile files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tinyllava_edge.benchmarks.answer_files import read_answers, write_answers
from tinyllava_edge.benchmarks.evaluation import record_of
from tinyllava_edge.benchmarks.tasks.pope import HEAD, SPLITS, TASK, parse
from tinyllava_edge.errors import DataError

SUFFIX = "\nAnswer the question using a single word or phrase."
FIRST = {"adversarial": 1, "random": 10000001, "popular": 20000001}
LABELS = {"adversarial": ("yes", "no", "yes"), "random": ("no", "yes", "no"), "popular": ("yes", "yes", "no")}
THINGS = ("dog", "cup", "tree")


def write_set(root: Path) -> Path:
    """Three pictures, one question on each in every split, in the official layout."""
    (root / "val2014").mkdir(parents=True)
    (root / "coco").mkdir()
    asked = []
    for split in SPLITS:
        rows = []
        for k, thing in enumerate(THINGS):
            image = f"COCO_val2014_{k:012d}.jpg"
            Image.new("RGB", (4, 4), (k, 0, 0)).save(root / "val2014" / image)
            text = f"Is there a {thing} in the image?"
            rows.append({"question_id": k + 1, "image": image, "text": text, "label": LABELS[split][k]})
            number = FIRST[split] + k
            asked.append({"question_id": number, "image": image, "text": text + SUFFIX, "category": split})
        (root / "coco" / f"coco_pope_{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "llava_pope_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return root


@pytest.mark.parametrize(
    ("answer", "counts_as"),
    [
        ("No", "no"),
        ("no", "no"),
        ("No.", "no"),
        ("No, there is none", "no"),
        ("there is not", "no"),
        ("Yes", "yes"),
        ("NO", "yes"),
        ("No\n", "yes"),
        ("None", "yes"),
        ("There isn't", "yes"),
        ("", "yes"),
        ("Yes. No", "yes"),
        (".no", "yes"),
        ("n,o", "no"),
    ],
)
def test_parser_has_the_official_quirks(answer: str, counts_as: str) -> None:
    assert parse(answer) == counts_as


@given(st.text())
def test_every_answer_is_yes_or_no(answer: str) -> None:
    assert parse(answer) in ("yes", "no")
    assert parse(answer + ".no") == parse(answer)  # what follows a full stop is never read


def test_figures_by_hand(tmp_path: Path) -> None:
    questions = TASK.load(write_set(tmp_path))
    assert [question.id for question in questions][:4] == ["1", "2", "3", "10000001"]
    assert questions[0].prompt == "Is there a dog in the image?" + SUFFIX
    said = ["Yes", "Yes", "No", "Yes", "Yes", "No", "No", "No", "No"]
    records = [record_of(TASK, question, text) for question, text in zip(questions, said, strict=True)]
    found = TASK.metrics(records)
    # adversarial: 1 of 2 said yes is right, 1 of 2 labelled yes was found; random: 1 of 2 and 1 of 1; popular: none
    assert found["adversarial/f1"] == pytest.approx(50)
    assert found["random/precision"] == pytest.approx(50) and found["random/recall"] == pytest.approx(100)
    assert found["random/f1"] == pytest.approx(200 / 3)
    assert found["popular/f1"] == 0 and found["popular/precision"] == 0 and found["popular/yes_ratio"] == 0
    assert found["adversarial/accuracy"] == pytest.approx(100 / 3)
    assert found["f1"] == pytest.approx((50 + 200 / 3 + 0) / 3)


def test_answer_file_comes_back(tmp_path: Path) -> None:
    questions = TASK.load(write_set(tmp_path))
    records = [record_of(TASK, question, "No") for question in questions]
    path = tmp_path / "answers.jsonl"
    write_answers(path, TASK, records, "tiny")
    first = json.loads(path.read_text().splitlines()[3])
    assert first["question_id"] == 10000001 and first["prompt"].endswith(SUFFIX)
    assert TASK.metrics(read_answers(path, TASK, questions)) == TASK.metrics(records)


def test_head_asks_the_label_files(tmp_path: Path) -> None:
    root = write_set(tmp_path)
    (root / "llava_pope_test.jsonl").unlink()
    questions = HEAD.load(root)
    assert len({question.id for question in questions}) == 9
    assert questions[0].prompt == "Is there a dog in the image?" + SUFFIX
    with pytest.raises(DataError, match="llava_pope_test.jsonl"):
        TASK.load(root)


def test_labels_of_another_version_are_refused(tmp_path: Path) -> None:
    root = write_set(tmp_path)
    labels = root / "coco" / "coco_pope_random.json"
    lines = labels.read_text().splitlines(keepends=True)
    labels.write_text("".join([lines[1], lines[0], lines[2]]))
    with pytest.raises(DataError, match="llava_pope_test.jsonl:4: asks something else") as caught:
        TASK.load(root)
    assert "e3e3926" in caught.value.hint and "pope_head" in caught.value.hint
    labels.write_text("".join(lines[:2]))
    with pytest.raises(DataError, match="has no row 3"):
        TASK.load(root)
    labels.write_text("".join([*lines, lines[0]]))
    with pytest.raises(DataError, match="3 of the 4 random"):
        TASK.load(root)


@pytest.mark.parametrize(("task", "count"), [(TASK, 3000), (HEAD, 2910)])
def test_the_other_versions_size_is_named(tmp_path: Path, task: object, count: int) -> None:
    root = write_set(tmp_path)
    path = root / "coco" / "coco_pope_random.json"
    path.write_text(path.read_text().splitlines(keepends=True)[0] * count)
    with pytest.raises(DataError, match=f"{count} rows"):
        task.load(root)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        ("coco/coco_pope_popular.json", '"label": "no"', '"label": "maybe"', "json:3: label 'maybe'"),
        ("coco/coco_pope_popular.json", '"label": "no"', '"lable": "no"', "json:3: lacks `label`"),
        ("coco/coco_pope_popular.json", '"no"}', '"no', "json:3: not a JSON line"),
        ("llava_pope_test.jsonl", '"popular"', '"rare"', "jsonl:7: category 'rare'"),
        ("llava_pope_test.jsonl", '"question_id": 2,', '"question_id": 1,', "id '1' occurs twice"),
        ("llava_pope_test.jsonl", '"question_id": 2,', '"question_id": "2",', "jsonl:2: `question_id` is a str"),
        ("llava_pope_test.jsonl", "\\nAnswer", " Answer", "jsonl:1: asks something else"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, old: str, new: str, says: str) -> None:
    path = write_set(tmp_path) / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=says):
        TASK.load(tmp_path)


def test_pictures_stay_inside_and_must_exist(tmp_path: Path) -> None:
    root = write_set(tmp_path)
    (root / "val2014" / "COCO_val2014_000000000001.jpg").unlink()
    with pytest.raises(DataError, match=r"COCO_val2014_000000000001.jpg: the picture of .*jsonl:2"):
        TASK.load(root)
    for path in root.rglob("*.json*"):
        path.write_text(path.read_text().replace("COCO_val2014_000000000001.jpg", "../secret.jpg"))
    with pytest.raises(DataError, match="not a plain path"):
        TASK.load(root)


def test_explain_line() -> None:
    question = TASK.from_line({"text": "No\n", "answers": "no"})
    mark = TASK.mark(question, "No\n")
    assert (mark.parsed, mark.score) == ("yes", 0.0)
    assert TASK.mark(TASK.from_line({"text": "x"}), "x").score is None
    with pytest.raises(DataError, match="neither yes nor no"):
        TASK.from_line({"text": "x", "answers": "perhaps"})
