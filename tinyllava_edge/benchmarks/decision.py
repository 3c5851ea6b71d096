"""Rows of one target → the build to ship, and why each other one not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tinyllava_edge.benchmarks import report_formats as formats
from tinyllava_edge.benchmarks import stats
from tinyllava_edge.benchmarks.evaluation import accuracy
from tinyllava_edge.benchmarks.report_speed import compare_rows
from tinyllava_edge.benchmarks.results import AnswerRecord
from tinyllava_edge.benchmarks.stats import Interval
from tinyllava_edge.benchmarks.summary_types import ALLOWED_LOSS, BuildSummary, Decision
from tinyllava_edge.errors import UsageError

Budget = Mapping[str, float]
Show = Callable[[float], str]


def _exact(value: float | None) -> Interval | None:
    return None if value is None else Interval(value, value, value)


def _drop(row: BuildSummary) -> Interval | None:
    if row.flips is None:
        return None
    gap = row.flips.difference
    return Interval(-gap.estimate, -gap.high, -gap.low)


COSTS: Mapping[str, tuple[str, Callable[[BuildSummary], Interval | None], Show]] = {
    "ttft_ms": ("time to first token", lambda row: row.ttft, lambda value: f"{formats.ms(value)} ms"),
    "total_ms": ("time to last token", lambda row: row.total, lambda value: f"{formats.ms(value)} ms"),
    "peak_rss": ("peak memory", lambda row: _exact(row.memory.get("peak_rss")), lambda v: f"{formats.mega(v)} MB"),
    "size": ("size on disk", lambda row: _exact(row.bytes), lambda value: f"{formats.mega(value)} MB"),
    "energy": ("energy of an answer", lambda row: row.energy, lambda value: f"{value:.3g} J"),
    "drop": ("loss of accuracy", _drop, lambda value: f"{max(0.0, value):.1f} points"),
}  # what a budget may limit: its name, a row's figure in base units, and how to print one


def check_budget(budget: Budget) -> Budget:
    """The budget, if every limit is known. Raises UsageError otherwise."""
    for name, limit in budget.items():
        if name not in COSTS:
            raise UsageError(f"budget names {name!r}", f"known: {', '.join(COSTS)}")
        if not 0 <= limit < 1e18:
            raise UsageError(f"budget allows {name} = {limit}", "give a positive number")
    return budget


def decide(
    builds: Sequence[BuildSummary],
    reference: BuildSummary | None,
    blind: Sequence[AnswerRecord] = (),
    budget: Budget | None = None,
) -> Decision:
    """The smallest build that is verified, within the budget, and loses at most the allowed points of accuracy.

    Equal sizes go to the faster one, by its median. A figure is held against its limit by its median. Which build is
    called faster is decided by `latency_compare`, round by round.

    Args:
        builds: rows of one target.
        reference: the checkpoint.
        blind: answers with shuffled pictures, to warn of questions that don't need one.
        budget: limits in base units, see COSTS; without `drop` ALLOWED_LOSS points may be lost.

    Raises:
        UsageError: a limit that is unknown or no number.
        DependencyError: scipy is not installed, and several builds are to be compared.
    """
    limits = dict(check_budget(budget or {}))
    allowed = limits.get("drop", ALLOWED_LOSS)
    target = builds[0].target if builds else ""
    rejected = {row.name: reason for row in builds if (reason := _objection(row, reference, allowed, limits))}
    fit = [row for row in builds if row.name not in rejected]
    if not fit:
        within = "verified and within the budget" if limits else "both verified and within the allowed loss"
        return Decision(None, (f"No build is {within}.",), rejected, {}, target, limits)
    ttft = {row.key: row.ttft.estimate if row.ttft else float("inf") for row in fit}
    best = min(fit, key=lambda row: (row.bytes or 0, ttft[row.key]))
    reasons = _reasons(best, fit, reference, allowed, bool(limits))
    guessed = accuracy(blind) if blind else None
    if guessed and reference and reference.accuracy and reference.accuracy.low <= guessed.high:
        reasons.append(
            f"Beware: with shuffled pictures the model answers {formats.percent(guessed)} right, so these "
            "questions hardly show that it sees at all."
        )
    passed_over = {row.name: _larger(row, best) for row in fit if row is not best}
    return Decision(best.build, tuple(reasons), rejected, passed_over, target, limits, best.runtime)


def _objection(row: BuildSummary, reference: BuildSummary | None, allowed: float, limits: Budget) -> str:
    """Why a build may not ship; empty when it may."""
    if row.verified is None:
        return "not verified against its checkpoint"
    if not row.verified:
        return f"failed verification at {row.verify.get('first_divergence', 'an unknown stage')}"
    if reference is None or reference.accuracy is None:
        return "there is no reference accuracy to compare with"
    if row.flips is None:
        return "its accuracy was not measured"
    over = []
    if (loss := -row.flips.difference.estimate) > allowed:
        over.append(f"loses {loss:.1f} points of accuracy" + (f", allowed {allowed:g}" if "drop" in limits else ""))
    for name, limit in limits.items():
        what, figure, show = COSTS[name]
        found = figure(row)
        if name == "drop":
            continue
        if found is None:
            over.append(f"its {what} was not measured")
        elif found.estimate > limit:
            near = ", which its interval reaches" if found.low <= limit else ""
            over.append(f"{what} {show(found.estimate)}, allowed {show(limit)}{near}")
    return "; ".join(over) or ("its size was not measured" if row.bytes is None else "")


def _reasons(
    best: BuildSummary, fit: Sequence[BuildSummary], reference: BuildSummary | None, allowed: float, asked: bool
) -> list[str]:
    points = f"{allowed:g} point" + ("" if allowed == 1 else "s")
    rule = f"verified, within the budget and lose at most {points}" if asked else f"verified and lose at most {points}"
    reasons = [f"It is the smallest of {len(fit)} builds that are {rule}."]
    if len(fit) == 1:
        reasons = [f"It is the only build that is {rule.replace('lose at', 'loses at')}."]
    if best.flips and reference and reference.accuracy and best.accuracy:
        gap = best.flips.difference
        verdict = "a difference" if best.flips.p_value < 1 - stats.LEVEL else "not distinguishable"
        change, low, high = (formats.points(value) for value in (gap.estimate, gap.low, gap.high))
        where = f" (answered on {best.answered_on})" if best.answered_on else ""
        reasons.append(
            f"It answers {formats.percent(best.accuracy)} of {best.n:,} questions right{where}, the reference "
            f"{formats.percent(reference.accuracy)}: {change} points (95 % interval {low} to {high}), "
            f"{verdict} by the exact McNemar test (p = {best.flips.p_value:.2g})."
        )
    if best.noisy:
        reasons.append("Its times scatter by more than 10 %: measure again on a quiet machine before relying on them.")
    return reasons + _speed(best, fit)


def _speed(best: BuildSummary, fit: Sequence[BuildSummary]) -> list[str]:
    """Whether another build that qualifies answers faster, by the paired test."""
    others = [row for row in fit if row is not best and row.ttft]
    if not best.ttft or not others:
        return []
    found = [(row, compare_rows(best, row)) for row in others]
    faster = [(one, row) for row, one in found if one and one.distinguishable and one.ratio.estimate < 1]
    own = formats.ms(best.ttft.estimate)
    if faster:
        most, row = min(faster, key=lambda pair: pair[0].ratio.estimate)
        theirs = formats.ms(row.ttft.estimate if row.ttft else None)
        return [f"{row.name} is {most.verdict}: {theirs} ms to the first token instead of {own} ms."]
    if all(one and one.distinguishable for _, one in found):
        return [f"It is also the fastest of them: {own} ms to the first token."]
    row, one = min(found, key=lambda pair: pair[0].ttft.estimate if pair[0].ttft else 0.0)
    if one is None or "too few" in one.verdict:
        return [f"Too few answers were timed to tell which of them is the fastest: {own} ms to the first token."]
    return [
        f"None of them is measurably faster: {own} ms to the first token; {row.name} takes "
        f"{one.ratio.estimate:.2f} of that (99 % interval {one.ratio.low:.2f} to {one.ratio.high:.2f})."
    ]


def _larger(row: BuildSummary, best: BuildSummary) -> str:
    """Why another build that qualifies is not shipped."""
    if row.bytes == best.bytes:
        return "as small, but not faster"
    return f"qualifies too, but is larger: {formats.mega(row.bytes)} MB"
