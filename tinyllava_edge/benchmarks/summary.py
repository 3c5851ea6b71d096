"""Raw samples → one row per target and build, and the decision which build to ship.

Latency, memory and energy belong to the target they were measured on and are never joined across targets. Size and
parity are the build's own. A target that gave no answers of its own is judged by the same build's answers elsewhere.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tinyllava_edge.benchmarks import energy, stats
from tinyllava_edge.benchmarks.decision import Budget, decide
from tinyllava_edge.benchmarks.evaluation import accuracy, accuracy_by
from tinyllava_edge.benchmarks.results import AnswerRecord, Sample
from tinyllava_edge.benchmarks.run_file import BLIND, PICTURE
from tinyllava_edge.benchmarks.stats import Interval
from tinyllava_edge.benchmarks.summary_runs import DEVICE_KINDS, pooled_runs, settings_by_environment
from tinyllava_edge.benchmarks.summary_types import (
    ALLOWED_LOSS,
    EDGE,
    NOISY,
    REFERENCE,
    STAGES,
    WHOLE,
    BuildSummary,
    Decision,
    Summary,
    on_target,
)
from tinyllava_edge.errors import DataError

__all__ = [
    "ALLOWED_LOSS",
    "NOISY",
    "STAGES",
    "BuildSummary",
    "Decision",
    "Summary",
    "answer_records",
    "apart",
    "decide",
    "headline",
    "summarise",
]
Key = tuple[str, str, str]  # target, runtime, build


def summarise(samples: Sequence[Sample], budget: Budget | None = None) -> Summary:
    """Group the samples by target and build. Accuracy and flips are those of the first task whose answers are there.

    Args:
        samples: lines of results.jsonl.
        budget: limits of the decision in base units, see `decision.COSTS`.

    Raises:
        DataError: more than one reference or bundle, or one build answers a question twice.
        UsageError: a limit that is unknown.
    """
    _one_bundle(samples)
    samples = _first_task(samples)
    keys = list(dict.fromkeys((s.target, s.runtime, s.build) for s in samples if s.build and s.runtime))
    precisions = list(dict.fromkeys(key[1:] for key in keys if key[1] == REFERENCE))
    if len(precisions) > 1:
        raise DataError(f"{len(precisions)} references in one report: {precisions}", "report one checkpoint at a time")
    answers = {key: _answers(samples, key, PICTURE) for key in keys}
    measured = {s.target for s in samples if s.kind in DEVICE_KINDS and s.runtime != REFERENCE}
    keys = [key for key in keys if key[1] == REFERENCE or not measured or key[0] in measured]
    several = len({key[0] for key in keys}) > 1
    references = [key for key in keys if key[1] == REFERENCE]
    built = {}
    for key in references + [key for key in keys if key[1] != REFERENCE]:
        own, giver = _own_answers(key, answers)
        base = [] if key[1] == REFERENCE else _base(key, references, answers)
        built[key] = _build(samples, key, own, base, giver, key[0] if several else "")
    builds = [row for key, row in built.items() if key[1] != REFERENCE]
    targets = list(dict.fromkeys(row.target for row in builds))
    builds = [row for target in targets for row in on_target(builds, target)]
    blind = next((found for key in references + keys if (found := _answers(samples, key, BLIND))), [])
    anchors = [built[key] for key in references]
    first = next((row for row in anchors if row.accuracy), anchors[0] if anchors else None)
    edge = [row for row in builds if row.runtime == EDGE] or builds
    decisions = tuple(
        decide(on_target(edge, target), _anchor(anchors, target) or first, headline(blind), budget)
        for target in dict.fromkeys(row.target for row in edge)
    ) or (decide((), first, (), budget),)
    return Summary(
        builds=tuple(builds),
        reference=first,
        blind=tuple(blind),
        decision=decisions[0],
        decisions=decisions,
        references=tuple(anchors),
        machines=tuple(_machines(samples)),
        protocol=next((str(s.detail.get("protocol", "")) for s in samples if s.kind == "answer"), ""),
        allowed_loss=(budget or {}).get("drop", ALLOWED_LOSS),
    )


def answer_records(
    samples: Iterable[Sample], runtime: str, build: str, stage: str, target: str | None = None
) -> list[AnswerRecord]:
    """The answers of one run; of the first target that gave any, unless one is named."""
    wanted = (runtime, build, stage)
    chosen = [s for s in samples if s.kind == "answer" and (s.runtime, s.build, s.stage) == wanted]
    place = target if target is not None else chosen[0].target if chosen else ""
    return [AnswerRecord.from_sample(sample) for sample in chosen if sample.target == place]


def headline(records: Sequence[AnswerRecord]) -> list[AnswerRecord]:
    """The answers that the accuracy counts: those without a tier, or all of them when each has one.

    Tiers grade questions from easy to out of reach, so their mean says little; each is shown by itself.
    """
    return [record for record in records if not record.tier] or list(records)


def apart(records: Sequence[AnswerRecord]) -> list[AnswerRecord]:
    """The answers that `headline` leaves out."""
    tiered = [record for record in records if record.tier]
    return tiered if len(tiered) < len(records) else []


def _answers(samples: Sequence[Sample], key: Key, stage: str) -> list[AnswerRecord]:
    return answer_records(samples, key[1], key[2], stage, key[0])


def _own_answers(key: Key, answers: Mapping[Key, list[AnswerRecord]]) -> tuple[list[AnswerRecord], str]:
    """The answers that a row counts, and the target that gave them where it is another one."""
    if answers[key]:
        return answers[key], ""
    for other, found in answers.items():
        if other[1:] == key[1:] and found:
            return found, other[0]
    return [], ""


def _base(key: Key, references: Sequence[Key], answers: Mapping[Key, list[AnswerRecord]]) -> list[AnswerRecord]:
    """The reference's answers on the build's own target, or else on the first one."""
    ordered = sorted(references, key=lambda other: other[0] != key[0])
    return next((answers[other] for other in ordered if answers[other]), [])


def _anchor(anchors: Sequence[BuildSummary], target: str) -> BuildSummary | None:
    return next((row for row in on_target(anchors, target) if row.accuracy), None)


def _first_task(samples: Sequence[Sample]) -> list[Sample]:
    """Without the answers to other tasks: their scores stand in a table of their own."""
    tasks = [str(sample.detail.get("task", "")) for sample in samples if sample.kind == "answer"]
    return [s for s in samples if s.kind != "answer" or str(s.detail.get("task", "")) == tasks[0]]


def _one_bundle(samples: Iterable[Sample]) -> None:
    """Refuse lines of two bundles: latencies would be pooled, and an old stamp would pass for the new bundle's."""
    hashes = list(dict.fromkeys(s.detail["sha256"] for s in samples if s.kind == "bundle" and s.detail.get("sha256")))
    if len(hashes) > 1:
        raise DataError(
            f"{len(hashes)} bundles in one report: {', '.join(hashes)}",
            "report one bundle at a time, or remove the old lines",
        )


