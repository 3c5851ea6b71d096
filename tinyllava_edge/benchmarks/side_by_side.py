"""Two runs beside each other: what changed from A to B, build by build, and whether chance explains it.

Times are compared by `latency_compare` (paired where both stand in one run), answers by `paired` on the same questions.
Size and memory are single figures, so they have a difference and no test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tinyllava_edge.benchmarks import report_formats as formats
from tinyllava_edge.benchmarks.compare import verdict
from tinyllava_edge.benchmarks.decision import Budget
from tinyllava_edge.benchmarks.latency_compare import LatencyComparison, compare_samples
from tinyllava_edge.benchmarks.paired import Paired, compare_pair
from tinyllava_edge.benchmarks.report_tables import cell
from tinyllava_edge.benchmarks.results import AnswerRecord, Sample
from tinyllava_edge.benchmarks.run_file import PICTURE
from tinyllava_edge.benchmarks.stats import LEVEL, holm
from tinyllava_edge.benchmarks.summary import Summary, answer_records, summarise
from tinyllava_edge.benchmarks.summary_runs import Setting, pooled_runs, settings_by_environment
from tinyllava_edge.benchmarks.summary_types import REFERENCE, WHOLE, BuildSummary
from tinyllava_edge.errors import DataError, UsageError

Key = tuple[str, str, str]  # target, runtime, build
TIMED = {
    "ttft_ms": "first token",
    "total_ms": "last token",
    "vision_ms": "vision",
    "prefill_ms": "prefill",
    "decode_tokens_per_s": "decode, per token",
}
POOLED = ("latency", "energy", "memory")  # kinds that joining would pool
ASKED = {
    "threads": "n_threads",
    "picture": "image_sha256",
    "picture's size": "image_size",
    "question": "prompt_sha256",
    "longest answer": "max_tokens",
}  # what an answer's time depends on, and where it is recorded
FACTS = ("system", "memory_bytes", "cpu", "limits", "libraries", "git_commit")
LOAD = "load"  # what a difference in load is called
LOADED = 0.5  # runnable processes: runs whose load differs by more did not meet the same conditions


@dataclass(frozen=True)
class Change:
    """One build in both runs."""

    a: BuildSummary
    """in the first run"""
    b: BuildSummary
    """in the second run"""
    times: Mapping[str, LatencyComparison]
    """stage of TIMED → how B's times differ from A's"""
    answers: tuple[Paired, ...]
    """task by task, adjusted for all builds and tasks"""
    notes: tuple[str, ...]
    """what could not be compared, and why"""

    @property
    def label(self) -> str:
        """What the build is called in tables."""
        return self.b.label


@dataclass(frozen=True)
class SideBySide:
    """Two runs, A before B."""

    names: tuple[str, str]
    """what the runs are called, e.g. their files' names"""
    a: Summary
    """the first run"""
    b: Summary
    """the second run"""
    changes: tuple[Change, ...]
    """builds that both have, in B's order"""
    alone: tuple[tuple[str, ...], tuple[str, ...]]
    """builds that only A has, and only B has"""
    setting: tuple[tuple[str, str, str], ...]
    """what differs between the machines or bundles: name, A's, B's"""
    why: str = ""
    """why the files were taken for two runs"""


def overlap(a: Sequence[Sample], b: Sequence[Sample]) -> str:
    """What joining two files would pool, in words; empty when they hold different measurements or shards of one.

    Times, energy and memory overlap where target, runtime, build and stage are the same; answers where the question is.
    """
    for kind in POOLED:
        both = _keys(a, kind) & _keys(b, kind)
        if both:
            target, runtime, build, _ = min(both)
            return f"both hold {kind} of {build if runtime != REFERENCE else 'the reference'} on {target}"
    answered = _asked(a) & _asked(b)
    if answered:
        target, runtime, build, *_ = min(answered)
        return f"both hold answers of {build if runtime != REFERENCE else 'the reference'} on {target}"
    return ""


