"""Is one build faster than another? Rows of one target, compared round by round as `latency_compare` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tinyllava_edge.benchmarks.latency_compare import PAIRED, LatencyComparison, compare_samples
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.benchmarks.summary_types import WHOLE, BuildSummary, Summary, on_target
from tinyllava_edge.errors import UsageError


@dataclass(frozen=True)
class Speed:
    """A row's whole times beside those of its target's base."""

    base: str
    """build that the row is compared with: the one to ship, or else the target's first timed one"""
    is_base: bool
    """whether the row is that build itself"""
    times: Mapping[str, LatencyComparison]
    """time of WHOLE → how the row's differs; stages that both have, with two answers or more"""

    def cell(self, stage: str = WHOLE[0]) -> str:
        """`1.06 (1.02 to 1.10), slower by 6.0 %`: ratio to the base, its 99 % interval, verdict."""
        if self.is_base:
            return "base"
        one = self.times.get(stage)
        if one is None:
            return ""
        return f"{one.ratio.estimate:.2f} ({one.ratio.low:.2f} to {one.ratio.high:.2f}), {one.verdict}"


def compare_rows(first: BuildSummary, second: BuildSummary, stage: str = WHOLE[0]) -> LatencyComparison | None:
    """How the second row's time differs from the first's; None where either has fewer than two answers.

    Raises DependencyError without scipy.
    """
    a, b = _positive(first, stage), _positive(second, stage)
    try:
        return compare_samples(a, b)
    except UsageError:
        return None


def speeds(summary: Summary) -> dict[tuple[str, str, str], Speed]:
    """Row's key → its speed, for every timed row of every target. Raises DependencyError without scipy."""
    found = {}
    for target in summary.targets:
        rows = [row for row in on_target(summary.rows, target) if row.ttft]
        chosen = summary.chosen(target)
        base = chosen if chosen and chosen.ttft else next(iter(rows), None)
        for row in rows:
            if base is not None:
                pairs = {stage: compare_rows(base, row, stage) for stage in WHOLE} if row is not base else {}
                times = {stage: one for stage, one in pairs.items() if one is not None}
                found[row.key] = Speed(base.name, row is base, times)
    return found


def how(found: Mapping[tuple[str, str, str], Speed]) -> str:
    """What the ratios are, in words; empty where nothing is compared."""
    compared = [one for speed in found.values() for one in speed.times.values()]
    if not compared:
        return ""
    paired = all(one.method == PAIRED for one in compared)
    way = "typical one of a round (both builds answer in it)" if paired else "of medians, or of a round in one run"
    bases = list(dict.fromkeys(speed.base for speed in found.values()))
    return f"time over that of {' or '.join(bases)}, {way}, with its 99 % interval and permutation test"


def _positive(row: BuildSummary, stage: str) -> Sequence[Sample]:
    return [sample for sample in row.lines.get(stage, ()) if sample.value is not None and sample.value > 0]
