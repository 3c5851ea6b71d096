"""Another Chromium, whose WebGPU is wrong: the page notices. A file of its own, for one browser runs at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("onnxruntime_genai", reason="the decoder's builder, extra [decoder], is not installed")

from tinyllava_edge.benchmarks.targets.browser_page import BrowserPage
from tinyllava_edge.export.bundle_writer import export_bundle
from tinyllava_edge.runtimes.edge import open_edge

from .web_page import Tab, encoded, needs_page, rgb, served

pytestmark = needs_page
QUESTION = "what color is the shape?"


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fallback") / "bundle"
    export_bundle(tiny_checkpoint, out, llm=("f32",), vision=("fp32",), web=("fp32",))
    return out


@pytest.fixture(scope="module")
def edge(bundle: Path) -> Iterator[Any]:
    opened = open_edge(bundle, n_threads=1, allow_unverified=True)
    yield opened
    opened.close()


def test_the_page_falls_back_where_webgpu_is_wrong(bundle: Path, edge: Any) -> None:
    """Chromium's software GPU, made to look like a real one: the page tries it, and uses it only if it computes right.

    With the Chromium of today it computes attention wrongly, so this is a fall-back that really happens.
    """
    flags = ("--use-webgpu-adapter=swiftshader", "--enable-unsafe-swiftshader")
    disguise = """
        const given = Object.getOwnPropertyDescriptor(GPUAdapter.prototype, "info").get;
        const real = {isFallbackAdapter: false, architecture: "a-real-one"};
        Object.defineProperty(GPUAdapter.prototype, "info", {
            get() { return new Proxy(given.call(this), {get: (info, key) => real[key] ?? info[key]}); },
        });
    """
    with BrowserPage(bundle, flags=flags) as own, served(bundle) as server:
        tab = Tab(own, f"{server.url}/?idle")
        if not tab.page.evaluate("async () => Boolean(await navigator.gpu?.requestAdapter())"):
            pytest.skip("this Chromium has no software WebGPU (libvulkan's SwiftShader comes with Chromium's package)")
        tab.context.add_init_script(disguise)
        tab.open(server.url)
        tab.until("ready")
        facts = tab.page.locator("#facts").inner_text()
        if "WebGPU agrees" not in facts:
            assert "WebGPU is off by" in facts and "WebAssembly," in facts
            assert "WebAssembly" in str(tab.page.locator("#status").text_content())
        tab.choose(encoded(rgb(13)))
        assert tab.ask(QUESTION) == edge.answer(encoded(rgb(13)), QUESTION, max_tokens=8).text
        tab.page.select_option("#provider", "webgpu")  # by hand it is an error, not a silent change
        tab.page.wait_for_selector("body[data-state=ready]" if "WebGPU agrees" in facts else "body[data-state=failed]")
        assert ("WebGPU can't be used" in tab.error()) == ("WebGPU is off" in facts) and tab.problems == []
        tab.context.close()
