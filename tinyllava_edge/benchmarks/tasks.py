"""Evaluate a runtime on questions in LLaVA JSON: exact match, by question type and tier, with a blind baseline.

Protocol, kept with every score: the question as it stands, the model's own template, greedy decoding, at most
MAX_TOKENS new tokens, and a match after strip and lower.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyllava_edge import prompt
from tinyllava_edge.benchmarks.environment import capture, environment_sample
from tinyllava_edge.benchmarks.results import AnswerRecord, Sample, read_results, to_line
from tinyllava_edge.benchmarks.stats import Interval, derangement, wilson
from tinyllava_edge.errors import DataError
from tinyllava_edge.files import storage_errors, write_text
from tinyllava_edge.runtimes.base import Runtime

MAX_TOKENS = 16
PICTURE, BLIND = "picture", "blind"  # stages of `answer` lines
_PROGRESS_EVERY = 50  # pictures between two progress lines


@dataclass(frozen=True)
class Row:
    """One question on one picture."""

    id: str
    """unique; a row's id, with `#k` behind it from the second question on"""
    image: str
    """name as written in the JSON"""
    path: Path
    """where the picture lies"""
    question: str
    """without the image marker"""
    expected: str
    """annotated answer"""
    question_type: str = ""
    """e.g. `yes/no`; empty when the set has none"""
    tier: str = ""
    """difficulty; empty when the set has none"""


@dataclass(frozen=True)
class EvalResult:
    """Every answer of one run."""

    runtime: str
    """`edge` or `reference`"""
    build: str
    """build name, or the checkpoint's precision"""
    stage: str
    """`picture`, or `blind` when the pictures were shuffled"""
    records: tuple[AnswerRecord, ...]
    """one per row, in the rows' order"""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """machine and libraries"""

    @property
    def accuracy(self) -> Interval:
        """Share of exact matches with Wilson's interval."""
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
        first = environment_sample(self.environment)
        return [first, *_samples(self, first.environment_id)]


def accuracy(records: Iterable[AnswerRecord]) -> Interval:
    """Share of exact matches with Wilson's interval."""
    marks = [record.correct for record in records]
    return wilson(sum(marks), len(marks))


def accuracy_by(records: Iterable[AnswerRecord], key: str) -> dict[str, Interval]:
    """Accuracy of each value of `question_type` or `tier`; empty values are left out."""
    groups: dict[str, list[AnswerRecord]] = {}
    for record in records:
        if name := str(getattr(record, key)):
            groups.setdefault(name, []).append(record)
    return {name: accuracy(group) for name, group in groups.items()}


def load_rows(path: Path, images: Path) -> list[Row]:
    """Read LLaVA JSON. Each human turn with its reply becomes a row of its own, asked without the earlier turns.

    Args:
        path: JSON list of {id, image, conversations, tier?, question_type?}.
        images: directory that the `image` names are relative to.

    Raises:
        DataError: not such a list, a row without picture, question or answer, a picture outside `images`, or a
            repeated id; the row is named.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(entries, ensure_ascii=False).encode("utf-8")  # half a surrogate pair would spoil results.jsonl
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: can't be read ({error})", "name a JSON list of LLaVA conversations") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: not a list with at least one row", "name a JSON list of LLaVA conversations")
    rows = [row for number, entry in enumerate(entries) for row in _rows(entry, images, f"{path}: row {number}")]
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise DataError(f"{path}: id {row.id!r} occurs twice", "give every row an id of its own")
        seen.add(row.id)
    return rows


def sample_rows(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """At most `limit` rows, pictures in the order of their names' hashes: a smaller sample is part of a larger one."""
    if limit is None or limit >= len(rows):
        return list(rows)
    groups = _by_picture(rows)
    order = sorted(groups, key=lambda name: hashlib.sha256(name.encode()).digest())
    return [row for name in order for row in groups[name]][:limit]


