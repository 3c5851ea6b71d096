"""MMBench, English dev set of July 2023: multiple choice, every question once for each rotation of its options.

The score of the tables is the server's, circular: a question counts when all its rotations are answered right. Here the
answers are read by VLMEvalKit's rules without a judge model; LLaVA's upload file for the server can be written too.
"""

from __future__ import annotations

import base64
import binascii
import csv
import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.results import AnswerRecord
from tinyllava_edge.benchmarks.tasks.base import (
    LETTER,
    LONG,
    DataFile,
    Mark,
    Question,
    Task,
    locate,
    mean,
    unique,
)
from tinyllava_edge.benchmarks.tasks.explain_lines import WHERE, options_by_letter, right_answer
from tinyllava_edge.benchmarks.tasks.mmbench_infer import infer, infer_letter, infer_text
from tinyllava_edge.errors import DataError, DependencyError
from tinyllava_edge.files import new_file

LETTERS = "ABCD"
ROTATION = 1_000_000  # index = group + rotation number · this
_FILE = "mmbench_dev_20230712.tsv"
_CELL = 1 << 28  # longest cell in characters; a picture is one cell
# what pandas.read_table, which upstream reads with, takes for an absent value, and LLaVA's is_none on top
_ABSENT = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA")
    + ("NULL", "NaN", "None", "n/a", "nan", "null")
)
_DIGITS = 12  # of an index
_COLUMNS = ("index", "question", "A", "B", "answer", "image")
_UPLOAD = ("index", "question", *LETTERS, "prediction", "answer")


def absent(cell: str | None) -> bool:
    """Whether upstream takes a cell for empty: no text, or a spelling of NaN, None or NULL that pandas knows."""
    return cell is None or cell in _ABSENT or cell.lower() in ("nan", "none")


def mark(question: Question, answer: str) -> Mark:
    """1 where the option that the answer means is the annotated one, else 0; None without one."""
    options = question.facts["options"]
    parsed = infer(answer, options)
    steps = (
        ("by letter", infer_letter(answer, options)),
        ("by text", infer_text(answer, options)),
        ("counts as", parsed),
    )
    return Mark(parsed, None if question.gold is None else float(parsed == question.gold), steps)


def metrics(records: Sequence[AnswerRecord]) -> dict[str, float]:
    """Percent: `circular`, `vanilla` (first rotations), `vanilla_all` (every row), circular by either category.

    As mcq_circular_eval with exact matching. A question counts in the circular figures when all rotations of the file
    were asked. A file without rotations has no circular figures, only the vanilla ones.
    """
    marked = [record for record in records if record.score is not None]
    groups: dict[str, list[AnswerRecord]] = {}
    for record in marked:
        groups.setdefault(record.unit, []).append(record)
    whole = [group for group in groups.values() if len(group) == group[0].facts["rotations"]]
    found: dict[str, float] = {}
    if any(record.facts["rotated"] for record in marked) and whole:
        found["circular"] = _percent([all(record.correct for record in group) for group in whole])
    if marked:
        found["vanilla"] = _percent([record.correct for record in marked if record.facts["rotation"] == 0])
        found["vanilla_all"] = _percent([record.correct for record in marked])
    if "circular" in found:
        for key in ("l2-category", "category"):
            hits: dict[str, list[bool]] = {}
            for group in whole:
                hits.setdefault(group[0].facts[key], []).append(all(record.correct for record in group))
            found |= {f"{key}/{name}": _percent(values) for name, values in hits.items() if name}
    return found


def _percent(hits: Sequence[bool]) -> float:
    return 100 * mean([float(hit) for hit in hits])


