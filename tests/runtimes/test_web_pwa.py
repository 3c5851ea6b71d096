"""The page as an app, in a real Chromium: installing, camera, clipboard, dropped folders, memory."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("onnxruntime_genai", reason="the decoder's builder, extra [decoder], is not installed")

from tinyllava_edge.benchmarks.targets.browser_page import FLAGS, BrowserPage
from tinyllava_edge.bundle import read_bundle
from tinyllava_edge.export.bundle_writer import export_bundle
from tinyllava_edge.runtimes.edge import open_edge
from tinyllava_edge.runtimes.server.web_files import default_dist

from .web_page import CHROMIUM, Tab, encoded, needs_page, rgb, served

pytestmark = needs_page
QUESTION = "what color is the shape?"
CAMERA = "--use-fake-device-for-media-stream"  # a test picture that moves; nobody is asked, pages must be allowed


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pwa") / "bundle"
    export_bundle(tiny_checkpoint, out, llm=("f32",), vision=("fp32",), web=("fp32",))
    return out


@pytest.fixture(scope="module")
def page(bundle: Path) -> Iterator[BrowserPage]:
    with BrowserPage(bundle, flags=(CAMERA,)) as opened:
        yield opened


@pytest.fixture(scope="module")
def edge(bundle: Path) -> Iterator[Any]:
    opened = open_edge(bundle, n_threads=1, allow_unverified=True)
    yield opened
    opened.close()


@pytest.fixture
def tab(page: BrowserPage, bundle: Path) -> Iterator[Tab]:
    with served(bundle) as server:
        opened = Tab(page, server.url).until("ready")
        yield opened
        opened.context.close()


def shown(tab: Tab) -> bytes:
    """The picture on the screen, as PNG."""
    tab.page.wait_for_selector("#shown:visible")
    read = """async () => {
        const image = document.getElementById("shown");
        await image.decode();
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        canvas.getContext("2d").drawImage(image, 0, 0);
        return canvas.toDataURL("image/png").split(",")[1];
    }"""
    return base64.b64decode(tab.page.evaluate(read))


def pixels(png: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def faults_of_installing(page: BrowserPage, url: str, root: Path) -> tuple[set[str], dict[str, Any]]:
    """What Chromium has against installing the page, and the manifest as it reads it. Private windows can't."""
    kind, root_flags = page.browser.browser_type, ["--no-sandbox"]
    context = kind.launch_persistent_context(root, executable_path=CHROMIUM, args=[*FLAGS, *root_flags])
    try:
        tab = context.pages[0]
        tab.goto(url)
        tab.evaluate("() => navigator.serviceWorker.ready.then(() => true)")
        session = context.new_cdp_session(tab)
        found = session.send("Page.getInstallabilityErrors")["installabilityErrors"]
        manifest = session.send("Page.getAppManifest")
        assert manifest["errors"] == [] and manifest["url"].endswith("/manifest.webmanifest")
        return {fault["errorId"] for fault in found}, json.loads(manifest["data"])
    finally:
        context.close()


def test_installable(page: BrowserPage, bundle: Path, tmp_path: Path) -> None:
    """Chromium has nothing against it; with another manifest it has, so the question is really asked."""
    with served(bundle) as server:
        faults, manifest = faults_of_installing(page, server.url, tmp_path / "profile")
    assert faults == set()
    assert manifest["name"] and manifest["start_url"] == manifest["id"] == "./" and manifest["display"] == "standalone"
    dist = tmp_path / "dist"
    shutil.copytree(default_dist(), dist, ignore=shutil.ignore_patterns("ort"))
    worse = {**manifest, "display": "browser", "icons": []}
    (dist / "manifest.webmanifest").write_text(json.dumps(worse))
    with served(bundle, web_dist=dist) as server:
        faults, _ = faults_of_installing(page, server.url, tmp_path / "other")
    assert "manifest-display-not-supported" in faults and "manifest-missing-suitable-icon" in faults


