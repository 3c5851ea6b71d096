"""The page on a plain static host, as docs/web.md lays it out: two headers, and the files that the recipe lists."""

from __future__ import annotations

import http.server
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("onnxruntime_genai", reason="the decoder's builder, extra [decoder], is not installed")

from tinyllava_edge.benchmarks.targets.browser_page import BrowserPage
from tinyllava_edge.export.bundle_writer import export_bundle
from tinyllava_edge.runtimes.edge import open_edge
from tinyllava_edge.runtimes.server.web_app import CSP
from tinyllava_edge.runtimes.server.web_files import default_dist

from .web_page import Tab, encoded, needs_page, rgb

pytestmark = needs_page


class _Handler(http.server.SimpleHTTPRequestHandler):
    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("static") / "bundle"
    export_bundle(tiny_checkpoint, out, llm=("f32",), vision=("fp32",), web=("fp32",))
    return out


@pytest.fixture
def url(bundle: Path, tmp_path: Path) -> Iterator[str]:
    site = tmp_path / "site"
    shutil.copytree(default_dist(), site)
    (site / "bundle").mkdir()
    for name in ("bundle.json", "preprocess.onnx"):
        shutil.copy(bundle / name, site / "bundle")
    shutil.copytree(bundle / "web", site / "bundle/web")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_answers_and_asks_nobody_else(bundle: Path, url: str) -> None:
    """The answer is the edge runtime's; without any policy in the headers the page's own stops a foreign request."""
    picture, question = encoded(rgb()), "what color is the shape?"
    with open_edge(bundle, n_threads=1, allow_unverified=True) as edge:
        wanted = edge.answer(picture, question, max_tokens=8).text
    with BrowserPage(bundle) as page:
        tab = Tab(page, url).until("ready")
        assert tab.page.evaluate("() => crossOriginIsolated")
        tab.choose(picture)
        assert tab.ask(question) == wanted and tab.problems == []
        foreign = url.replace("localhost", "127.0.0.1")  # the same server, another origin
        fetched = """(where) => new Promise((done) => {
            document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
            fetch(where, {mode: "no-cors"}).then(() => done("fetched"), () => undefined);
        })"""
        assert tab.page.evaluate(fetched, foreign) == "connect-src"


def test_the_page_holds_the_servers_policy() -> None:
    """All of it but what works in headers only."""
    page = unescape((default_dist() / "index.html").read_text(encoding="utf-8"))
    policy = CSP.removesuffix("; frame-ancestors 'none'")
    assert policy != CSP and f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in page
