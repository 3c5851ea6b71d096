"""The browser app in a real Chromium: its answers, its pixels, its files, its page."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("onnxruntime_genai", reason="the decoder's builder, extra [decoder], is not installed")

from tinyllava_edge.benchmarks.targets.browser_page import BrowserPage
from tinyllava_edge.benchmarks.targets.browser_runtime import WebRuntime
from tinyllava_edge.bundle import read_bundle
from tinyllava_edge.errors import BundleError, DependencyError, EngineError, UsageError
from tinyllava_edge.export.bundle_writer import export_bundle
from tinyllava_edge.export.chat_template import chat_template
from tinyllava_edge.image import load_image
from tinyllava_edge.prompt import Turn, get_template
from tinyllava_edge.runtimes.edge import open_edge
from tinyllava_edge.runtimes.server.options import ServerOptions
from tinyllava_edge.runtimes.server.web_files import default_dist
from tinyllava_edge.runtimes.server.web_serve import WebServer
from tinyllava_edge.runtimes.text import Vocabulary, conversation_ids
from tinyllava_edge.tokenizer_files import fast_tokenizer
from tinyllava_edge.tokenizer_sections import FIRST, SectionTokenizer, token_bytes

from .. import tiny_tokenizers as tiny
from .web_page import Tab, drop, encoded, needs_page, rgb, served

QUESTION = "what color is the shape?"


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("web-app") / "bundle"
    export_bundle(tiny_checkpoint, out, llm=("f32",), vision=("fp32",), web=("fp32",))
    return out


@pytest.fixture(scope="module")
def page(bundle: Path) -> Iterator[BrowserPage]:
    with BrowserPage(bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def web(page: BrowserPage, bundle: Path) -> WebRuntime:
    return WebRuntime(page, read_bundle(bundle), "fp32", provider="wasm")


@pytest.fixture(scope="module")
def edge(bundle: Path) -> Iterator[Any]:
    opened = open_edge(bundle, n_threads=1, allow_unverified=True)
    yield opened
    opened.close()


def transparent() -> Image.Image:
    picture = rgb(1).convert("RGBA")
    alpha = np.random.default_rng(2).integers(0, 256, (picture.height, picture.width), np.uint8)
    picture.putalpha(Image.fromarray(alpha))
    return picture


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    return encoded(rgb(3), "PNG", exif=exif)


def gamma() -> bytes:
    """A PNG that says it has gamma 1.0, which colour management would brighten."""
    data = encoded(rgb(4))
    import struct
    import zlib

    chunk = b"gAMA" + struct.pack(">I", 100_000)
    return data[:33] + struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


PICTURES = {
    "rgb": encoded(rgb()),
    "tall": encoded(rgb(5, (40, 500))),
    "grey": encoded(rgb(6).convert("L")),
    "palette": encoded(rgb(7).quantize(32)),
    "transparent": encoded(transparent()),
    "turned": turned(),
    "gamma": gamma(),
    "webp": encoded(rgb(8), "WEBP", lossless=True),
    "jpeg": encoded(rgb(9, (96, 80)), "JPEG", quality=90, subsampling=0),
    "jpeg 4:2:0": encoded(rgb(10, (97, 81)), "JPEG", quality=80),
}


@needs_page
@pytest.mark.parametrize("name", PICTURES)
def test_the_tower_sees_the_same_pixels(name: str, web: WebRuntime, edge: Any) -> None:
    """Equal to the edge runtime's: nothing is resized, managed or multiplied by the browser."""
    wanted = edge._vision.pixel_values(load_image(PICTURES[name]))
    found = web.pixel_values(PICTURES[name])
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-6  # one level of 255 is 8e-3


