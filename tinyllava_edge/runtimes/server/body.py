"""A request's body, read under limits of size, time and memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from .errors import ApiError
from .exchange import JSON, Exchange
from .options import ServerOptions

MIB = 1 << 20
_SLOWEST = 16 << 10  # bytes per second that a client must send


class Lease:
    """What one request holds of the memory for bodies."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.taken = 0

    def take(self, count: int) -> None:
        """Hold so many bytes more. Raises ApiError 429 when all requests together hold too much."""
        self._memory.used += count
        self.taken += count
        if self._memory.used > self._memory.limit:
            raise ApiError(429, "the server holds too many pictures at once", code="memory_full", keep_open=False)


class Memory:
    """Bytes that the bodies of all requests may hold together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    @contextlib.contextmanager
    def lease(self) -> Iterator[Lease]:
        """Memory for one request, given back at the block's end."""
        lease = Lease(self)
        try:
            yield lease
        finally:
            self.used -= lease.taken


async def read_body(exchange: Exchange, options: ServerOptions, lease: Lease) -> bytes:
    """The whole body of a JSON request.

    Raises:
        ApiError: 400 two lengths, 408 too slow, 413 too large (from its Content-Length, before anything is read; or
            as soon as the bytes that came pass the limit), 415 not JSON, 429 no memory left.
        ConnectionError: the client went.
    """
    if exchange.header("content-length") and exchange.header("transfer-encoding"):  # two lengths hide a second request
        message = "Content-Length and Transfer-Encoding exclude each other"
        raise ApiError(400, message, code="invalid_length", keep_open=False)
    kind = (exchange.header("content-type") or "").partition(";")[0].strip().lower()
    if kind != JSON:
        message = f"Content-Type must be {JSON}"
        raise ApiError(415, message, code="unsupported_media_type", keep_open=False)
    if exchange.header("content-encoding") not in (None, "identity"):
        message = "compressed bodies are not accepted"
        raise ApiError(415, message, code="unsupported_media_type", keep_open=False)
    limit = options.max_body_mb * MIB
    announced = exchange.header("content-length") or "0"  # h11 lets only digits through
    if int(announced) > limit:
        raise _too_large(limit)
    loop = asyncio.get_running_loop()
    start = loop.time()
    parts: list[bytes] = []
    more = True
    while more:
        deadline = start + options.read_timeout_s + lease.taken / _SLOWEST
        try:
            async with asyncio.timeout_at(deadline):
                chunk, more = await exchange.chunk()
        except TimeoutError as error:
            raise ApiError(408, "the request's body came too slowly", code="timeout", keep_open=False) from error
        lease.take(len(chunk))
        if lease.taken > limit:
            raise _too_large(limit)
        parts.append(chunk)
    return b"".join(parts)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request is larger than {limit:,} bytes", code="request_too_large", keep_open=False)
