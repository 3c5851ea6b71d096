"""Compare builds with a reference over recorded answers: results.jsonl files, or lmms-eval's sample logs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.out_file import BESIDE
from tinyllava_edge.benchmarks.paired import NOT_SHOWN, WORSE, Noise, Paired, compare_pair, noise_floor
from tinyllava_edge.benchmarks.results import AnswerRecord, read_results
from tinyllava_edge.benchmarks.run_file import BLIND, PICTURE
from tinyllava_edge.benchmarks.stats import holm
from tinyllava_edge.errors import DataError, UsageError

REFERENCE = "reference"  # the runtime of a checkpoint
LMMS_EVAL = "lmms-eval"  # stands for the runtime of a run that lmms-eval logged
Key = tuple[str, str, str]
Runs = dict[Key, list[AnswerRecord]]


@dataclass(frozen=True)
class Comparison:
    """Builds against one reference."""

    reference: str
    """the run that the others are compared with"""
    confidence: float
    """of intervals, bounds and verdicts"""
    max_drop: float | None
    """points that a build may lose"""
    strict: bool
    """whether a drop that is neither shown nor excluded counts as failed"""
    rows: tuple[Paired, ...]
    """one per build and task"""
    absent: tuple[str, ...]
    """tasks that one side has and the other lacks, as sentences"""

    def failed(self, strict: bool | None = None) -> bool:
        """Whether a build lost more than allowed; strictly also: was not shown to stay within it, or lacks a task."""
        strictly = self.strict if strict is None else strict
        if self.max_drop is not None and strictly and self.absent:
            return True
        bad = {WORSE, NOT_SHOWN} if strictly else {WORSE}
        return any(row.gate is not None and row.gate.verdict in bad for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "rows": [row.to_dict() for row in self.rows], "failed": self.failed()}


def read_runs(path: Path) -> Runs:
    """Answers with pictures by (runtime, build, task), each in the file's order. Blind runs are left out.

    A file whose lines have no `schema` is read as lmms-eval's `*_samples_<task>.jsonl`; its build is the file's name.

    Raises:
        DataError: a line that can't be read, a question that is answered twice in one run, or no answers.
    """
    if _is_foreign(path):
        if path.name.endswith(BESIDE):
            raise DataError(f"{path}: answers without scores", "name the results file that -o named")
        from tinyllava_edge.benchmarks.lmms_logs import read_lmms_samples

        found = [((LMMS_EVAL, path.stem, record.task), record) for record in read_lmms_samples(path)]
        blind = 0
    else:
        answers = [sample for sample in read_results([path]) if sample.kind == "answer"]
        shown = [sample for sample in answers if sample.stage == PICTURE]
        blind = sum(sample.stage == BLIND for sample in answers)
        found = []
        for sample in shown:
            try:
                record = AnswerRecord.from_sample(sample)
            except DataError as error:
                raise DataError(f"{path}: {error.message}", error.hint) from error
            found.append(((sample.runtime, sample.build, record.task), record))
    if not found:
        what = "blind answers only" if blind else "no answers"
        raise DataError(f"{path}: {what}", "name a file that `eval` wrote, of a run with pictures")
    runs: Runs = {}
    seen: set[tuple[Key, str]] = set()
    for key, record in found:
        if (key, record.id) in seen:
            raise DataError(f"{path}: {_label(key)} answers question {record.id!r} twice", "keep one run per file")
        seen.add((key, record.id))
        runs.setdefault(key, []).append(record)
    return runs


def compare_files(
    reference: Path,
    builds: Sequence[Path],
    *,
    noise: Path | None = None,
    max_drop: float | None = None,
    confidence: float = 0.95,
    strict: bool = False,
    task: str | None = None,
    reference_build: str | None = None,
    names: Sequence[str] = (),
) -> Comparison:
    """Compare every build of `builds` with the reference run of `reference`, task by task.

    Args:
        reference: results file with the reference run: that of `reference_build`, else of the runtime `reference`, else
            the only one.
        builds: results files with the builds; may include the file of the reference, and is that file when empty.
        noise: results file of the same build, or of the reference, measured again under another set-up.
        max_drop: points of percent that a build may lose.
        confidence: between 0.5 and 1.
        strict: see `Comparison.failed`.
        task: compare this task only.
        reference_build: build name of the reference run.
        names: builds to compare; all but checkpoints by default, or those too where a file has nothing else.

    Raises:
        UsageError: a name, task, drop or confidence that can't be.
        DataError: see `read_runs`; no reference, or more than one; runs over different questions or protocols.
        DependencyError: scipy or statsmodels is not installed.
    """
    if not 0.5 < confidence < 1:
        raise UsageError(f"confidence {confidence}", "choose one between 0.5 and 1, e.g. 0.95")
    if strict and max_drop is None:
        raise UsageError("strict says nothing without a drop that is allowed", "name one with --max-drop")
    if max_drop is not None and not 0 <= max_drop <= 100:
        raise UsageError(f"a drop of {max_drop} points", "allow 0 to 100 points")
    files = {path.resolve(): path for path in (reference, *builds)}
    read = {real: read_runs(path) for real, path in files.items()}
    base_file = reference.resolve()
    base = _reference(reference, read[base_file], reference_build)
    chosen = []
    for real in dict.fromkeys(path.resolve() for path in builds or [reference]):
        own = list(dict.fromkeys(key[:2] for key in read[real]))
        chosen += [(real, pair) for pair in _builds(own, names) if (real, pair) != (base_file, base)]
    known = [build for runs in read.values() for _, build, _ in runs]
    for name in names:
        if name not in {pair[1] for _, pair in chosen}:
            raise UsageError(f"no build {name!r} to compare", f"measured: {', '.join(dict.fromkeys(known))}")
    if not chosen and reference in builds:  # named twice by whoever wants to see what equal runs look like
        chosen = [(base_file, base)]
    if not chosen:
        raise DataError(f"{files[base_file]}: nothing to compare with {_label(base)}", "name a file with a build's run")
    if noise and noise.resolve() in files:
        raise UsageError(f"{noise}: a run can't be its own repetition", "measure again under another set-up")
    again = read_runs(noise) if noise else {}
    before = _tasks(read[base_file], base, task)
    if not before:
        raise UsageError(f"{reference}: {_label(base)} has no task {task!r}", "see `task` of the answer lines")
    title, *labels = _unique([(_label(base), reference), *((_label(pair), files[real]) for real, pair in chosen)])
    rows, absent = [], []
    for (real, pair), label in zip(chosen, labels, strict=True):
        after = _tasks(read[real], pair, task)
        lacking = list(dict.fromkeys([*before, *after]))
        absent += [f"{label} and the reference don't both have {name or 'the file'}" for name in lacking
                   if (name in before) != (name in after)]  # fmt: skip
        shared = [name for name in before if name in after]
        if not shared:
            raise DataError(f"{files[real]}: {label} has no task in common with {title}", "evaluate both on one")
        for name in shared:
            floor = _noise(again, [(pair, label, after[name]), (base, title, before[name])], name)
            rows.append(
                compare_pair(
                    before[name],
                    after[name],
                    names=(title, label),
                    where=f"{files[real]}: {label}",
                    confidence=confidence,
                    max_drop=max_drop,
                    noise=floor,
                )
            )
    if noise and not any(row.noise for row in rows):
        raise DataError(
            f"{noise}: repeats none of the compared runs", "measure one of them again, e.g. on other threads"
        )
    return Comparison(title, confidence, max_drop, strict, _adjusted(rows, confidence), tuple(absent))


def verdict(row: Paired, confidence: float) -> str:
    """What can be said of a difference, in words."""
    if row.p_holm is None:
        return "no labels: answers only"
    if row.p_holm < 1 - confidence:
        words = "worse" if (row.build_score or 0.0) < (row.reference_score or 0.0) else "better"
        if row.p_pictures is not None and row.p_pictures >= 1 - confidence:
            words += ", though not when whole pictures are drawn"
        return words
    words = f"not distinguishable at n = {row.scored:,}"
    if row.p_value is not None and row.p_value < 1 - confidence:
        return f"{words} among so many comparisons; by itself it would be"
    if row.needed is not None and row.needed <= row.scored:  # few pictures: the permutations are coarser than the error
        return f"{words}; the test needs more pictures"
    if row.needed is not None:
        return f"{words}; {row.needed:,} questions would show this difference"
    return words if row.detectable is None else f"{words}; {row.detectable:.2f} points would show"


def _adjusted(rows: Sequence[Paired], confidence: float) -> tuple[Paired, ...]:
    """Holm over all rows that have a p value, then the verdicts."""
    tested = [row.p_value for row in rows if row.p_value is not None]
    corrected = iter(holm(tested))
    done = [row if row.p_value is None else replace(row, p_holm=next(corrected)) for row in rows]
    return tuple(replace(row, verdict=verdict(row, confidence)) for row in done)


def _reference(path: Path, runs: Mapping[Key, Any], build: str | None) -> tuple[str, str]:
    pairs = list(dict.fromkeys(key[:2] for key in runs))
    checkpoints = [pair for pair in pairs if pair[0] == REFERENCE]
    found = [pair for pair in pairs if pair[1] == build] if build is not None else checkpoints or pairs
    if build is not None and len(found) > 1:
        found = [pair for pair in found if pair[0] == REFERENCE] or found
    if len(found) != 1:
        listed = ", ".join(_label(pair) for pair in pairs)
        raise DataError(
            f"{path}: {len(found)} runs could be the reference; it holds {listed}", "name one with --reference-build"
        )
    return found[0]


def _builds(own: Sequence[tuple[str, str]], names: Sequence[str]) -> list[tuple[str, str]]:
    if names:
        return [pair for pair in own if pair[1] in names]
    return [pair for pair in own if pair[0] != REFERENCE] or list(own)


def _tasks(runs: Runs, pair: tuple[str, str], task: str | None) -> dict[str, list[AnswerRecord]]:
    return {key[2]: records for key, records in runs.items() if key[:2] == pair and task in (None, key[2])}


def _noise(
    again: Runs, candidates: Sequence[tuple[tuple[str, str], str, list[AnswerRecord]]], task: str
) -> Noise | None:
    """The build's own repetition, else the reference's."""
    for pair, label, records in candidates:
        if (repeated := again.get((*pair, task))) is not None:
            return noise_floor(records, repeated, label)
    return None


def _label(key: tuple[str, ...]) -> str:
    return key[1] if key[0] == "edge" else f"{key[0]} {key[1]}".strip()


def _unique(labels: Sequence[tuple[str, Path]]) -> list[str]:
    names = [label for label, _ in labels]
    return [f"{label} ({path})" if names.count(label) > 1 else label for label, path in labels]


def _is_foreign(path: Path) -> bool:
    """Whether the first line is a JSON object without `schema`; anything else is left to `read_results`."""
    try:
        with path.open("rb") as handle:
            first = json.loads(next((line for line in handle if line.strip()), b"null"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and "schema" not in first