def test_icons(tab: Tab) -> None:
    """Every icon is there in the size that the manifest says, drawn from icon.svg, and kept for offline use."""
    read = """async () => {
        const icons = (await (await fetch("manifest.webmanifest")).json()).icons;
        const kept = await caches.open((await caches.keys()).find((name) => name.startsWith("tinyllava-shell-")));
        for (const icon of icons) {
            const reply = await fetch(icon.src);
            icon.served = reply.headers.get("content-type");
            icon.kept = Boolean(await kept.match(icon.src));
        }
        return icons;
    }"""
    icons = tab.page.evaluate(read)
    assert {(icon["sizes"], icon["purpose"]) for icon in icons} >= {
        ("192x192", "any"), ("512x512", "any"), ("512x512", "maskable"),
    }  # fmt: skip
    # mean difference of a PNG and icon.svg drawn in its size; a maskable one fills the corners, so its middle counts
    compare = """async ([name, maskable]) => {
        const draw = async (src, side) => {
            const image = new Image();
            image.src = src;
            await image.decode();
            const canvas = new OffscreenCanvas(side ?? image.naturalWidth, side ?? image.naturalHeight);
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0, canvas.width, canvas.height);
            const cut = maskable ? Math.floor(canvas.width / 4) : 0;
            const inner = canvas.width - 2 * cut;
            return [canvas.width, canvas.height, context.getImageData(cut, cut, inner, inner).data,
                    context.getImageData(0, 0, 1, 1).data[3]];
        };
        const [width, height, given, corner] = await draw(name);
        const [, , wanted] = await draw("icon.svg", width);
        const total = given.reduce((sum, value, place) => sum + Math.abs(value - wanted[place]), 0);
        return [`${width}x${height}`, total / given.length, corner];
    }"""
    for icon in icons:
        assert icon["served"] == icon["type"] and icon["kept"], icon["src"]
        if icon["type"] == "image/png":
            maskable = icon["purpose"] == "maskable"
            size, difference, corner = tab.page.evaluate(compare, [icon["src"], maskable])
            assert size == icon["sizes"] and corner == (255 if maskable else 0)
            assert difference < 1, icon["src"]  # of 255: edges may be smoothed in two ways


def test_a_photograph(tab: Tab, edge: Any) -> None:
    """Camera, Take photo: the picture is shown, the camera is off again, and the answer is about that picture."""
    tab.context.grant_permissions(["camera"])
    tab.page.click("#camera")
    tab.page.wait_for_selector("#viewfinder[open]")
    tab.page.wait_for_function("() => document.getElementById('video').videoWidth > 0")
    tab.page.evaluate("() => { window.track = document.getElementById('video').srcObject.getTracks()[0]; }")
    tab.page.click("#shoot")
    photo = shown(tab)
    assert Image.open(io.BytesIO(photo)).size == tuple(
        tab.page.evaluate("() => [window.track.getSettings().width ?? 640, window.track.getSettings().height ?? 480]")
    )
    assert tab.page.evaluate("() => window.track.readyState") == "ended"
    assert tab.page.locator("#viewfinder[open]").count() == 0
    assert tab.ask(QUESTION) == edge.answer(photo, QUESTION, max_tokens=8).text and tab.problems == []
    tab.page.click("#camera")
    tab.page.wait_for_selector("#viewfinder[open]")
    tab.page.click("#cancel")
    assert shown(tab) == photo  # giving up changes nothing


def test_a_camera_that_is_denied(tab: Tab) -> None:
    """Said with what to do; a picture given another way clears the message."""
    tab.context.clear_permissions()
    tab.page.click("#camera")
    tab.page.wait_for_selector("#error:visible")
    assert "the camera was not allowed" in tab.error() and "choose a picture file" in tab.error()
    assert tab.page.locator("#viewfinder[open]").count() == 0
    tab.choose(encoded(rgb()))
    assert tab.page.locator("#error").is_hidden() and tab.problems == []


def test_a_machine_without_a_camera(page: BrowserPage, bundle: Path) -> None:
    """The phone's own camera program, or the file dialog, is asked for."""
    browser = page.browser.browser_type.launch(executable_path=CHROMIUM, args=[*FLAGS, "--no-sandbox"])
    try:
        with served(bundle) as server:
            tab = browser.new_page()
            tab.context.grant_permissions(["camera"])
            tab.goto(server.url)
            with tab.expect_file_chooser() as chooser:
                tab.click("#camera")
            assert chooser.value.element.get_attribute("capture") == "environment"
            chooser.value.set_files([{"name": "a.png", "mimeType": "image/png", "buffer": encoded(rgb())}])
            tab.wait_for_selector("#shown:visible")
    finally:
        browser.close()


