"""MMMU validation set as TinyLLaVA Factory asks it: 900 college questions, multiple choice and a few open ones.

Questions with several pictures carry none in Factory's file. Upstream does not ask the model but draws a letter at
random, unseeded, as it does for an answer that names no option. Here the letter hangs on the question's id alone, so a
run scores the same twice. What an answer file holds for a question without a picture is not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.results import AnswerRecord
from tinyllava_edge.benchmarks.tasks.base import (
    LONG,
    DataFile,
    Mark,
    Question,
    Task,
    by_kind,
    field_of,
    locate,
    picture_path,
    read_json,
    unique,
)
from tinyllava_edge.benchmarks.tasks.explain_lines import options_by_letter
from tinyllava_edge.benchmarks.tasks.mmmu_parse import fixed_choice, open_matches, parse_choice, parse_open
from tinyllava_edge.errors import DataError
from tinyllava_edge.files import write_json

CHOICE = "multiple-choice"
INVALID = "INVALID GENERATION FOR MULTIPLE IMAGE INPUTS"  # upstream's answer to an open question without a picture
DISCIPLINES = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
SUBJECTS = tuple(sorted(subject for subjects in DISCIPLINES.values() for subject in subjects))
_FACTORY = "TinyLLaVA Factory, see https://tinyllava-factory.readthedocs.io/en/latest/Evaluation.html"
_QUESTIONS, _ANSWERS, _PICTURES = "anns_for_eval.json", "eval/answer_dict_val.json", "all_images"


def mark(question: Question, answer: str) -> Mark:
    """1 where the letter is the annotated one, or where an accepted open answer was found; None without a label."""
    facts = question.facts
    if facts["type"] == CHOICE:
        read = parse_choice(answer, facts["options"]) if facts["picture"] else ""
        parsed = read or fixed_choice(question.id, list(facts["options"]))
        steps = [("letter", read or "none: fixed by the id"), ("counts as", parsed)]
    else:
        parsed = answer if facts["picture"] else INVALID
        steps = []
    if question.gold is None:
        return Mark(parsed, None, tuple(steps))
    if facts["gold_type"] == CHOICE:
        right = parsed == question.gold or (isinstance(question.gold, list) and parsed in question.gold)
    else:
        found = parse_open(parsed)
        steps.append(("searched for the answer", " | ".join(map(str, found))))
        right = open_matches(question.gold, found)
    return Mark(parsed, float(right), tuple(steps))


def metrics(records: Sequence[AnswerRecord]) -> dict[str, float]:
    """Percent with one decimal, as main_eval_only.py rounds: `accuracy`, then each discipline and subject asked."""
    shares = {
        subject: (sum(record.correct for record in group) / len(group), len(group))
        for subject, group in by_kind([record for record in records if record.score is not None]).items()
    }
    found: dict[str, float] = {}
    sets: dict[str, Sequence[str]] = {"accuracy": SUBJECTS}
    sets |= {f"discipline/{name}": subjects for name, subjects in DISCIPLINES.items()}
    for name, subjects in sets.items():
        present = [shares[subject] for subject in subjects if subject in shares]
        if present:
            # from shares and counts, as upstream: the same floating-point number goes into the rounding
            share = sum((share * count for share, count in present), 0.0) / sum(count for _, count in present)
            found[name] = _percent(share)
    return found | {f"subject/{subject}": _percent(shares[subject][0]) for subject in SUBJECTS if subject in shares}


def _percent(share: float) -> float:
    return round(100 * round(share, 3), 1)


def submission(records: Sequence[AnswerRecord], path: Path) -> Path:
    """Write main_eval_only.py's input: letter by id, of an open question the answer itself."""
    target = path.with_name(path.name + ".json")
    write_json(target, {record.id: record.parsed for record in records})
    return target


