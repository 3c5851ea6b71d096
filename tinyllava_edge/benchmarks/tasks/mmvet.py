"""MM-Vet: open questions that need several capabilities at once; a model judges each answer from 0 to 1.

Matches MM-Vet's mm-vet_evaluator.py with one run. Its quirks that move a score are kept: answers are put into the
judge's table as they stand, `|` and newlines included; the first repetition still asks at temperature 0; only the
words before the first space of a reply count, and an answer without a readable reply scores 0. Two differences: `nan`
counts as unreadable here (there it would make every figure `nan`), and a sixth reply, which is asked for there and then
thrown away, isn't asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.results import AnswerRecord
from tinyllava_edge.benchmarks.tasks.base import (
    LONG,
    DataFile,
    JudgeRequest,
    Judging,
    Mark,
    Question,
    Task,
    field_of,
    locate,
    picture_path,
    read_json,
    unique,
)
from tinyllava_edge.errors import DataError
from tinyllava_edge.files import write_json

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
TRIES = 5  # replies that are read
_AGAIN = "\nPredict the correctness of the answer (digit): "
_SOURCE = "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"


def load(root: Path) -> list[Question]:
    """Read mm-vet.json and find its pictures.

    Raises:
        DataError: a missing file or key, a value of another type, a repeated id, an unknown capability, or a picture
            that is missing or outside the folder.
    """
    found = locate(root, TASK)
    path, images = found["mm-vet.json"], found["images"]
    data = read_json(path)
    if not isinstance(data, dict):
        raise DataError(f"{path}: not a JSON object of questions", "restore the official file")
    return unique([_question(id_, row, images, f"{path}: {id_!r}") for id_, row in data.items()], str(path))


def _question(id_: str, row: Any, images: Path, where: str) -> Question:
    name, answer = field_of(row, "imagename", str, where), field_of(row, "answer", str, where)
    needs = _capabilities(field_of(row, "capability", list, where), where)
    return Question(
        id_,
        field_of(row, "question", str, where),
        (picture_path(images, name, where),),
        name,
        gold=answer,
        expected=answer,
        kind="_".join(needs),
        facts={"capability": needs},
    )


def _capabilities(names: Any, where: str) -> list[str]:
    """The needed capabilities, each once, in the order of CAPABILITIES."""
    if not isinstance(names, list) or not names or any(name not in CAPABILITIES for name in names):
        raise DataError(f"{where}: `capability` is {names!r}", f"known are {', '.join(CAPABILITIES)}")
    return [name for name in CAPABILITIES if name in names]


def from_line(line: Mapping[str, Any]) -> Question:
    """A line of `--explain`: `text`, and `question` and `answer` where the judge's prompt shall be seen."""
    question, answer = line.get("question", ""), line.get("answer", "")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise DataError(
            "`question` and `answer` must be texts", 'e.g. {"text": "3", "question": "1+2?", "answer": "3"}'
        )
    return Question(str(line.get("question_id", "")), question, gold=answer, expected=answer)


def request(question: Question, answer: str, number: int) -> JudgeRequest:
    """What the judge is asked: the table with this answer as its last row; one line more from the second try on."""
    gold = str(question.gold).replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    row = " | ".join((question.prompt, gold, answer, ""))
    prompt = f"{_table()}\n{row}{_AGAIN if number else ''}"
    return JudgeRequest("", prompt, max(0, number - 1) * 0.5, 3)


@cache
def _table() -> str:
    return (Path(__file__).parent / "prompts" / "mmvet.txt").read_bytes().decode("utf-8")


def read(reply: str) -> float | None:
    """The number before the first space, 0..1; None for anything else."""
    try:
        value = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None


def _verdict(replies: Any, where: str) -> float:
    """Score of the first readable reply, 0 after TRIES unreadable ones. Raises DataError if some are missing."""
    if not isinstance(replies, list | tuple) or not all(isinstance(reply, str) for reply in replies):
        raise DataError(
            f"{where} has not been judged",
            "judge the answers with --judge-url and --judge-model, or with --judge-replies",
        )
    values = [value for reply in replies[:TRIES] if (value := read(reply)) is not None]
    if not values and len(replies) < TRIES:
        raise DataError(f"{where}: {len(replies)} replies, none readable, of {TRIES} tries", "go on with judging")
    return values[0] if values else 0.0


def mark(question: Question, answer: str) -> Mark:
    """The answer as it goes to the judge; without a score."""
    return Mark(answer, None, (("judge's row", " | ".join((question.prompt, str(question.gold), answer))),))


def mark_replies(question: Question, answer: str, replies: Sequence[str]) -> Mark:
    """The score that the replies give. Raises DataError when another try is due."""
    value = _verdict(list(replies), f"answer {question.id!r}")
    readable = any(read(reply) is not None for reply in replies[:TRIES])
    steps = tuple((f"reply {number}", reply) for number, reply in enumerate(replies, 1))
    return Mark(str(value) if readable else "unreadable", value, (*steps, ("score", str(value))))


def metrics(records: Sequence[AnswerRecord]) -> dict[str, float]:
    """Means in percent, one decimal, rounded as numpy does: total, per capability, per set of capabilities.

    Keys: `total`, e.g. `ocr`, e.g. `integration/ocr_math`; the latter from the most frequent on.

    Raises:
        DataError: no answers, an answer that has not been judged, or one without its capabilities.
    """
    if not records:
        raise DataError("mmvet: no answers to score", "evaluate at least one question")
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for record in records:
        where = f"mmvet: answer {record.id!r}"
        value = _verdict(record.facts.get("replies"), where)
        needs = _capabilities(record.facts.get("capability"), where)
        for key in ("total", *needs, f"integration/{'_'.join(needs)}"):
            sums[key] = sums.get(key, 0.0) + value
            counts[key] = counts.get(key, 0) + 1
    sets = sorted((key for key in sums if "/" in key), key=lambda key: -counts[key])
    order = ["total", *(name for name in CAPABILITIES if name in sums), *sets]
    return {key: round(sums[key] / counts[key] * 100 * 10) / 10 for key in order}


def line_key(line: Mapping[str, Any]) -> str:
    """`v1_0` for the 0 of LLaVA's answer files and for `v1_0` itself."""
    key = str(line["question_id"])
    return key if key.startswith("v1_") else f"v1_{key}"


def question_line(question: Question) -> dict[str, Any]:
    """Number and prompt, as in LLaVA's llava-mm-vet.jsonl."""
    number = question.id.removeprefix("v1_")
    id_ = int(number) if re.fullmatch("0|[1-9][0-9]{,17}", number) else question.id
    return {"question_id": id_, "prompt": question.prompt}


def submission(records: Sequence[AnswerRecord], out: Path) -> Path:
    """Write what mm-vet_evaluator.py reads as --result_file: {"v1_0": text}."""
    path = out.with_name(f"{out.name}.json")
    write_json(path, {record.id: record.given for record in records})
    return path


TASK = Task(
    name="mmvet",
    title="MM-Vet",
    protocol=f"mm-vet-v1/no-suffix/judge-7-shot/1-run/{LONG}",
    folder="mm-vet",
    files=(
        DataFile(("mm-vet.json", "mm-vet/mm-vet.json"), "questions and answers", _SOURCE),
        DataFile(("images", "mm-vet/images"), "pictures", _SOURCE),
    ),
    max_tokens=LONG,
    headline="total",
    load=load,
    from_line=from_line,
    mark=mark,
    metrics=metrics,
    line_key=line_key,
    question_line=question_line,
    submission=submission,
    judging=Judging(request, read, mark_replies, TRIES, "gpt-4-0613"),
)
