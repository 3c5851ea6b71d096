"""uvicorn's HTTP/1.1 protocol with the time limits that it lacks: for a request's head, and for closing."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_BYTES = 16 << 10  # of a request's head


def timed_protocol(head_timeout_s: float) -> type[asyncio.Protocol]:
    """A protocol class for uvicorn's `http` setting.

    uvicorn's own waits for ever for the first request of a connection and for a head that comes byte by byte. It also
    leaves a connection open whose client doesn't read the rest of its reply.
    """

    class TimedProtocol(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.app_state: dict[str, Any] = {**self.app_state, "abort": transport.abort}
            self._watch_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_head()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop_watch()

        def shutdown(self) -> None:
            if self.conn.their_state is h11.SEND_BODY:  # what hasn't come by now may never come
                self.transport.abort()
            else:
                super().shutdown()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self.transport.abort()

        def _watch_head(self) -> None:
            """The clock runs from a head's first byte, or the connection's start, until the head is whole."""
            if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
                self._stop_watch()
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(head_timeout_s, self.transport.abort)

        def _stop_watch(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return TimedProtocol
