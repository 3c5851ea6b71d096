"""Answer files in LLaVA's and TinyLLaVA's format, read and written; the official scripts read what we write.

One JSON object a line: {question_id, prompt, text, answer_id, model_id, metadata}. Also read: the results formats of
VQA ([{question_id, answer}]), GQA ([{questionId, prediction}]) and MM-Vet ({id: text}).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.evaluation import record_of
from tinyllava_edge.benchmarks.results import AnswerRecord
from tinyllava_edge.benchmarks.tasks.base import Question, Task, read_json, read_lines
from tinyllava_edge.errors import DataError
from tinyllava_edge.files import write_text


def question_of(record: AnswerRecord) -> Question:
    """What a record still knows of its question."""
    return Question(
        id=record.id,
        prompt=record.question,
        image=record.image,
        expected=record.expected,
        kind=record.question_type,
        unit=record.unit,
        facts=record.facts,
    )


def write_answers(path: Path, task: Task, records: Sequence[AnswerRecord], model: str) -> None:
    """Write LLaVA's answer file, in the set's order."""
    lines = []
    for record in records:
        line = task.question_line(question_of(record))
        name = hashlib.sha256(json.dumps([line, record.given]).encode()).hexdigest()[:22]
        known = {"text": record.given, "answer_id": name, "model_id": model, "metadata": {}}
        lines.append(json.dumps({**line, **known}, ensure_ascii=True) + "\n")
    write_text(path, "".join(lines))


def read_answers(path: Path, task: Task, questions: Sequence[Question]) -> list[AnswerRecord]:
    """Mark an answer file made elsewhere.

    Args:
        path: JSON lines, or one of the results formats above.
        task: under whose protocol.
        questions: all questions of the set.

    Returns:
        Records in the questions' order.

    Raises:
        DataError: an answer is missing, there twice or to no question of the set, or the file is damaged; what is
            wrong is named, because a silent score over misaligned answers is worse than none.
    """
    wanted: dict[str, list[Question]] = {}
    for question in questions:
        key = _key(task, task.question_line(question), f"question {question.id}")
        wanted.setdefault(key, []).append(question)  # a set may ask the same of a picture twice
    given: dict[str, str] = {}
    for where, line in _lines(path):
        key = _key(task, line, where)
        left = [question.id for question in wanted.get(key, []) if question.id not in given]
        if key in wanted and not left:
            raise DataError(f"{where}: a second answer to {key!r}", "keep one answer to each question")
        if key not in wanted:
            raise DataError(
                f"{where}: answers {key!r}, which is no question of {task.name}", "score it with the task it belongs to"
            )
        if not isinstance(line.get("text"), str):
            raise DataError(f"{where}: `text` is no string", "an answer line holds question_id, prompt and text")
        given[left[0]] = line["text"]
    missing = [question.id for question in questions if question.id not in given]
    if missing:
        raise DataError(
            f"{path}: {len(missing):,} of {len(questions):,} questions have no answer, e.g. {', '.join(missing[:3])}",
            "finish the run; a benchmark's score counts every question",
        )
    return [record_of(task, question, given[question.id]) for question in questions]


def _key(task: Task, line: Mapping[str, Any], where: str) -> str:
    try:
        return task.line_key(line)
    except KeyError as error:
        raise DataError(f"{where}: lacks {error}", "an answer line holds question_id, prompt and text") from error
    except DataError as error:
        raise DataError(f"{where}: {error.message}", error.hint) from error


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Answer lines of any of the formats."""
    try:
        with path.open("rb") as handle:
            first = next((line.strip() for line in handle if line.strip()), b"")
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error})", "name an answers file") from error
    if not first:
        raise DataError(f"{path}: is empty", "name an answers file")
    if first.startswith(b'{"schema"'):
        raise DataError(f"{path}: is a results file", f"name the answers beside it, {path.stem}.answers.jsonl")
    yield from _document(path) if _begins_document(first) else read_lines(path)


def _begins_document(first: bytes) -> bool:
    """Whether a file's first line begins one JSON value: a list, an object of several lines, or a map {id: text}."""
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return first[:1] in b"[{"
    return isinstance(value, list) or (
        isinstance(value, dict) and bool(value) and not {"question_id", "text"} & set(value)
    )


def _document(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    value = read_json(path)
    if isinstance(value, dict):
        for key, text in value.items():
            yield f"{path}: {key}", {"question_id": key, "text": text}
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            where = f"{path}: entry {number}"
            if not isinstance(entry, dict):
                raise DataError(f"{where}: not an object", "an entry is {question_id, answer}")
            line = dict(entry)
            for old, new in (("questionId", "question_id"), ("answer", "text"), ("prediction", "text")):
                if new not in line and old in line:
                    line[new] = line[old]
            yield where, line
    else:
        raise DataError(f"{path}: a {type(value).__name__}, no answers", "name an answers file")
