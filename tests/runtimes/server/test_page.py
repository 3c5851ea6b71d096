"""The chat page in a real browser, against a real engine."""

from __future__ import annotations

import html.parser
import io
import json
import shutil
import threading
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from tinyllava_edge.runtimes.engine import Engine
from tinyllava_edge.runtimes.server.options import ServerOptions
from tinyllava_edge.runtimes.server.page import FILES
from tinyllava_edge.runtimes.server.serve import Server

from .conftest import call, png, served, until

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]  # fmt: skip
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
WIDE, PHONE = {"width": 1100, "height": 800}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


class Tab:
    """A page, and what went wrong on it."""

    def __init__(self, browser: Any, server: Server, size: dict[str, int] = WIDE, **options: Any) -> None:
        self.context = browser.new_context(viewport=size, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.problems: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.context.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(server.url)

    def ready(self) -> Tab:
        self.page.locator(".status.ok").wait_for()
        return self

    def choose(self, *pictures: bytes) -> None:
        files = [{"name": f"{i}.png", "mimeType": "image/png", "buffer": p} for i, p in enumerate(pictures)]
        self.page.set_input_files("#file", files)
        self.page.locator("#pictures li").nth(len(pictures) - 1).wait_for()

    def settle(self, tokens: int) -> None:
        self.page.click("#open-settings")
        self.page.fill("#max-tokens", str(tokens))
        self.page.click("text=Done")

    def ask(self, question: str) -> str:
        """Send and wait for the whole answer."""
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        last = self.page.locator(".turn").last
        last.locator(".answer[aria-busy=false]").wait_for()
        return str(last.locator(".answer .words").text_content())

    def js(self, code: str, argument: Any = None) -> Any:
        return self.page.evaluate(code, argument)

    def no_sideways_scrolling(self) -> bool:
        return bool(self.js("() => document.documentElement.scrollWidth <= innerWidth && scrollX === 0"))


@pytest.fixture
def tab(browser: Any, server: Server) -> Iterator[Tab]:
    opened = Tab(browser, server).ready()
    yield opened
    opened.context.close()


@needs_browser
def test_pictures_over_several_turns(tab: Tab, engine: Engine, server: Server) -> None:
    tab.settle(24)
    pictures = [png(seed) for seed in (101, 102, 103)]  # no other test has shown them: nothing is cached
    tab.choose(pictures[0], pictures[1])
    said = [tab.ask("compare them")]
    tab.choose(pictures[2])
    said.append(tab.ask("and\nthis?"))
    said.append(tab.ask("why?"))
    messages: list[dict[str, Any]] = []
    for question, seen, answer in zip(
        ("compare them", "and\nthis?", "why?"), (pictures[:2], pictures[2:], []), said, strict=True
    ):
        parts = [{"type": "image", "image": p} for p in seen]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        assert answer == engine.generate(messages, max_tokens=24).text
        messages.append({"role": "assistant", "content": answer})
    assert tab.page.locator(".timings").count() == 3
    shown = tab.page.locator(".timings").first
    label = shown.locator(".track").get_attribute("aria-label")
    assert all(
        stage in label for stage in ("Decode image", "Preprocess", "Vision", "Prefill", "First token", "Decode ")
    )
    assert "tokens/s" in shown.locator("summary").text_content() and "cached" in shown.locator("summary").text_content()
    shown.locator("summary").click()
    assert shown.locator("dl").is_visible() and "ms" in shown.locator("dd").first.text_content()
    assert tab.page.locator(".question img").count() == 3
    assert tab.problems == []
    origin = server.url + "/"
    assert all(url.startswith((origin, f"blob:{origin}")) for url in tab.asked), tab.asked


@needs_browser
def test_it_streams(tab: Tab, engine: Engine, unhurried: pytest.MonkeyPatch) -> None:
    """The answer grows while it is made."""
    tab.settle(500)
    tab.page.fill("#question", "what color?")
    tab.page.click("#send")
    words = tab.page.locator(".answer .words")
    seen = set[int]()
    until(lambda: seen.add(len(words.text_content())) or len(seen) > 3)
    assert tab.page.locator(".answer").get_attribute("aria-busy") == "true"
    assert tab.page.locator("#log").get_attribute("aria-live") == "polite"
    tab.page.locator(".answer[aria-busy=false]").wait_for()
    unhurried.undo()
    assert words.text_content() == engine.generate("what color?", max_tokens=500).text


@needs_browser
@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop(tab: Tab, engine: Engine, how: str, unhurried: pytest.MonkeyPatch) -> None:
    before = engine.stats()["requests"]["cancelled"]
    tab.settle(1900)
    tab.page.fill("#question", "what color?")
    tab.page.click("#send")
    until(lambda: len(tab.page.locator(".answer .words").text_content()) > 10)
    assert tab.page.locator("#send").is_hidden()
    tab.page.click("#stop") if how == "button" else tab.page.keyboard.press("Escape")
    tab.page.locator("text=Stopped.").wait_for()
    until(lambda: engine.stats()["requests"]["cancelled"] == before + 1 and not engine.stats()["running"], 5)
    unhurried.undo()
    part = tab.page.locator(".answer .words").text_content()
    assert engine.generate("what color?", max_tokens=1900).text.startswith(part)
    tab.settle(8)
    messages = [{"role": "user", "content": "what color?"}, {"role": "assistant", "content": part}]
    wanted = engine.generate([*messages, {"role": "user", "content": "why?"}], max_tokens=8).text
    assert tab.ask("why?") == wanted and tab.problems == []


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phones_width(browser: Any, server: Server, scheme: str, tmp_path: Path) -> None:
    tab = Tab(browser, server, PHONE, color_scheme=scheme, has_touch=True, is_mobile=True).ready()
    assert tab.no_sideways_scrolling()
    tab.choose(png(1, 640, 100), png(2), png(3), png(4))
    assert tab.no_sideways_scrolling()
    tab.page.click("#open-settings")
    assert tab.no_sideways_scrolling()
    box = tab.page.locator("#settings").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360
    tab.page.fill("#max-tokens", "60")
    tab.page.click("text=Done")
    tab.ask("x" * 300)
    tab.page.locator("summary").click()
    assert tab.no_sideways_scrolling()
    for control in tab.page.locator("header button:visible, .tools button:visible").all():
        size = control.bounding_box()
        assert min(size["width"], size["height"]) >= 40, control
    from PIL import Image

    with Image.open(io.BytesIO(tab.page.screenshot(path=tmp_path / f"{scheme}.png"))) as picture:
        corner = picture.convert("L").getpixel((2, picture.height // 2))
    assert (corner < 80) == (scheme == "dark") and tab.problems == []
    tab.context.close()


@needs_browser
def test_drop_paste_and_remove(tab: Tab) -> None:
    send = """([kind, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], kind + ".png", {type: "image/png"}));
        if (kind === "drop") {
            document.body.dispatchEvent(new DragEvent("dragover", {dataTransfer: data, bubbles: true}));
            if (document.getElementById("drop").hidden) throw new Error("the page shows no place to drop");
        }
        const event = kind === "drop"
            ? new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true})
            : new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true});
        document.body.dispatchEvent(event);
    }"""
    for kind in ("drop", "paste"):
        tab.js(send, [kind, list(png())])
    names = tab.page.locator("#pictures img")
    assert [image.get_attribute("alt") for image in names.all()] == ["drop.png", "paste.png"]
    assert tab.page.locator("#drop").is_hidden()
    tab.page.get_by_role("button", name="Remove drop.png").click()
    assert [image.get_attribute("alt") for image in names.all()] == ["paste.png"]
    assert tab.js("() => document.activeElement.getAttribute('aria-label')") == "Remove paste.png"
    tab.page.keyboard.press("Enter")
    assert names.count() == 0 and tab.js("() => document.activeElement.id") == "question" and tab.problems == []


@needs_browser
def test_the_bytes_are_sent_as_they_are(tab: Tab) -> None:
    jpeg = png(7, kind="JPEG")
    tab.page.set_input_files("#file", [{"name": "a.jpg", "mimeType": "image/jpeg", "buffer": jpeg}])
    with tab.page.expect_request("**/v1/chat/completions") as sent:
        tab.ask("what?")
    content = json.loads(sent.value.post_data)["messages"][-1]["content"]
    import base64

    assert content[0]["image_url"]["url"] == f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


@needs_browser
def test_camera(browser: Any, server: Server) -> None:
    """Chromium's test pattern stands in for a camera."""
    tab = Tab(browser, server, permissions=["camera"]).ready()
    tab.page.click("#photo")
    tab.page.wait_for_selector("#camera[open]")
    until(lambda: tab.js("() => document.getElementById('video').videoWidth") > 0)
    tab.page.click("#shoot")
    tab.page.locator("#pictures img").wait_for()
    assert tab.page.locator("#camera").is_hidden()
    tab.page.click("#photo")
    tab.page.wait_for_selector("#camera[open]")
    tab.page.keyboard.press("Escape")
    tab.page.locator("#camera").wait_for(state="hidden")
    assert tab.page.locator("#pictures img").count() == 1 and tab.ask("what?") is not None and tab.problems == []
    tab.context.close()


@needs_browser
def test_errors_say_what_to_do(browser: Any, engine: Engine) -> None:
    with served(engine, max_picture_mb=1, max_pictures=2, default_max_tokens=8) as server:
        tab = Tab(browser, server).ready()
        tab.page.set_input_files("#file", [{"name": "big.png", "mimeType": "image/png", "buffer": b"\0" * (3 << 19)}])
        notice = tab.page.locator("#notice")
        assert "big.png has 1.5 MB; the server takes up to 1.0 MB" in notice.text_content()
        tab.page.set_input_files("#file", [{"name": "a.txt", "mimeType": "text/plain", "buffer": b"x"}])
        assert "a.txt is not a picture" in notice.text_content()
        tab.page.set_input_files(
            "#file", [{"name": f"{i}.png", "mimeType": "image/png", "buffer": png(i)} for i in range(3)]
        )
        assert "up to 2 pictures" in notice.text_content() and tab.page.locator("#pictures li").count() == 2
        assert not [url for url in tab.asked if "/v1/chat" in url]
        tab.page.click("#new-chat")
        tab.choose(b"this is no picture")
        tab.page.fill("#question", "what?")
        tab.page.press("#question", "Enter")
        failure = tab.page.locator(".failure")
        failure.wait_for()
        assert "not a picture in a known format" in failure.text_content() and failure.get_attribute("role") == "alert"
        before = len(tab.asked)
        failure.get_by_role("button", name="Try again").click()
        until(lambda: len(tab.asked) > before)
        tab.page.locator(".failure").wait_for()
        assert tab.ask("a question after it") == engine.generate("a question after it", max_tokens=8).text
    tab.page.fill("#question", "the server is gone")
    tab.page.press("#question", "Enter")
    tab.page.locator(".failure", has_text="can't be reached").wait_for()
    assert tab.page.locator(".status.bad").is_visible()
    tab.context.close()


@needs_browser
def test_key(browser: Any, engine: Engine) -> None:
    key = "0123456789abcdef"
    with served(engine, {"TINYLLAVA_EDGE_API_KEY": key}, default_max_tokens=4) as server:
        tab = Tab(browser, server)
        tab.page.wait_for_selector("#settings[open]")
        assert "asks for an API key" in tab.page.locator("#settings-note").text_content()
        assert tab.js("() => document.activeElement.id") == "key"
        tab.page.keyboard.type("wrong-key-of-16-characters")
        tab.page.keyboard.press("Enter")
        tab.page.locator("#settings-note", has_text="refused").wait_for()
        tab.page.fill("#key", key)
        tab.page.keyboard.press("Enter")
        tab.ready()
        assert tab.ask("what?") == engine.generate("what?", max_tokens=4).text
        assert tab.js("() => Object.values(sessionStorage)") == [key]
        assert key not in str(tab.js("() => Object.values(localStorage)"))
        assert key not in tab.page.url and not any(key in url for url in tab.asked)
        tab.context.close()


@needs_browser
def test_text_stays_text(tab: Tab) -> None:
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>&amp;\n**bold**"
    chunk = {"choices": [{"index": 0, "delta": {"content": hostile}, "finish_reason": None}]}
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    body = f"data: {json.dumps(chunk)}\n\n: waiting\n\ndata: {json.dumps(last)}\n\ndata: [DONE]\n\n"
    tab.page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    assert tab.ask(hostile) == hostile
    assert tab.page.locator(".question .words").text_content() == hostile
    assert tab.page.locator("#log img, #log script, #log b").count() == 0 and tab.problems == []


@needs_browser
def test_keyboard_and_names(tab: Tab) -> None:
    """Everything can be reached by Tab and has a name; Shift+Enter makes a line, Enter sends."""
    tab.settle(4)
    nameless = tab.js(
        """() => [...document.querySelectorAll("button, input, textarea, dialog, ul[id], main section, #log")]
            .filter(e => !(e.getAttribute("aria-label") || e.getAttribute("aria-labelledby") || e.title
                || e.labels?.length || e.textContent.trim()))
            .map(e => e.outerHTML.slice(0, 80))"""
    )
    assert nameless == []
    tab.page.focus("#question")
    tab.page.keyboard.type("one")
    tab.page.keyboard.press("Shift+Enter")
    tab.page.keyboard.type("two")
    assert tab.page.input_value("#question") == "one\ntwo" and tab.page.locator(".turn").count() == 0
    reached = []
    for _ in range(8):
        tab.page.keyboard.press("Tab")
        reached.append(tab.js("() => document.activeElement.id"))
    assert {"add", "photo", "send", "new-chat", "open-settings"} <= set(reached) and "file" not in reached
    tab.page.focus("#question")
    tab.page.keyboard.press("Enter")
    tab.page.locator(".timings").wait_for()
    assert tab.page.locator(".question .words").text_content() == "one\ntwo"
    assert tab.js("() => document.activeElement.id") == "question"


@needs_browser
def test_settings_and_new_chat(tab: Tab, engine: Engine) -> None:
    tab.page.click("#open-settings")
    tab.page.fill("#system", "Answer in one word.")
    tab.page.fill("#max-tokens", "6")
    tab.page.click("text=Done")
    messages = [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "what color?"}]
    assert tab.ask("what color?") == engine.generate(messages, max_tokens=6).text
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.page.get_by_role("button", name="Copy answer").click()
    tab.page.get_by_role("button", name="Copied").wait_for()
    assert tab.js("() => navigator.clipboard.readText()") == engine.generate(messages, max_tokens=6).text
    tab.page.click("#new-chat")
    assert tab.page.locator(".turn").count() == 0 and tab.page.locator("#welcome").is_visible()
    tab.page.reload()
    tab.ready()
    tab.page.click("#open-settings")
    assert tab.page.input_value("#system") == "Answer in one word." and tab.page.input_value("#max-tokens") == "6"


@needs_browser
def test_loading(browser: Any, engine: Engine) -> None:
    go = threading.Event()
    server = Server(lambda: go.wait(30) and engine, ServerOptions(port=0, warm_up=False), environ={})  # type: ignore[arg-type,return-value]
    real_close = engine.close
    engine.close = lambda **kw: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: call(server, "GET", "/health")[0] == 503)
        tab = Tab(browser, server)
        tab.page.locator(".status.wait", has_text="Loading the model").wait_for()
        go.set()
        tab.ready()
        tab.context.close()
    finally:
        go.set()
        server.stop()
        thread.join(20)
        engine.close = real_close  # type: ignore[method-assign]


class Markup(html.parser.HTMLParser):
    """Addresses, inline handlers and inline styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "action", "srcset")]
        self.inline += [k for k in names if k.startswith("on") or k == "style"]
        if tag == "style" or (tag == "script" and "src" not in names):
            self.inline.append(tag)


def test_files(server: Server) -> None:
    """Served with strict headers; nothing inline, nothing from elsewhere; a browser needs to load them once."""
    for path, (name, kind) in FILES.items():
        status, body, headers = call(server, "GET", path)
        assert status == 200 and headers["content-type"] == kind
        assert body == (resources.files("tinyllava_edge.runtimes.server") / "page" / name).read_bytes()
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        again = call(server, "GET", path, headers={"if-none-match": headers["etag"]})
        assert again[0] == 304 and again[1] == b""
        assert call(server, "HEAD", path)[1] == b"" and call(server, "HEAD", path)[0] == 200
        text = body.decode()
        addresses = [word for word in text.split('"') if "//" in word and "://" in word]
        assert all(word == "http://www.w3.org/2000/svg" for word in addresses), addresses
    assert {p.name for p in (resources.files("tinyllava_edge.runtimes.server") / "page").iterdir()} == {
        name for name, _ in FILES.values()
    }
    markup = Markup(call(server, "GET", "/")[1].decode())
    assert markup.inline == [] and set(markup.addresses) <= set(FILES)
    scripts = "".join(call(server, "GET", path)[1].decode() for path in FILES if path.endswith(".js"))
    assert not any(
        word in scripts for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "document.write")
    )
