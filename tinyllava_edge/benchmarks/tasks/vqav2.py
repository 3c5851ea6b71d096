"""VQAv2: val2014 with labels, scored as the official evaluator does, and test-dev2015 for the server.

Papers print test-dev, whose labels only the server has. The official evaluator leaves answers and annotations as they
are where all annotators agree: `Yes` against ten `yes` scores 0. Published test-dev scores never show that, because
LLaVA uploads answers in m4c's lower case; `vqav2_val_always_normalised` normalises both sides always.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.results import AnswerRecord
from tinyllava_edge.benchmarks.tasks.base import (
    EVAL_ZIP,
    SHORT,
    SINGLE_WORD,
    DataFile,
    Mark,
    Question,
    Task,
    by_kind,
    field_of,
    locate,
    picture_path,
    read_json,
    read_lines,
    scores,
    unique,
)
from tinyllava_edge.benchmarks.vqa_text import (
    leave_one_out,
    line_answers,
    m4c,
    m4c_steps,
    official,
    official_steps,
    one_line,
)
from tinyllava_edge.errors import DataError
from tinyllava_edge.files import write_text

QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
ASKED, ALL = "llava_vqav2_mscoco_test-dev2015.jsonl", "llava_vqav2_mscoco_test2015.jsonl"
SUFFIX = f"\n{SINGLE_WORD}"


def load(root: Path) -> list[Question]:
    """val2014 in the question file's order, with every annotator's answer as it stands.

    Raises:
        DataError: a missing, damaged or inconsistent file; question and place are named.
    """
    found = locate(root, TASK)
    labels = _annotations(found[ANNOTATIONS])
    questions = []
    for number, row in enumerate(field_of(read_json(found[QUESTIONS]), "questions", list, str(found[QUESTIONS]))):
        where = f"{found[QUESTIONS]}: question {number}"
        identity, picture = field_of(row, "question_id", int, where), field_of(row, "image_id", int, where)
        if identity not in labels or labels[identity]["image_id"] != picture:
            raise DataError(f"{where}: {ANNOTATIONS} has no {identity} on picture {picture}", "fetch both files again")
        label, name = labels[identity], f"COCO_val2014_{picture:012d}.jpg"
        questions.append(
            Question(
                id=str(identity),
                prompt=field_of(row, "question", str, where) + SUFFIX,
                pictures=(picture_path(found["val2014"], name, where),),
                image=name,
                gold=label["answers"],
                expected=label["multiple_choice_answer"],
                kind=label["answer_type"],
                facts={"question_type": label["question_type"]},
            )
        )
    if len(questions) < len(labels):
        raise DataError(f"{found[QUESTIONS]}: {len(questions)} questions for {len(labels)} annotations", "fetch both")
    return unique(questions, str(found[QUESTIONS]))


def mark(question: Question, text: str, *, always: bool = False) -> Mark:
    """Score as the official evaluator does: nothing is normalised where all annotators agree, but with `always`."""
    steps = official_steps(text)
    if question.gold is None:
        return Mark(steps[-1][1], None, (*steps, ("compared as", steps[-1][1])))
    answers = [one_line(answer) for answer in question.gold]
    if len(set(answers)) == 1 and not always:
        given = steps[0][1]
        steps = (steps[0], ("normalised", "no: all annotators agree"))
    else:
        given = steps[-1][1]
        answers = [official(answer) for answer in answers]
    return Mark(given, leave_one_out(given, answers), (*steps, ("compared as", given), ("with", " | ".join(answers))))


def from_line(line: Mapping[str, Any]) -> Question:
    """A line of `--explain`: `answers` as many as given, one text for ten that agree. Raises DataError."""
    return Question("line", str(line.get("question", "")), gold=line_answers(line))


def metrics(records: Sequence[AnswerRecord]) -> dict[str, float]:
    """Percent, two decimals as the official evaluator rounds: overall, by answer type, by question type.

    Nothing where no answer has a score, as on test-dev.
    """
    if not scores(records):
        return {}
    found = {"overall": _percent(records)}
    found |= {f"answer_type/{kind}": _percent(group) for kind, group in by_kind(records).items() if kind}
    groups: dict[str, list[AnswerRecord]] = {}
    for record in records:
        groups.setdefault(str(record.facts.get("question_type", "")), []).append(record)
    return found | {f"question_type/{kind}": _percent(group) for kind, group in groups.items() if kind}


def question_line(question: Question) -> dict[str, Any]:
    """As in LLaVA's answer file: `question_id` is a number there."""
    return {"question_id": _number(question.id), "prompt": question.prompt}


