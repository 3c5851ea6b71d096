"""TextVQA val v0.5.1, scored by m4c's rules: `textvqa_val` asks the question alone, `textvqa_val_ocr` as LLaVA does.

LLaVA's prompt has three lines: the question as annotated, `Reference OCR token: ` with the Rosetta tokens joined by
`, ` in their file's order, and the suffix. The tokens are worth about five points, so the two never share a protocol.

An answer file of LLaVA has the picture's id as `question_id`. Answers are therefore joined by that id and the question
in lower case, which is read back out of the prompt. Of two annotations that agree in both, the evaluator scores every
answer by the later one, and so does this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
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
    field_of,
    locate,
    mean,
    picture_path,
    read_json,
    read_lines,
    scores,
    unique,
)
from tinyllava_edge.benchmarks.vqa_text import ANSWERS, leave_one_out, line_answers, m4c, m4c_steps
from tinyllava_edge.errors import DataError
from tinyllava_edge.files import write_text

ANNOTATIONS = "TextVQA_0.5.1_val.json"
PROMPTS, TOKENS = "llava_textvqa_val_v051_ocr.jsonl", "TextVQA_Rosetta_OCR_v0.2_val.json"
OCR_LINE = "Reference OCR token: "
_PYTHIA_START = "OCR tokens: "
_PYTHIA = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


def load(root: Path) -> list[Question]:
    """The annotated questions in their order, without OCR tokens. Raises DataError, which names the place."""
    return _questions(locate(root, TASK), lambda key, picture, question: f"{question}\n{SINGLE_WORD}")


def load_ocr(root: Path) -> list[Question]:
    """The annotated questions in their order, with LLaVA's prompts, or where its file is absent, prompts like them.

    Raises:
        DataError: a missing or damaged file, or one that does not belong to the annotations; the place is named.
    """
    found = locate(root, OCR)
    source = found[PROMPTS]
    if source.name == TOKENS:
        lines = _token_lines(source)
        return _questions(found, lambda key, picture, question: _with_tokens(lines, key, picture, question, source))
    prompts = _llava_prompts(source)
    questions = _questions(found, lambda key, picture, question: _next_prompt(prompts, key, source))
    if left := next((key for key, texts in prompts.items() if texts), None):
        raise DataError(f"{source}: {left!r:.80} is not in {ANNOTATIONS}", "the two files must be of version 0.5.1")
    return questions


def join_key(picture: str, question: str) -> str:
    """What an answer and its annotation share."""
    return f"{picture}\n{question.lower()}"


def question_of(prompt: str) -> str:
    """The question in a prompt of LLaVA's answer file, case kept, by the rules of its eval_textvqa.py.

    Raises:
        DataError: not three lines with an OCR line as first or second, not two lines, not m4c's one-line form.
    """
    lines = prompt.split("\n")
    if prompt.startswith(_PYTHIA_START):
        if match := _PYTHIA.search(prompt):
            return match[1]
    elif OCR_LINE in prompt and len(lines) == 3:
        return lines[1] if prompt.startswith(OCR_LINE.rstrip()) else lines[0]
    elif len(lines) == 2:
        return lines[0]
    raise DataError(
        f"prompt {prompt!r:.80} is none of TextVQA's", "it has the question, perhaps an OCR line, and the suffix"
    )


def line_key(line: Mapping[str, Any], *, with_tokens: bool = False) -> str:
    """Join key of an answer line, whose `question_id` is the picture's id.

    Raises:
        KeyError: a key is missing.
        DataError: a prompt of another form, or with OCR tokens where the task has none, or the other way round.
    """
    prompt = line["prompt"]
    if not isinstance(prompt, str):
        raise DataError(f"`prompt` is a {type(prompt).__name__}", "name an answer file of LLaVA's evaluation")
    question = question_of(prompt)
    found = prompt.startswith(_PYTHIA_START) or (OCR_LINE in prompt and prompt.count("\n") == 2)
    if found != with_tokens:
        has, name = ("with", OCR.name) if found else ("without", TASK.name)
        raise DataError(f"prompt {prompt!r:.80} was asked {has} OCR tokens", f"score the file with --task {name}")
    return join_key(str(line["question_id"]), question)


def question_line(question: Question) -> dict[str, Any]:
    """As in LLaVA's answer file: the picture's id stands for the question's."""
    return {"question_id": question.image.removesuffix(".jpg"), "prompt": question.prompt}


def mark(question: Question, text: str) -> Mark:
    """m4c's score: both sides always normalised, leave-one-out over ten answers."""
    steps = m4c_steps(text)
    parsed = steps[-1][1]
    if question.gold is None:
        return Mark(parsed, None, (*steps, ("compared as", parsed)))
    answers = [m4c(answer) for answer in question.gold]
    steps = (*steps, ("compared as", parsed), ("with", " | ".join(answers)))
    return Mark(parsed, leave_one_out(parsed, answers), steps)


def from_line(line: Mapping[str, Any]) -> Question:
    """A line of `--explain`: ten `answers`, or one text for ten that agree. Raises DataError."""
    return Question("line", str(line.get("question", "")), gold=line_answers(line, exactly=ANSWERS))


def metrics(records: Sequence[AnswerRecord]) -> dict[str, float]:
    """`accuracy` in percent, two decimals as LLaVA prints it; nothing where no answer has a score."""
    found = scores(records)
    return {"accuracy": round(100 * mean(found), 2)} if found else {}


