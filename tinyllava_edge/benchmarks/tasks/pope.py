"""POPE: is a thing in the picture, three times about the same 500 pictures of COCO.

`pope` is what LLaVA and TinyLLaVA report: the label files of POPE's commit e3e3926 (random 2910, popular and
adversarial 3000 questions) and LLaVA's question file. `pope_head` asks POPE's newest label files (3000 each).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    mean,
    picture_path,
    read_lines,
    unique,
)
from tinyllava_edge.benchmarks.tasks.explain_lines import WHERE, right_answer
from tinyllava_edge.errors import DataError

SPLITS = ("adversarial", "random", "popular")  # in the order of LLaVA's question file
_BEFORE_FIRST = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}  # LLaVA's ids count on from here
_RANDOM_E3E3926, _RANDOM_HEAD = 2910, 3000  # the split whose size tells the versions apart
_SUFFIX = f"\n{SINGLE_WORD}"
_QUESTIONS = "llava_pope_test.jsonl"
_PICTURES = DataFile(("val2014", "coco/val2014"), "COCO's val2014 pictures", "https://cocodataset.org")


def _label_files(commit: str) -> tuple[DataFile, ...]:
    names = [f"coco_pope_{split}.json" for split in SPLITS]
    source = f"https://github.com/AoiDragon/POPE/tree/{commit}/output/coco"
    return tuple(DataFile((f"coco/{name}", f"output/coco/{name}", name), "labels", source) for name in names)


def parse(answer: str) -> str:
    """`no` where one of No, not, no stands alone before the first full stop, else `yes`, for every other answer.

    As eval_pope.py: words end at single spaces only and commas are dropped, so `NO`, `No\\n`, `None`, `There isn't`, an
    empty answer and `Yes. No` all count as yes.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def mark(question: Question, answer: str) -> Mark:
    """1 where the parsed answer is the label, else 0; None without a label."""
    parsed = parse(answer)
    steps = (("before the first full stop, no commas", answer.split(".")[0].replace(",", "")), ("counts as", parsed))
    return Mark(parsed, None if question.gold is None else float(parsed == question.gold), steps)


def metrics(records: Sequence[AnswerRecord]) -> dict[str, float]:
    """Percent: `f1`, the mean over the splits, then accuracy, precision, recall, f1 and yes_ratio of each split.

    LLaVA's formulas with yes as the positive class. Where eval_pope.py of LLaVA divides by zero (no yes among the
    answers or the labels) the figure is 0 here; TinyLLaVA Factory adds 1e-6 to the denominators instead, which moves F1
    in the seventh digit.
    """
    found: dict[str, float] = {}
    for split, group in by_kind([record for record in records if record.score is not None]).items():
        pairs = [(record.parsed, str(record.facts["label"])) for record in group]
        true_yes = pairs.count(("yes", "yes"))
        said_yes = sum(parsed == "yes" for parsed, _ in pairs)
        precision = _share(true_yes, said_yes)
        recall = _share(true_yes, sum(label == "yes" for _, label in pairs))
        f1 = _share(2 * precision * recall, precision + recall)
        accuracy = _share(sum(parsed == label for parsed, label in pairs), len(pairs))
        values = (accuracy, precision, recall, f1, _share(said_yes, len(pairs)))
        for name, value in zip(("accuracy", "precision", "recall", "f1", "yes_ratio"), values, strict=True):
            found[f"{split}/{name}"] = 100 * value
    f1s = [value for name, value in found.items() if name.endswith("/f1")]
    return {"f1": mean(f1s), **found} if f1s else {}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _labels(found: Mapping[str, Path], split: str) -> list[tuple[str, str, str, str, int]]:
    """Place, picture, question, label and number of each row of a label file."""
    rows = []
    for where, row in read_lines(found[f"coco/coco_pope_{split}.json"]):
        label = field_of(row, "label", str, where)
        if label not in ("yes", "no"):
            raise DataError(f"{where}: label {label!r} is neither yes nor no", "restore the official file")
        image, text = field_of(row, "image", str, where), field_of(row, "text", str, where)
        rows.append((where, image, text, label, field_of(row, "question_id", int, where)))
    return rows