def submission(records: Sequence[AnswerRecord], path: Path) -> Path:
    """Write the server's workbook: the columns of LLaVA's upload, an answer in `prediction`.

    Raises:
        DependencyError: openpyxl is not installed.
    """
    try:
        openpyxl = importlib.import_module("openpyxl")
    except ImportError as error:
        raise DependencyError(
            "MMBench's upload file is a workbook and needs openpyxl", "pip install 'tinyllava-edge[mmbench]'"
        ) from error
    bad = importlib.import_module("openpyxl.cell.cell").ILLEGAL_CHARACTERS_RE
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(_UPLOAD)
    for row, record in enumerate(records, 2):
        facts = record.facts
        options = [facts["options"].get(letter) for letter in LETTERS]
        cells = [int(record.id), facts["question"], *options, record.given, facts["answer"]]
        for column, value in enumerate(cells, 1):
            cell = sheet.cell(row, column, bad.sub(" ", value) if isinstance(value, str) else value)
            if isinstance(value, str):
                cell.data_type = "s"  # an answer that starts with = is no formula
    target = path.with_name(path.name + ".xlsx")
    with new_file(target) as temporary:
        book.save(temporary)
    return target


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Place and cells by column name of each row."""
    limit = csv.field_size_limit(_CELL)
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            reader = csv.DictReader(handle, delimiter="\t", strict=True)
            lacking = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if lacking:
                raise DataError(f"{path}:1: lacks the column {lacking[0]!r}", "fetch the file again")
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{where}: another number of cells than the first line", "fetch the file again")
                yield where, row
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: not a readable table ({error})", "fetch the file again") from error
    finally:
        csv.field_size_limit(limit)


def _index(where: str, cell: str) -> int:
    if not (cell.isascii() and cell.isdigit() and len(cell) <= _DIGITS):
        raise DataError(f"{where}: index {cell[:20]!r} is not a number", "fetch the file again")
    return int(cell)


def _picture(where: str, cell: str) -> bytes:
    try:
        picture = base64.b64decode(cell, validate=True)
    except binascii.Error as error:
        raise DataError(f"{where}: the picture is not base64 ({error})", "fetch the file again") from error
    if not picture:
        raise DataError(f"{where}: has no picture", "fetch the file again")
    return picture


def _load(root: Path) -> list[Question]:
    path = locate(root, TASK)[_FILE]
    rows: dict[int, tuple[str, dict[str, str]]] = {}
    shown: dict[str, tuple[str, bytes]] = {}  # rotations repeat the picture's text: it is decoded and kept once
    for where, row in _rows(path):
        number = _index(where, row["index"])
        if number in rows:
            raise DataError(f"{where}: index {number} occurs twice", "fetch the file again")
        rows[number] = (where, row)
        text = row.pop("image")
        if text not in shown:
            shown[text] = (str(number), _picture(where, text))
        row["image"] = shown[text][0]
    pictures = dict(shown.values())
    sizes: dict[int, int] = {}
    for number in rows:
        sizes[number % ROTATION] = sizes.get(number % ROTATION, 0) + 1
    rotated = any(number >= ROTATION for number in rows)
    questions = []
    for number, (where, row) in rows.items():
        if number % ROTATION not in rows:
            raise DataError(f"{where}: a rotation of {number % ROTATION}, which is missing", "fetch the file again")
        more = {"rotations": sizes[number % ROTATION], "rotated": rotated}
        questions.append(_question(number, row, pictures[row["image"]], more, where))
    return unique(questions, str(path))


def _question(number: int, row: Mapping[str, str], picture: bytes, more: Mapping[str, Any], where: str) -> Question:
    options: dict[str, str] = {}
    for letter in LETTERS:
        if absent(row.get(letter)):
            break
        options[letter] = row[letter]
    gold = row["answer"]
    if gold not in options or absent(row["question"]):
        raise DataError(f"{where}: answer {gold!r} is none of the options {''.join(options)}", "fetch the file again")
    hint = row.get("hint")
    lines = [*([] if hint is None or absent(hint) else [hint]), row["question"]]
    prompt = "\n".join([*lines, *(f"{letter}. {text}" for letter, text in options.items()), LETTER])
    names = {key: "" if absent(row.get(key)) else row[key] for key in ("category", "l2-category")}
    facts = {
        "options": options,
        "question": row["question"],
        "answer": gold,
        "rotation": number // ROTATION,
        **more,
        **names,
    }
    unit = str(number % ROTATION)
    expected = f"{gold}. {options[gold]}"
    return Question(str(number), prompt, (picture,), row["image"], gold, expected, names["category"], unit, facts)


def _from_line(line: Mapping[str, Any]) -> Question:
    options, gold = options_by_letter(line), right_answer(line)
    if not options or (gold is not None and gold not in options):
        raise DataError(f"{WHERE}: needs `options`, and `answers` as one of their letters", 'write "options": [...]')
    return Question("line", str(line.get("question", "")), gold=gold, expected=gold or "", facts={"options": options})


def _line_key(line: Mapping[str, Any]) -> str:
    """The index; later rounds of LLaVA's --all-rounds, which rotates by itself, are other questions."""
    turn = line.get("round_id", 0)
    return str(line["question_id"]) if turn == 0 else f"{line['question_id']}, round {turn}"


def _question_line(question: Question) -> dict[str, Any]:
    """LLaVA logs the prompt without its suffix, and the options."""
    options = question.facts["options"]
    return {
        "question_id": int(question.id),
        "round_id": 0,
        "prompt": question.prompt.removesuffix(f"\n{LETTER}"),
        "options": list(options.values()),
        "option_char": list(options),
    }


TASK = Task(
    name="mmbench_en_dev",
    title="MMBench",
    protocol="mmbench_dev_20230712/letter/vlmevalkit-exact-matching/1024",
    folder="mmbench",
    files=(
        DataFile(
            (_FILE,),
            "questions, labels and pictures",
            f"https://download.openmmlab.com/mmclassification/datasets/mmbench/{_FILE}",
        ),
    ),
    max_tokens=LONG,
    headline="circular",
    load=_load,
    from_line=_from_line,
    mark=mark,
    metrics=metrics,
    line_key=_line_key,
    question_line=_question_line,
    submission=submission,
)
