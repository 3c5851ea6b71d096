"""Ask a runtime the questions of a task, picture by picture, and mark its answers.

    questions → pieces (a few pictures each) → answers → marks → records, appended to a file that a killed run resumes

A piece is computed in one call; its answers do not depend on the other pieces. So a run that was cut, or was spread
over machines by `--shard`, gives the same answers as one that was not.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyllava_edge import prompt
from tinyllava_edge.benchmarks import run_file
from tinyllava_edge.benchmarks.environment import capture, environment_sample
from tinyllava_edge.benchmarks.results import AnswerRecord, Sample, answered_on
from tinyllava_edge.benchmarks.run_file import BLIND, PICTURE, Run, Shard
from tinyllava_edge.benchmarks.stats import Interval, derangement, wilson
from tinyllava_edge.benchmarks.tasks.base import Question, Task
from tinyllava_edge.benchmarks.tasks.llava_json import EXACT
from tinyllava_edge.errors import DataError, ImageError, UsageError
from tinyllava_edge.runtimes.base import Answer, Runtime

_EVERY_S = 2.0  # between two progress lines
Piece = list[tuple[Path | bytes | None, list[Question]]]  # pictures that are computed together, each with its questions


@dataclass(frozen=True)
class EvalResult:
    """Every answer of one run."""

    runtime: str
    """`edge`, `reference`, `mtmd`, `web`, or `answers` for a file made elsewhere"""
    build: str
    """build name, or the checkpoint's precision"""
    stage: str
    """`picture`, or `blind` when the pictures were shuffled"""
    records: tuple[AnswerRecord, ...]
    """one per question asked, in the set's order"""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """machine and libraries"""
    run: Run | None = None
    """what was asked; None for records that were put together otherwise"""

    @property
    def accuracy(self) -> Interval:
        """Share of answers with full score, with Wilson's interval."""
        return accuracy(self.records)

    @property
    def by_type(self) -> dict[str, Interval]:
        """Accuracy of each question type, in order of first appearance."""
        return accuracy_by(self.records, "question_type")

    @property
    def by_tier(self) -> dict[str, Interval]:
        """Accuracy of each tier, in order of first appearance."""
        return accuracy_by(self.records, "tier")

    def samples(self) -> list[Sample]:
        """The run as lines of results.jsonl, its environment first."""
        first = environment_sample(self.environment, answered_on(self.runtime))
        lines = [
            record.to_sample(self.runtime, self.build, self.stage, number, first.environment_id)
            for number, record in enumerate(self.records)
        ]
        return [first, *lines]


def accuracy(records: Iterable[AnswerRecord]) -> Interval:
    """Share of answers with full score, with Wilson's interval."""
    marks = [record.correct for record in records]
    return wilson(sum(marks), len(marks))


def accuracy_by(records: Iterable[AnswerRecord], key: str) -> dict[str, Interval]:
    """Accuracy of each value of `question_type` or `tier`; empty values are left out."""
    groups: dict[str, list[AnswerRecord]] = {}
    for record in records:
        if name := str(getattr(record, key)):
            groups.setdefault(name, []).append(record)
    return {name: accuracy(group) for name, group in groups.items()}


