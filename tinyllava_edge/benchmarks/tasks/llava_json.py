"""Any LLaVA JSON file with answers: the question as it stands, exact match after strip and lower, 16 tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllava_edge import prompt
from tinyllava_edge.benchmarks.results import AnswerRecord
from tinyllava_edge.benchmarks.tasks.base import Mark, Question, Task, by_kind, mean, read_json
from tinyllava_edge.benchmarks.tasks.explain_lines import right_answer
from tinyllava_edge.errors import DataError, UsageError

MAX_TOKENS = 16


def load_rows(path: Path, images: Path) -> list[Question]:
    """Read LLaVA JSON. Each human turn with its reply becomes a question of its own, asked without the earlier turns.

    Args:
        path: JSON list of {id, image, conversations, tier?, question_type?}.
        images: directory that the `image` names are relative to.

    Raises:
        DataError: not such a list, a row without picture, question or answer, a picture outside `images`, or a
            repeated id; the row is named.
    """
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: not a list with at least one row", "name a JSON list of LLaVA conversations")
    rows = [row for number, entry in enumerate(entries) for row in _rows(entry, images, f"{path}: row {number}")]
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise DataError(f"{path}: id {row.id!r} occurs twice", "give every row an id of its own")
        seen.add(row.id)
    return rows


def exact_match(question: Question, text: str) -> Mark:
    """1 where answer and annotation agree after strip and lower; None for a line of `--explain` without `answers`."""
    given, wanted = text.strip().lower(), question.expected.strip().lower()
    if question.facts.get("unlabelled"):
        return Mark(given, None, (("compared as", given),))
    return Mark(given, float(given == wanted), (("compared as", given), ("with", wanted)))


def exact_metrics(records: Sequence[AnswerRecord]) -> dict[str, float]:
    """Percent right, over all and by question type."""
    found = {"accuracy": 100 * mean([float(record.correct) for record in records])}
    for kind, group in by_kind(records).items():
        if kind:
            found[f"accuracy/{kind}"] = 100 * mean([float(record.correct) for record in group])
    return found


def exact_line(line: Mapping[str, Any]) -> Question:
    """A line of `--explain`: `text`, and `answers` as one text or a list of one. Raises DataError."""
    wanted = right_answer(line)
    facts = {"unlabelled": True} if wanted is None else {}
    return Question("line", str(line.get("question", "")), gold=wanted, expected=wanted or "", facts=facts)


def _no_directory(root: Path) -> list[Question]:
    raise UsageError(f"{root}: a LLaVA JSON file is named itself", "eval CKPT --task questions.json --images DIR")


EXACT = Task(
    name="",
    title="LLaVA JSON",
    protocol=f"llava-json/as-is/exact-match/{MAX_TOKENS}",
    folder="",
    files=(),
    max_tokens=MAX_TOKENS,
    headline="accuracy",
    load=_no_directory,
    from_line=exact_line,
    mark=exact_match,
    metrics=exact_metrics,
)


def _rows(entry: Any, images: Path, where: str) -> list[Question]:
    talk = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(talk, list) or len(talk) < 2 or len(talk) % 2:
        raise DataError(
            f"{where}: `conversations` is not a list of question-answer pairs", "see docs on the data format"
        )
    name, image = entry.get("id"), entry.get("image")
    if not isinstance(image, str) or not image or not isinstance(name, str | int):
        raise DataError(f"{where}: needs `id` and `image`", "only rows with a picture can be evaluated")
    if {"", ".", ".."} & set(image.split("/")) or any(mark in image for mark in "\\:\0"):
        raise DataError(
            f"{where}: image {image!r} is not a plain path below the image directory", "name it relative to --images"
        )
    kind, tier = ("" if entry.get(key) is None else str(entry[key]) for key in ("question_type", "tier"))
    rows = []
    for turn in range(0, len(talk), 2):
        human, reply = talk[turn], talk[turn + 1]
        for side, speaker in ((human, "human"), (reply, "gpt")):
            if not isinstance(side, dict) or side.get("from") != speaker or not isinstance(side.get("value"), str):
                raise DataError(f"{where}: turn {turn} is not {{from: {speaker}, value: text}}", "restore the row")
        question, _ = prompt.take_image_marker(human["value"])
        identity = str(name) if turn == 0 else f"{name}#{turn // 2}"
        right = reply["value"].strip()
        facts = {"tier": tier} if tier else {}
        rows.append(Question(identity, question, (images / image,), image, right, right, kind, facts=facts))
    return rows