def _load(root: Path) -> list[Question]:
    found = locate(root, TASK)
    rows, answers = read_json(found[_QUESTIONS]), read_json(found[_ANSWERS])
    if not isinstance(rows, list) or not isinstance(answers, dict):
        raise DataError(f"{found[_QUESTIONS]}: not a list, or its answers no object", "restore the official files")
    questions = []
    for number, row in enumerate(rows):
        where = f"{found[_QUESTIONS]}: row {number}"
        name = field_of(row, "id", str, where)
        if name not in answers:
            raise DataError(f"{found[_ANSWERS]}: lacks {name!r}, which {where} asks", "restore the official file")
        questions.append(_question(name, row, answers[name], found, where))
    return unique(questions, str(found[_QUESTIONS]))


def _question(name: str, row: Any, answer: Any, found: Mapping[str, Path], where: str) -> Question:
    subject = "_".join(name.split("_")[1:-1])
    if subject not in SUBJECTS:
        raise DataError(f"{where}: id {name!r} names none of the 30 subjects", "restore the official file")
    labels = f"{found[_ANSWERS]}: {name!r}"
    gold = field_of(answer, "ground_truth", (str, list), labels)
    if isinstance(gold, list) and not all(isinstance(text, str) for text in gold):
        raise DataError(f"{labels}: `ground_truth` holds something else than strings", "restore the official file")
    image = row.get("image", "")
    if not isinstance(image, str) or ("image" in row and not image):
        raise DataError(f"{where}: `image` is not a file name", "leave it out where there is none")
    kind = field_of(row, "question_type", str, where)
    facts = {
        "type": kind,
        "gold_type": field_of(answer, "question_type", str, labels),
        "options": _options(row, where) if kind == CHOICE else {},
        "picture": bool(image),
    }
    prompt = field_of(row, "prompt", str, where)
    pictures = (picture_path(found[_PICTURES], image, where),) if image else ()
    expected = gold if isinstance(gold, str) else " or ".join(gold)
    return Question(name, prompt, pictures, image, gold, expected, subject, facts=facts)


def _options(row: Mapping[str, Any], where: str) -> dict[str, str]:
    """Letter → text in the order of `all_choices`."""
    texts = field_of(row, "index2ans", dict, where)
    letters = field_of(row, "all_choices", list, where)
    if not letters or not all(isinstance(letter, str) and isinstance(texts.get(letter), str) for letter in letters):
        raise DataError(f"{where}: `all_choices` and `index2ans` don't belong together", "restore the official file")
    return {letter: texts[letter] for letter in letters}


def _from_line(line: Mapping[str, Any]) -> Question:
    options, gold = options_by_letter(line), line.get("answers")
    accepted = gold if isinstance(gold, list) else [] if gold is None else [gold]
    if not all(isinstance(text, str) for text in accepted):
        raise DataError("a line of --explain: `answers` is neither a string nor a list of strings", "write a string")
    if gold == [] or (options and any(text not in options for text in accepted)):
        raise DataError(f"a line of --explain: `answers` {gold!r} is none of the options", 'write "answers": "B"')
    kind = CHOICE if options else "short-answer"
    facts = {"type": kind, "gold_type": kind, "options": options, "picture": True}
    expected = " or ".join(accepted)
    return Question("line", str(line.get("question", "")), gold=gold, expected=expected, facts=facts)


TASK = Task(
    name="mmmu_val",
    title="MMMU-val",
    protocol="mmmu-val-anns_for_eval/as-prompted/mmmu-parser, sha256 for random/1024",
    folder="MMMU",
    files=(
        DataFile((_QUESTIONS,), "questions", _FACTORY),
        DataFile((_ANSWERS, "answer_dict_val.json"), "labels", "https://github.com/MMMU-Benchmark/MMMU, eval/"),
        DataFile((_PICTURES,), "pictures", _FACTORY),
    ),
    max_tokens=LONG,
    headline="accuracy",
    load=_load,
    from_line=_from_line,
    mark=mark,
    metrics=metrics,
    submission=submission,
)
