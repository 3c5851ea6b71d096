"""What a device has to give, and whether builds stay within it: `ttft=500ms,rss=1.2GB,size=900MB`.

A limit is compared with the median of what was measured (with the largest peak for memory), and the upper bound of the
median's 95 % interval is told beside it: a median under the limit with a bound over it is a pass by luck.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from tinyllava_edge.benchmarks import energy, stats
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.errors import UsageError

_TIME = {"ms": 1.0, "s": 1000.0}
_BYTES = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_ENERGY = {"j": 1.0, "mj": 1e-3}
_POINTS = {"": 1.0, "point": 1.0, "points": 1.0}
_NUMBER = re.compile(r"(\d{1,15}(?:\.\d{0,9})?|\.\d{1,9})\s*([a-z]*)", re.ASCII)


@dataclass(frozen=True)
class Quantity:
    """Something that can be limited."""

    key: str
    """its name in Budget.limits"""
    units: Mapping[str, float]
    """unit, in lower case → how many of the base unit"""
    kind: str
    """kind of the result lines that hold it; empty where no measurement of `bench` does"""
    stage: str
    """their stage"""
    shown: str
    """unit that it is shown in"""


QUANTITIES: Mapping[str, Quantity] = {
    "ttft": Quantity("ttft_ms", _TIME, "latency", "ttft_ms", "ms"),
    "total": Quantity("total_ms", _TIME, "latency", "total_ms", "ms"),
    "rss": Quantity("peak_rss", _BYTES, "memory", "peak_rss", "MB"),
    "size": Quantity("size", _BYTES, "size", "total", "MB"),
    "energy": Quantity("energy", _ENERGY, "energy", "answer", "J"),
    "drop": Quantity("drop", _POINTS, "", "", "points"),
}
_HINT = "write ttft=500ms,rss=1.2GB,size=900MB,total=2s,energy=5J,drop=0.5"


@dataclass(frozen=True)
class Budget:
    """Upper limits."""

    limits: Mapping[str, float]
    """`ttft_ms` and `total_ms` in ms, `peak_rss` and `size` in bytes, `energy` in J an answer, `drop` in points of
    accuracy against the reference; only those that are limited"""
    text: str = ""
    """as it was written"""

    def __bool__(self) -> bool:
        """Whether anything is limited."""
        return bool(self.limits)


@dataclass(frozen=True)
class Check:
    """One build beside one limit."""

    build: str
    """its name"""
    target: str
    """where it was measured"""
    name: str
    """key of QUANTITIES"""
    value: float | None
    """median (memory: the largest peak) in the base unit; None where it wasn't measured"""
    bound: float | None
    """upper bound of the median's 95 % interval; None where there is one value only, or none"""
    limit: float
    """what it may be"""
    reason: str = ""
    """why there is no value"""

    @property
    def passed(self) -> bool:
        """Whether the value was measured and is within the limit, the limit itself included."""
        return self.value is not None and self.value <= self.limit

    def line(self) -> str:
        """For people: the numbers and the verdict."""
        place = "" if self.target == "cpu" else f" on {self.target}"
        limit = spelled(self.name, self.limit)
        if self.value is None:
            return f"{self.build}{place}: {self.name} not measured ({self.reason}), limit {limit}: FAIL"
        bound = "" if self.bound is None else f" (95 % bound {spelled(self.name, self.bound)})"
        verdict = "ok" if self.passed else "FAIL"
        if self.passed and self.bound is not None and self.bound > self.limit:
            verdict = "ok, but its bound is over the limit"
        return f"{self.build}{place}: {self.name} {spelled(self.name, self.value)}{bound}, limit {limit}: {verdict}"


def parse_budget(text: str) -> Budget:
    """Read `ttft=500ms,rss=1.2GB`.

    Units: ms, s; B, KB, MB, GB (powers of 1,000), KiB, MiB, GiB; J, mJ; none, or points, for `drop`. Case doesn't
    matter.

    Raises:
        UsageError: the part that can't be read is named; also for a name that is there twice.
    """
    limits: dict[str, float] = {}
    for part in (piece.strip() for piece in text.split(",")):
        name, equals, value = (word.strip() for word in part.partition("="))
        if name not in QUANTITIES or not equals:
            raise UsageError(f"budget part {part[:60]!r}: known are {', '.join(QUANTITIES)}", _HINT)
        quantity = QUANTITIES[name]
        match = _NUMBER.fullmatch(value.lower())
        units = ", ".join(unit for unit in quantity.units if unit)
        if not match or match[2] not in quantity.units:
            raise UsageError(f"budget part {part[:60]!r}: not a number with one of the units {units}", _HINT)
        limit = float(match[1]) * quantity.units[match[2]]
        if not math.isfinite(limit) or (limit <= 0 and name != "drop"):
            raise UsageError(f"budget part {part[:60]!r}: a limit must be above 0", _HINT)
        if quantity.key in limits:
            raise UsageError(f"budget part {part[:60]!r}: {name} is limited twice", _HINT)
        limits[quantity.key] = limit
    return Budget(MappingProxyType(limits), text)


def check_measured(budget: Budget, *, answers: bool, memory: bool) -> None:
    """Raise UsageError for a limit on what the coming run doesn't measure, so that nobody waits for it in vain.

    Args:
        budget: limits.
        answers: whether whole answers are timed, not the decoder's tests alone.
        memory: whether memory is measured.
    """
    if "drop" in budget.limits:
        raise UsageError("a budget with `drop` needs accuracy, which bench doesn't measure", "pass it to `report`")
    for name, quantity in QUANTITIES.items():
        if quantity.key not in budget.limits:
            continue
        if quantity.kind == "memory" and not memory:
            raise UsageError(f"--budget {name} with --no-memory: it would not be measured", "leave out one of them")
        if quantity.kind in ("latency", "energy") and not answers:
            raise UsageError(
                f"--budget {name} with -p or -n alone: no answer would be measured", "add --image or --image-size"
            )


def check(budget: Budget, samples: Sequence[Sample]) -> list[Check]:
    """Every measured build beside every limit, by plain stage names: the grid's first picture and number of threads.

    Raises:
        UsageError: `drop` is limited, which takes answers to questions.
    """
    if "drop" in budget.limits:
        raise UsageError("a budget with `drop` needs accuracy, which bench doesn't measure", "pass it to `report`")
    builds = dict.fromkeys((s.target, s.build) for s in samples if s.build and s.runtime == "edge")
    named = {quantity.key: (name, quantity) for name, quantity in QUANTITIES.items()}
    return [
        _check(samples, target, build, *named[key], limit)
        for target, build in builds
        for key, limit in budget.limits.items()
    ]


def spelled(name: str, value: float) -> str:
    """A value in the base unit, as people write it: `412.3 ms`, `1,204.5 MB`."""
    quantity = QUANTITIES[name]
    digits = 3 if quantity.shown == "J" else 1
    return f"{value / quantity.units[quantity.shown.lower()]:,.{digits}f} {quantity.shown}"


def _check(samples: Sequence[Sample], target: str, build: str, name: str, quantity: Quantity, limit: float) -> Check:
    own = [
        s
        for s in samples
        if (s.target, s.build, s.kind, s.stage) == (target, build, quantity.kind, quantity.stage)
        and s.runtime == "edge"
    ]
    values, told = energy.values(own)
    if not values:
        return Check(build, target, name, None, None, limit, told or "not part of this run")
    if quantity.kind in ("memory", "size"):
        return Check(build, target, name, max(values), None, limit)
    found = stats.median_interval(values)
    return Check(build, target, name, found.estimate, found.high if len(values) > 1 else None, limit)
