"""Stopping a running request from another thread, within one token or one operator of the vision graph."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from ..errors import CancelledError


class Cancel:
    """A switch that its holder may throw once, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thrown = False
        self._hooks: list[Callable[[], None]] = []

    @property
    def thrown(self) -> bool:
        """Whether somebody cancelled."""
        return self._thrown

    def throw(self) -> None:
        """Cancel: what runs now is told at once, what would run next refuses."""
        with self._lock:
            self._thrown = True
            for hook in self._hooks:
                hook()

    def check(self) -> None:
        """Raise CancelledError if somebody cancelled."""
        if self._thrown:
            raise CancelledError("the request was cancelled")

    @contextlib.contextmanager
    def tells(self, stop: Callable[[], None]) -> Iterator[None]:
        """While the block runs, cancelling calls `stop`; never after it. Raises CancelledError if it is too late."""
        with self._lock:
            self.check()
            self._hooks.append(stop)
        try:
            yield
        finally:
            with self._lock:
                self._hooks.remove(stop)
