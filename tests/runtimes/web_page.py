"""The built page in a real Chromium, for the tests that use it: a server, a tab as people see it, pictures."""

from __future__ import annotations

import base64
import contextlib
import io
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tinyllava_edge.benchmarks.targets.browser_page import BrowserPage
from tinyllava_edge.runtimes.server.options import ServerOptions
from tinyllava_edge.runtimes.server.web_files import default_dist
from tinyllava_edge.runtimes.server.web_serve import WebServer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_page = pytest.mark.skipif(
    CHROMIUM is None or not (default_dist() / "sw.js").is_file(),
    reason="needs Chromium (apt install chromium) and the built page (make web)",
)


@contextlib.contextmanager
def served(bundle: Path, **options: Any) -> Iterator[WebServer]:
    server = WebServer(bundle, ServerOptions(port=options.pop("port", 0), web=True, **options))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(10)


def rgb(seed: int = 0, size: tuple[int, int] = (90, 70)) -> Image.Image:
    """A ramp with noise."""
    ramp = np.add.outer(np.linspace(0, 200, size[1]), np.linspace(0, 50, size[0]))[..., None] * np.array([1, 0.7, 0.4])
    noise = np.random.default_rng(seed).normal(0, 5, ramp.shape)
    return Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8))


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


class Tab:
    """The page as people see it."""

    def __init__(self, page: BrowserPage, url: str, width: int = 1000, **options: Any) -> None:
        self.context = page.browser.new_context(viewport={"width": width, "height": 740}, **options)
        self.problems: list[str] = []
        self.asked: list[str] = []
        self.context.on("request", lambda request: self.asked.append(request.url))
        self.page: Any = None
        self.open(url)

    def open(self, url: str) -> None:
        if self.page:
            self.page.close()
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(url)

    def until(self, state: str) -> Tab:
        self.page.wait_for_selector(f"body[data-state={state}]")
        return self

    def ask(self, question: str, tokens: int = 8) -> str:
        self.page.fill("#max-tokens", str(tokens))
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        self.page.wait_for_selector("#answer[aria-busy=false]:visible")
        self.until("ready")
        return str(self.page.locator("#answer").text_content())

    def choose(self, data: bytes) -> None:
        self.page.set_input_files("#file", [{"name": "a.png", "mimeType": "image/png", "buffer": data}])
        self.page.wait_for_selector("#shown:visible")

    def sideways(self) -> bool:
        return bool(self.page.evaluate("() => document.documentElement.scrollWidth > innerWidth"))

    def error(self) -> str:
        return str(self.page.locator("#error").text_content())


def drop(tab: Tab, paths: list[Path], more: dict[str, bytes] | None = None) -> None:
    """Drop loose files on the page."""
    files = {**{path.name: path.read_bytes() for path in paths}, **(more or {})}
    given = [[name, base64.b64encode(data).decode()] for name, data in files.items()]
    send = """(given) => {
        const data = new DataTransfer();
        for (const [name, text] of given) {
            data.items.add(new File([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], name));
        }
        document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
    }"""
    tab.page.evaluate(send, given)
