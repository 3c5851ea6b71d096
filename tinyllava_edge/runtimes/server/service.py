"""What a server is doing: loading, answering, draining; the engine, and the requests that run."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from ..engine import Engine
from .body import MIB, Memory
from .bridge import Running
from .errors import ApiError
from .options import ServerOptions

LOADING, OK, DRAINING = "loading", "ok", "draining"


class Service:
    """One engine's state, used in the event loop only."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.memory = Memory(options.max_memory_mb * MIB)
        self.phase = LOADING
        self.created = int(time.time())
        self.fingerprint = ""
        self._engine: Engine | None = None
        self._running: set[Running] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def opened(self, engine: Engine, fingerprint: str) -> None:
        """The engine is there: answer."""
        self._engine, self.fingerprint = engine, fingerprint
        if self.phase == LOADING:
            self.phase = OK

    def require(self) -> Engine:
        """The engine, if it takes requests now. Raises ApiError 503."""
        if self.phase != OK or self._engine is None:
            reason = {LOADING: "the model is still loading", DRAINING: "the server is shutting down"}[self.phase]
            raise ApiError(503, reason, code=self.phase)
        return self._engine

    def stats(self) -> Mapping[str, Any]:
        """The engine's counts; nothing while it loads."""
        return {} if self._engine is None else self._engine.stats()

    @contextlib.contextmanager
    def runs(self, running: Running) -> Iterator[None]:
        """The request counts as running while the block runs; it is stopped when time is up, or at the block's end."""
        timer = asyncio.get_running_loop().call_later(self.options.request_timeout_s, running.stop, "timeout")
        self._running.add(running)
        self._idle.clear()
        try:
            yield
        finally:
            timer.cancel()
            running.close()
            self._running.discard(running)
            if not self._running:
                self._idle.set()

    async def drain(self) -> None:
        """Take no more requests, let those that run end, and after the grace period stop the rest."""
        self.phase = DRAINING
        for grace_s in (self.options.grace_s, 2.0):  # the second is for the last words of those that were stopped
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._idle.wait()
            for running in list(self._running):
                running.stop("shutdown")

    @property
    def n_running(self) -> int:
        """Requests that wait or run."""
        return len(self._running)
