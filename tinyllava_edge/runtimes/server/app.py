"""The ASGI application: checks, routes, errors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from .body import MIB
from .chat import complete
from .errors import ApiError, internal_error, to_api_error
from .exchange import PAGE_HEADERS, Exchange, Receive, Scope, Send
from .guard import Guard
from .metrics import CONTENT_TYPE, Metrics
from .page import StaticFile
from .replies import model_object
from .service import OK, Service

_LOG = logging.getLogger("tinyllava_edge.server")
_MODEL = "/v1/models/"
Handler = Callable[[Exchange], Awaitable[None]]
GET, POST = ("GET", "HEAD"), ("POST",)


class App:
    """One server's routes. `/health` and the page are open; the rest asks for the key, if there is one."""

    def __init__(
        self,
        service: Service,
        guard: Guard,
        metrics: Metrics,
        page: Mapping[str, StaticFile],
        log: Callable[[str], None] | None = None,
    ) -> None:
        self._service, self._guard, self._metrics, self._page, self._log = service, guard, metrics, page, log
        self._open: dict[str, tuple[tuple[str, ...], Handler]] = {"/health": (GET, self._health)}
        self._open |= {path: (GET, self._static) for path in page}
        self._closed: dict[str, tuple[tuple[str, ...], Handler]] = {
            "/v1/chat/completions": (POST, self._chat),
            "/v1/models": (GET, self._models),
            "/metrics": (GET, self._show_metrics),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        exchange = Exchange(scope, receive, send)
        start = time.perf_counter()
        route = "other"
        try:
            route = await self._answer(exchange)
        except asyncio.CancelledError:  # the server has waited long enough
            exchange.abort()
        finally:
            self._metrics.replied(route, exchange.status)
            if self._log is not None:
                ms = 1000 * (time.perf_counter() - start)
                self._log(f"{exchange.method} {ascii(exchange.path)[1:-1][:200]} {exchange.status} {ms:.0f} ms")

    async def _answer(self, exchange: Exchange) -> str:
        """Reply, or drop the connection; returns the route's name."""
        route = "other"
        try:
            self._guard.check_host(exchange)
            self._guard.check_origin(exchange)
            route, methods, handler, is_open = self._find(exchange.path)
            if exchange.method == "OPTIONS":
                await exchange.reply(204, b"", "text/plain", self._guard.preflight(exchange))
            elif exchange.method not in methods:
                message = f"{route} takes {', '.join(methods)}, not {exchange.method[:20]}"
                allow = {"allow": ", ".join(methods)}
                raise ApiError(405, message, code="method_not_allowed", headers=allow, keep_open=False)
            else:
                if not is_open:
                    self._guard.check_key(exchange)
                await handler(exchange)
        except ConnectionError:
            exchange.abort()
        except Exception as error:
            await self._fail(exchange, error)
        return route

    def _find(self, path: str) -> tuple[str, tuple[str, ...], Handler, bool]:
        """Route's name, its methods, its handler, and whether it needs no key. Raises ApiError 404."""
        if path in self._open:
            return path, *self._open[path], True
        if path in self._closed:
            return path, *self._closed[path], False
        if path.startswith(_MODEL):
            return _MODEL + "{id}", GET, self._model, False
        raise ApiError(404, f"no such path: {path[:80]!r}", code="not_found", keep_open=False)

    async def _fail(self, exchange: Exchange, error: Exception) -> None:
        told = to_api_error(error)
        if told is None:
            _LOG.error("%s failed", ascii(exchange.path), exc_info=error)
            told = internal_error()
        if exchange.status:  # half a reply is out: no honest end is left
            exchange.abort()
            return
        try:
            if told.status != 408:
                await exchange.discard()
            await exchange.reply_json(told.status, told.body(), told.headers)
        except ConnectionError:
            exchange.abort()

    async def _health(self, exchange: Exchange) -> None:
        phase = self._service.phase
        await exchange.reply_json(200 if phase == OK else 503, {"status": phase})

    async def _static(self, exchange: Exchange) -> None:
        file = self._page[exchange.path]
        headers = {**PAGE_HEADERS, "cache-control": "no-cache", "etag": file.etag}
        if exchange.header("if-none-match") == file.etag:
            await exchange.reply(304, b"", file.content_type, headers)
        else:
            await exchange.reply(200, file.body, file.content_type, headers)

    async def _chat(self, exchange: Exchange) -> None:
        await complete(exchange, self._service, self._metrics)

    async def _models(self, exchange: Exchange) -> None:
        await exchange.reply_json(200, {"object": "list", "data": [self._describe()]})

    async def _model(self, exchange: Exchange) -> None:
        found = self._describe()
        asked = exchange.path.removeprefix(_MODEL)
        if asked != found["id"]:
            message = f"no model {asked[:80]!r}; this server runs {found['id']!r}"
            raise ApiError(404, message, code="model_not_found", param="model")
        await exchange.reply_json(200, found)

    def _describe(self) -> dict[str, object]:
        engine, options = self._service.require(), self._service.options
        meta = {
            "build": engine.build,
            "n_ctx": engine.n_ctx,
            "visual_tokens": engine.spec.visual_tokens,
            "default_max_tokens": options.default_max_tokens,
            "max_pictures": options.max_pictures,
            "max_picture_bytes": options.max_picture_mb * MIB,
            "max_body_bytes": options.max_body_mb * MIB,
        }
        return model_object(engine.name, self._service.created, meta)

    async def _show_metrics(self, exchange: Exchange) -> None:
        await exchange.reply(200, self._metrics.text(), CONTENT_TYPE, {"cache-control": "no-store"})