def side_by_side(
    a: Sequence[Sample],
    b: Sequence[Sample],
    *,
    names: tuple[str, str] = ("A", "B"),
    budget: Budget | None = None,
    why: str = "",
) -> SideBySide:
    """Compare two runs.

    Args:
        a: lines of the first results file.
        b: lines of the second.
        names: what to call them.
        budget: limits of both decisions.
        why: why they were taken for two runs, for people.

    Raises:
        UsageError: they have no build in common.
        DataError: one of them is not a run of one bundle and one checkpoint.
        DependencyError: scipy or statsmodels is not installed.
    """
    first, second = summarise(a, budget), summarise(b, budget)
    before, after = ({row.key: row for row in summary.rows} for summary in (first, second))
    common = [key for key in after if key in before]
    if not common:
        raise UsageError(
            f"{names[0]} and {names[1]} have no build in common", f"they hold {_names(before)} and {_names(after)}"
        )
    changes = [_change(a, b, before[key], after[key], names) for key in common]
    adjusted = _adjust(changes)
    alone = tuple(tuple(row.label for key, row in mine.items() if key not in other)
                  for mine, other in ((before, after), (after, before)))  # fmt: skip
    return SideBySide(names, first, second, adjusted, (alone[0], alone[1]), tuple(_setting(a, b)), why)


