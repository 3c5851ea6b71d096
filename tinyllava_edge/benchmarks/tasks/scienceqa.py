"""ScienceQA, test split: 4241 multiple-choice questions, 2017 of them with a picture; the tables print those, SQA-IMG.

Upstream opens these pictures without turning them into RGB, so a palette, grey or transparent PNG reaches its processor
as it is. Every runtime here converts to RGB: that is the one known difference.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.results import AnswerRecord
from tinyllava_edge.benchmarks.tasks.base import (
    EVAL_ZIP,
    LETTER,
    LONG,
    DataFile,
    Mark,
    Question,
    Task,
    field_of,
    locate,
    picture_path,
    read_json,
    unique,
)
from tinyllava_edge.benchmarks.tasks.explain_lines import WHERE, options_by_letter, right_answer
from tinyllava_edge.errors import DataError
from tinyllava_edge.files import write_json

LETTERS = ("A", "B", "C", "D", "E")
FAILED = "FAILED"  # what the official evaluator writes for an answer it can't read
_SENTENCE = re.compile("The answer is ([A-Z]).")  # the last dot stands for any one character, as upstream
_LENIENT = (
    re.compile(r"\W*([A-E])\W*", re.IGNORECASE),
    re.compile(r"\W*([A-E])[).:\]]\W.*", re.DOTALL),
    re.compile(r".*\b(?:answer|option)(?: is)?:? *\W{0,3}([A-E])\b\W*", re.IGNORECASE | re.DOTALL),
)
_MARKER = "<image>"
_SUFFIX = f"\n{LETTER}"
_SLICES: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "subject/natural": lambda facts: facts["subject"] == "natural science",
    "subject/social": lambda facts: facts["subject"] == "social science",
    "subject/language": lambda facts: facts["subject"] == "language science",
    "context/text": lambda facts: bool(facts["text"]),
    "context/image": lambda facts: bool(facts["image"]),
    "context/none": lambda facts: not facts["text"] and not facts["image"],
    "grade/1-6": lambda facts: facts["grade"] in {f"grade{number}" for number in range(1, 7)},
    "grade/7-12": lambda facts: facts["grade"] in {f"grade{number}" for number in range(7, 13)},
}


_FIGURES = {"img_accuracy": _SLICES["context/image"], "accuracy": lambda facts: True, **_SLICES}


def parse(answer: str) -> str:
    """The letter that eval_science_qa.py reads, or `FAILED`.

    A lone A to E; or one of them at the start, followed by a full stop and a space; or one single `The answer is X`
    with another character after the letter. So `B.`, `b`, `(B)` and a final `The answer is B` are all FAILED.
    """
    if answer in LETTERS or (answer[:1] in LETTERS and answer[1:3] == ". "):
        return answer[0]
    found = _SENTENCE.findall(answer)
    return str(found[0]) if len(found) == 1 else FAILED


def parse_lenient(answer: str) -> str:
    """As `parse`, and where that fails also `b`, `B.`, `(B)`, `B: words` and `the answer is (B)`."""
    official = parse(answer)
    if official != FAILED:
        return official
    found = next(filter(None, (pattern.fullmatch(answer.strip()) for pattern in _LENIENT)), None)
    return found.group(1).upper() if found else FAILED


def index_of(parsed: str, choices: int) -> int:
    """Number of the choice from 0; −1 for FAILED or a letter beyond the choices, which is always wrong."""
    return LETTERS.index(parsed) if parsed in LETTERS[:choices] else -1


def _marker(read: Callable[[str], str]) -> Callable[[Question, str], Mark]:
    def mark(question: Question, answer: str) -> Mark:
        parsed = read(answer)
        number = index_of(parsed, int(question.facts["choices"]))
        steps = (("letter", parsed), ("number of the choice", str(number)))
        return Mark(parsed, None if question.gold is None else float(number == question.gold), steps)

    return mark


def metrics(records: Sequence[AnswerRecord]) -> dict[str, float]:
    """Percent with two decimals: `img_accuracy` over questions with a picture, `accuracy` over all, official slices.

    The slices are those of ScienceQA's evaluate_acc.py; one without questions is left out.
    """
    marked = [record for record in records if record.score is not None]
    found = {}
    for name, belongs in _FIGURES.items():
        values = [record.score for record in marked if belongs(record.facts)]
        if values:
            found[name] = round(sum(value or 0.0 for value in values) / len(values) * 100, 2)
    return found


def submission(records: Sequence[AnswerRecord], path: Path) -> Path:
    """Write the JSON that eval_science_qa.py leaves for ScienceQA's evaluate_acc.py: number of the choice by id."""
    target = path.with_name(path.name + ".json")
    correct = sum(record.correct for record in records)
    value = {
        "acc": 100 * correct / len(records) if records else 0.0,
        "correct": correct,
        "count": len(records),
        "results": {record.id: index_of(record.parsed, int(record.facts["choices"])) for record in records},
        "outputs": {record.id: record.given for record in records},
    }
    write_json(target, value)
    return target