def _question(number: int, image: str, prompt: str, split: str, label: str, folder: Path, where: str) -> Question:
    facts = {"label": label, "question_id": number}
    path = picture_path(folder, image, where)
    return Question(str(number), prompt, (path,), image, label, label, split, facts=facts)


def _load(root: Path) -> list[Question]:
    found = locate(root, TASK)
    labels = {split: _labels(found, split) for split in SPLITS}
    if len(labels["random"]) == _RANDOM_HEAD:
        raise DataError(
            f"{found['coco/coco_pope_random.json']}: {_RANDOM_HEAD} rows: POPE's newest labels, not commit e3e3926's",
            "fetch the files of commit e3e3926, or run --task pope_head",
        )
    asked: dict[str, int] = dict.fromkeys(SPLITS, 0)
    questions = []
    for where, row in read_lines(found[_QUESTIONS]):
        split, number = field_of(row, "category", str, where), field_of(row, "question_id", int, where)
        image, prompt = field_of(row, "image", str, where), field_of(row, "text", str, where)
        if split not in labels:
            raise DataError(f"{where}: category {split!r} is none of {', '.join(SPLITS)}", "restore the official file")
        place = asked[split]
        asked[split] += 1
        if place >= len(labels[split]):
            raise _misaligned(where, f"has no row {place + 1} in {found[f'coco/coco_pope_{split}.json']}")
        other, labelled, text, label, _ = labels[split][place]
        if (image, prompt) != (labelled, text + _SUFFIX):
            raise _misaligned(where, f"asks something else than {other}")
        questions.append(_question(number, image, prompt, split, label, found["val2014"], where))
    for split, count in asked.items():
        if count != len(labels[split]):
            raise _misaligned(str(found[_QUESTIONS]), f"asks {count} of the {len(labels[split])} {split} questions")
    return unique(questions, str(found[_QUESTIONS]))


def _misaligned(where: str, what: str) -> DataError:
    return DataError(
        f"{where}: {what}: question file and labels are of different versions",
        "LLaVA's question file goes with POPE's commit e3e3926; for POPE's newest label files run --task pope_head",
    )


def _load_head(root: Path) -> list[Question]:
    found = locate(root, HEAD)
    questions = []
    for split in SPLITS:
        rows = _labels(found, split)
        if split == "random" and len(rows) == _RANDOM_E3E3926:
            raise DataError(
                f"{found['coco/coco_pope_random.json']}: {_RANDOM_E3E3926} rows: the label files of commit e3e3926",
                "fetch POPE's newest label files, or run --task pope",
            )
        for where, image, text, label, number in rows:
            number += _BEFORE_FIRST[split]
            questions.append(_question(number, image, text + _SUFFIX, split, label, found["val2014"], where))
    return unique(questions, str(root))


def _from_line(line: Mapping[str, Any]) -> Question:
    label = right_answer(line)
    if label not in (None, "yes", "no"):
        raise DataError(f"{WHERE}: `answers` {label!r} is neither yes nor no", 'write "answers": "yes"')
    return Question("line", str(line.get("question", "")), gold=label, expected=label or "", facts={"label": label})


def _question_line(question: Question) -> dict[str, Any]:
    return {"question_id": question.facts["question_id"], "prompt": question.prompt}


TASK = Task(
    name="pope",
    title="POPE",
    protocol="pope-e3e3926/single-word/eval_pope/128",
    folder="pope",
    files=(
        DataFile((_QUESTIONS,), "LLaVA's questions", EVAL_ZIP),
        *_label_files("e3e39262c85a6a83f26cf5094022a782cb0df58d"),
        _PICTURES,
    ),
    max_tokens=SHORT,
    headline="f1",
    load=_load,
    from_line=_from_line,
    mark=mark,
    metrics=metrics,
    question_line=_question_line,
)

HEAD = Task(
    name="pope_head",
    title="POPE (newest label files)",
    protocol="pope-3000x3/single-word/eval_pope/128",
    folder="pope",
    files=(*_label_files("main"), _PICTURES),
    max_tokens=SHORT,
    headline="f1",
    load=_load_head,
    from_line=_from_line,
    mark=mark,
    metrics=metrics,
    question_line=_question_line,
)
