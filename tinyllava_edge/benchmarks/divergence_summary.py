"""Divergence lines of results.jsonl → one row per build and cause, and a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tinyllava_edge.benchmarks.clusters import cluster, standard_error
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.benchmarks.stats import Interval, median, percentile, wilson
from tinyllava_edge.errors import DataError

CAUSES = ("again", "preprocess", "runtime", "vision", "llm", "both")  # in the order of the table
_HEAD = (
    *("build", "cause", "mean KL", "± SE", "median", "p95", "p99", "max"),
    *("same top-1 (95 %)", "Δp", "margin*", "questions", "tokens"),
)


@dataclass(frozen=True)
class DivergenceRow:
    """All answer tokens of one build under one cause. KL in nats."""

    build: str
    """build name; the checkpoint's precision for `again` and `preprocess`, which run no build"""
    cause: str
    """one of CAUSES"""
    questions: int
    """answers compared"""
    pictures: int
    """pictures they are about"""
    positions: int
    """answer tokens compared, end tokens included"""
    mean: float
    """mean KL of a token"""
    standard_error: float | None
    """of that mean, clustered by picture; None with one picture"""
    median: float
    """median KL"""
    p95: float
    """95th percentile"""
    p99: float
    """99th percentile"""
    max: float
    """largest KL of a token"""
    same_top: Interval
    """share of tokens whose first choice is the reference's, 0..1, with Wilson's interval"""
    moved: float
    """mean change of the probability of the reference's token"""
    moved_rms: float
    """root of the mean square of that change"""
    margin_median: float | None
    """where the first choice changed: median distance of the reference's first two choices, in nats; else None"""
    margin_max: float | None
    """and the largest"""


@dataclass(frozen=True)
class DivergenceReport:
    """Every row, and what could not be measured."""

    rows: tuple[DivergenceRow, ...]
    """builds in order of first appearance, causes in the order of CAUSES"""
    absent: Mapping[str, str]
    """cause → why there is no row of it"""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"rows": [asdict(row) for row in self.rows], "absent": dict(self.absent)}


def summarise_divergence(samples: Iterable[Sample]) -> DivergenceReport:
    """Pool the tokens of every build and cause.

    Args:
        samples: lines of results.jsonl; those of other kinds are passed over.

    Raises:
        DataError: a divergence line that holds something else, or a question that occurs twice.
    """
    groups: dict[tuple[str, str], list[Sample]] = {}
    absent: dict[str, str] = {}
    seen: set[tuple[str, str, str, str]] = set()
    for sample in samples:
        if sample.kind != "divergence":
            continue
        if sample.value is None:
            absent[sample.stage] = str(sample.detail.get("absent", ""))
            continue
        _check(sample)
        key = (sample.build, sample.stage, sample.detail["task"], sample.detail["id"])
        if key in seen:
            raise DataError(
                f"divergence of {key[3]!r} occurs twice ({key[0]}, {key[1]})", "summarise one measurement at a time"
            )
        seen.add(key)
        groups.setdefault(key[:2], []).append(sample)
    builds = list(dict.fromkeys(build for build, _ in groups))
    rows = [_row(b, c, groups[b, c]) for b in builds for c in CAUSES if (b, c) in groups]
    return DivergenceReport(tuple(rows), absent)


def divergence_lines(report: DivergenceReport) -> list[str]:
    """The report for a terminal: a table, then what is absent."""
    cells = [_HEAD, *map(_cells, report.rows)] if report.rows else []
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [
            text.ljust(w) if k < 2 else text.rjust(w) for k, (text, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    if report.rows:
        lines.append("KL in nats; Δp: mean change of the reference token's probability;")
        lines.append("margin*: median distance of the reference's first two choices where the first changed, in nats")
    return [*lines, *(f"{cause}: not measured, {reason}" for cause, reason in report.absent.items())]


def _row(build: str, cause: str, samples: Sequence[Sample]) -> DivergenceRow:
    details = [sample.detail for sample in samples]
    kl = [value for d in details for value in d["kl"]]
    pictures = [(d["task"], d["image"]) for d in details]
    moved = [value for d in details for value in d["moved"]]
    margins = [value for d in details for value in d["margins"]]
    owners = [picture for picture, d in zip(pictures, details, strict=True) for _ in d["kl"]]
    return DivergenceRow(
        build=build,
        cause=cause,
        questions=len(details),
        pictures=len(set(pictures)),
        positions=len(kl),
        mean=sum(kl) / len(kl),
        standard_error=standard_error(cluster(kl, owners)),
        median=median(kl),
        p95=percentile(kl, 0.95),
        p99=percentile(kl, 0.99),
        max=max(kl),
        same_top=wilson(sum(d["same_top"] for d in details), len(kl)),
        moved=sum(moved) / len(moved),
        moved_rms=math.sqrt(sum(value * value for value in moved) / len(moved)),
        margin_median=median(margins) if margins else None,
        margin_max=max(margins, default=None),
    )


def _cells(row: DivergenceRow) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.2e}"

    same = row.same_top
    return (
        row.build,
        row.cause,
        *map(number, (row.mean, row.standard_error, row.median, row.p95, row.p99, row.max)),
        f"{100 * same.estimate:.2f} % ({100 * same.low:.2f}–{100 * same.high:.2f})",
        f"{row.moved:+.2e}",
        number(row.margin_median),
        f"{row.questions:,}",
        f"{row.positions:,}",
    )


def _check(sample: Sample) -> None:
    """Raise DataError unless a line holds what a row needs."""
    detail = sample.detail
    where = f"divergence line {sample.sample} ({sample.build}, {sample.stage})"
    if sample.stage not in CAUSES:
        raise DataError(f"{where}: unknown cause", f"known: {', '.join(CAUSES)}")
    for key in ("id", "image", "task"):
        if not isinstance(detail.get(key), str):
            raise DataError(f"{where}: `{key}` is not text", "measure again with this version")
    n, same = detail.get("positions"), detail.get("same_top")
    if type(n) is not int or type(same) is not int or not 0 <= same <= n or n < 1:
        raise DataError(f"{where}: `positions` {n!r} and `same_top` {same!r} are no counts", "measure again")
    for key, length in (("kl", n), ("moved", n), ("margins", n - same)):
        values = detail.get(key)
        if not isinstance(values, list) or len(values) != length or not all(map(_finite, values)):
            raise DataError(f"{where}: `{key}` is not a list of {length} numbers", "measure again with this version")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18