def _load(root: Path) -> list[Question]:
    found = locate(root, TASK)
    problems, places = read_json(found["problems.json"]), found["pid_splits.json"]
    ids = field_of(read_json(places), "test", list, str(places))
    prompts = _prompts(found["llava_test_CQM-A.json"], ids) if "llava_test_CQM-A.json" in found else {}
    order = list(prompts) or ids
    questions = []
    for name in order:
        where = f"{found['problems.json']}: problem {name!r}"
        if not isinstance(name, str) or not isinstance(problems, dict) or not isinstance(problems.get(name), dict):
            raise DataError(f"{where} of the test split is missing", "restore the official file")
        questions.append(_question(name, problems[name], prompts.get(name), found["images/test"], where))
    return unique(questions, str(places))


def _question(name: str, row: Mapping[str, Any], given: str | None, folder: Path, where: str) -> Question:
    choices = field_of(row, "choices", list, where)
    gold = field_of(row, "answer", int, where)
    texts = {key: field_of(row, key, str, where) for key in ("question", "hint", "subject", "grade")}
    if not 2 <= len(choices) <= len(LETTERS) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{where}: `choices` is not two to five strings", "restore the official file")
    if not 0 <= gold < len(choices):
        raise DataError(f"{where}: answer {gold} of {len(choices)} choices", "restore the official file")
    image = field_of(row, "image", (str, type(None)), where)
    facts = {
        "subject": texts["subject"],
        "grade": texts["grade"],
        "text": bool(texts["hint"]),
        "image": bool(image),
        "choices": len(choices),
    }
    if given is None:
        given = prompt_of(texts["question"], texts["hint"], choices)
    elif (_MARKER in given) != bool(image):
        raise DataError(f"{where}: the prompt file and problems.json disagree on a picture", "restore both files")
    shown = f"{name}/{image}" if image else ""
    return Question(
        name,
        given.replace(_MARKER, "").strip() + _SUFFIX,
        (picture_path(folder, shown, where),) if image else (),
        shown,
        gold,
        f"{LETTERS[gold]}. {choices[gold]}",
        texts["subject"],
        facts=facts,
    )


def prompt_of(question: str, hint: str, choices: Sequence[str]) -> str:
    """A problem in the words of LLaVA's llava_test_CQM-A.json, image marker and suffix left out."""
    context = [f"Context: {hint}"] if hint else []
    listed = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([*context, question, *listed])


def _prompts(path: Path, ids: Sequence[Any]) -> dict[str, str]:
    """LLaVA's prompt of each test problem, in the order of its file."""
    rows = read_json(path)
    prompts: dict[str, str] = {}
    for number, row in enumerate(rows if isinstance(rows, list) else []):
        where = f"{path}: row {number}"
        name = field_of(row, "id", str, where)
        talk = field_of(row, "conversations", list, where)
        if name in prompts or not talk:
            raise DataError(f"{where}: id {name!r} occurs twice or asks nothing", "restore the official file")
        prompts[name] = field_of(talk[0], "value", str, where)
    if set(prompts) != {name for name in ids if isinstance(name, str)}:
        raise DataError(
            f"{path}: {len(prompts)} prompts, not those of the {len(ids)} test problems",
            "restore the official file, or remove it to have the prompts built from problems.json",
        )
    return prompts


def _from_line(line: Mapping[str, Any]) -> Question:
    options, gold = options_by_letter(line), right_answer(line)
    choices = len(options) or len(LETTERS)
    if gold is not None and gold not in LETTERS[:choices]:
        raise DataError(f"{WHERE}: `answers` {gold!r} is no letter of {choices} choices", 'write "answers": "B"')
    number = None if gold is None else LETTERS.index(gold)
    prompt = str(line.get("question", ""))
    return Question("line", prompt, gold=number, expected=gold or "", facts={"choices": choices})


def _question_line(question: Question) -> dict[str, Any]:
    """The official IMG accuracy counts the lines whose logged prompt holds the image marker."""
    marker = f"{_MARKER}\n" if question.facts["image"] else ""
    return {"question_id": question.id, "prompt": marker + question.prompt}


TASK = Task(
    name="scienceqa_img",
    title="SQA-IMG",
    protocol="scienceqa-test-CQM-A/letter/eval_science_qa/1024",
    folder="scienceqa",
    files=(
        DataFile(("problems.json",), "the problems", "https://github.com/lupantech/ScienceQA, data/scienceqa"),
        DataFile(("pid_splits.json",), "the splits", "https://github.com/lupantech/ScienceQA, data/scienceqa"),
        DataFile(("images/test", "test"), "the test pictures", "https://github.com/lupantech/ScienceQA, download.sh"),
        DataFile(("llava_test_CQM-A.json",), "LLaVA's prompts", EVAL_ZIP, needed=False),
    ),
    max_tokens=LONG,
    headline="img_accuracy",
    load=_load,
    from_line=_from_line,
    mark=_marker(parse),
    metrics=metrics,
    question_line=_question_line,
    submission=submission,
    rests_on=lambda figure, record: _FIGURES[figure](record.facts),
)

LENIENT = replace(
    TASK,
    name="scienceqa_img_lenient",
    title="SQA-IMG (lenient parser)",
    protocol="scienceqa-test-CQM-A/letter/lenient/1024",
    mark=_marker(parse_lenient),
)