def markdown(found: SideBySide) -> str:
    """The changes as a table in GitHub's Markdown."""
    head = ["build", "first token", "last token", "accuracy, points", "size, MB", "peak, MB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for change in found.changes:
        cells = [
            cell(change.label),
            *(change.times[stage].verdict if stage in change.times else "–" for stage in WHOLE),
            "; ".join(answers_text(pair) for pair in change.answers) or "–",
            step(change.a.bytes, change.b.bytes),
            step(change.a.memory.get("peak_rss"), change.b.memory.get("peak_rss")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    a, b = map(cell, found.names)
    return (
        "\n".join([*lines, "", f"From {a} to {b}. Times: 99 % intervals and permutation tests; answers: paired, Holm."])
        + "\n"
    )


def answers_text(pair: Paired) -> str:
    """A difference in points with its verdict."""
    gap = pair.difference.estimate if pair.difference else None
    task = f"{cell(pair.task)} " if pair.task else ""
    return f"{task}{formats.points(gap)} ({pair.verdict})"


def step(before: float | None, after: float | None) -> str:
    """Bytes in MB from A to B."""
    if before is None or after is None:
        return formats.NONE if before is None and after is None else f"{formats.mega(before)} → {formats.mega(after)}"
    if before == after:
        return f"{formats.mega(after)}, the same"
    change = f"{100 * (after / before - 1):+.1f} %".replace("-", "−") if before else "new"
    return f"{formats.mega(before)} → {formats.mega(after)} ({change})"


def _change(
    a: Sequence[Sample], b: Sequence[Sample], old: BuildSummary, new: BuildSummary, names: tuple[str, str]
) -> Change:
    times: dict[str, LatencyComparison] = {}
    notes: list[str] = []
    before, after = _times(a, old.key), _times(b, new.key)
    for stage in TIMED:
        if stage in before and stage in after:
            try:
                times[stage] = compare_samples(before[stage], after[stage])
            except UsageError as error:
                notes.append(f"{TIMED[stage]}: {error.message}")
    answers: list[Paired] = []
    had, has = _answers(a, old.key), _answers(b, new.key)
    for task in [task for task in has if task in had]:
        try:
            answers.append(compare_pair(had[task], has[task], names=names, where=f"{names[1]}: {new.label}"))
        except DataError as error:
            notes.append(f"answers{f' to {task}' if task else ''}: {error.message}")
    return Change(old, new, times, tuple(answers), tuple(notes))


def _adjust(changes: Sequence[Change]) -> tuple[Change, ...]:
    """Holm over all builds and tasks, then the verdicts."""
    tested = [pair.p_value for change in changes for pair in change.answers if pair.p_value is not None]
    corrected = iter(holm(tested))

    def done(pair: Paired) -> Paired:
        held = pair if pair.p_value is None else replace(pair, p_holm=next(corrected))
        return replace(held, verdict=verdict(held, LEVEL) if held.changed else "the same answers")

    return tuple(replace(change, answers=tuple(map(done, change.answers))) for change in changes)


def _times(samples: Sequence[Sample], key: Key) -> dict[str, list[Sample]]:
    """Stage → latency lines of one build under its first settings, as far as they can be compared."""
    own = [s for s in samples if (s.target, s.runtime, s.build) == key]
    kept, _, _ = pooled_runs(own, settings_by_environment(samples))
    table: dict[str, list[Sample]] = {}
    for sample in kept:
        if sample.kind == "latency" and sample.stage in TIMED and sample.value is not None and sample.value > 0:
            table.setdefault(sample.stage, []).append(sample)
    return table


def _answers(samples: Sequence[Sample], key: Key) -> dict[str, list[AnswerRecord]]:
    table: dict[str, list[AnswerRecord]] = {}
    for record in answer_records(samples, key[1], key[2], PICTURE, key[0]):
        table.setdefault(record.task, []).append(record)
    return table


def _keys(samples: Sequence[Sample], kind: str) -> set[tuple[str, str, str, str]]:
    return {(s.target, s.runtime, s.build, s.stage) for s in samples if s.kind == kind}


def _asked(samples: Sequence[Sample]) -> set[tuple[str, ...]]:
    return {
        (s.target, s.runtime, s.build, s.stage, str(s.detail.get("task", "")), str(s.detail.get("id", "")))
        for s in samples
        if s.kind == "answer"
    }


def _names(rows: Mapping[Key, BuildSummary]) -> str:
    return ", ".join(row.label for row in rows.values()) or "none"


def _setting(a: Sequence[Sample], b: Sequence[Sample]) -> list[tuple[str, str, str]]:
    """What differs between the two runs' bundles and machines."""
    rows = []
    for kind, name in (("bundle", "sha256"), *(("environment", name) for name in FACTS)):
        old, new = (list(dict.fromkeys(_flat(s.detail.get(name)) for s in run if s.kind == kind)) for run in (a, b))
        if old and new and old != new:
            rows.append(("bundle" if kind == "bundle" else name.replace("_", " "), "; ".join(old), "; ".join(new)))
    if (loads := _loads(a, b)) is not None:
        rows.append((LOAD, *loads))
    timed = [[s for s in run if s.kind == "latency" and s.stage == "ttft_ms"] for run in (a, b)]
    tables = [settings_by_environment(run) for run in (a, b)]
    for name, key in ASKED.items():
        before, after = (
            sorted({_flat(_threads(table, s) if key == "n_threads" else s.detail.get(key)) for s in run})
            for run, table in zip(timed, tables, strict=True)
        )
        if before and after and before != after:
            rows.append((name, "; ".join(before), "; ".join(after)))
    return rows


def _loads(a: Sequence[Sample], b: Sequence[Sample]) -> tuple[str, str] | None:
    """The machine's load before and after each run, where it was not the same in both."""
    spans = []
    for run in (a, b):
        lines = [s for s in run if s.kind == "condition"]
        averages = [s.detail.get("load_average") for s in lines]
        spans.append([float(one[0]) for one in averages if isinstance(one, list) and one and _number(one[0])])
    if not all(spans):
        return None
    apart = max(abs(pick(spans[0]) - pick(spans[1])) for pick in (min, max))
    first, second = (" → ".join(f"{value:.2f}" for value in span) for span in spans)
    return (first, second) if apart > LOADED else None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _threads(table: Mapping[str, Setting], sample: Sample) -> Any:
    return table.get(sample.environment_id, Setting()).threads


def unlike(found: SideBySide) -> list[str]:
    """What differs of that which times depend on by right, so that they are not like for like."""
    return [name for name, _, _ in found.setting if name in ASKED or name in ("cpu", "limits", LOAD)]


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(inner)}" for key, inner in value.items() if inner is not None)
    return ", ".join(map(str, value)) if isinstance(value, list) else "unknown" if value is None else str(value)
