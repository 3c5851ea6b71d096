"""A server's life: bind, load, answer, drain, leave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, Protocol

import uvicorn

from ...errors import UsageError
from ..engine import Engine
from .app import App
from .guard import Guard, is_loopback
from .metrics import Metrics
from .options import ServerOptions, flag, read_key
from .page import load_page
from .protocol import HEAD_BYTES, timed_protocol
from .service import Service

Say = Callable[[str], None]
Opened = tuple[Engine, str]  # the engine and its fingerprint


class Stoppable(Protocol):
    """What a signal ends."""

    def stop(self) -> None:
        """Begin to leave; from any thread."""
        ...


class Server:
    """One server. `run` blocks; `stop` may be called from any thread."""

    def __init__(
        self,
        engine: Engine | Callable[[], Engine],
        options: ServerOptions,
        *,
        environ: Mapping[str, str] = os.environ,
        say: Say = lambda line: None,
    ) -> None:
        """Bind the port.

        Args:
            engine: an opened engine, which stays the caller's; or what opens one, which is called while the server
                already says that it is loading, and closed at the end.
            options: see ServerOptions.
            environ: where the key is looked for if options name no file.
            say: receives lines for people.

        Raises:
            UsageError: the key is unfit, the address can't be used, or it is open to others without a key.
        """
        self._engine, self._options, self._say = engine, options, say
        self._key = read_key(options, environ)
        if self._key is None and not is_loopback(options.host) and not options.insecure_no_key:
            raise UsageError(
                f"{options.host} can be reached by other machines, and there is no API key",
                f"give one with {flag('api_key_file')}, or allow everybody with {flag('insecure_no_key')}",
            )
        self._socket = bind(options.host, options.port)
        host, self.port = self._socket.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = threading.Event()
        self._wake: asyncio.Event | None = None

    def run(self) -> None:
        """Serve until `stop`. Raises what opening the engine raised."""
        asyncio.run(self._run())

    def stop(self) -> None:
        """Let running answers end within the grace period, then leave."""
        self._stopping.set()
        if self._loop is not None and self._wake is not None:
            with contextlib.suppress(RuntimeError):  # it has left already
                self._loop.call_soon_threadsafe(self._wake.set)

    async def _run(self) -> None:
        self._loop, self._wake = asyncio.get_running_loop(), asyncio.Event()
        if self._stopping.is_set():
            self._wake.set()
        service = Service(self._options)
        metrics = Metrics(service.stats, lambda: service.memory.used)
        page = load_page() if self._options.page else {}
        app = App(
            service, Guard(self._options, self._key), metrics, page, self._say if self._options.log_requests else None
        )
        server = QuietUvicorn(uvicorn_config(app, self._options))
        serving = asyncio.create_task(server.serve(sockets=[self._socket]))
        loading = self._load()
        stop = asyncio.create_task(self._wake.wait())
        ends: list[asyncio.Future[Any]] = [stop, serving]
        self._greet()
        try:
            await asyncio.wait([loading, *ends], return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                service.opened(*loading.result())
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if stop.done() and service.n_running:
                self._say(f"stopping: {service.n_running} answers have {self._options.grace_s:g} s to end")
            await service.drain()
        finally:
            server.should_exit = True
            await serving
            stop.cancel()
            await self._unload(loading)

    def _greet(self) -> None:
        self._say(f"listening on {self.url}" + ("; open it in a browser to chat" if self._options.page else ""))
        self._say(f"API: {self.url}/v1" + (" (needs the API key)" if self._key else "") + "; Ctrl-C stops")

    def _load(self) -> asyncio.Future[Opened]:
        """Open the engine in a thread of its own: the ones that asyncio keeps are waited for when the loop ends."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Opened] = loop.create_future()

        def work() -> None:
            try:
                engine = self._engine if isinstance(self._engine, Engine) else self._engine()
                if self._options.warm_up:
                    engine.warm_up()
                fingerprint = f"fp_{engine.environment()['bundle_sha256'][:12]}_{engine.build}"
                loop.call_soon_threadsafe(future.set_result, (engine, fingerprint))
            except BaseException as error:  # raised again by `run`
                loop.call_soon_threadsafe(future.set_exception, error)

        threading.Thread(target=work, name="load", daemon=True).start()
        return future

    async def _unload(self, loading: asyncio.Future[Opened]) -> None:
        """Close the engine, if we opened it. One that still loads gets the grace period; native code can't be ended."""
        await asyncio.wait({loading}, timeout=self._options.grace_s)
        if not loading.done():
            sys.stderr.flush()
            os._exit(0)
        if loading.exception() is None and not isinstance(self._engine, Engine):
            await asyncio.to_thread(loading.result()[0].close)


def serve(
    engine: Engine | Callable[[], Engine],
    options: ServerOptions,
    *,
    say: Say = lambda line: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; a second Ctrl-C leaves at once.

    Takes and raises what `Server` does. Returns after a graceful end, also after SIGTERM, so that the exit code is 0.
    """
    server = Server(engine, options, say=say)
    with stop_on_signals(server):
        server.run()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UsageError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":  # elsewhere it would let two servers share a port
                found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(256)
        except OSError:
            found.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(f"can't listen on {host}, port {port}: {reason}", "choose another --port or --host") from error
    return found


@contextlib.contextmanager
def stop_on_signals(server: Stoppable) -> Iterator[None]:
    """SIGTERM and Ctrl-C stop the server; Ctrl-C after either leaves at once."""
    before: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if before and number == signal.SIGINT:
            os._exit(1)
        before.append(number)
        server.stop()

    old = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class QuietUvicorn(uvicorn.Server):
    """uvicorn without its signal handlers, which would end the process by SIGTERM after a graceful end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def uvicorn_config(app: Any, options: ServerOptions) -> uvicorn.Config:
    """uvicorn's settings for an ASGI application of ours."""
    return uvicorn.Config(
        app,
        http=timed_protocol(options.read_timeout_s),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=options.max_connections,
        timeout_keep_alive=int(options.keep_alive_s) or 1,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=HEAD_BYTES,
    )
