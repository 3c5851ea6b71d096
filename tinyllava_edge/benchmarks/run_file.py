"""The file that an evaluation grows: environment, the `run` line, answers, and at the end the scores.

A killed run leaves whole lines and perhaps a half one; opening the file again drops the half line and goes on. A file
of another model, machine, build, task or shard is refused before anything is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.environment import VOLATILE, environment_sample
from tinyllava_edge.benchmarks.out_file import check_target
from tinyllava_edge.benchmarks.results import AnswerRecord, Sample, answered_on, read_results, to_line
from tinyllava_edge.benchmarks.tasks.base import Question, Task
from tinyllava_edge.errors import DataError, UsageError
from tinyllava_edge.files import storage_errors, write_text

PICTURE, BLIND = "picture", "blind"  # stages of `answer` lines


@dataclass(frozen=True)
class Shard:
    """One part of an evaluation that is spread over machines."""

    index: int
    """from 0"""
    count: int
    """parts in all"""


@dataclass(frozen=True)
class Run:
    """What an evaluation asks."""

    task: str
    """name; empty for a LLaVA JSON file"""
    protocol: str
    """everything that moves the score"""
    questions_sha256: str
    """of the whole set: ids, pictures' names, prompts, right answers"""
    n: int
    """questions of the set"""
    asked: int
    """questions asked, all shards together"""
    limit: int | None
    """sample size that was wanted"""
    shard: tuple[int, int] | None
    """index from 0 and count"""

    @classmethod
    def of(
        cls, task: Task, questions: Sequence[Question], *, asked: int, limit: int | None, shard: Shard | None
    ) -> Run:
        """Describe an evaluation."""
        digest = hashlib.sha256()
        for question in questions:
            facts = [question.id, question.image, question.prompt, question.expected, question.kind, question.unit]
            digest.update(json.dumps([*facts, question.gold, dict(question.facts)], default=str).encode())
        part = None if shard is None else (shard.index, shard.count)
        return cls(task.name, task.protocol, digest.hexdigest(), len(questions), asked, limit, part)

    def to_sample(self, runtime: str, build: str, stage: str, environment_id: str) -> Sample:
        """The `run` line."""
        place = answered_on(runtime)
        return Sample("run", runtime, build, stage, environment_id=environment_id, target=place, detail=asdict(self))

    @classmethod
    def from_sample(cls, sample: Sample) -> Run:
        """The run in a `run` line. Raises DataError."""
        detail = dict(sample.detail)
        try:
            shard = detail.pop("shard")
            if type(detail["n"]) is not int or type(detail["asked"]) is not int:
                raise TypeError("`n` and `asked` are no numbers")
            return cls(**detail, shard=None if shard is None else (int(shard[0]), int(shard[1])))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"a run line is damaged ({error})", "evaluate again") from error


class RunFile:
    """An evaluation's file, open for appending; without a path nothing is kept."""

    def __init__(self, path: Path | None, key: tuple[str, str, str, str], stored: Sequence[Sample]) -> None:
        self._path, self._key, self._stored = path, key, list(stored)

    def answers(self, questions: Mapping[str, Question], task: Task) -> dict[str, AnswerRecord]:
        """Answers that the file holds already, marked anew. Raises DataError when they belong to other questions."""
        found: dict[str, AnswerRecord] = {}
        for sample in self._stored:
            if sample.kind != "answer":
                continue
            record = AnswerRecord.from_sample(sample)
            question = questions.get(record.id)
            if question is None:  # of a larger sample
                continue
            replies = record.facts.get("replies")
            if task.judging is not None and isinstance(replies, list):  # a judge has spoken: the score is its own
                mark = task.judging.mark(question, record.given, replies)
            else:
                mark = task.mark(question, record.given)
            found[record.id] = replace(record, parsed=mark.parsed, score=mark.score)
        return found

    def append(self, records: Sequence[tuple[int, AnswerRecord]]) -> None:
        """Write a piece's answers, each with its question's number in the set, at once."""
        if self._path is None:
            return
        runtime, build, stage, environment_id = self._key
        lines = [to_line(record.to_sample(runtime, build, stage, place, environment_id)) for place, record in records]
        with storage_errors(self._path), self._path.open("a", encoding="utf-8") as handle:
            handle.write("".join(lines))


