"""Numbers as a report prints them; an absent number is a dash."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinyllava_edge.benchmarks.stats import Interval

__all__ = ["cosine", "limit", "mega", "ms", "number", "percent", "points", "share", "tiny"]
NONE = "–"


def percent(value: Interval | None) -> str:
    """A share with its unit."""
    return NONE if value is None else f"{100 * value.estimate:.1f} %"


def ms(value: float | None) -> str:
    """Milliseconds: two digits below 10, one below 100."""
    if value is None:
        return NONE
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def mega(value: float | None) -> str:
    """Bytes in MB (10^6)."""
    return NONE if value is None else f"{value / 1e6:.1f}" if value < 1e8 else f"{value / 1e6:,.0f}"


def points(value: float | None) -> str:
    """A difference in percentage points, always with its sign."""
    return NONE if value is None else "0.0" if abs(value) < 0.05 else f"{value:+.1f}".replace("-", "−")


def number(value: float | None) -> str:
    """A plain number with at most one decimal."""
    return NONE if value is None else f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"


def tiny(value: float | None) -> str:
    """An error: two significant digits."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    return f"{value:.2g}" if 1e-3 <= abs(value) < 1e3 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")


def cosine(value: float | None) -> str:
    """A cosine with enough nines to tell 0.9999 from 1."""
    return NONE if value is None else f"{value:.6f}"


def share(value: float | None) -> str:
    """A share in percent; 100 only when nothing is missing."""
    if value is None:
        return NONE
    return "100" if value == 1 else f"{min(100 * value, 99.99):.2f}"


def is_number(value: Any) -> bool:
    """Whether these functions can print it: a number, or None for an absent one."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def limit(check: Mapping[str, Any]) -> str:
    """The limits of one check in words. Raises ValueError where they are no table of numbers."""
    bounds = check.get("tolerance") or {}
    if not check.get("gated"):
        return NONE
    known = bounds if isinstance(bounds, Mapping) else {"max_abs": bounds}
    if not all(is_number(known.get(key)) for key in ("max_abs", "relative", "cosine", "share")):
        raise ValueError(f"the tolerance {str(bounds)[:80]!r}")
    parts = [f"largest ≤ {bounds['max_abs']:g}"] if bounds.get("max_abs") is not None else []
    parts += [f"relative ≤ {bounds['relative']:g}"] if bounds.get("relative") is not None else []
    parts += [f"cosine ≥ {bounds['cosine']:g}"] if bounds.get("cosine") is not None else []
    parts += [f"agree ≥ {100 * bounds['share']:g} %"] if bounds.get("share") is not None else []
    return ", ".join(parts)
