"""A tiny bundle behind a real socket."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tinyllava_edge.runtimes.engine import Engine, open_bundle
from tinyllava_edge.runtimes.llama import Llama
from tinyllava_edge.runtimes.server.options import ServerOptions
from tinyllava_edge.runtimes.server.serve import Server

from ..conftest import Pair

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="session")
def engine(siglip: Pair) -> Iterator[Engine]:
    """The float32 build: what the caches keep changes its answers least, so that texts can be compared."""
    with open_bundle(siglip.bundle, "fp32+f32", n_threads=1, allow_unverified=True) as opened:
        opened.warm_up()
        yield opened


@contextlib.contextmanager
def served(
    engine: Engine | Callable[[], Engine], environ: dict[str, str] | None = None, **options: Any
) -> Iterator[Server]:
    """A server in a thread, on a free port; it must end by itself when told to."""
    server = Server(engine, ServerOptions(**{"port": 0, "warm_up": False, **options}), environ=environ or {})
    failures: list[BaseException] = []

    def run() -> None:
        try:
            server.run()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        until(lambda: failures or health(server) == "ok")
        yield server
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()
        if failures:
            raise failures[0]


@pytest.fixture(scope="session")
def server(engine: Engine) -> Iterator[Server]:
    with served(engine) as running:
        yield running


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The model takes 10 ms a token, as real ones do: slow clients still find it at work."""
    decode = Llama.decode_tokens

    def slower(self: Llama, *given: Any, **named: Any) -> Any:
        time.sleep(0.01)
        return decode(self, *given, **named)

    monkeypatch.setattr(Llama, "decode_tokens", slower)
    return monkeypatch


def health(server: Server) -> str:
    return call(server, "GET", "/health")[1]["status"]


def call(
    server: Server, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON or bytes, headers in lower case. Bodies that aren't bytes are sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request(
            method, path, data, {**({"content-type": "application/json"} if data else {}), **(headers or {})}
        )
        reply = connection.getresponse()
        found = {name.lower(): value for name, value in reply.getheaders()}
        content = reply.read()
        return (
            reply.status,
            json.loads(content) if content and "json" in found.get("content-type", "") else content,
            found,
        )
    finally:
        connection.close()


def ask(server: Server, question: Any = "what color?", **fields: Any) -> tuple[int, Any, dict[str, str]]:
    """Chat request with one message."""
    return call(server, "POST", CHAT, {"messages": [{"role": "user", "content": question}], **fields})


def raw(server: Server, data: bytes) -> socket.socket:
    """A connection on which these bytes were sent."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(data)
    return connection


def chat_bytes(**fields: Any) -> bytes:
    """A whole chat request as it goes over the wire."""
    body = json.dumps({"messages": [{"role": "user", "content": "what color?"}], **fields}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.01)


def png(seed: int = 0, width: int = 64, height: int = 48, kind: str = "PNG") -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def data_url(picture: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def shown(*pictures: bytes, text: str = "what color?") -> list[dict[str, Any]]:
    """Content of a message with pictures."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(p)}} for p in pictures]
    return [*parts, {"type": "text", "text": text}]
