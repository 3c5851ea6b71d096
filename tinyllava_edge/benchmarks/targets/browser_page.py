"""The browser app under our control: a server of its files, the system's Chromium, and one page that computes.

Timing happens inside the page, on its own clock; what passes between Python and the page is not in any figure.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllava_edge.errors import DependencyError, EngineError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
VARIABLE = "TINYLLAVA_EDGE_BROWSER"  # path of another Chromium
# Nothing that runs beside a measurement; WebGPU where there is a GPU, which Linux still hides behind a flag.
FLAGS = (
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--disable-background-timer-throttling",
    "--disable-renderer-backgrounding",
    "--enable-unsafe-webgpu",
)
_PREFIX = re.compile(r"^\w+\.\w+: (?:\w*Error: )?")
# What the page says of a file that isn't the manifest's: runtimes/web/src/bundle/source.ts.
_DAMAGED = re.compile(r"its SHA-256 differs|: \d+ bytes, \d+ expected|: longer than its \d+ bytes|the server says \d+")
OPEN_S = 600.0  # seconds until a model must be loaded


@dataclass(frozen=True)
class Engine:
    """One precision, opened in the page."""

    handle: int
    """its number there"""
    facts: dict[str, Any]
    """precision, provider, threads, load_ms, onnxruntime_web, self_test, spec"""


class BrowserPage:
    """A page that waits for orders; several engines may be open in it. Close it, or use it in a `with` block.

    `url` is where the page is served, `browser` playwright's browser, `page_id` a hash of the page's files.

    Args:
        bundle: directory with web files.
        dist: directory of the built page; `make web`'s by default.
        flags: further flags of Chromium.

    Raises:
        DependencyError: playwright, Chromium, uvicorn or the built page is missing.
        BundleError: not a bundle, or one without web files.
        EngineError: the page doesn't come up.
    """

    def __init__(self, bundle: Path, *, dist: Path | None = None, flags: Sequence[str] = ()) -> None:
        self._closers: list[Any] = []
        try:
            self._start(bundle, dist, flags)
        except BaseException:
            self.close()
            raise

    def _start(self, bundle: Path, dist: Path | None, flags: Sequence[str]) -> None:
        try:
            from playwright.sync_api import Error, sync_playwright

            from tinyllava_edge.runtimes.server.options import ServerOptions
            from tinyllava_edge.runtimes.server.web_serve import WebServer
        except ImportError as error:
            raise DependencyError(
                f"measuring in a browser needs a package that is missing ({error})",
                "pip install 'tinyllava-edge[browser]'",
            ) from error
        self._error = Error
        server = WebServer(bundle, ServerOptions(port=0, web=True, web_dist=dist))
        self.url, self.page_id = server.url, server.page_id
        thread = threading.Thread(target=server.run, name="web", daemon=True)
        thread.start()
        self._closers += [lambda: thread.join(10), server.stop]
        driver = sync_playwright().start()
        self._closers.append(driver.stop)
        root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        try:
            self.browser = driver.chromium.launch(executable_path=find_browser(driver), args=[*FLAGS, *root, *flags])
            self._closers.append(self.browser.close)
            self._page = self.browser.new_page()
            self._page.set_default_timeout(1000 * OPEN_S)
            self._page.goto(f"{self.url}/?idle")
            self._page.wait_for_selector("body[data-state=empty]", timeout=30_000)
        except Error as error:
            raise EngineError(f"the browser does not show the page ({_line(error)})", "run `make web` again") from error

    def __enter__(self) -> BrowserPage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, precision: str, *, provider: str = "auto", threads: int | None = None) -> Engine:
        """Load a precision and let it pass the self-test. Raises EngineError with the page's own words."""
        wish = {"precision": precision, "provider": provider, "threads": threads}
        facts = self.call("open", wish)
        return Engine(facts.pop("handle"), facts)

    def answer(self, engine: Engine, picture: bytes | None, question: str, max_tokens: int) -> dict[str, Any]:
        """Text, ids, counts and timings of a greedy answer. Raises EngineError with the page's own words."""
        found: dict[str, Any] = self.call("answer", engine.handle, _base64(picture), question, max_tokens)
        return found

    def pixels(self, engine: Engine, picture: bytes) -> bytes:
        """pixel_values of a picture, float32 (3, s, s) as bytes. Raises EngineError with the page's own words."""
        return base64.b64decode(self.call("pixels", engine.handle, _base64(picture)))

    def close_engine(self, engine: Engine) -> None:
        """Let go of an engine."""
        self.call("close", engine.handle)

    def environment(self) -> dict[str, Any]:
        """What the page says of itself and its browser."""
        return {**self.call("environment"), "browser": self.browser.version, "page": self.page_id}

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the page's `tinyllava` object. Raises EngineError."""
        try:
            return self._page.evaluate("([name, given]) => window.tinyllava[name](...given)", [name, list(arguments)])
        except self._error as error:
            line = _line(error)
            damaged, by_hand = (
                "copy the file again, or export again",
                "try the page by hand: tinyllava-edge serve --web",
            )
            raise EngineError(f"the browser: {line}", damaged if _DAMAGED.search(line) else by_hand) from error

    def peak_rss(self) -> int | None:
        """Most resident memory that the page's process has had, in bytes; None where the system doesn't say."""
        session = self.browser.new_browser_cdp_session()
        processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
        session.detach()
        found = [_high_water(int(one["id"])) for one in processes if one["type"] == "renderer"]
        return max(found, default=0) or None  # an empty spare renderer is the smaller one

    def close(self) -> None:
        """End the page, the browser and the server."""
        while self._closers:
            self._closers.pop()()


def find_browser(driver: Any) -> str:
    """Path of Chromium: the one that VARIABLE names, the system's, or playwright's. Raises DependencyError."""
    named = os.environ.get(VARIABLE)
    system = next((path for path in map(shutil.which, BROWSERS) if path), None)
    found = named or system or str(driver.chromium.executable_path)
    if not Path(found).is_file():
        raise DependencyError(f"no Chromium at {found}", f"apt install chromium, or name one in {VARIABLE}")
    return found


def _base64(picture: bytes | None) -> str | None:
    return None if picture is None else base64.b64encode(picture).decode("ascii")


def _high_water(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(lines[0].split()[1]) if lines else 0


def _line(error: Exception) -> str:
    """The page's words in one line, without playwright's `Page.evaluate: AppError: ` in front of them."""
    text = str(error).partition("\n    at ")[0].partition("Call log:")[0]
    return " ".join(_PREFIX.sub("", text, count=1).split())[:400]