def evaluate(
    runtime: Runtime,
    rows: Sequence[Row],
    *,
    shuffle_pictures_seed: int | None = None,
    progress: Callable[[str], None] | None = None,
    limit: int | None = None,
    out: Path | None = None,
) -> EvalResult:
    """Ask every row, picture by picture.

    Args:
        runtime: what answers.
        rows: from `load_rows`.
        shuffle_pictures_seed: when given, every picture is replaced by another one: the blind baseline. Grey or noise
            pictures would be out of distribution and measure something else.
        progress: receives a line now and then.
        limit: ask a fixed sample of the rows.
        out: results.jsonl that grows picture by picture; a run that was cut off goes on where it stopped.

    Raises:
        DataError: no rows, or `out` belongs to another model, machine or build, or to other questions.
    """
    chosen = sample_rows(rows, limit)
    if not chosen:
        raise DataError("no rows to evaluate", "check the data file, or raise the limit")
    stage = PICTURE if shuffle_pictures_seed is None else BLIND
    groups = _by_picture(chosen)
    shown = {name: group[0].path for name, group in groups.items()}
    if shuffle_pictures_seed is not None:
        names = list(shown)
        place = derangement(len(names), shuffle_pictures_seed)
        shown = {name: groups[names[place[k]]][0].path for k, name in enumerate(names)}
    environment = capture(runtime)
    done = _resume(out, environment, runtime, stage, rows)
    asked = [(name, [row for row in group if row.id not in done]) for name, group in groups.items()]
    asked = [(name, group) for name, group in asked if group]
    items = ((shown[name], [row.question for row in group]) for name, group in asked)
    found = runtime.answer_pictures(items, max_tokens=MAX_TOKENS)
    for number, ((_, group), answers) in enumerate(zip(asked, found, strict=True), 1):
        fresh = [_record(row, answer.text) for row, answer in zip(group, answers, strict=True)]
        part = EvalResult(runtime.name, runtime.build, stage, tuple(fresh), environment)
        _append(out, _samples(part, environment_sample(environment).environment_id, len(done)))
        done.update({record.id: record for record in fresh})
        if progress and (number % _PROGRESS_EVERY == 0 or number == len(asked)):
            progress(f"{runtime.name} {runtime.build} {stage}: {number} of {len(asked)} pictures, {len(done)} answers")
    records = tuple(done[row.id] for row in chosen)
    return EvalResult(runtime.name, runtime.build, stage, records, environment)


def _rows(entry: Any, images: Path, where: str) -> list[Row]:
    talk = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(talk, list) or len(talk) < 2 or len(talk) % 2:
        raise DataError(
            f"{where}: `conversations` is not a list of question-answer pairs", "see docs on the data format"
        )
    name, image = entry.get("id"), entry.get("image")
    if not isinstance(image, str) or not image or not isinstance(name, str | int):
        raise DataError(f"{where}: needs `id` and `image`", "only rows with a picture can be evaluated")
    if {"", ".", ".."} & set(image.split("/")) or any(mark in image for mark in "\\:\0"):
        raise DataError(
            f"{where}: image {image!r} is not a plain path below the image directory", "name it relative to --images"
        )
    kinds = ["" if entry.get(key) is None else str(entry[key]) for key in ("question_type", "tier")]
    rows = []
    for turn in range(0, len(talk), 2):
        human, reply = talk[turn], talk[turn + 1]
        for side, speaker in ((human, "human"), (reply, "gpt")):
            if not isinstance(side, dict) or side.get("from") != speaker or not isinstance(side.get("value"), str):
                raise DataError(f"{where}: turn {turn} is not {{from: {speaker}, value: text}}", "restore the row")
        question, _ = prompt.take_image_marker(human["value"])
        identity = str(name) if turn == 0 else f"{name}#{turn // 2}"
        rows.append(Row(identity, image, images / image, question, reply["value"].strip(), *kinds))
    return rows


def _by_picture(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.image, []).append(row)
    return groups


def _record(row: Row, given: str) -> AnswerRecord:
    return AnswerRecord(row.id, row.image, row.question, row.expected, given, row.question_type, row.tier)


def _samples(result: EvalResult, environment_id: str, first: int = 0) -> list[Sample]:
    return [
        record.to_sample(result.runtime, result.build, result.stage, first + k, environment_id)
        for k, record in enumerate(result.records)
    ]


def _resume(
    out: Path | None, environment: Mapping[str, Any], runtime: Runtime, stage: str, rows: Sequence[Row]
) -> dict[str, AnswerRecord]:
    """Answers that `out` holds already; a new file starts with the environment line."""
    if out is None:
        return {}
    first = environment_sample(environment)
    if not out.is_file() or not out.stat().st_size:
        write_text(out, to_line(first))
        return {}
    samples = read_results([out], tolerate_cut=True)
    answers = [sample for sample in samples if sample.kind == "answer"]
    key = (runtime.name, runtime.build, stage, first.environment_id)
    if any((s.runtime, s.build, s.stage, s.environment_id) != key for s in answers):
        raise DataError(f"{out}: holds answers of another model, build or machine", "name another file with -o")
    records = [AnswerRecord.from_sample(sample) for sample in answers]
    asked = {row.id: row for row in rows}
    if any(record.id not in asked or record != _record(asked[record.id], record.given) for record in records):
        raise DataError(f"{out}: holds answers to other questions", "name another file with -o")
    write_text(out, "".join(to_line(sample) for sample in samples))  # drops a half-written last line
    return {record.id: record for record in records}


def _append(out: Path | None, samples: Sequence[Sample]) -> None:
    if out is None:
        return
    with storage_errors(out), out.open("a", encoding="utf-8") as handle:
        handle.write("".join(to_line(sample) for sample in samples))
