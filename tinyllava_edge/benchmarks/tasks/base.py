"""What a benchmark is here: where its files go, how it asks, how an answer is parsed and scored, and its protocol.

Each task is one module with a `TASK`. Scores equal the official evaluator's, quirks included; a protocol that corrects
one is a task with a name of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.results import AnswerRecord
from tinyllava_edge.errors import DataError

SHORT, LONG = 128, 1024  # max_new_tokens of LLaVA's model_vqa_loader.py and of model_vqa.py
SINGLE_WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
EVAL_ZIP = "LLaVA's eval.zip, see https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md"


@dataclass(frozen=True)
class Question:
    """One question as a benchmark asks it."""

    id: str
    """unique within the task"""
    prompt: str
    """the words after the picture, suffix included, as LLaVA's question files have them"""
    pictures: tuple[Path | bytes, ...] = ()
    """files, or a file's bytes where the set has them inside; empty for a question without a picture"""
    image: str = ""
    """the picture's name in the data set: questions with the same one hang together statistically"""
    gold: Any = None
    """what the scorer compares with: JSON values; None where the set has no labels"""
    expected: str = ""
    """the right answer for people to read"""
    kind: str = ""
    """category that scores are split by"""
    unit: str = ""
    """questions that only count together: the two of an MME picture, the rotations of an MMBench question"""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """what else the metrics or an official file need: JSON values"""


@dataclass(frozen=True)
class Mark:
    """What an answer becomes."""

    parsed: str
    """after normalising and parsing; what it counts as"""
    score: float | None
    """0..1; None where there is no label, or where a judge has not spoken"""
    steps: tuple[tuple[str, str], ...] = ()
    """name and value of each step on the way, for `--explain`"""


@dataclass(frozen=True)
class JudgeRequest:
    """What a judge model is asked about one answer."""

    system: str
    """system message; empty for none"""
    prompt: str
    """user message"""
    temperature: float
    """of the first try"""
    max_tokens: int
    """longest reply"""


@dataclass(frozen=True)
class Judging:
    """How a task's answers are judged by a model."""

    request: Callable[[Question, str, int], JudgeRequest]
    """question, answer and number of the try from 0 → what is asked"""
    read: Callable[[str], float | tuple[float, float] | None]
    """reply → what it says, or None when it can't be read and another try is due"""
    mark: Callable[[Question, str, Sequence[str]], Mark]
    """question, answer, all replies in order → mark"""
    tries: int
    """most replies asked for"""
    official_model: str
    """the judge that published scores used"""


@dataclass(frozen=True)
class DataFile:
    """A file or directory of a data set."""

    paths: tuple[str, ...]
    """where it may lie below the data directory; the first that exists is taken"""
    what: str
    """what it is"""
    source: str
    """where it is published"""
    needed: bool = True
    """whether the task can't do without it"""


@dataclass(frozen=True)
class Task:
    """One benchmark under one protocol."""

    name: str
    """as typed after --task; lmms-eval's name where it has one"""
    title: str
    """as in the papers' tables"""
    protocol: str
    """id of everything that moves the score: data version, prompt, parser, max_new_tokens"""
    folder: str
    """its folder in LLaVA's playground/data/eval"""
    files: tuple[DataFile, ...]
    """what it reads"""
    max_tokens: int
    """most tokens of an answer"""
    headline: str
    """key of `metrics` that the papers print"""
    load: Callable[[Path], list[Question]]
    """data directory → questions in the set's order. Raises DataError"""
    from_line: Callable[[Mapping[str, Any]], Question]
    """a line of `--explain` (`text`, and `answers`, `options`, … where they count) → question"""
    mark: Callable[[Question, str], Mark]
    """question, raw answer → what it becomes. Of a judged task: without the judge"""
    metrics: Callable[[Sequence[AnswerRecord]], dict[str, float]]
    """all answers, in the set's order → figures as published, e.g. percent; needs nothing but the records"""
    line_key: Callable[[Mapping[str, Any]], str] = lambda line: str(line["question_id"])
    """a line of a LLaVA answer file → what joins it to `question_line`. Raises KeyError when a key is missing"""
    question_line: Callable[[Question], dict[str, Any]] = lambda question: {
        "question_id": question.id,
        "prompt": question.prompt,
    }
    """question → `question_id` and `prompt` as LLaVA's answer file of this task has them, and any other key of it"""
    submission: Callable[[Sequence[AnswerRecord], Path], Path] | None = None
    """records, file name without its ending → the official evaluator's or server's input file, written"""
    judging: Judging | None = None
    """where a model judges"""
    unit: str = "%"
    """of the headline: `%`, or `points`"""
    units: Mapping[str, str] = field(default_factory=dict)
    """last part of a figure's name → its unit, where that is another one"""
    rests_on: Callable[[str, AnswerRecord], bool] = lambda figure, record: True
    """whether a figure counts this record, which is what its `n` is made of"""


