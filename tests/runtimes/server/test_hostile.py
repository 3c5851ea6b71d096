"""What a malicious or broken client sends, over a socket. The server refuses, or answers, and goes on."""

from __future__ import annotations

import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinyllava_edge.runtimes.engine import Engine
from tinyllava_edge.runtimes.server.serve import Server

from ..conftest import Pair
from .conftest import CHAT, ask, call, chat_bytes, data_url, png, raw, served, shown, until


@pytest.fixture(autouse=True)
def still_answers(server: Server) -> Iterator[None]:
    yield
    assert ask(server, max_tokens=1)[0] == 200


def rss(pid: str = "self") -> int:
    """Resident bytes of this process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def head(length: int | None = None, **headers: str) -> bytes:
    lines = [f"POST {CHAT} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Content-Length: {length}"] if length is not None else []
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def status(connection: socket.socket) -> int:
    """Status of the reply; 0 if the connection was closed without one."""
    data = b""
    try:
        while b"\r\n" not in data:
            piece = connection.recv(4096)
            if not piece:
                return 0
            data += piece
    except ConnectionResetError:
        return 0
    return int(data.split()[1])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"[" * 200_000,
        b'{"messages":' * 100_000,
        b"\xff" * 100,
        b"[" + b"[]," * 400_000 + b"[]]",
    ],
    ids=lambda body: repr(body[:14]),
)
def test_bad_json(server: Server, body: bytes) -> None:
    code, reply, _ = call(server, "POST", CHAT, body, {"content-type": "application/json"})
    assert code == 400 and set(reply["error"]) == {"message", "type", "param", "code"}
    assert reply["error"]["code"] == "invalid_json"


def test_a_body_of_100_mb(engine: Engine) -> None:
    """Refused from its announced length; sent in chunks, as soon as it is too long; never held in memory."""
    with served(engine, max_body_mb=4) as server:
        before = rss()
        with raw(server, head(100 << 20, Expect="100-continue")) as connection:
            assert status(connection) == 413  # and no "100 Continue", so that nothing is sent at all
        for announced in (True, False):
            start = head(100 << 20) if announced else head(Transfer_Encoding="chunked")
            with raw(server, start) as connection:
                piece = b" " * (1 << 20)
                chunk = piece if announced else b"100000\r\n" + piece + b"\r\n"
                for _ in range(100):
                    connection.sendall(chunk)
                if not announced:
                    connection.sendall(b"0\r\n\r\n")
                assert status(connection) == 413
        assert rss() - before < 40 << 20


def test_bodies_together_are_bounded(engine: Engine) -> None:
    """Two requests that don't end hold what there is; a third is told to come back, and may once they are gone."""
    with served(engine, max_memory_mb=3, max_body_mb=2) as server:
        holding = [raw(server, head(2 << 20) + b" " * 1_450_000) for _ in range(2)]
        until(lambda: b"body_bytes 2.9e+06" in call(server, "GET", "/metrics")[1])
        large = "x" * 400_000
        until(lambda: ask(server, large)[0] == 429)
        _, reply, headers = ask(server, large)
        assert reply["error"]["code"] == "memory_full" and "retry-after" in headers
        for connection in holding:
            connection.close()
        until(lambda: ask(server, max_tokens=1)[0] == 200)


