"""The ASGI application of `serve --web`: static files under strict headers. The model runs in the browser."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Mapping

from .errors import ApiError, internal_error, to_api_error
from .exchange import Exchange, Receive, Scope, Send
from .guard import Guard
from .web_files import WebFile

GET = ("GET", "HEAD")
PIECE = 1 << 20
STALL_S = 60.0  # a browser that hashes or compiles takes nothing meanwhile
# WebAssembly is compiled, threads are started from the page's own files, and nothing comes from anywhere else.
CSP = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; media-src 'self' blob:; manifest-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# The first two make the page cross-origin isolated: without that there are no threads and no exact clock.
HEADERS = {
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": CSP,
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "accept-ranges": "bytes",
    "cache-control": "no-cache",
}
_RANGE = re.compile(r"bytes=(\d{0,15})-(\d{0,15})")


class FileExchange(Exchange):
    """An exchange whose reply may be a long file."""

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Begin a reply of known length; `push` and `end` follow."""
        await self._start(status, headers)


class WebApp:
    """Files by their paths, each with an ETag that is its hash, whole or one range of it."""

    def __init__(self, files: Mapping[str, WebFile], guard: Guard, log: Callable[[str], None] | None = None) -> None:
        self._files, self._guard, self._log = files, guard, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        exchange = FileExchange(scope, receive, send)
        start = time.perf_counter()
        try:
            await self._answer(exchange)
        except (ConnectionError, asyncio.CancelledError):
            exchange.abort()
        except Exception as error:
            await _fail(exchange, error)
        finally:
            if self._log is not None:
                ms = 1000 * (time.perf_counter() - start)
                self._log(f"{exchange.method} {ascii(exchange.path)[1:-1][:200]} {exchange.status} {ms:.0f} ms")

    async def _answer(self, exchange: FileExchange) -> None:
        self._guard.check_host(exchange)
        self._guard.check_origin(exchange)
        file = self._files.get(exchange.path)
        if file is None:
            raise ApiError(404, f"no such path: {exchange.path[:80]!r}", code="not_found", keep_open=False)
        if exchange.method not in GET:
            message = f"files take {', '.join(GET)}, not {exchange.method[:20]}"
            raise ApiError(405, message, code="method_not_allowed", headers={"allow": ", ".join(GET)}, keep_open=False)
        etag = f'"{file.sha256}"'
        headers = {**HEADERS, "etag": etag}
        if etag in [tag.strip().removeprefix("W/") for tag in (exchange.header("if-none-match") or "").split(",")]:
            await exchange.reply(304, b"", file.content_type, headers)
            return
        try:
            size = file.path.stat().st_size
        except OSError:
            raise ApiError(404, f"{exchange.path[:80]}: the file is missing", code="not_found") from None
        asked = exchange.header("range") if exchange.header("if-range") in (None, etag) else None
        first, last = _range(asked, size)
        if first > last and asked is not None:
            headers["content-range"] = f"bytes */{size}"
            raise ApiError(416, f"{exchange.path[:80]} has {size} bytes", code="invalid_range", headers=headers)
        status = 206 if asked is not None and _RANGE.fullmatch(asked) else 200
        if status == 206:
            headers["content-range"] = f"bytes {first}-{last}/{size}"
        await _send(exchange, file, status, first, last + 1 - first, headers)


async def _send(
    exchange: FileExchange, file: WebFile, status: int, first: int, length: int, headers: Mapping[str, str]
) -> None:
    """Stream a part of a file; it is never whole in memory."""
    described = {"content-type": file.content_type, "content-length": str(length), **headers}
    await exchange.start(status, described)
    if exchange.method == "HEAD":
        await exchange.end()
        return
    with file.path.open("rb") as handle, exchange.no_stalls(STALL_S):
        handle.seek(first)
        while length > 0:
            piece = await asyncio.to_thread(handle.read, min(PIECE, length))
            if not piece:  # the file shrank: the browser sees a short body, and its hash check the rest
                exchange.abort()
                return
            length -= len(piece)
            await exchange.push(piece)
    await exchange.end()


def _range(asked: str | None, size: int) -> tuple[int, int]:
    """First and last byte of one range; the whole file for no range or one of another form, first > last if outside."""
    match = _RANGE.fullmatch(asked) if asked else None
    if match is None or not (match[1] or match[2]):
        return 0, size - 1
    if not match[1]:
        return max(0, size - int(match[2])), size - 1 if int(match[2]) else -1
    first = int(match[1])
    last = min(int(match[2]), size - 1) if match[2] else size - 1
    return (first, last) if first < size else (1, 0)


async def _fail(exchange: Exchange, error: Exception) -> None:
    told = to_api_error(error) or internal_error()
    if exchange.status:
        exchange.abort()
        return
    with contextlib.suppress(ConnectionError):
        await exchange.reply_json(told.status, told.body(), {**HEADERS, **told.headers})