def open_run(
    path: Path | None, environment: Mapping[str, Any], runtime: str, build: str, stage: str, run: Run
) -> RunFile:
    """Begin a file, or go on with one. Raises UsageError for a directory, a device or a pipe.

    Raises:
        DataError: the file holds answers of another model, build or machine, or to other questions, or is damaged.
    """
    if path is not None:
        check_target(path)
    first = environment_sample(environment, answered_on(runtime))
    key = (runtime, build, stage, first.environment_id)
    if path is None:
        return RunFile(None, key, ())
    if not path.is_file() or not path.stat().st_size:
        write_text(path, to_line(first) + to_line(run.to_sample(*key)))
        return RunFile(path, key, ())
    samples = [s for s in read_results([path], tolerate_cut=True) if s.kind != "accuracy"]  # scores come at the end
    for sample in samples:
        if sample.kind in ("run", "answer") and key != (
            sample.runtime,
            sample.build,
            sample.stage,
            sample.environment_id,
        ):
            differs = _difference(samples, sample.environment_id, first.detail)
            raise DataError(
                f"{path}: holds answers of another model, build or machine{differs}", "name another file with -o"
            )
    runs = [Run.from_sample(sample) for sample in samples if sample.kind == "run"]
    if not runs:
        raise DataError(f"{path}: holds no evaluation that could go on", "name another file with -o")
    if any(replace(old, limit=run.limit, asked=run.asked) != run for old in runs):
        raise DataError(f"{path}: holds answers to other questions", "name another file with -o")
    kept = _last_of_each(samples)
    kept = [run.to_sample(*key) if sample.kind == "run" else sample for sample in kept]
    write_text(path, "".join(to_line(sample) for sample in kept))  # drops a half-written last line, and old scores
    return RunFile(path, key, kept)


def _difference(samples: Sequence[Sample], environment_id: str, now: Mapping[str, Any]) -> str:
    """What differs between the stored environment and this one, for people."""
    stored = next((s.detail for s in samples if s.kind == "environment" and s.environment_id == environment_id), None)
    if stored is None:
        return ""
    flat = [{**side, **dict(side.get("runtime") or {}), "runtime": ""} for side in (stored, now)]
    keys = [key for key in {**flat[0], **flat[1]} if key not in VOLATILE and flat[0].get(key) != flat[1].get(key)]
    return f" (differs: {', '.join(keys)})" if keys else ""


def _last_of_each(samples: Sequence[Sample]) -> list[Sample]:
    """Without earlier answers to a question that was asked again because its piece had not been finished."""
    latest = {sample.detail.get("id"): number for number, sample in enumerate(samples) if sample.kind == "answer"}
    return [
        sample
        for number, sample in enumerate(samples)
        if sample.kind != "answer" or latest[sample.detail.get("id")] == number
    ]


def parse_shard(text: str, environment: Mapping[str, str]) -> Shard | None:
    """`i/n` with i from 0, or `auto`: what torchrun, accelerate or Slurm say in the environment; None for nothing.

    Raises:
        UsageError: another form, or `auto` where nobody says anything.
    """
    if not text:
        return None
    if text == "auto":
        for rank, world in (
            ("RANK", "WORLD_SIZE"),
            ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
            ("SLURM_PROCID", "SLURM_NTASKS"),
        ):
            if rank in environment and world in environment:
                lowest = environment.get("SLURM_ARRAY_TASK_MIN", "0") if rank == "SLURM_ARRAY_TASK_ID" else "0"
                whole = environment[rank].isdecimal() and lowest.isdecimal()
                place = str(int(environment[rank]) - int(lowest)) if whole else environment[rank]
                text = f"{place}/{environment[world]}"
                break
        else:
            raise UsageError("--shard auto: neither RANK and WORLD_SIZE nor Slurm's variables are set", "give i/n")
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(count) >= 1):
        raise UsageError(f"--shard {text}: not of the form i/n", "e.g. 0/4, 1/4, 2/4, 3/4")
    if int(index) >= int(count):
        raise UsageError(f"--shard {text}: counted from 0, the last one is {int(count) - 1}/{count}")
    return Shard(int(index), int(count))