def submission(records: Sequence[AnswerRecord], path: Path) -> Path:
    """Write the official evaluator's results file: answers as they were given. Raises DataError for a foreign id."""
    return _write([{"question_id": _number(record.id), "answer": record.given} for record in records], path)


def load_testdev(root: Path) -> list[Question]:
    """test-dev2015 from LLaVA's question file.

    The server wants all of test2015. So each question carries its place in that list, how long it is, and the ids that
    follow it there and are not asked; the first one also carries the ids before it.

    Raises:
        DataError: a missing or damaged file, a prompt without the suffix, or an id that test2015 lacks.
    """
    found = locate(root, TESTDEV)
    places: dict[int, int] = {}
    for where, row in read_lines(found[ALL]):
        identity = field_of(row, "question_id", int, where)
        if identity in places:
            raise DataError(f"{where}: id {identity} occurs twice", "restore LLaVA's file")
        places[identity] = len(places)
    questions = []
    for where, row in read_lines(found[ASKED]):
        identity, name = field_of(row, "question_id", int, where), field_of(row, "image", str, where)
        text = field_of(row, "text", str, where)
        if identity not in places:
            raise DataError(f"{where}: id {identity} is not in {found[ALL].name}", "restore LLaVA's two files")
        if not text.endswith(SUFFIX):
            raise DataError(f"{where}: the prompt does not end in {SINGLE_WORD!r}", "restore LLaVA's file")
        picture = picture_path(found["test2015"], name, where)
        questions.append(Question(str(identity), text, (picture,), name))
    asked = unique(questions, str(found[ASKED]))
    rest = _unasked(list(places), {int(question.id) for question in asked})
    of = len(places)
    return [replace(q, facts={"place": places[int(q.id)], "of": of, **rest[int(q.id)]}) for q in asked]


def mark_testdev(question: Question, text: str) -> Mark:
    """What LLaVA uploads: the answer in m4c's form. Only the server has labels, so there is no score."""
    steps = m4c_steps(text)
    return Mark(steps[-1][1], None, (*steps, ("uploaded as", steps[-1][1])))


def from_line_testdev(line: Mapping[str, Any]) -> Question:
    """A line of `--explain`; `answers` play no part."""
    return Question("line", str(line.get("question", "")))


def submission_testdev(records: Sequence[AnswerRecord], path: Path) -> Path:
    """Write the server's file: all of test2015 in its order, m4c's form of our answers, empty text for the rest.

    Raises:
        DataError: records of a part of test-dev, from which the whole list of ids can't be told.
    """
    placed: list[tuple[int, list[dict[str, Any]]]] = []
    total = 0
    for record in records:
        where = f"record {record.id}"
        place, total = field_of(record.facts, "place", int, where), field_of(record.facts, "of", int, where)
        before, after = (
            [{"question_id": identity, "answer": ""} for identity in record.facts.get(key, ())]
            for key in ("unasked_before", "unasked_after")
        )
        placed.append((place, [*before, {"question_id": _number(record.id), "answer": m4c(record.given)}, *after]))
    lines = [line for _, group in sorted(placed, key=lambda pair: pair[0]) for line in group]
    if not lines or len({line["question_id"] for line in lines}) != total or len(lines) != total:
        raise DataError(
            f"{path}: answers to a part of test-dev, {len(lines)} of {total} ids are known",
            "the server wants all: evaluate without a limit, and join all shards",
        )
    return _write(lines, path)