@needs_page
def test_answers(web: WebRuntime, page: BrowserPage, edge: Any) -> None:
    """Prompt ids, tokens and text equal the edge runtime's, special tokens in a question included."""
    questions = [
        QUESTION,
        "is there a red circle?",
        " </s><s> USER: \u00e9\u4e2d\U0001f600 <image> \u2581x\x85",
        "a\n\nb",
    ]
    for question in questions:
        probe = edge.probe(PICTURES["rgb"], question, max_tokens=16)
        found = page.answer(web._engine, PICTURES["rgb"], question, 16)
        assert tuple(found["prompt_ids"]) == tuple(probe.prompt_ids)
        assert tuple(found["token_ids"]) == probe.answer.token_ids
        assert found["text"] == probe.answer.text and found["finish_reason"] == probe.answer.finish_reason
        assert found["n_prompt_tokens"] == probe.answer.n_prompt_tokens and found["n_image_tokens"] == 64
    blind = web.answer(None, QUESTION, max_tokens=8)
    assert blind.token_ids == edge.answer(None, QUESTION, max_tokens=8).token_ids
    few, more = (edge.answer(None, "x " * n, max_tokens=1).n_prompt_tokens for n in (10, 20))
    long = "x " * (10 + 10 * (edge.n_ctx - few) // (more - few) - 3)  # all but a few positions of the context
    whole, wanted = (runtime.answer(None, long, max_tokens=100) for runtime in (web, edge))
    assert edge.n_ctx - 20 < whole.n_prompt_tokens == wanted.n_prompt_tokens and whole.finish_reason == "length"
    assert (len(whole.token_ids), whole.finish_reason) == (len(wanted.token_ids), wanted.finish_reason)
    stages = blind.timings.to_dict()
    assert stages["prefill_ms"] > 0 and stages["decode_ms"] > 0 and stages["total_ms"] >= stages["ttft_ms"]
    assert len(blind.token_ms) == len(blind.token_ids) - 1 + blind.ended_by_token


@needs_page
def test_refusals(web: WebRuntime, page: BrowserPage) -> None:
    """Clear words for a question or picture that can't be used."""
    with pytest.raises(EngineError, match="question is empty"):
        web.answer(None, " <image> ")
    with pytest.raises(EngineError, match="not a picture"):
        web.answer(b"nonsense", QUESTION)
    with pytest.raises(EngineError, match="positions"):
        web.answer(None, "x " * 3000)
    with pytest.raises(EngineError, match="no decoder_model_merged of precision q8|no .* of precision q8"):
        page.open("q8")
    facts = page.environment()
    assert facts["cross_origin_isolated"] is True and "Chrome" in facts["user_agent"]
    assert web.facts["self_test"]["outcome"] == "reference" and web.facts["threads"] >= 1


@needs_page
def test_offline_after_the_first_load(page: BrowserPage, bundle: Path, edge: Any) -> None:
    """With the server gone a new page still answers, from the service worker and the files kept by their hashes."""
    wanted = edge.answer(PICTURES["rgb"], QUESTION, max_tokens=8).text
    with served(bundle) as server:
        tab = Tab(page, server.url).until("ready")
        tab.choose(PICTURES["rgb"])
        assert tab.ask(QUESTION) == wanted
        url = server.url
        assert all(one.startswith((url, f"blob:{url}")) for one in tab.asked), tab.asked
        # a kept file that was changed is not used: it is fetched again
        key = f"{url}/bundle/sha256/{next(f.sha256 for f in read_bundle(bundle).files if f.role == 'preprocess')}"
        replace = """async (key) => {
            const cache = await caches.open("tinyllava-files-1");
            if (!(await cache.match(key))) throw new Error("not kept");
            await cache.put(key, new Response(new Uint8Array(1556)));
        }"""
        tab.page.evaluate(replace, key)
        tab.open(url)
        tab.until("ready")
    with pytest.raises(OSError):
        http.client.HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]), timeout=2).request("GET", "/")
    tab.open(url)
    tab.until("ready")
    tab.choose(PICTURES["rgb"])
    assert tab.ask(QUESTION) == wanted and tab.problems == []
    assert tab.page.evaluate("() => crossOriginIsolated") is True
    tab.context.close()


