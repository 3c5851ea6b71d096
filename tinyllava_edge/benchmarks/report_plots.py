"""What the Pareto plots show: accuracy over every cost that was measured. `report_draw` draws it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tinyllava_edge.benchmarks.stats import Interval
from tinyllava_edge.benchmarks.summary_types import BuildSummary, Summary, on_target

SERIES = 6  # colours for LLM types; they repeat beyond that
MARKERS, GLYPHS = ("o", "D", "s", "^", "v", "P"), "○◇□△▽✚"


@dataclass(frozen=True)
class Point:
    """One build in a plot."""

    label: str
    """build name"""
    llm: str
    """LLM type: its colour"""
    vision: str
    """vision precision: its marker"""
    x: Interval
    """cost"""
    y: Interval
    """accuracy in percent"""
    chosen: bool
    """whether it is the one to ship"""


@dataclass(frozen=True)
class Plot:
    """Accuracy over one cost."""

    name: str
    """short name, part of ids in the SVG"""
    x_label: str
    """axis title with unit"""
    points: tuple[Point, ...]
    """builds that have both numbers"""
    reference: float | None
    """reference accuracy in percent"""
    target: str = ""
    """where it was measured; empty when everything was measured on one target"""
    allowed: float = 1.0
    """points below the reference that a build may fall"""
    limit: float | None = None
    """what the budget allows of this cost, in the axis' unit"""


@dataclass(frozen=True)
class Key:
    """What colours and marks mean, the same in every plot of a report."""

    colors: Mapping[str, str]
    """LLM type → colour name in PAPER"""
    markers: Mapping[str, str]
    """vision precision → matplotlib's marker"""
    glyphs: Mapping[str, str]
    """vision precision → the marker as a character"""

    @classmethod
    def of(cls, found: Sequence[Plot]) -> Key:
        """Colours and marks in order of first appearance in any of the plots."""
        points = [point for plot in found for point in plot.points]
        llms = dict.fromkeys(point.llm for point in points)
        places = {vision: k % len(MARKERS) for k, vision in enumerate(dict.fromkeys(point.vision for point in points))}
        return cls(
            {llm: f"series{k % SERIES}" for k, llm in enumerate(llms)},
            {vision: MARKERS[k] for vision, k in places.items()},
            {vision: GLYPHS[k] for vision, k in places.items()},
        )


def plots(summary: Summary) -> list[Plot]:
    """The plots that the measurements allow, target by target; size stands once, for it is the same everywhere."""
    axes: tuple[tuple[str, str, str, float, Callable[[BuildSummary], Interval | None]], ...] = (
        ("ttft", "ttft_ms", "time to first token, ms (median)", 1.0, lambda row: row.ttft),
        ("total", "total_ms", "time to last token, ms (median)", 1.0, lambda row: row.total),
        ("size", "size", "size on disk, MB", 1e6, lambda row: _exact(row.bytes)),
        ("memory", "peak_rss", "peak memory, MB", 1e6, lambda row: _exact(row.memory.get("peak_rss"))),
        ("energy", "energy", "energy of an answer, J (median)", 1.0, lambda row: row.energy),
    )
    reference = summary.reference.accuracy if summary.reference else None
    level = None if reference is None else 100 * reference.estimate
    limits = summary.decision.budget
    found: list[Plot] = []
    for number, target in enumerate(summary.targets):
        place = target if len(summary.targets) > 1 else ""
        for name, limit, label, scale, cost in axes:
            if name == "size" and any(plot.name == "size" for plot in found):
                continue
            costs = [(row, cost(row)) for row in on_target(summary.builds, target) if row.accuracy]
            points = tuple(_point(row, x, scale, summary.ships(row)) for row, x in costs if x)
            allowed = limits[limit] / scale if limit in limits else None
            if points:
                unique = f"t{number}-{name}" if number and name != "size" else name
                found.append(Plot(unique, label, points, level, place, summary.allowed_loss, allowed))
    return found


def frontier(points: Sequence[Point]) -> list[Point]:
    """Builds that no other build beats in both cost and accuracy, by rising cost."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x.estimate, -p.y.estimate)):
        if not best or point.y.estimate > best[-1].y.estimate:
            best.append(point)
    return best


def _point(row: BuildSummary, cost: Interval, scale: float, chosen: bool) -> Point:
    vision, _, llm = row.name.partition("+")
    y = row.accuracy or Interval(0.0, 0.0, 0.0)
    x = Interval(cost.estimate / scale, cost.low / scale, cost.high / scale)
    return Point(row.name, llm, vision, x, Interval(100 * y.estimate, 100 * y.low, 100 * y.high), chosen)


def _exact(value: int | None) -> Interval | None:
    return None if value is None else Interval(value, value, value)
