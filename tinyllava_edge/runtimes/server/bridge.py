"""The engine's thread → the event loop. Neither waits for the other.

Whatever ends a request early (the client went, time is up, the server stops) does so by one road: `stop` cancels the
generation and puts the last event itself, so that nobody waits for an engine that is busy with another request.
"""

from __future__ import annotations

import asyncio
import contextlib

from ...errors import CancelledError
from ..base import Answer
from ..engine import Engine
from ..request import Request

Event = str | Answer | BaseException
TICK_S = 10.0


class Running:
    """One request to the engine, seen from the event loop."""

    def __init__(self, engine: Engine, request: Request, *, pieces: bool) -> None:
        """Submit a request; `pieces` asks for its text as it comes, else the answer or the error is the only event.

        Raises:
            QueueFullError: too many requests wait.
        """
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._pieces = pieces
        self.stopped = ""
        self._end_event: Event | None = None
        self._generation = engine.submit(request, self._listen)  # may refuse; the timer would outlive that
        self._ticking = self._loop.call_later(TICK_S, self._tick)

    def stop(self, why: str) -> None:
        """Cancel it and remember why; only the first call counts."""
        if not self.stopped:
            self.stopped = why
            self._generation.cancel()
            self._events.put_nowait(CancelledError("the request was cancelled"))

    def close(self) -> None:
        """Cancel it, if it isn't done, and let go of the loop."""
        self._ticking.cancel()
        self.stop("left")

    async def event(self) -> Event | None:
        """Next piece of text (all that has come by now), the answer, or the error; None after TICK_S of nothing."""
        if self._end_event is not None:
            return self._end_event
        first = await self._events.get()
        while isinstance(first, str) and not self._events.empty():
            following = self._events.get_nowait()
            if not isinstance(following, str):
                self._end_event = following
                break
            first += following
        return first

    def _listen(self, piece: str | None) -> None:
        """Runs in the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended; nobody listens
            if piece is None:
                self._loop.call_soon_threadsafe(self._end)
            elif self._pieces:
                self._loop.call_soon_threadsafe(self._events.put_nowait, piece)

    def _tick(self) -> None:
        """One timer for the whole request: a time limit on each event would cost more than the event."""
        if self._events.empty():
            self._events.put_nowait(None)
        self._ticking = self._loop.call_later(TICK_S, self._tick)

    def _end(self) -> None:
        try:
            self._events.put_nowait(self._generation.result(0))
        except BaseException as error:  # whatever it is, it is this request's
            self._events.put_nowait(error)
