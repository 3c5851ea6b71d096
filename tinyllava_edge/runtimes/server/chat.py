"""POST /v1/chat/completions: one answer, whole or as a stream."""

from __future__ import annotations

import asyncio
import logging

from ...errors import CancelledError
from ..base import Answer
from .body import read_body
from .bridge import Event, Running
from .errors import ApiError, internal_error, to_api_error
from .exchange import Exchange
from .metrics import Metrics
from .openai_api import ChatRequest, read_chat
from .replies import WAITING, Reply, event
from .service import Service

_LOG = logging.getLogger("tinyllava_edge.server")


async def complete(exchange: Exchange, service: Service, metrics: Metrics) -> None:
    """Answer one request.

    Raises:
        ApiError and what `to_api_error` knows, before a reply started.
        ConnectionError: the client went.
    """
    service.require()
    with service.memory.lease() as lease:
        asked = read_chat(await read_body(exchange, service.options, lease), service.options, service.require().name)
        engine = service.require()
        start = asyncio.get_running_loop().time()
        running = Running(engine, asked.request, pieces=asked.stream)
        with service.runs(running), exchange.no_stalls(service.options.read_timeout_s):
            watch = asyncio.create_task(exchange.gone())
            watch.add_done_callback(lambda task: None if task.cancelled() else running.stop("gone"))
            outcome = "error"
            try:
                answer = await _answer(exchange, running, asked, Reply(engine.name, service.fingerprint))
                outcome = ""
                metrics.answered(answer, asyncio.get_running_loop().time() - start)
            except ConnectionError:
                outcome = "gone"
                raise
            except CancelledError as error:
                outcome = running.stopped or "error"
                await _fail(exchange, _why(outcome, error))
            except Exception as error:
                await _fail(exchange, error)
            finally:
                watch.cancel()
                if outcome:
                    metrics.ended(outcome)


async def _answer(exchange: Exchange, running: Running, asked: ChatRequest, reply: Reply) -> Answer:
    if not asked.stream:
        while (whole := await running.event()) is None:
            pass
        if not isinstance(whole, Answer):
            raise _error(whole)
        await exchange.reply_json(200, reply.whole(whole))
        return whole
    # A failure before the first token gets its HTTP status, unless that token takes longer than a tick.
    found = await running.event()
    if isinstance(found, BaseException):
        raise found
    await exchange.start_events()
    opening = reply.first()
    while not isinstance(found, Answer):
        if isinstance(found, BaseException):
            raise found
        await exchange.push(opening + (WAITING if found is None else reply.piece(found)))
        opening = b""
        found = await running.event()
    await exchange.push(opening + reply.last(found, asked.include_usage))
    await exchange.end()
    return found


def _error(event: Event) -> BaseException:
    return event if isinstance(event, BaseException) else RuntimeError(f"the engine gave {type(event).__name__}")


def _why(stopped: str, error: CancelledError) -> Exception:
    """What to tell about a request that was stopped."""
    if stopped == "gone":
        return ConnectionError("the client closed the connection")
    if stopped == "timeout":
        return ApiError(504, "the answer took too long", code="timeout")
    if stopped == "shutdown":
        return ApiError(503, "the server is shutting down", code="draining")
    return error


async def _fail(exchange: Exchange, error: Exception) -> None:
    """Before a reply started: raise; in a stream: one event with the error, after which there is no `[DONE]`."""
    if not exchange.status or isinstance(error, ConnectionError):
        raise error
    told = to_api_error(error)
    if told is None:
        _LOG.error("a stream failed", exc_info=error)
        told = internal_error()
    await exchange.push(event(told.body()))
    await exchange.end()
