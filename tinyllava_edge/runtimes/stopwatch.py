"""Stage timings, each measured where it happens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from .base import StageTimings


class Stopwatch:
    """Adds up milliseconds per stage; stages are StageTimings' fields."""

    def __init__(self) -> None:
        self.token_ms: list[float] = []
        self._ms: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def stage(self, *names: str) -> Iterator[None]:
        """Time a block and add it to a stage, or to a stage and the part of it that the block is."""
        start = time.perf_counter()
        try:
            yield
        finally:
            ms = 1000 * (time.perf_counter() - start)
            for name in names:
                self.add(name, ms)

    def add(self, name: str, ms: float) -> None:
        """Add milliseconds to a stage."""
        self._ms[name] = self._ms.get(name, 0.0) + ms

    def token(self, ms: float) -> None:
        """Add one decoding step: to `decode_ms`, and to the list of steps."""
        self.token_ms.append(ms)
        self.add("decode_ms", ms)

    def first_token(self) -> None:
        """The first token is there: note the time since this watch was made, loading left out."""
        self._ms["clock_ms"] = 1000 * (time.perf_counter() - self._start) - self._ms.get("load_ms", 0.0)

    def last_token(self) -> None:
        """The answer is whole: note the time since this watch was made, loading left out."""
        self._ms["total_ms"] = 1000 * (time.perf_counter() - self._start) - self._ms.get("load_ms", 0.0)

    def timings(self) -> StageTimings:
        """What was measured so far."""
        return StageTimings(**self._ms)
