"""Stage timings, each measured where it happens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from .base import StageTimings


class Stopwatch:
    """Adds up milliseconds per stage; stages are StageTimings' fields."""

    def __init__(self) -> None:
        self._ms: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block and add it to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, 1000 * (time.perf_counter() - start))

    def add(self, name: str, ms: float) -> None:
        """Add milliseconds to a stage."""
        self._ms[name] = self._ms.get(name, 0.0) + ms

    def timings(self) -> StageTimings:
        """What was measured so far."""
        return StageTimings(**self._ms)
