"""LLaVA-Bench (In-the-Wild): a judge rates GPT-4's reference answer and the model's, 1 to 10; their ratio is the score.

Matches LLaVA's eval_gpt_review_bench.py and summarize_gpt_review.py. Their quirks that move a score are kept: the
reference always comes first, a reply is asked for once, its first line must split at single spaces into exactly two
numbers, and a pair that can't be read goes into the means as -1 and -1 (`unreadable` counts them). Three differences:
files are joined by question id, there by line number; a pair with `nan` or `inf` counts as unreadable, there it would
make the means so; and where not one reply is readable there is no score, there it would be 100.
"""

from __future__ import annotations

import json
import math
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
    read_lines,
    unique,
)
from tinyllava_edge.errors import DataError
from tinyllava_edge.files import new_file

CATEGORIES = ("conv", "detail", "complex")
_SOURCE = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
_UNREADABLE = (-1.0, -1.0)


def load(root: Path) -> list[Question]:
    """Read the questions with the judge's context and reference answer of each.

    Raises:
        DataError: a missing file or key, a value of another type, a repeated or unmatched question or context, an
            unknown category, a rule.json with another rule, or a picture that is missing or outside the folder.
    """
    found = locate(root, TASK)
    contexts = _table(found["context.jsonl"], "image", _caption)
    references = _table(
        found["answers_gpt4.jsonl"], "question_id", lambda row, where: str(field_of(row, "text", str, where))
    )
    if "rule.json" in found:
        _check_rule(found["rule.json"])
    path = found["questions.jsonl"]
    questions = [_question(row, where, found, contexts, references) for where, row in read_lines(path)]
    if spare := set(references) - {question.id for question in questions}:
        raise DataError(
            f"{found['answers_gpt4.jsonl']}: answers {min(spare)!r}, which {path} lacks", "restore the official files"
        )
    return unique(questions, str(path))


def _question(
    row: dict[str, Any], where: str, found: Mapping[str, Path], contexts: dict[str, str], references: dict[str, str]
) -> Question:
    id_, name = _key(row, "question_id", where), field_of(row, "image", str, where)
    category = field_of(row, "category", str, where)
    if category not in CATEGORIES:
        raise DataError(f"{where}: `category` is {category!r}", f"known are {', '.join(CATEGORIES)}")
    for table, key, file in ((references, id_, "answers_gpt4.jsonl"), (contexts, name, "context.jsonl")):
        if key not in table:
            raise DataError(f"{found[file]}: lacks {key!r}, which {where} needs", "restore the official file")
    return Question(
        id_,
        field_of(row, "text", str, where),
        (picture_path(found["images"], name, where),),
        name,
        gold={"reference": references[id_], "context": contexts[name]},
        expected=references[id_],
        kind=category,
    )


def _table(path: Path, key: str, value: Any) -> dict[str, str]:
    """JSON lines → text by key. Raises DataError for a repeated key."""
    table: dict[str, str] = {}
    for where, row in read_lines(path):
        name = _key(row, key, where)
        if name in table:
            raise DataError(f"{where}: `{key}` {name!r} occurs twice", "restore the official file")
        table[name] = value(row, where)
    return table


def _caption(row: dict[str, Any], where: str) -> str:
    """A picture's description; several are put on lines of their own."""
    captions = field_of(row, "caption", (str, list), where)
    if isinstance(captions, str):
        return captions
    return "\n".join(str(field_of({"caption": caption}, "caption", str, where)) for caption in captions)


def _key(row: Any, key: str, where: str) -> str:
    """An id: a number or a text, in any of the files."""
    if isinstance(field_of(row, key, (int, str), where), bool):
        raise DataError(f"{where}: `{key}` is a bool", "restore the official file")
    return str(row[key])


def _check_rule(path: Path) -> None:
    """Another rule is another benchmark, which may not pass under this protocol's name."""
    rules = read_json(path)
    for category in CATEGORIES:
        where = f"{path}: llava_bench_{category}"
        rule = field_of(rules, f"llava_bench_{category}", dict, str(path))
        stated = field_of(rule, "role", str, where), field_of(rule, "prompt", str, where)
        if stated != (_official()["role"], _official()["rule"]):
            raise DataError(f"{where} is not the official rule", "restore LLaVA's rule.json, or remove the file")


@cache
def _official() -> dict[str, str]:
    path = Path(__file__).parent / "prompts" / "llava_wild.json"
    return {key: str(value) for key, value in json.loads(path.read_text(encoding="utf-8")).items()}


def from_line(line: Mapping[str, Any]) -> Question:
    """A line of `--explain`: `text`, and `question`, `answer` (the reference) and `context` for the judge's prompt."""
    question, answer, context = (line.get(key, "") for key in ("question", "answer", "context"))
    if not all(isinstance(value, str) for value in (question, answer, context)):
        raise DataError("`question`, `answer` and `context` must be texts", 'e.g. {"text": "Hawaii.", "question": "?"}')
    gold = {"reference": answer, "context": context}
    return Question(str(line.get("question_id", "")), question, gold=gold, expected=answer)


def request(question: Question, answer: str, number: int) -> JudgeRequest:
    """What the judge is asked; the same at every try."""
    role = _official()["role"]
    parts = (
        ("Context", question.gold["context"]),
        ("Question", question.prompt),
        (f"{role} 1", f"{question.gold['reference']}\n\n[End of {role} 1]"),
        (f"{role} 2", f"{answer}\n\n[End of {role} 2]"),
        ("System", _official()["rule"]),
    )
    return JudgeRequest(_official()["system"], "".join(f"[{name}]\n{text}\n\n" for name, text in parts), 0.2, 1024)


