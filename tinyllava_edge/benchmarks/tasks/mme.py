"""MME: two yes/no questions on each picture, 14 tasks; Perception is the sum over ten of them, Cognition over four."""

from __future__ import annotations

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
    locate,
    picture_path,
    unique,
)
from tinyllava_edge.benchmarks.tasks.explain_lines import WHERE, right_answer
from tinyllava_edge.errors import DataError
from tinyllava_edge.files import new_directory

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_REQUEST = "Please answer yes or no."
_SUFFIX = f"\n{SINGLE_WORD}"
_RELEASE = "MME_Benchmark_release_version"
_SOURCE = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
_ENDINGS = (".jpg", ".png", ".jpeg")
_BREAKS = str.maketrans("\t\n\r", "   ")


def parse(answer: str) -> str:
    """`yes`, `no` or `other`: the whole answer, else the first of yes and no within its first four characters.

    As calculation.py: lower case first, no stripping, so `not` and `none` count as no and `it is yes` as other.
    """
    text = answer.lower()
    if text in ("yes", "no"):
        return text
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def mark(question: Question, answer: str) -> Mark:
    """1 where the parsed answer is the annotated one, else 0; None without one."""
    parsed = parse(answer)
    steps = (("first four characters, lower case", answer.lower()[:4]), ("counts as", parsed))
    return Mark(parsed, None if question.gold is None else float(parsed == question.gold), steps)


def metrics(records: Sequence[AnswerRecord]) -> dict[str, float]:
    """Points: `perception`, `cognition`, then `<task>/score`, the sum of `<task>/acc` and `<task>/acc+`.

    As calculation.py: acc is the share of questions, acc+ that of pictures with both answers right, both times 100.
    Only what was asked is in the sums: `tasks` says how many of the 14 that are. A picture with one answer of two
    counts nowhere.
    """
    groups = by_kind(records)
    scores: dict[str, float] = {}
    found: dict[str, float] = {}
    for task in (*PERCEPTION, *COGNITION):
        units: dict[str, list[float]] = {}
        for record in groups.get(task, ()):
            if record.score is not None:
                units.setdefault(record.unit, []).append(record.score)
        pairs = [pair for pair in units.values() if len(pair) == 2]
        if pairs:
            accuracy = sum(sum(pair) for pair in pairs) / (2 * len(pairs))
            both = sum(sum(pair) == 2 for pair in pairs) / len(pairs)
            scores[task] = accuracy * 100 + both * 100
            found |= {f"{task}/score": scores[task], f"{task}/acc": accuracy * 100, f"{task}/acc+": both * 100}
    sums = {
        name: sum(scores[task] for task in tasks if task in scores)
        for name, tasks in (("perception", PERCEPTION), ("cognition", COGNITION))
        if any(task in scores for task in tasks)
    }
    return {**sums, "tasks": float(len(scores)), **found} if scores else {}


def submission(records: Sequence[AnswerRecord], path: Path) -> Path:
    """Write the directory that calculation.py reads: `<task>.txt`, lines of picture, question, truth and answer.

    It reads by line and tab, so tabs and line breaks in an answer become spaces there; that never changes what the
    answer counts as. It wants all 14 files.
    """
    with new_directory(path, force=True) as folder:
        for task, group in by_kind(records).items():
            lines = []
            for record in group:
                facts = record.facts
                cells = (record.image.split("/")[-1], facts["question"], facts["answer"], record.given)
                lines.append("\t".join(str(cell).translate(_BREAKS) for cell in cells) + "\n")
            (folder / f"{task}.txt").write_text("".join(lines), encoding="utf-8", newline="\n")
    return path


def _plain(question: str) -> str:
    """The question without LLaVA's suffix and without the official request, one or two spaces before it included."""
    return question.removesuffix(_SUFFIX).strip().removesuffix(_REQUEST).rstrip()


def _load(root: Path) -> list[Question]:
    release = locate(root, TASK)[_RELEASE]
    tasks = (*PERCEPTION, *COGNITION)
    if lacking := [task for task in tasks if not (release / task).is_dir()]:  # a sum over fewer would look like a score
        raise DataError(
            f"{release}: lacks {', '.join(lacking)} of MME's 14 task directories ({_SOURCE})",
            f"unpack {_RELEASE} there, or name another directory with --data",
        )
    return unique([question for task in tasks for question in _load_task(release, task)], str(release))


def _load_task(release: Path, task: str) -> list[Question]:
    """Questions of one task, which lies flat or split in `images` and `questions_answers_YN`."""
    nested = (release / task / "images").is_dir()
    texts = release / task / "questions_answers_YN" if nested else release / task
    images = f"{task}/images" if nested else task
    files = sorted(texts.glob("*.txt")) if texts.is_dir() else []
    if not files:
        raise DataError(f"{texts}: holds no question files", "unpack the official release again")
    return [question for file in files for question in _load_pair(release, task, images, file)]


def _load_pair(release: Path, task: str, images: str, file: Path) -> list[Question]:
    try:
        lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: can't be read ({error})", "unpack the official release again") from error
    pictures = [file.stem + ending for ending in _ENDINGS if (release / images / (file.stem + ending)).is_file()]
    if len(lines) != 2 or len(pictures) != 1:
        raise DataError(
            f"{file}: {len(lines)} questions and {len(pictures)} pictures, where MME has two and one",
            "unpack the official release again",
        )
    name = f"{images}/{pictures[0]}"
    picture = picture_path(release, name, str(file))
    questions = []
    for number, line in enumerate(lines, 1):
        cells = line.strip().split("\t")
        if len(cells) != 2 or cells[1].lower() not in ("yes", "no"):
            raise DataError(
                f"{file}:{number}: not a question, a tab and Yes or No", "unpack the official release again"
            )
        facts = {"question": cells[0], "answer": cells[1]}
        gold = cells[1].lower()
        prompt = _plain(cells[0]) + _SUFFIX
        unit = f"{task}/{file.stem}"
        questions.append(Question(f"{name}#{number}", prompt, (picture,), name, gold, cells[1], task, unit, facts))
    return questions


def _from_line(line: Mapping[str, Any]) -> Question:
    gold = right_answer(line)
    if gold is not None and gold.lower() not in ("yes", "no"):
        raise DataError(f"{WHERE}: `answers` {gold!r} is neither yes nor no", 'write "answers": "Yes"')
    return Question("line", str(line.get("question", "")), gold=gold and gold.lower(), expected=gold or "")


def _line_key(line: Mapping[str, Any]) -> str:
    """Task, picture's stem and bare question, as convert_answer_to_mme.py joins: the id alone names two questions."""
    parts = str(line["question_id"]).split("/")
    return f"{parts[0]}/{parts[-1].split('.')[0]}\n{_plain(str(line['prompt']))}"


TASK = Task(
    name="mme",
    title="MME",
    protocol="mme-release/single-word/calculation/128",
    folder="MME",
    files=(
        DataFile(
            (_RELEASE, f"MME/{_RELEASE}", "."),
            "the 14 tasks with pictures and questions",
            _SOURCE,
        ),
    ),
    max_tokens=SHORT,
    headline="perception",
    load=_load,
    from_line=_from_line,
    mark=mark,
    metrics=metrics,
    line_key=_line_key,
    question_line=lambda question: {"question_id": question.image, "prompt": question.prompt},
    submission=submission,
    unit="points",
    units={"acc": "%", "acc+": "%", "tasks": "tasks"},
)