def _build(
    samples: Sequence[Sample],
    key: Key,
    records: list[AnswerRecord],
    base: list[AnswerRecord],
    answered_on: str,
    place: str,
) -> BuildSummary:
    target, runtime, build = key
    counted = headline(records)
    own, runs, left_out = pooled_runs(
        [s for s in samples if (s.target, s.runtime, s.build) == key], settings_by_environment(samples)
    )
    latency = _values(own, "latency")
    everywhere = [s for s in samples if (s.runtime, s.build) == (runtime, build)]
    sizes = {stage: int(values[-1]) for stage, values in (_values(own, "size") or _values(everywhere, "size")).items()}
    joules, energy_notes = _energy(own)
    ttft, total = latency.get("ttft_ms", []), latency.get("total_ms", [])
    verify = {} if runtime == REFERENCE else _verify_record(samples, build)
    return BuildSummary(
        runtime=runtime,
        build=build,
        bytes=sizes.get("total"),
        sizes={stage: size for stage, size in sizes.items() if stage != "total"},
        accuracy=accuracy(counted) if counted else None,
        n=len(counted),
        by_type=accuracy_by(counted, "question_type"),
        by_tier=accuracy_by(records, "tier"),
        ttft=_median(ttft),
        ttft_p90=stats.p90(ttft) if ttft else None,
        ttft_mad=stats.mad(ttft) if ttft else None,
        samples=len(ttft),
        stages={stage: stats.median(values) for stage, values in latency.items()},
        memory={stage: int(max(values)) for stage, values in _values(own, "memory").items()},
        verified=bool(verify["passed"]) if "passed" in verify else None,
        verify=verify,
        flips=stats.flips(headline(base), counted) if base and counted else None,
        tier_flips=stats.flips(apart(base), apart(records)) if apart(base) and apart(records) else None,
        target=target,
        place=place,
        answered_on=answered_on,
        total=_median(total),
        energy=_median(joules),
        energy_notes=energy_notes,
        variation={stage: spread for stage, values in latency.items() if (spread := variation(values)) is not None},
        runs=runs,
        left_out=left_out,
        lines={stage: tuple(s for s in own if s.kind == "latency" and s.stage == stage) for stage in WHOLE},
    )


def variation(values: Sequence[float]) -> float | None:
    """Coefficient of variation: standard deviation / mean; None with fewer than three values or a mean of 0."""
    mean = statistics.fmean(values) if len(values) >= 3 else 0.0
    return statistics.stdev(values) / abs(mean) if mean else None


def _median(values: Sequence[float]) -> Interval | None:
    return stats.median_interval(values) if values else None


def _energy(own: Iterable[Sample]) -> tuple[list[float], tuple[str, ...]]:
    """Joules of each answer, and what they were read from; or nothing, and every reason."""
    lines = [s for s in own if s.kind == "energy" and s.stage == "answer"]
    joules, reason = energy.values(lines)
    told = [s.detail.get("source" if joules else "reason") for s in lines if not joules or s.value is not None]
    names = told if joules or not reason else [reason]
    return joules, tuple(dict.fromkeys(str(name) for name in names if name))


def _values(samples: Iterable[Sample], kind: str) -> dict[str, list[float]]:
    """Stage → raw values of one kind."""
    table: dict[str, list[float]] = {}
    for sample in samples:
        if sample.kind == kind and sample.value is not None:
            table.setdefault(sample.stage, []).append(sample.value)
    return table


def _verify_record(samples: Sequence[Sample], build: str) -> dict[str, Any]:
    """The latest verify line of a build, or else the stamp that its bundle carried when it was measured."""
    for sample in reversed(samples):
        if sample.kind == "verify" and sample.build == build:
            return dict(sample.detail)
    stamps = [s.detail.get("verified", {}).get(build) for s in samples if s.kind == "bundle"]
    return next((dict(stamp) for stamp in reversed(stamps) if isinstance(stamp, dict)), {})


def _machines(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """Details of `environment` lines, each machine once, with the target it was reached as."""
    found: dict[str, dict[str, Any]] = {}
    for sample in samples:
        if sample.kind == "environment":
            detail = {**sample.detail, "target": sample.target}
            stable = ("target", "cpu", "memory_bytes", "limits", "system", "libraries", "git_commit")
            found.setdefault(json.dumps([detail.get(name) for name in stable], default=str), detail)
    return list(found.values())