def mean(values: Sequence[float]) -> float:
    """Mean, 0 for nothing."""
    return sum(values) / len(values) if values else 0.0


def scores(records: Sequence[AnswerRecord]) -> list[float]:
    """Scores of the records that have one."""
    return [record.score for record in records if record.score is not None]


def by_kind(records: Sequence[AnswerRecord]) -> dict[str, list[AnswerRecord]]:
    """Records by `question_type`, in order of first appearance."""
    groups: dict[str, list[AnswerRecord]] = {}
    for record in records:
        groups.setdefault(record.question_type, []).append(record)
    return groups


def locate(root: Path, task: Task) -> dict[str, Path]:
    """First path of each file → where it lies; absent ones that are not needed are left out.

    Raises:
        DataError: lists everything that is missing, where it should lie and where it is published.
    """
    found: dict[str, Path] = {}
    missing: list[DataFile] = []
    for file in task.files:
        place = next((root / name for name in file.paths if (root / name).exists()), None)
        if place is not None:
            found[file.paths[0]] = place
        elif file.needed:
            missing.append(file)
    if missing:
        listed = "; ".join(f"{' or '.join(f.paths)} ({f.what}; {f.source})" for f in missing)
        raise DataError(f"{root}: {task.name} lacks {listed}", "put them there, or name another directory with --data")
    return found


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises DataError that names it, also where an object has a key twice."""
    import json

    def whole(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice[:80]!r} occurs twice in one object")
        return found

    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=whole)
        check_unicode(text, value)
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable JSON ({error})", "fetch the file again") from error


def check_unicode(text: str, value: Any) -> None:
    """Raises UnicodeEncodeError for half a surrogate pair, which no results file could hold."""
    import json

    if "\\ud" in text.lower():  # only an escape can give one
        json.dumps(value, ensure_ascii=False).encode("utf-8")


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """JSON lines → (`file:number`, object). Raises DataError that names the line."""
    import json

    try:
        data = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error})", "check the path") from error
    for number, line in enumerate(data, 1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8")
            value = json.loads(text)
            check_unicode(text, value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not a JSON line ({error})", "fetch or write the file again") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}:{number}: not a JSON object", "fetch or write the file again")
        yield f"{path}:{number}", value


def field_of(value: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """value[key], of the given type. Raises DataError that names the place and the key."""
    if not isinstance(value, Mapping) or key not in value:
        raise DataError(f"{where}: lacks `{key}`", "restore the official file")
    found = value[key]
    if not isinstance(found, kind) or (isinstance(found, bool) and kind is int):
        raise DataError(f"{where}: `{key}` is a {type(found).__name__}", "restore the official file")
    return found


def picture_path(folder: Path, name: str, where: str) -> Path:
    """A picture that stays inside its folder. Raises DataError where its name leaves it or there is no such file."""
    if {"", ".", ".."} & set(name.split("/")) or any(mark in name for mark in "\\:\0"):
        raise DataError(f"{where}: picture {name!r} is not a plain path below {folder}", "restore the official file")
    path = folder / name
    try:
        there = path.is_file()
    except OSError as error:  # a name that no file system holds
        raise DataError(f"{where}: picture {name[:80]!r}: {error.strerror}", "restore the official file") from error
    if not there:
        raise DataError(f"{path}: the picture of {where} is missing", "unpack the task's pictures there")
    return path


def unique(questions: Sequence[Question], where: str) -> list[Question]:
    """The questions, if no id occurs twice. Raises DataError."""
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise DataError(f"{where}: id {question.id!r} occurs twice", "restore the official file")
        seen.add(question.id)
    if not questions:
        raise DataError(f"{where}: holds no questions", "restore the official file")
    return list(questions)