@needs_page
def test_tampered_and_dropped_files(page: BrowserPage, bundle: Path, edge: Any, tmp_path: Path) -> None:
    """A changed file is refused by its hash, from the server and from the user; the right files then work."""
    bad = tmp_path / "bad"
    shutil.copytree(bundle, bad)
    graph = bad / "web/onnx/vision_encoder.onnx"
    data = bytearray(graph.read_bytes())
    data[-1] ^= 1
    graph.write_bytes(data)
    with served(bad) as server:
        tab = Tab(page, server.url).until("failed")
        assert "vision_encoder.onnx: its SHA-256 differs" in tab.error()
        tab.page.set_input_files("#folder", bad)
        tab.page.wait_for_timeout(200)
        tab.until("failed")
        assert "SHA-256" in tab.error()
        drop(tab, [path for path in bundle.rglob("*") if path.suffix in (".json", ".onnx")])
        tab.until("ready")
        assert tab.page.locator("#error").is_hidden()
        drop(tab, [], {"cat.png": PICTURES["rgb"]})
        tab.page.wait_for_selector("#shown:visible")
        assert tab.ask(QUESTION) == edge.answer(PICTURES["rgb"], QUESTION, max_tokens=8).text
        drop(tab, [], {"a.txt": b"x", "b.txt": b"y"})
        tab.page.wait_for_selector("#error:visible")
        assert "no bundle.json" in tab.error() and tab.problems == []
        tab.context.close()


@needs_page
def test_a_phones_width_and_stop(page: BrowserPage, bundle: Path) -> None:
    """360 pixels without sideways scrolling; Stop ends an answer; times and memory are shown."""
    with served(bundle) as server:
        tab = Tab(page, server.url, 360, is_mobile=True, has_touch=True)
        assert not tab.sideways()
        tab.until("ready")
        tab.choose(encoded(rgb(0, (640, 100))))
        tab.ask("x" * 300, 12)
        assert not tab.sideways()
        times = tab.page.locator("#timings").inner_text()
        assert all(
            word in times for word in ("Decode image", "Preprocess", "Vision", "Prefill", "Decode per token", "ms")
        )
        tab.page.fill("#max-tokens", "2000")
        tab.page.fill("#question", QUESTION)
        tab.page.click("#send")
        tab.until("answering")
        tab.page.wait_for_function("() => document.getElementById('answer').textContent.length > 20")
        tab.page.click("#stop")
        tab.until("ready")
        assert tab.page.locator("#note").text_content() == "Stopped."
        for control in tab.page.locator("button:visible").all():
            assert control.bounding_box()["height"] >= 40
        icons = json.loads(tab.page.evaluate("async () => (await fetch('manifest.webmanifest')).text()"))["icons"]
        assert icons[0]["src"] == "icon.svg" and tab.problems == []
        tab.context.close()


