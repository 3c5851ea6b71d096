"""One HTTP request and its reply, on ASGI."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Scope = MutableMapping[str, Any]

JSON = "application/json"
_DISCARD_S = 5.0
# No script, style, font, frame or request from anywhere else; pictures from files and the clipboard are blob: URLs.
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "content-security-policy": CSP,
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
}


class Exchange:
    """What a handler sees of a request, and how it answers."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self._receive, self._send = receive, send
        self._headers = scope["headers"]
        self._abort: Callable[[], None] = scope["state"]["abort"]
        self.reply_headers: dict[str, str] = {}
        self.status = 0  # 0 until a reply started
        self._unread = True
        self._sending_since: float | None = None

    def header(self, name: str) -> str | None:
        """A header's value, None if absent; of a repeated one the values joined by commas, which no check accepts."""
        found = [value.decode("latin-1") for key, value in self._headers if key == name.encode()]
        return ",".join(found) if found else None

    async def reply(
        self, status: int, body: bytes, content_type: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """A whole reply."""
        await self._start(status, {"content-type": content_type, "content-length": str(len(body)), **(headers or {})})
        await self._send({"type": "http.response.body", "body": body})

    async def reply_json(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        """A whole reply in JSON."""
        body = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        await self.reply(status, body, JSON, {"cache-control": "no-store", **(headers or {})})

    async def start_events(self) -> None:
        """Begin a stream of server-sent events."""
        kind = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}
        await self._start(200, {**kind, "x-accel-buffering": "no"})  # nginx would hold pieces back

    async def push(self, data: bytes) -> None:
        """More of a stream. Returns at once if the client went."""
        self._sending_since = asyncio.get_running_loop().time()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self._sending_since = None

    @contextlib.contextmanager
    def no_stalls(self, limit_s: float) -> Iterator[None]:
        """While the block runs, a client that takes nothing of a stream for `limit_s` seconds loses its connection."""
        loop = asyncio.get_running_loop()

        timer: asyncio.TimerHandle

        def check() -> None:
            nonlocal timer
            if self._sending_since is not None and loop.time() - self._sending_since >= limit_s:
                self._abort()
            timer = loop.call_later(limit_s / 2, check)

        timer = loop.call_later(limit_s / 2, check)
        try:
            yield
        finally:
            timer.cancel()

    async def end(self) -> None:
        """End a stream."""
        await self._send({"type": "http.response.body", "body": b""})

    async def chunk(self) -> tuple[bytes, bool]:
        """Next piece of the request's body, and whether more follows. Raises ConnectionError if the client went."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client closed the connection")
        self._unread = message.get("more_body", False)
        return message.get("body", b""), self._unread

    async def gone(self) -> None:
        """Return once the client has closed the connection, or has its whole reply."""
        with contextlib.suppress(ConnectionError):
            while True:
                await self.chunk()

    async def discard(self) -> None:
        """Read and drop what is left of the body, for a moment: many clients read no reply before all of it is sent."""
        if self.header("expect") is None:  # such a client waits for leave, and then sends nothing
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DISCARD_S):
                    while self._unread:
                        await self.chunk()

    def abort(self) -> None:
        """Drop the connection, unsent data included."""
        self._abort()

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        merged = {"x-content-type-options": "nosniff", **self.reply_headers, **headers}
        pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in merged.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})
