"""Raw samples → one row per build, and the decision which build to ship."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyllava_edge.benchmarks import report_formats as formats
from tinyllava_edge.benchmarks import stats
from tinyllava_edge.benchmarks.results import AnswerRecord, Sample
from tinyllava_edge.benchmarks.stats import Flips, Interval
from tinyllava_edge.benchmarks.tasks import BLIND, PICTURE, accuracy, accuracy_by
from tinyllava_edge.errors import DataError

ALLOWED_LOSS = 1.0  # points of accuracy that a build may lose against the reference and still ship
NOISY = 0.10  # spread / median above which a latency is flagged
STAGES = ("decode_image_ms", "preprocess_ms", "vision_ms", "prefill_ms", "first_token_ms")  # they add up to the TTFT


@dataclass(frozen=True)
class BuildSummary:
    """What was measured of one build, or of the reference; None where nothing was."""

    runtime: str
    """`edge` or `reference`"""
    build: str
    """build name, or the checkpoint's precision"""
    bytes: int | None
    """size on disk"""
    sizes: Mapping[str, int]
    """bytes by role"""
    accuracy: Interval | None
    """share of exact matches, 0..1"""
    n: int
    """questions answered"""
    by_type: Mapping[str, Interval]
    """accuracy by question type"""
    by_tier: Mapping[str, Interval]
    """accuracy by tier"""
    ttft: Interval | None
    """median time to first token in ms with its bootstrap interval"""
    ttft_p90: float | None
    """90th percentile in ms"""
    ttft_mad: float | None
    """median absolute deviation in ms"""
    samples: int
    """answers that were timed"""
    stages: Mapping[str, float]
    """median of every latency stage"""
    memory: Mapping[str, int]
    """largest sample of every memory stage, in bytes"""
    verified: bool | None
    """the verify record's verdict"""
    verify: Mapping[str, Any]
    """the verify record"""
    flips: Flips | None
    """against the reference, over the questions that the accuracy counts"""
    tier_flips: Flips | None
    """against the reference, over the questions with a tier, where those are counted apart"""

    @property
    def label(self) -> str:
        """What the build is called in tables."""
        return self.build if self.runtime == "edge" else f"{self.runtime} {self.build}"

    @property
    def noisy(self) -> bool:
        """Whether the TTFT samples scatter by more than a tenth (1.4826 MAD stands for a standard deviation)."""
        if self.ttft is None or self.ttft_mad is None:
            return False
        return 1.4826 * self.ttft_mad > NOISY * self.ttft.estimate


@dataclass(frozen=True)
class Decision:
    """Which build to ship."""

    build: str | None
    """its name, or None when no build qualifies"""
    reasons: tuple[str, ...]
    """sentences that say why"""
    rejected: Mapping[str, str]
    """build → what speaks against it"""


@dataclass(frozen=True)
class Summary:
    """Everything that a report shows, computed from raw samples."""

    builds: tuple[BuildSummary, ...]
    """edge builds, in order of first appearance"""
    reference: BuildSummary | None
    """the checkpoint that the builds came from"""
    blind: tuple[AnswerRecord, ...]
    """answers with shuffled pictures: the reference's, or else the first build's"""
    decision: Decision
    """which build to ship"""


def summarise(samples: Sequence[Sample]) -> Summary:
    """Group the samples by build.

    Raises:
        DataError: more than one reference or bundle, or one build answers a question twice.
    """
    _one_bundle(samples)
    keys = list(dict.fromkeys((s.runtime, s.build) for s in samples if s.build))
    references = [key for key in keys if key[0] == "reference"]
    if len(references) > 1:
        raise DataError(f"{len(references)} references in one report: {references}", "report one checkpoint at a time")
    answers = {key: answer_records(samples, *key, PICTURE) for key in keys}
    base = answers[references[0]] if references else []
    built = {key: _build(samples, *key, answers[key], base if key not in references else []) for key in keys}
    builds = tuple(summary for key, summary in built.items() if key[0] == "edge")
    reference = built[references[0]] if references else None
    blind = next((found for key in references + keys if (found := answer_records(samples, *key, BLIND))), [])
    return Summary(builds, reference, tuple(blind), decide(builds, reference, blind))


def answer_records(samples: Iterable[Sample], runtime: str, build: str, stage: str) -> list[AnswerRecord]:
    """The answers of one run."""
    wanted = (runtime, build, stage)
    chosen = [s for s in samples if s.kind == "answer" and (s.runtime, s.build, s.stage) == wanted]
    return [AnswerRecord.from_sample(sample) for sample in chosen]


def headline(records: Sequence[AnswerRecord]) -> list[AnswerRecord]:
    """The answers that the accuracy counts: those without a tier, or all of them when each has one.

    Tiers grade questions from easy to out of reach, so their mean says little; each is shown by itself.
    """
    return [record for record in records if not record.tier] or list(records)


def apart(records: Sequence[AnswerRecord]) -> list[AnswerRecord]:
    """The answers that `headline` leaves out."""
    tiered = [record for record in records if record.tier]
    return tiered if len(tiered) < len(records) else []