def read(reply: str) -> tuple[float, float] | None:
    """The reference's and the model's rating from the first line; None when they can't be read."""
    parts = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = (float(part) for part in parts)
    except ValueError:
        return None
    return (first, second) if math.isfinite(first) and math.isfinite(second) else None


def mark(question: Question, answer: str) -> Mark:
    """The answer as it goes to the judge; without a score."""
    return Mark(answer, None)


def mark_replies(question: Question, answer: str, replies: Sequence[str]) -> Mark:
    """The model's rating as a share of 10, held to 0..1, for comparisons; 0 when the reply can't be read."""
    pair = read(_reply(list(replies), f"answer {question.id!r}"))
    first_line = ("first line", replies[0].split("\n")[0])
    if pair is None:
        return Mark("unreadable", 0.0, (first_line, ("ratings", "-1 -1")))
    ratings = f"{pair[0]:g} {pair[1]:g}"
    return Mark(ratings, min(1.0, max(0.0, pair[1] / 10)), (first_line, ("ratings", ratings)))


def _reply(replies: Any, where: str) -> str:
    """The one reply that counts. Raises DataError when there is none."""
    if not isinstance(replies, list | tuple) or not replies or not isinstance(replies[0], str):
        raise DataError(
            f"{where} has not been judged",
            "judge the answers with --judge-url and --judge-model, or with --judge-replies",
        )
    return replies[0]


def metrics(records: Sequence[AnswerRecord]) -> dict[str, float]:
    """Relative score in percent, and ten times the mean ratings, of all questions and of each category.

    Keys: `relative`, `reference`, `model`, `unreadable` (a count: each stands in the means as -1 and -1), then e.g.
    `conv/relative`. The mean ratings are rounded to three decimals before they are divided, all figures to one, as
    summarize_gpt_review.py does. A category of unreadable replies alone gets its 100 here too.

    Raises:
        DataError: no answers, one that has not been judged, no readable reply, or a reference that gets 0 on average.
    """
    if not records:
        raise DataError("llava_in_the_wild: no answers to score", "evaluate at least one question")
    pairs: dict[str, list[tuple[float, float] | None]] = {}
    for record in records:
        where = f"llava_in_the_wild: answer {record.id!r}"
        if record.question_type not in CATEGORIES:
            raise DataError(f"{where} has the category {record.question_type!r}", f"known are {', '.join(CATEGORIES)}")
        pair = read(_reply(record.facts.get("replies"), where))
        for group in ("", record.question_type):
            pairs.setdefault(group, []).append(pair)
    if all(pair is None for pair in pairs[""]):
        raise DataError(
            f"llava_in_the_wild: none of {len(records)} replies can be read", "look at the replies, or change the judge"
        )
    figures: dict[str, float] = {}
    for group in sorted(pairs):  # "", which is all, comes first
        figures |= _figures(f"{group}/" if group else "", pairs[group])
    return figures


def _figures(prefix: str, pairs: Sequence[tuple[float, float] | None]) -> dict[str, float]:
    reference = model = 0.0
    for pair in pairs:  # one after the other, as numpy adds rows
        first, second = pair or _UNREADABLE
        reference, model = reference + first, model + second
    reference, model = round(reference / len(pairs), 3), round(model / len(pairs), 3)
    if reference == 0 or not math.isfinite(reference) or not math.isfinite(model):
        raise DataError(
            f"llava_in_the_wild: mean ratings of {prefix.rstrip('/') or 'all'}, {reference} and {model}, give no ratio",
            "look at the replies, or change the judge",
        )
    return {
        f"{prefix}relative": round(model / reference * 100, 1),
        f"{prefix}reference": round(reference * 10, 1),
        f"{prefix}model": round(model * 10, 1),
        f"{prefix}unreadable": float(pairs.count(None)),
    }


def question_line(question: Question) -> dict[str, Any]:
    """Number and prompt, as in LLaVA's questions.jsonl."""
    return {"question_id": _number(question.id), "prompt": question.prompt}


def _number(id_: str) -> int | str:
    """An id as the official files have it."""
    return int(id_) if re.fullmatch("0|[1-9][0-9]{,17}", id_) else id_


def submission(records: Sequence[AnswerRecord], out: Path) -> Path:
    """Write an answer file as eval_gpt_review_bench.py reads it. It joins by line number: all questions, in order."""
    path = out.with_name(f"{out.name}.jsonl")
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as handle:
        for record in records:
            line = {"question_id": _number(record.id), "prompt": record.question, "text": record.given}
            handle.write(json.dumps(line | {"answer_id": record.id, "model_id": "", "metadata": {}}) + "\n")
    return path


TASK = Task(
    name="llava_in_the_wild",
    title="LLaVA-Bench (In-the-Wild)",
    protocol=f"llava-bench-in-the-wild/no-suffix/judge-pair-reference-first/{LONG}",
    folder="llava-bench-in-the-wild",
    files=(
        DataFile(("questions.jsonl",), "questions", _SOURCE),
        DataFile(("context.jsonl",), "descriptions of the pictures", _SOURCE),
        DataFile(("answers_gpt4.jsonl",), "reference answers", _SOURCE),
        DataFile(("images",), "pictures", _SOURCE),
        DataFile(("rule.json",), "the judge's rule", "https://github.com/haotian-liu/LLaVA", needed=False),
    ),
    max_tokens=LONG,
    headline="relative",
    load=load,
    from_line=from_line,
    mark=mark,
    metrics=metrics,
    question_line=question_line,
    submission=submission,
    judging=Judging(request, read, mark_replies, 1, "gpt-4-0314"),
    units={"unreadable": "replies"},
)