def sample_questions(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """At most `limit` questions, pictures by their names' hashes: a smaller sample is part of a larger one.

    Where questions only count together, a picture's are all taken or none, so that there may be fewer, or, if the
    first picture alone has more, more than `limit`.
    """
    if limit is None or limit >= len(questions):
        return list(questions)
    groups = by_picture(questions)
    order = sorted(groups, key=lambda name: hashlib.sha256(name.encode()).digest())
    if not any(question.unit for question in questions):
        return [question for name in order for question in groups[name]][:limit]
    chosen: list[Question] = []
    for name in order:
        if chosen and len(chosen) + len(groups[name]) > limit:
            break
        chosen += groups[name]
    return chosen


def by_picture(questions: Sequence[Question]) -> dict[str, list[Question]]:
    """Picture's name → its questions, in order of first appearance; a question without a picture stands alone."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.image if question.pictures else f"\0{question.id}", []).append(question)
    return groups


def evaluate(
    runtime: Runtime,
    questions: Sequence[Question],
    task: Task = EXACT,
    *,
    shuffle_pictures_seed: int | None = None,
    progress: Callable[[str], None] | None = None,
    limit: int | None = None,
    shard: Shard | None = None,
    out: Path | None = None,
) -> EvalResult:
    """Ask every question.

    Args:
        runtime: what answers.
        questions: of one task, in the set's order.
        task: how answers are marked, and how long they may be.
        shuffle_pictures_seed: when given, every picture is replaced by another one: the blind baseline. Grey or noise
            pictures would be out of distribution and measure something else.
        progress: receives a line now and then.
        limit: ask a fixed sample of the questions.
        shard: ask only this part of the pieces.
        out: results.jsonl that grows piece by piece; a run that was cut off goes on where it stopped.

    Raises:
        DataError: no questions, or `out` belongs to another model, machine or build, or to other questions.
        UsageError: a question with several pictures.
    """
    chosen = sample_questions(questions, limit)
    if not chosen:
        raise DataError("no rows to evaluate", "check the data file, or raise the limit")
    stage = PICTURE if shuffle_pictures_seed is None else BLIND
    groups = by_picture(chosen)
    shown = pictures_shown(groups, shuffle_pictures_seed)
    pieces = [
        [(shown[name], groups[name]) for name in names] for names in pieces_of(groups, shown, runtime.pictures_at_once)
    ]
    if shard is not None:
        pieces = pieces[shard.index :: shard.count]
    run = Run.of(task, questions, asked=len(chosen), limit=limit, shard=shard)
    environment = capture(runtime)
    log = run_file.open_run(out, environment, runtime.name, runtime.build, stage, run)
    place = {question.id: number for number, question in enumerate(questions)}
    done = log.answers({question.id: question for question in chosen}, task)
    left = [piece for piece in pieces if any(q.id not in done for _, group in piece for q in group)]
    _same_pictures([pair for piece in pieces if piece not in left for pair in piece], done)
    label = f"{task.name} {runtime.name} {runtime.build} {stage}".strip()
    clock = Clock(progress, label, sum(len(piece) for piece in left))
    for piece in left:
        fresh = list(_ask(runtime, piece, task))
        log.append([(place[record.id], record) for record in fresh])
        done.update({record.id: record for record in fresh})
        clock.tick(len(piece), len(fresh))
    asked = [question.id for piece in pieces for _, group in piece for question in group]
    records = tuple(done[name] for name in sorted(asked, key=place.__getitem__))
    return EvalResult(runtime.name, runtime.build, stage, records, environment, run)


def _same_pictures(finished: Sequence[tuple[Path | bytes | None, list[Question]]], done: Mapping[str, Any]) -> None:
    """Raises DataError where a picture's bytes changed since its questions were answered."""
    for picture, group in finished:
        before = done[group[0].id].image_sha256
        if before and _picture_sha256(picture) != before:
            raise DataError(
                f"{group[0].image}: the picture changed since {group[0].id} was answered",
                "restore it, or evaluate anew into another file with -o",
            )


def pictures_shown(groups: Mapping[str, Sequence[Question]], seed: int | None) -> dict[str, Path | bytes | None]:
    """Which picture each group's questions see: their own, or with a seed another one's. Raises UsageError."""
    for group in groups.values():
        if len(group[0].pictures) > 1:
            raise UsageError(f"question {group[0].id} shows {len(group[0].pictures)} pictures", "one can be evaluated")
    shown = {name: group[0].pictures[0] if group[0].pictures else None for name, group in groups.items()}
    if seed is not None:
        names = [name for name, picture in shown.items() if picture is not None]
        place = derangement(len(names), seed)
        shown |= {name: groups[names[place[k]]][0].pictures[0] for k, name in enumerate(names)}
    return shown


def pieces_of(
    groups: Mapping[str, Sequence[Question]], shown: Mapping[str, Path | bytes | None], most: int
) -> list[list[str]]:
    """Group names, put together to pieces of at most `most` pictures; a question without a picture stands alone."""
    pieces: list[list[str]] = []
    open_piece = False
    for name in groups:
        if shown[name] is None:
            pieces.append([name])
            open_piece = False
        elif open_piece and len(pieces[-1]) < most:
            pieces[-1].append(name)
        else:
            pieces.append([name])
            open_piece = True
    return pieces


def prompt_sha256(template: str, question: Question) -> str:
    """Hash of the whole prompt as text, with `<image>` in the picture's place."""
    shape = prompt.get_template(template)
    turn = prompt.Turn(question.prompt, images=len(question.pictures))
    return hashlib.sha256(prompt.render(prompt.build([turn], shape), shape).encode()).hexdigest()


def record_of(task: Task, question: Question, text: str, **measured: Any) -> AnswerRecord:
    """The record of an answer: what it was asked, what it becomes, and what else was measured."""
    mark = task.mark(question, text)
    return AnswerRecord(
        id=question.id,
        image=question.image,
        question=question.prompt,
        expected=question.expected,
        given=text,
        question_type=question.kind,
        tier=str(question.facts.get("tier", "")),
        task=task.name,
        protocol=task.protocol,
        parsed=mark.parsed,
        score=mark.score,
        unit=question.unit,
        facts=dict(question.facts),
        **measured,
    )


class Clock:
    """Progress lines: how many, how fast, how long still."""

    def __init__(self, progress: Callable[[str], None] | None, label: str, pictures: int) -> None:
        self._progress, self._label, self._pictures = progress, label, pictures
        self._start = self._told = time.monotonic()
        self._done = self._answers = 0

    def tick(self, pictures: int, answers: int) -> None:
        """Count one more piece, and tell now and then."""
        self._done += pictures
        self._answers += answers
        now = time.monotonic()
        if self._progress is None or (self._done < self._pictures and now - self._told < _EVERY_S):
            return
        self._told = now
        passed = max(now - self._start, 1e-9)
        left = passed / self._done * (self._pictures - self._done)
        self._progress(
            f"{self._label}: {self._done:,} of {self._pictures:,} pictures, {self._answers:,} answers, "
            f"{self._answers / passed:.1f} a second" + (f", {duration(left)} left" if left >= 1 else "")
        )


def duration(seconds: float) -> str:
    """For people: `48 s`, `12 min`, `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _ask(runtime: Runtime, piece: Piece, task: Task) -> Iterator[AnswerRecord]:
    if piece[0][0] is None:
        question = piece[0][1][0]
        answers = [[runtime.answer(None, question.prompt, max_tokens=task.max_tokens)]]
    else:
        items = [(picture, [q.prompt for q in group]) for picture, group in piece if picture is not None]
        try:
            answers = list(runtime.answer_pictures(items, max_tokens=task.max_tokens))
        except ImageError as error:
            if not any(isinstance(picture, bytes) for picture, _ in piece):  # a file is named already
                raise
            ids = ", ".join(group[0].id for _, group in piece)
            raise ImageError(f"{task.name}: picture of question {ids}: {error.message}", error.hint) from error
    for (picture, group), given in zip(piece, answers, strict=True):
        digest = _picture_sha256(picture)
        for question, answer in zip(group, given, strict=True):
            yield record_of(
                task,
                question,
                answer.text,
                prompt_sha256=prompt_sha256(runtime.spec.template, question),
                image_sha256=digest,
                n_prompt_tokens=answer.n_prompt_tokens,
                token_ids=answer.token_ids,
                margins=answer.margins,
                timings_ms=_timings(answer),
            )


def _picture_sha256(picture: Path | bytes | None) -> str:
    if picture is None:
        return ""
    data = picture if isinstance(picture, bytes) else picture.read_bytes()
    return hashlib.sha256(data).hexdigest()


def _timings(answer: Answer) -> dict[str, float]:
    """Rounded to a microsecond; nothing where another answer of the call carries them."""
    found = answer.timings.to_dict()
    return {name: round(value, 3) for name, value in found.items()} if any(found.values()) else {}