def decide(
    builds: Sequence[BuildSummary], reference: BuildSummary | None, blind: Sequence[AnswerRecord] = ()
) -> Decision:
    """The smallest build that is verified and loses at most ALLOWED_LOSS points; equal sizes go to the faster one."""
    rejected = {summary.build: reason for summary in builds if (reason := _objection(summary, reference))}
    fit = [summary for summary in builds if summary.build not in rejected]
    if not fit:
        return Decision(None, ("No build is both verified and within the allowed loss.",), rejected)
    ttft = {summary.build: summary.ttft.estimate if summary.ttft else float("inf") for summary in fit}
    best = min(fit, key=lambda summary: (summary.bytes or 0, ttft[summary.build]))
    reasons = _reasons(best, fit, reference)
    guessed = accuracy(headline(blind)) if blind else None
    if guessed and reference and reference.accuracy and reference.accuracy.low <= guessed.high:
        reasons.append(
            f"Beware: with shuffled pictures the model answers {formats.percent(guessed)} right, so these "
            "questions hardly show that it sees at all."
        )
    return Decision(best.build, tuple(reasons), rejected)


def _one_bundle(samples: Iterable[Sample]) -> None:
    """Refuse lines of two bundles: latencies would be pooled, and an old stamp would pass for the new bundle's."""
    hashes = list(dict.fromkeys(s.detail["sha256"] for s in samples if s.kind == "bundle" and s.detail.get("sha256")))
    if len(hashes) > 1:
        raise DataError(
            f"{len(hashes)} bundles in one report: {', '.join(hashes)}",
            "report one bundle at a time, or remove the old lines",
        )


def _build(
    samples: Sequence[Sample], runtime: str, build: str, records: list[AnswerRecord], base: list[AnswerRecord]
) -> BuildSummary:
    counted = headline(records)
    own = [s for s in samples if (s.runtime, s.build) == (runtime, build)]
    latency = _values(own, "latency")
    sizes = {stage: int(values[-1]) for stage, values in _values(own, "size").items()}
    ttft = latency.get("ttft_ms", [])
    verify = _verify_record(samples, build) if runtime == "edge" else {}
    return BuildSummary(
        runtime=runtime,
        build=build,
        bytes=sizes.get("total"),
        sizes={stage: size for stage, size in sizes.items() if stage != "total"},
        accuracy=accuracy(counted) if counted else None,
        n=len(counted),
        by_type=accuracy_by(counted, "question_type"),
        by_tier=accuracy_by(records, "tier"),
        ttft=stats.median_interval(ttft) if ttft else None,
        ttft_p90=stats.p90(ttft) if ttft else None,
        ttft_mad=stats.mad(ttft) if ttft else None,
        samples=len(ttft),
        stages={stage: stats.median(values) for stage, values in latency.items()},
        memory={stage: int(max(values)) for stage, values in _values(own, "memory").items()},
        verified=bool(verify["passed"]) if "passed" in verify else None,
        verify=verify,
        flips=stats.flips(headline(base), counted) if base and counted else None,
        tier_flips=stats.flips(apart(base), apart(records)) if apart(base) and apart(records) else None,
    )


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


def _objection(summary: BuildSummary, reference: BuildSummary | None) -> str:
    """Why a build may not ship; empty when it may."""
    if summary.verified is None:
        return "not verified against its checkpoint"
    if not summary.verified:
        return f"failed verification at {summary.verify.get('first_divergence', 'an unknown stage')}"
    if reference is None or reference.accuracy is None:
        return "there is no reference accuracy to compare with"
    if summary.flips is None:
        return "its accuracy was not measured"
    loss = -summary.flips.difference.estimate
    if loss > ALLOWED_LOSS:
        return f"loses {loss:.1f} points of accuracy"
    return "its size was not measured" if summary.bytes is None else ""


def _reasons(best: BuildSummary, fit: Sequence[BuildSummary], reference: BuildSummary | None) -> list[str]:
    reasons = [f"It is the smallest of {len(fit)} builds that are verified and lose at most {ALLOWED_LOSS:g} point."]
    if len(fit) == 1:
        reasons = [f"It is the only build that is verified and loses at most {ALLOWED_LOSS:g} point."]
    if best.flips and reference and reference.accuracy and best.accuracy:
        gap = best.flips.difference
        verdict = "a difference" if best.flips.p_value < 1 - stats.LEVEL else "not distinguishable"
        change, low, high = (formats.points(value) for value in (gap.estimate, gap.low, gap.high))
        reasons.append(
            f"It answers {formats.percent(best.accuracy)} of {best.n:,} questions right, the reference "
            f"{formats.percent(reference.accuracy)}: {change} points (95 % interval {low} to {high}), "
            f"{verdict} by the exact McNemar test (p = {best.flips.p_value:.2g})."
        )
    timed = [summary for summary in fit if summary.ttft]
    fastest = min(timed, key=lambda summary: summary.ttft.estimate) if timed else None  # type: ignore[union-attr]
    if fastest and fastest.ttft and best.ttft and fastest.build != best.build:
        apart = fastest.ttft.high < best.ttft.low
        reasons.append(
            f"{fastest.build} is {'faster' if apart else 'not measurably faster'}: "
            f"{formats.ms(fastest.ttft.estimate)} ms to the first token instead of {formats.ms(best.ttft.estimate)} ms."
        )
    elif fastest and best.ttft:
        reasons.append(f"It is also the fastest of them: {formats.ms(best.ttft.estimate)} ms to the first token.")
    return reasons
