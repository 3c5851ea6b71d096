"""Host, Origin and key, over a socket."""

from __future__ import annotations

import socket

import pytest

from tinyllava_edge.runtimes.engine import Engine
from tinyllava_edge.runtimes.server.guard import is_loopback
from tinyllava_edge.runtimes.server.serve import Server

from .conftest import CHAT, ask, call, raw, served

KEY = {"TINYLLAVA_EDGE_API_KEY": "0123456789abcdef-key"}
BEARER = {"authorization": f"Bearer {KEY['TINYLLAVA_EDGE_API_KEY']}"}


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:99", "127.0.0.1", "127.0.0.1:1", "[::1]:8080", "192.168.1.7", socket.gethostname()]
)
def test_own_names(server: Server, host: str) -> None:
    assert call(server, "GET", "/health", headers={"host": host})[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "a b",
        "localhost:x",
        "localhost,evil",
        "localhost@evil",
        "[evil]",
        "x" * 300,
    ],
)
@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", CHAT])
def test_foreign_names(server: Server, host: str, path: str) -> None:
    """What a page gets that has pointed its own name at this machine."""
    status, reply, _ = call(server, "GET", path, headers={"host": host})
    assert status == 403 and reply["error"]["code"] == "host_not_allowed"


def test_more_names(engine: Engine) -> None:
    with served(engine, allowed_hosts=("nas.home",)) as server:
        assert call(server, "GET", "/health", headers={"host": "NAS.home:8080"})[0] == 200
        assert call(server, "GET", "/health", headers={"host": "nas.work"})[0] == 403


def test_no_host_header(server: Server) -> None:
    with raw(server, b"GET /health HTTP/1.0\r\n\r\n") as connection:
        assert b" 403 " in connection.recv(1000).splitlines()[0]


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "file://", "http://localhost.evil"]
)
def test_other_sites_pages_may_not_ask(server: Server, origin: str) -> None:
    before = call(server, "GET", "/metrics")[1]
    status, reply, headers = call(server, "POST", CHAT, b"{}", {"origin": origin, "content-type": "text/plain"})
    assert status == 403 and reply["error"]["code"] == "origin_not_allowed"
    assert not [name for name in headers if name.startswith("access-control")]
    status, _, headers = call(
        server, "OPTIONS", CHAT, headers={"origin": origin, "access-control-request-method": "POST"}
    )
    assert status == 403 and "access-control-allow-origin" not in headers
    assert b'route="/v1/chat/completions",status="403"' not in before


def test_own_page_may(server: Server) -> None:
    host = f"localhost:{server.port}"
    status, reply, headers = call(server, "GET", "/v1/models", headers={"host": host, "origin": f"http://{host}"})
    assert status == 200 and reply["data"] and "access-control-allow-origin" not in headers


def test_listed_origins(engine: Engine) -> None:
    app = "https://app.example"
    with served(engine, KEY, allowed_origins=(app,)) as server:
        wish = {"origin": app, "access-control-request-headers": "authorization,x-stainless-os"}
        status, _, headers = call(server, "OPTIONS", CHAT, headers=wish)
        assert (
            status == 204
            and headers["access-control-allow-origin"] == app
            and "POST" in headers["access-control-allow-methods"]
        )
        assert headers["access-control-allow-headers"] == "authorization,x-stainless-os"
        status, _, headers = call(server, "GET", "/v1/models", headers={"origin": app, **BEARER})
        assert status == 200 and headers["access-control-allow-origin"] == app and headers["vary"] == "Origin"
        status, _, headers = call(server, "GET", "/v1/models", headers={"origin": app})
        assert status == 401 and headers["access-control-allow-origin"] == app  # so that the page can read why
        assert call(server, "GET", "/v1/models", headers={"origin": "https://app.example.evil", **BEARER})[0] == 403


def test_every_origin(engine: Engine) -> None:
    with served(engine, allowed_origins=("*",)) as server:
        assert call(server, "GET", "/v1/models", headers={"origin": "https://any.example"})[0] == 200


def test_key(engine: Engine) -> None:
    with served(engine, KEY) as server:
        for path in ("/v1/models", "/v1/models/x", "/metrics"):
            status, reply, headers = call(server, "GET", path)
            assert (
                status == 401
                and reply["error"]["code"] == "invalid_api_key"
                and headers["www-authenticate"] == "Bearer"
            )
        assert ask(server)[0] == 401
        right = BEARER["authorization"]
        for wrong in (
            "Bearer x",
            "Bearer ",
            "Basic " + right.split()[1],
            right[:-1],
            right + "x",
            right.upper(),
            "é",
            "Bearer é",
        ):
            assert (
                call(server, "GET", "/v1/models", headers={"authorization": wrong.encode("latin-1").decode("latin-1")})[
                    0
                ]
                == 401
            )
        for path in ("/health", "/", "/app.js"):
            assert call(server, "GET", path)[0] == 200
        assert call(server, "GET", "/v1/models", headers={"authorization": right.replace("Bearer", "bearer")})[0] == 200
        assert call(server, "GET", "/metrics", headers=BEARER)[0] == 200


@pytest.mark.parametrize(
    ("host", "wanted"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.1", False),
        ("example.com", False),
    ],
)
def test_loopback(host: str, wanted: bool) -> None:
    assert is_loopback(host) is wanted