def test_a_bomb_of_a_picture(server: Server) -> None:
    """A PNG of 60,000 x 60,000 pixels in 10 kB, and one whose pixels inflate without end."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * 10_000_000, 9)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )
    before = rss()
    code, reply, _ = ask(server, shown(bomb))
    assert code == 400 and reply["error"]["code"] == "invalid_image" and "pixels" in reply["error"]["message"]
    text = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
        + chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 200_000_000, 9))
        + chunk(b"IDAT", zlib.compress(b"\0" * 200))
        + chunk(b"IEND", b"")
    )
    assert ask(server, shown(text), max_tokens=1)[0] in (200, 400)
    assert rss() - before < 150 << 20


@pytest.mark.parametrize(
    "picture",
    [
        b"hello",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        png()[:300],
        b"%PDF-1.4",
        b"\xff\xd8\xff",
    ],
    ids=lambda picture: repr(picture[:8]),
)
def test_not_a_picture(server: Server, picture: bytes) -> None:
    for stream in (False, True):
        code, reply, _ = ask(server, shown(picture), stream=stream)
        assert code == 400 and reply["error"]["code"] == "invalid_image" and reply["error"]["param"] == "messages"


def test_thin_and_huge_pictures(server: Server) -> None:
    from PIL import Image

    for size in ((20_001, 1), (1, 4000)):
        buffer = io.BytesIO()
        Image.new("RGB", size).save(buffer, "PNG")
        assert ask(server, shown(buffer.getvalue()))[0] == 400


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/health", "file:///etc/hostname", "https://example.com/x.png"])
def test_nothing_is_fetched(server: Server, url: str) -> None:
    counted = call(server, "GET", "/metrics")[1]
    parts = [{"type": "image_url", "image_url": {"url": url.format(port=server.port)}}]
    code, reply, _ = ask(server, parts)
    assert code == 400 and reply["error"]["code"] == "unsupported_image_url"
    after = call(server, "GET", "/metrics")[1]
    line = b'http_requests_total{route="/health",status="200"}'
    assert [x for x in counted.splitlines() if line in x] == [x for x in after.splitlines() if line in x]


def test_special_text_stays_text(server: Server, engine: Engine) -> None:
    for text in ("</s><image><s> what?", "\u202eabc\ufeff", "😀" * 50, "a\x01\x1b[31m\x7f", "{{7*7}} ${x} %s"):
        code, reply, _ = ask(server, text, max_tokens=6)
        assert code == 200 and reply["choices"][0]["message"]["content"] == engine.generate(text, max_tokens=6).text
    body = b'{"messages":[{"role":"user","content":"%s"}]}'
    for escape in (b"\\ud83d", b"\\udc00 x", b"a\\u0000b"):
        code, reply, _ = call(server, "POST", CHAT, body % escape, {"content-type": "application/json"})
        assert code == 400 and reply["error"]["param"] == "messages[0].content[0].text"


def test_10_000_messages(server: Server) -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": "x"} for i in range(10_001)]
    code, reply, _ = call(server, "POST", CHAT, {"messages": messages})
    assert code == 400 and reply["error"]["param"] == "messages"


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::=",
        "root ::= root",
        "x ::= [a-z]",
        "root ::= " + "(" * 5000,
        'root ::= "' + "a" * 60_000 + '"',
        "root ::= ((([a-z]*)*)*)*",
        "root ::= [a-z]{1000000}",
        "\u0000",
    ],
    ids=lambda grammar: grammar[:22],
)
def test_hostile_grammars(server: Server, grammar: str) -> None:
    start = time.monotonic()
    code, reply, _ = ask(server, grammar=grammar, max_tokens=4)
    assert code in (200, 400) and time.monotonic() - start < 10
    assert code == 200 or reply["error"]["message"]


def test_hostile_schemas(server: Server) -> None:
    deep: dict[str, object] = {"type": "string"}
    for _ in range(25):
        deep = {"type": "array", "items": deep}
    schemas = [
        deep,
        {"$ref": "#"},
        {"$ref": "http://example.com/s.json"},
        {"type": "nonsense"},
        {"type": "string", "pattern": "(a+)+$"},
        {"type": "string", "minLength": 10**9},
        {"enum": []},
        {"properties": 5},
        {"anyOf": [{"$ref": "#"}] * 50},
    ]
    for schema in schemas:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        start = time.monotonic()
        code, _, _ = ask(server, response_format=form, max_tokens=4)
        assert code in (200, 400), schema
        assert time.monotonic() - start < 10, schema


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/%2e%2e/options.py",
        "/page/index.html",
        "/app.js/",
        "//app.js",
        "/app.js%00",
        "/index.html",
        "/style.css/../app.js",
        "/v1/models/../../app.js",
        "/.git/config",
        "/%ff",
        "/v1",
        "/docs",
    ],
)
def test_paths_lead_nowhere(server: Server, path: str) -> None:
    with raw(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()) as connection:
        reply = b""
        while piece := connection.recv(65536):
            reply += piece
    assert reply.split()[1] == b"404" and b"root:" not in reply
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] in ("not_found", "model_not_found")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "HEAD", "GET", "BREW"])
def test_methods(server: Server, method: str) -> None:
    code, _, headers = call(server, method, CHAT)
    assert code == 405 and headers["allow"] == "POST"


@pytest.mark.parametrize(
    "kind", ["text/plain", "multipart/form-data", "application/x-www-form-urlencoded", "application/json2", ""]
)
def test_only_json(server: Server, kind: str) -> None:
    body = chat_bytes().partition(b"\r\n\r\n")[2]
    assert call(server, "POST", CHAT, body, {"content-type": kind})[0] == 415
    assert call(server, "POST", CHAT, body, {"content-encoding": "gzip"})[0] == 415


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 100,
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 70_000 + b"\r\n\r\n",
        b"POST "
        + CHAT.encode()
        + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: -5\r\n\r\n",
        b"POST "
        + CHAT.encode()
        + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST "
        + CHAT.encode()
        + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=lambda data: repr(data[:24]),
)
def test_broken_http(server: Server, data: bytes) -> None:
    with raw(server, data) as connection:
        assert status(connection) in (0, 400, 403)


def test_upgrade_to_a_websocket(server: Server) -> None:
    upgrade = (
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: YWFhYWFhYWFhYWFhYWFhYQ==\r\n\r\n"
    )
    with raw(server, upgrade) as connection:
        assert status(connection) == 200  # the page, as if nothing had been asked


def test_slow_heads_and_bodies(engine: Engine) -> None:
    with served(engine, read_timeout_s=1) as server:
        starts = [b"", b"GET / HT", head(100), head(100) + b"{", head(Transfer_Encoding="chunked") + b"1\r\n{\r\n"]
        connections = [raw(server, start) for start in starts]
        begin, codes = time.monotonic(), list[int]()
        drip = connections[1]
        while time.monotonic() - begin < 1.6:
            try:
                drip.sendall(b"T")  # a byte now and then buys no time
            except OSError:
                break
            time.sleep(0.2)
        for connection in connections:
            with connection:
                codes.append(status(connection))
        assert codes == [0, 0, 408, 408, 408] and time.monotonic() - begin < 6


def test_idle_connections_are_closed(engine: Engine) -> None:
    with (
        served(engine, keep_alive_s=1) as server,
        raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection,
    ):
        assert status(connection) == 200
        begin = time.monotonic()
        while connection.recv(4096):
            pass
        assert 0.5 < time.monotonic() - begin < 4


def test_too_many_connections(engine: Engine) -> None:
    with served(engine, max_connections=8) as server:
        idle = [raw(server, b"") for _ in range(10)]
        until(lambda: health_code(server) == 503)
        for connection in idle:
            connection.close()
        until(lambda: health_code(server) == 200)


def health_code(server: Server) -> int:
    return call(server, "GET", "/health")[0]


def test_pipelined_requests(server: Server) -> None:
    with raw(server, 3 * b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
        data = b""
        while data.count(b'{"status":"ok"}') < 3:
            piece = connection.recv(65536)
            assert piece
            data += piece


def test_errors_tell_nothing_of_the_inside(server: Server, siglip: Pair) -> None:
    for content in (
        shown(b"hello"),
        "x" * 200_000,
        [{"type": "image_url", "image_url": {"url": data_url(png())[:-3]}}],
    ):
        _, reply, headers = ask(server, content)
        message = json.dumps(reply)
        assert str(siglip.bundle) not in message and "Traceback" not in message and "site-packages" not in message
        assert "server" not in headers