def submission(records: Sequence[AnswerRecord], path: Path) -> Path:
    """Write the answer file that LLaVA's eval_textvqa.py scores, one JSON line per answer."""
    target = path.with_name(f"{path.name}.jsonl")
    lines = (
        {"question_id": record.image.removesuffix(".jpg"), "prompt": record.question, "text": record.given}
        for record in records
    )
    write_text(target, "".join(json.dumps(line) + "\n" for line in lines))
    return target


def _questions(found: Mapping[str, Path], prompt: Callable[[str, str, str], str]) -> list[Question]:
    """Annotations → questions; `prompt` gets the join key, the picture's id and the question."""
    path = found[ANNOTATIONS]
    questions: list[tuple[str, Question]] = []
    gold: dict[str, list[str]] = {}
    for number, row in enumerate(field_of(read_json(path), "data", list, str(path))):
        where = f"{path}: question {number}"
        text, picture = field_of(row, "question", str, where), field_of(row, "image_id", str, where)
        answers = field_of(row, "answers", list, where)
        if len(answers) != ANSWERS or not all(isinstance(answer, str) for answer in answers):
            raise DataError(f"{where}: `answers` is not {ANSWERS} texts", "restore the official file")
        if "\n" in text:
            raise DataError(f"{where}: a question of two lines can't be told from its prompt", "restore the file")
        key, name = join_key(picture, text), f"{picture}.jpg"
        gold[key] = answers
        identity = str(field_of(row, "question_id", int, where))
        file = picture_path(found["train_images"], name, where)
        questions.append((key, Question(identity, prompt(key, picture, text), (file,), name)))
    settled = [replace(question, gold=gold[key], expected=_usual(gold[key])) for key, question in questions]
    return unique(settled, str(path))


def _usual(answers: Sequence[str]) -> str:
    """The answer that most annotators gave, the first of several."""
    return max(answers, key=answers.count)


def _llava_prompts(path: Path) -> dict[str, list[str]]:
    """Join key → prompts, which two questions may share."""
    prompts: dict[str, list[str]] = {}
    for where, row in read_lines(path):
        text, picture = field_of(row, "text", str, where), field_of(row, "question_id", str, where)
        if text.count("\n") != 2 or OCR_LINE not in text or not text.endswith(f"\n{SINGLE_WORD}"):
            raise DataError(f"{where}: not question, OCR line and {SINGLE_WORD!r}", "restore LLaVA's file")
        if field_of(row, "image", str, where) != f"{picture}.jpg":
            raise DataError(f"{where}: `image` is not the picture of `question_id`", "restore LLaVA's file")
        prompts.setdefault(join_key(picture, question_of(text)), []).append(text)
    return prompts


def _next_prompt(prompts: Mapping[str, list[str]], key: str, path: Path) -> str:
    if not prompts.get(key):
        raise DataError(f"{path}: lacks {key!r:.80}", "the file must be of the annotations' version, 0.5.1")
    return prompts[key].pop(0)


def _token_lines(path: Path) -> dict[str, str]:
    """Picture's id → OCR line."""
    lines: dict[str, str] = {}
    for number, row in enumerate(field_of(read_json(path), "data", list, str(path))):
        where = f"{path}: entry {number}"
        picture, tokens = field_of(row, "image_id", str, where), field_of(row, "ocr_tokens", list, where)
        if not all(isinstance(token, str) for token in tokens):
            raise DataError(f"{where}: `ocr_tokens` holds something else than texts", "restore the official file")
        line = OCR_LINE + ", ".join(token.replace("\n", " ") for token in tokens)  # a token can't add a line
        if lines.setdefault(picture, line) != line:
            raise DataError(
                f"{where}: picture {picture!r} occurs twice, with other tokens", "restore the official file"
            )
    return lines


def _with_tokens(lines: Mapping[str, str], key: str, picture: str, question: str, path: Path) -> str:
    if picture not in lines:
        raise DataError(f"{path}: lacks picture {picture!r:.80}", "it must be of the validation set, version 0.2")
    return f"{question}\n{lines[picture]}\n{SINGLE_WORD}"


_SOURCE = "textvqa.org/dataset"
_FILES = (
    DataFile((ANNOTATIONS,), "questions with answers", _SOURCE),
    DataFile(("train_images", "train_val_images/train_images"), "pictures", _SOURCE),
)
TASK = Task(
    name="textvqa_val",
    title="TextVQA (no OCR tokens)",
    protocol=f"textvqa-val-0.5.1/single-word/m4c/{SHORT}",
    folder="textvqa",
    files=_FILES,
    max_tokens=SHORT,
    headline="accuracy",
    load=load,
    from_line=from_line,
    mark=mark,
    metrics=metrics,
    line_key=line_key,
    question_line=question_line,
    submission=submission,
)
OCR = replace(
    TASK,
    name="textvqa_val_ocr",
    title="TextVQA",
    protocol=f"textvqa-val-0.5.1/ocr-rosetta-0.2+single-word/m4c/{SHORT}",
    files=(
        *_FILES,
        DataFile((PROMPTS, TOKENS), "prompts with OCR tokens, or the tokens", f"{EVAL_ZIP}; {_SOURCE}"),
    ),
    load=load_ocr,
    line_key=partial(line_key, with_tokens=True),
)