def test_a_pasted_picture(tab: Tab, edge: Any) -> None:
    """From the real clipboard, by the keyboard; pasted text stays text in the question."""
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    copy = """async (text) => {
        const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
        await navigator.clipboard.write([new ClipboardItem({"image/png": new Blob([bytes], {type: "image/png"})})]);
    }"""
    picture = encoded(rgb(11))
    tab.page.evaluate(copy, base64.b64encode(picture).decode())
    tab.page.focus("#question")
    tab.page.keyboard.press("Control+V")
    pasted = shown(tab)
    assert (pixels(pasted) == np.asarray(rgb(11))).all()
    assert tab.ask(QUESTION) == edge.answer(picture, QUESTION, max_tokens=8).text
    tab.page.evaluate("() => navigator.clipboard.writeText('a question')")
    tab.page.fill("#question", "")
    tab.page.keyboard.press("Control+V")
    assert tab.page.input_value("#question") == "a question" and shown(tab) == pasted and tab.problems == []


def drag(tab: Tab, path: Path, last: str = "drop") -> None:
    """Drag something of the disk over the page, and let it fall."""
    session = tab.context.new_cdp_session(tab.page)
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for kind in dict.fromkeys(("dragEnter", "dragOver", last)):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 300, "data": data})
    session.detach()


def test_a_dropped_folder(page: BrowserPage, bundle: Path, edge: Any, tmp_path: Path) -> None:
    """A bundle's folder, as it lies on the disk, opens on a page that has none; a changed file in it is refused."""
    empty = tmp_path / "empty"
    shutil.copytree(default_dist(), empty)
    with served(bundle) as server:
        tab = Tab(page, f"{server.url}/?idle").until("empty")
        drag(tab, bundle, "dragOver")
        assert tab.page.locator("#drop").is_visible()
        drag(tab, bundle)
        tab.until("ready")
        assert tab.page.locator("#drop").is_hidden()
        asked = [url for url in tab.asked if "/bundle/" in url]
        assert asked == [], asked  # nothing of the model came from the server
        picture = tmp_path / "cat.png"
        picture.write_bytes(encoded(rgb(12)))
        drag(tab, picture)
        assert (pixels(shown(tab)) == np.asarray(rgb(12))).all()
        assert tab.ask(QUESTION) == edge.answer(picture, QUESTION, max_tokens=8).text
        bad = tmp_path / "bad"
        shutil.copytree(bundle, bad, ignore=shutil.ignore_patterns("*.gguf"))
        graph = bad / next(file.path for file in read_bundle(bundle).files if "embed_tokens" in file.path)
        graph.write_bytes(graph.read_bytes()[:-1] + b"\x00")
        drag(tab, bad)
        tab.until("failed")
        assert "embed_tokens.onnx: its SHA-256 differs" in tab.error() and tab.problems == []
        tab.context.close()


def test_memory_is_shown(tab: Tab) -> None:
    """What Chromium counts for page and engine, in megabytes. It takes its time: up to a minute on a quiet page."""
    assert "counting" in tab.page.locator("#memory").text_content()
    both = """async () => {
        const found = await performance.measureUserAgentSpecificMemory();
        const scopes = found.breakdown.flatMap((part) => part.attribution.map((one) => one.scope));
        return [found.bytes, scopes];
    }"""
    counted, scopes = tab.page.evaluate(both)
    assert "DedicatedWorkerGlobalScope" in scopes  # the engine's part is in it
    tab.page.wait_for_selector('#memory:text-matches("^[0-9]+ MB$")', timeout=120_000)
    figure = int(tab.page.locator("#memory").text_content().split()[0])
    assert 0.5 < figure / (counted / 1e6) < 2 and figure > 10


def test_where_memory_can_not_be_counted(page: BrowserPage, bundle: Path) -> None:
    """The page says so, and shows no figure."""
    with served(bundle) as server:
        tab = Tab(page, f"{server.url}/?idle")
        tab.context.add_init_script(
            "delete Performance.prototype.memory; delete Performance.prototype.measureUserAgentSpecificMemory;"
        )
        tab.open(server.url)
        tab.until("ready")
        tab.page.wait_for_function("() => document.getElementById('memory').textContent.includes('say')")
        tab.context.close()
