"""GQA testdev-balanced: the answer without final full stops, in lower case, equal to the annotation or not.

Of the official script's figures, accuracy, binary, open and accuracy by type are given. Its validity, plausibility and
distribution need files that the release lacks or compare answers with each other, and no paper of this field prints
them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.results import AnswerRecord
from tinyllava_edge.benchmarks.tasks.base import (
    SHORT,
    SINGLE_WORD,
    DataFile,
    Mark,
    Question,
    Task,
    by_kind,
    field_of,
    locate,
    mean,
    picture_path,
    read_json,
    scores,
    unique,
)
from tinyllava_edge.errors import DataError
from tinyllava_edge.files import write_text

QUESTIONS = "testdev_balanced_questions.json"
OPEN = "query"  # the one structural type that the official script calls open; all others are binary


def load(root: Path) -> list[Question]:
    """The balanced questions in the file's order; `kind` is the structural type.

    Raises:
        DataError: a missing or damaged file, an id that occurs twice, or a missing picture; the place is named.
    """
    found = locate(root, TASK)
    path = found[QUESTIONS]
    rows = read_json(path)
    if not isinstance(rows, dict):
        raise DataError(f"{path}: not an object of questions by id", "restore the official file")
    questions = []
    for identity, row in rows.items():
        where = f"{path}: question {identity!r:.40}"
        if not field_of(row, "isBalanced", bool, where):
            continue
        types, answer = field_of(row, "types", dict, where), field_of(row, "answer", str, where)
        name = f"{field_of(row, 'imageId', str, where)}.jpg"
        questions.append(
            Question(
                id=identity,
                prompt=f"{field_of(row, 'question', str, where)}\n{SINGLE_WORD}",
                pictures=(picture_path(found["images"], name, where),),
                image=name,
                gold=answer,
                expected=answer,
                kind=field_of(types, "structural", str, where),
                facts={"semantic": field_of(types, "semantic", str, where)},
            )
        )
    return unique(questions, str(path))


def mark(question: Question, text: str) -> Mark:
    """1 or 0 by equality, after LLaVA's conversion: no strip, no articles, no number words."""
    bare = text.rstrip(".")
    parsed = bare.lower()
    steps = (("without final full stops", bare), ("compared as", parsed))
    if question.gold is None:
        return Mark(parsed, None, steps)
    return Mark(parsed, float(parsed == question.gold), (*steps, ("with", question.gold)))


def from_line(line: Mapping[str, Any]) -> Question:
    """A line of `--explain`: `answers` as one text or a list of one. Raises DataError."""
    answers = line.get("answers")
    if isinstance(answers, list) and len(answers) == 1:
        answers = answers[0]
    if answers is not None and not isinstance(answers, str):
        raise DataError(f"`answers` is {answers!r:.80}", "GQA has one right answer: give one text")
    return Question("line", str(line.get("question", "")), gold=answers, expected=answers or "")


def metrics(records: Sequence[AnswerRecord]) -> dict[str, float]:
    """Percent, two decimals as the official script prints: accuracy, binary, open, by structural and semantic type.

    Nothing where no answer has a score. A part without questions is 0, as upstream.
    """
    if not scores(records):
        return {}
    found = {
        "accuracy": _percent(records),
        "binary": _percent([record for record in records if record.question_type != OPEN]),
        "open": _percent([record for record in records if record.question_type == OPEN]),
    }
    found |= {f"structural/{kind}": _percent(group) for kind, group in by_kind(records).items() if kind}
    groups: dict[str, list[AnswerRecord]] = {}
    for record in records:
        groups.setdefault(str(record.facts.get("semantic", "")), []).append(record)
    return found | {f"semantic/{kind}": _percent(group) for kind, group in groups.items() if kind}


def submission(records: Sequence[AnswerRecord], path: Path) -> Path:
    """Write the official script's predictions file, answers as LLaVA converts them."""
    target = path.with_name(f"{path.name}.json")
    lines = [{"questionId": record.id, "prediction": record.given.rstrip(".").lower()} for record in records]
    write_text(target, json.dumps(lines))
    return target


def _percent(records: Sequence[AnswerRecord]) -> float:
    return round(100 * mean(scores(records)), 2)


TASK = Task(
    name="gqa",
    title="GQA",
    protocol=f"gqa-testdev-balanced/single-word/llava-convert-exact/{SHORT}",
    folder="gqa",
    files=(
        DataFile(
            (QUESTIONS, f"data/{QUESTIONS}", f"questions/{QUESTIONS}"),
            "questions with answers",
            "cs.stanford.edu/people/dorarad/gqa/download.html",
        ),
        DataFile(("images", "data/images"), "pictures", "cs.stanford.edu/people/dorarad/gqa/download.html"),
    ),
    max_tokens=SHORT,
    headline="accuracy",
    load=load,
    from_line=from_line,
    mark=mark,
    metrics=metrics,
    submission=submission,
)
