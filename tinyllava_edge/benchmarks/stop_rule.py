"""When a measurement may stop: enough rounds, enough time, and a change of a tenth would have shown.

The last is decided by the width of intervals alone, never by what they say: to stop as soon as two builds differ would
find differences that aren't there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from tinyllava_edge.benchmarks.bench_grid import REPETITIONS
from tinyllava_edge.errors import UsageError

MOST = 10  # times as many rounds as were asked for are measured at most, however noisy the machine
LATER = 1.15  # intervals are looked at again after so many times the rounds


@dataclass(frozen=True)
class StopRule:
    """Rounds go on until all minima are met and the resolution is reached, or a cap is hit."""

    repetitions: int = REPETITIONS
    """rounds at least; medians need 10 or more to mean something"""
    min_time_s: float = 0.0
    """seconds of measuring at least, warm-up not counted"""
    max_time_s: float = math.inf
    """seconds after which no further round begins, even if a minimum isn't met"""
    resolution: float = 0.0
    """change between two builds that four of five such runs must find, 0.05 is 5 %; 0 doesn't ask for one"""

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range."""
        if self.repetitions < 1:
            raise UsageError(f"{self.repetitions} repetitions", "give --repetitions 1 or more")
        if not 0 <= self.min_time_s < math.inf or not self.max_time_s > 0:
            raise UsageError(
                f"--min-time {self.min_time_s}, --max-time {self.max_time_s}", "give seconds, the cap above 0"
            )
        if self.max_time_s < self.min_time_s:
            raise UsageError(
                f"--max-time {self.max_time_s:g} is shorter than --min-time {self.min_time_s:g}", "raise the cap"
            )
        if not 0 <= self.resolution < 1:
            raise UsageError(f"--resolution {100 * self.resolution:g}", "give percent from 0 to below 100, e.g. 5")

    @property
    def most(self) -> int:
        """Rounds at most."""
        return MOST * self.repetitions if self.resolution else self.repetitions

    def minima(self, rounds: int, seconds: float) -> bool:
        """Whether rounds and seconds are met."""
        return rounds >= self.repetitions and seconds >= self.min_time_s

    def verdict(self, rounds: int, seconds: float, seen: float | None = None) -> str:
        """Why to stop after so many rounds and seconds; empty to go on.

        Args:
            rounds: rounds so far.
            seconds: how long they took.
            seen: the resolution so far; None where it isn't known yet.
        """
        if self.minima(rounds, seconds):
            if not self.resolution:
                return "count and time"
            if seen is not None and seen <= self.resolution:
                return "resolution"
            if rounds >= self.most:
                return "most rounds"
        return "max-time" if seconds >= self.max_time_s else ""


@dataclass
class Seen:
    """The times of every task and arm so far, and how small a change they would show."""

    groups: Sequence[Sequence[int]]
    """arms that are compared with each other (same device, same threads), by their places; the first is the base"""
    times: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    """(task's name, arm's place) → ms, round by round"""
    due: int = 0
    """round after which to look again"""

    def add(self, task: str, arm: int, ms: float) -> None:
        """Keep one time."""
        self.times.setdefault((task, arm), []).append(ms)

    def resolution(self) -> float | None:
        """The worst of all tasks and arms, see latency_compare; None with too few rounds for one of them.

        An arm is compared with its group's first; one alone in its group with a second run just like this one.
        """
        from tinyllava_edge.benchmarks.latency_compare import pair_resolution, run_resolution

        worst = 0.0
        if any(len(values) < 2 or min(values) <= 0 for values in self.times.values()):
            return None
        for task in dict.fromkeys(name for name, _ in self.times):
            for base, *others in self.groups:
                first = self.times[task, base]
                found = [pair_resolution(first, self.times[task, arm]) for arm in others] or [run_resolution(first)]
                for one in found:
                    if one is None:
                        return None
                    worst = max(worst, one)
        return worst

    def look(self, rounds: int) -> float | None:
        """`resolution`, but only where it is due: it takes time that nothing is measured in."""
        if rounds < self.due:
            return None
        self.due = max(rounds + 1, int(LATER * rounds))
        return self.resolution()