def _annotations(path: Path) -> dict[int, dict[str, Any]]:
    labels: dict[int, dict[str, Any]] = {}
    for number, row in enumerate(field_of(read_json(path), "annotations", list, str(path))):
        where = f"{path}: annotation {number}"
        identity = field_of(row, "question_id", int, where)
        if identity in labels:
            raise DataError(f"{where}: id {identity} occurs twice", "restore the official file")
        answers = field_of(row, "answers", list, where)
        # the official scorer tells annotators apart by this number
        if not answers or len({field_of(answer, "answer_id", int, where) for answer in answers}) < len(answers):
            raise DataError(f"{where}: no answers, or two with one `answer_id`", "restore the official file")
        texts = ("multiple_choice_answer", "answer_type", "question_type")
        labels[identity] = {
            "image_id": field_of(row, "image_id", int, where),
            "answers": [field_of(answer, "answer", str, where) for answer in answers],
            **{key: field_of(row, key, str, where) for key in texts},
        }
    return labels


def _unasked(everything: Sequence[int], asked: set[int]) -> dict[int, dict[str, list[int]]]:
    """Asked id → the ids of `everything` that follow it and are not asked, and before the first those before it."""
    rest: dict[int, dict[str, list[int]]] = {}
    before: list[int] = []
    after = before
    for identity in everything:
        if identity in asked:
            after = []
            rest[identity] = {"unasked_after": after} if rest else {"unasked_before": before, "unasked_after": after}
        else:
            after.append(identity)
    return {identity: {key: ids for key, ids in lists.items() if ids} for identity, lists in rest.items()}


def _percent(records: Sequence[AnswerRecord]) -> float:
    found = scores(records)
    return round(100 * float(sum(found)) / len(found), 2) if found else 0.0


def _number(identity: str) -> int:
    if not (identity.isascii() and identity.isdigit()):
        raise DataError(f"{identity!r} is no VQAv2 question id", "name answers to this task")
    return int(identity)


def _write(lines: Sequence[Mapping[str, Any]], path: Path) -> Path:
    target = path.with_name(f"{path.name}.json")
    write_text(target, json.dumps(lines))
    return target


_SOURCE = "visualqa.org/download.html"
TASK = Task(
    name="vqav2_val",
    title="VQAv2 (val2014)",
    protocol=f"vqav2-val2014/single-word/official-vqa-eval/{SHORT}",
    folder="vqav2",
    files=(
        DataFile((QUESTIONS, f"questions/{QUESTIONS}", f"Questions/{QUESTIONS}"), "questions", _SOURCE),
        DataFile((ANNOTATIONS, f"annotations/{ANNOTATIONS}", f"Annotations/{ANNOTATIONS}"), "annotations", _SOURCE),
        DataFile(("val2014", "images/val2014", "Images/mscoco/val2014"), "pictures", "cocodataset.org/#download"),
    ),
    max_tokens=SHORT,
    headline="overall",
    load=load,
    from_line=from_line,
    mark=mark,
    metrics=metrics,
    question_line=question_line,
    submission=submission,
)
ALWAYS_NORMALISED = replace(
    TASK,
    name="vqav2_val_always_normalised",
    title="VQAv2 (val2014, always normalised)",
    protocol=f"vqav2-val2014/single-word/always-normalised/{SHORT}",
    mark=partial(mark, always=True),
)
TESTDEV = Task(
    name="vqav2_test",
    title="VQAv2",
    protocol=f"vqav2-test-dev2015/single-word/server-m4c-upload/{SHORT}",
    folder="vqav2",
    files=(
        DataFile((ASKED,), "questions of test-dev", EVAL_ZIP),
        DataFile((ALL,), "all ids that the server wants", EVAL_ZIP),
        DataFile(("test2015", "images/test2015"), "pictures", "cocodataset.org/#download"),
    ),
    max_tokens=SHORT,
    headline="overall",
    load=load_testdev,
    from_line=from_line_testdev,
    mark=mark_testdev,
    metrics=metrics,
    question_line=question_line,
    submission=submission_testdev,
)
