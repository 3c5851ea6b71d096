"""`serve --web`: the browser app and a bundle's web files, on this machine. A server's life: bind, answer, leave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from ...bundle import read_bundle
from ...errors import BundleError, UsageError
from .guard import Guard, is_loopback
from .options import ServerOptions, flag
from .serve import QuietUvicorn, bind, stop_on_signals, uvicorn_config
from .web_app import WebApp
from .web_files import bundle_files, default_dist, page_files, shell_id, web_precisions

Say = Callable[[str], None]


class WebServer:
    """One server of files. `run` blocks; `stop` may be called from any thread."""

    def __init__(self, bundle: Path, options: ServerOptions, *, say: Say = lambda line: None) -> None:
        """Read the manifest and the page, bind the port.

        Args:
            bundle: directory with web files.
            options: see ServerOptions; those of a running model mean nothing here.
            say: receives lines for people.

        Raises:
            UsageError: the address can't be used, it is open to others, or a key is asked for.
            DependencyError: the page is not built.
            BundleError: not a bundle, or one without web files.
        """
        if options.api_key_file is not None:
            raise UsageError("--web serves files, which no API key guards", "put a proxy with a login in front of it")
        if not is_loopback(options.host) and not options.insecure_no_key:
            raise UsageError(
                f"{options.host} can be reached by other machines, who could then copy the model",
                f"allow everybody with {flag('insecure_no_key')}",
            )
        opened = read_bundle(bundle)
        if not web_precisions(opened):
            raise BundleError(f"{bundle}: holds no web files", "export it again with --web q4")
        page = page_files(options.web_dist or default_dist())
        self.page_id = shell_id(page)
        app = WebApp({**page, **bundle_files(opened)}, Guard(options, None), say if options.log_requests else None)
        self._say = say
        self._socket = bind(options.host, options.port)
        host, self.port = self._socket.getsockname()[:2]
        # Browsers trust `localhost` and loopback addresses as they do https, and nothing else over http.
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._server = QuietUvicorn(uvicorn_config(app, options))

    def run(self) -> None:
        """Serve until `stop`."""
        asyncio.run(self._run())

    def stop(self) -> None:
        """Leave; running transfers get two seconds."""
        self._server.should_exit = True

    async def _run(self) -> None:
        self._say(f"open {self.url} in a browser; the model runs there, not here. Ctrl-C stops")
        with contextlib.closing(self._socket):
            await self._server.serve(sockets=[self._socket])


def serve_web(bundle: Path, options: ServerOptions, *, say: Say = lambda line: None) -> None:
    """Serve until SIGTERM or Ctrl-C. Takes and raises what `WebServer` does."""
    server = WebServer(bundle, options, say=say)
    with stop_on_signals(server):
        server.run()