def fetch(server: WebServer, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    reply = connection.getresponse()
    found = reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()
    connection.close()
    return found


@pytest.fixture
def tiny_dist(tmp_path: Path) -> Path:
    """Stands for a built page where only the server is looked at."""
    dist = tmp_path / "dist"
    (dist / "assets").mkdir(parents=True)
    for name in ("index.html", "sw.js", "assets/a.js"):
        (dist / name).write_text(name)
    (dist / "link.js").symlink_to(tmp_path / "secret.js")
    (tmp_path / "secret.js").write_text("secret")
    return dist


def test_only_named_files_are_served(bundle: Path, tiny_dist: Path) -> None:
    """What the manifest doesn't name for browsers has no path, however it is spelled."""
    with served(bundle, web_dist=tiny_dist) as server:
        assert fetch(server, "/")[2] == b"index.html" and fetch(server, "/assets/a.js")[0] == 200
        assert fetch(server, "/bundle/bundle.json")[2] == (bundle / "bundle.json").read_bytes()
        for path in (
            "/bundle/llm-f32.gguf", "/bundle/vision-fp32.onnx", "/bundle/export.json", "/bundle/nothing", "/link.js",
            "/bundle/../../secret.js", "/bundle/%2e%2e/%2e%2e/secret.js", "/..%2fsecret.js", "//etc/passwd", "/assets",
        ):  # fmt: skip
            status, _, body = fetch(server, path)
            assert status == 404 and body != b"secret", path
        assert fetch(server, "/", "POST")[0] == 405
        assert fetch(server, "/", Host="evil.example")[0] == 403
        assert fetch(server, "/", Origin="https://evil.example")[0] == 403


def test_headers_ranges_and_etags(bundle: Path, tiny_dist: Path) -> None:
    """Isolation headers on every reply; the hash is the ETag; one range at a time."""
    file = next(file for file in read_bundle(bundle).files if file.path.endswith("vision_encoder.onnx"))
    data, path = (bundle / file.path).read_bytes(), f"/bundle/{file.path}"
    with served(bundle, web_dist=tiny_dist) as server:
        status, headers, body = fetch(server, path)
        assert status == 200 and body == data and headers["etag"] == f'"{file.sha256}"'
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["cross-origin-embedder-policy"] == "require-corp"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "'wasm-unsafe-eval'" in policy and "http" not in policy
        assert fetch(server, path, If_None_Match=headers["etag"])[0] == 304
        assert fetch(server, path, "HEAD")[2] == b""
        for asked, first, last in (("0-9", 0, 9), ("100-", 100, len(data) - 1), ("-5", len(data) - 5, len(data) - 1)):
            status, headers, body = fetch(server, path, Range=f"bytes={asked}")
            assert status == 206 and body == data[first : last + 1]
            assert headers["content-range"] == f"bytes {first}-{last}/{len(data)}"
        assert fetch(server, path, Range=f"bytes={len(data)}-")[0] == 416
        assert fetch(server, path, Range="bytes=0-1,4-5")[2] == data
        assert fetch(server, path, Range="bytes=0-9", If_Range='"old"')[0] == 200
        assert fetch(server, "/missing")[1]["cross-origin-embedder-policy"] == "require-corp"


def test_what_can_not_be_served(bundle: Path, tiny_dist: Path, tmp_path: Path) -> None:
    """Said at the start, with the next step."""
    with pytest.raises(DependencyError) as missing:
        WebServer(bundle, ServerOptions(port=0, web=True, web_dist=tmp_path / "nothing"))
    assert "make web" in missing.value.hint
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["files"] = [file for file in manifest["files"] if file["role"] != "web"]
    (tmp_path / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="no web files"):
        WebServer(tmp_path, ServerOptions(port=0, web=True, web_dist=tiny_dist))
    with pytest.raises(UsageError, match="other machines"):
        WebServer(bundle, ServerOptions(host="0.0.0.0", port=0, web=True, web_dist=tiny_dist))


def test_the_command(bundle: Path, tiny_dist: Path) -> None:
    """`serve --web` says where it listens, and ends on SIGTERM with exit code 0."""
    code = "from tinyllava_edge.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--web", str(bundle), "--port", "0"]
    process = subprocess.Popen([*command, "--web-dist", str(tiny_dist)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "open http://127.0.0.1:" in line, line
    port = int(line.split("127.0.0.1:")[1].split()[0])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/bundle/bundle.json")
    assert connection.getresponse().read() == (bundle / "bundle.json").read_bytes()
    connection.close()
    process.terminate()
    assert process.wait(20) == 0 and process.stderr.read() == ""
    process.stderr.close()


KINDS = {
    "llama, old": ("llama", "</s>", lambda out: tiny.write_llama(out, legacy=None)),
    "llama, new": ("llama", "</s>", lambda out: tiny.write_llama(out, legacy=False)),
    "gemma": ("gemma", "<eos>", tiny.write_gemma),
    "phi": ("phi", tiny.END, tiny.write_phi),
    "qwen2": ("qwen2_instruct", "<|im_end|>", tiny.write_qwen2),
}
ESBUILD = default_dist().parent / "node_modules" / ".bin" / "esbuild"
needs_node = pytest.mark.skipif(
    not ESBUILD.is_file() or shutil.which("node") is None, reason="needs Node.js and make web"
)


@needs_node
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_ids_of_every_tokenizer(kind: str, tmp_path: Path) -> None:
    """The page's own code in Node: ids of 300 odd questions, and the bytes of every token, equal the package's."""
    name, ending, write = KINDS[kind]
    given = fast_tokenizer(write(tmp_path / "release"))
    given.add_tokens(["<image>"], special_tokens=True)
    sections, template = SectionTokenizer(given), get_template(name)
    end = int(given.convert_tokens_to_ids(ending))
    vocabulary = Vocabulary(
        sections.start, given.bos_token_id if given("")["input_ids"] else None, end, end, sections.rest
    )
    questions = [text for text in tiny.random_texts(300) if text.replace("<image>", "").strip()]
    questions += ["</s><s><image> <|im_end|>", "<eos><bos>", "<|fim_pad|> <tool_call>x"]
    wanted = [conversation_ids([Turn(text)], template, vocabulary, has_image=True) for text in questions]
    first = sections.prefix == FIRST
    raw = sections.bare.to_str() if first else given.backend_tokenizer.to_str()
    ids = list(range(len(given)))
    asked = {
        "tokenizer": json.loads(raw),
        "config": {"chat_template": chat_template(template, "", first_space=first)},
        "template": name,
        "questions": questions,
        "ids": ids,
    }
    found = in_node("web_tokenizer.ts", asked, tmp_path)
    for question, ours, theirs in zip(questions, wanted, found["ids"], strict=True):
        assert tuple(theirs) == ours, ascii(question)
    of = token_bytes(given)
    assert [bytes.fromhex(text) for text in found["bytes"]] == [of(index) for index in ids]


def in_node(name: str, asked: object, folder: Path) -> Any:
    """What a program beside this file, which imports the page's own code, makes of a JSON value."""
    built = folder / "program.mjs"
    command = [ESBUILD, Path(__file__).with_name(name), "--bundle", "--platform=node", "--format=esm"]
    modules = {**os.environ, "NODE_PATH": str(ESBUILD.parents[1])}
    subprocess.run([*command, f"--outfile={built}", "--log-level=error"], check=True, timeout=60, env=modules)
    ran = subprocess.run(
        ["node", built], input=json.dumps(asked), capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout)


@needs_node
def test_the_page_takes_one_graph_of_a_kind_and_precision(tmp_path: Path) -> None:
    """As the reader in Python does: two are refused, and what only begins like a graph is none."""
    stems = ("vision_encoder", "embed_tokens", "decoder_model_merged")
    right = [f"web/onnx/{stem}_q4.onnx" for stem in stems]
    odd = ["web/onnx/decoder_model_merged.onnx.bak", *right]
    twice = [[f"web/onnx/{stem}_evil.onnx", *right] for stem in stems]
    spec = {"template": "phi", "image_policy": "pad"}
    spec |= dict.fromkeys(("image_size", "visual_tokens", "embedding_dim", "max_length"), 1)

    def manifest(paths: list[str]) -> dict[str, object]:
        entry = {"role": "web", "precision": "q4", "sha256": "0" * 64, "bytes": 1}
        names = ("tokenizer", "tokenizer_config", "generation_config")
        files = [{**entry, "path": f"web/{name}.json", "precision": "text"} for name in names]
        files += [{**entry, "path": "preprocess.onnx", "role": "preprocess"}, *({**entry, "path": p} for p in paths)]
        return {"schema_version": 1, "name": "a", "model": spec, "files": files}

    given = [manifest(paths) for paths in (odd, *twice, [*right, right[0]])]
    found = in_node("web_manifest.ts", given, tmp_path)
    assert found[0] == {"precisions": ["q4"], "decoder": "web/onnx/decoder_model_merged_q4.onnx"}
    for stem, told in zip((*stems, "web/onnx/vision_encoder_q4.onnx"), found[1:], strict=True):
        assert told["error"].startswith(f"bundle.json lists {stem}") and told["error"].endswith("twice")
