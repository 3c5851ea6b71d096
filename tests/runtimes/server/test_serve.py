"""A server's life: binding, loading, draining, signals, exit codes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tinyllava_edge.errors import BundleError, UsageError
from tinyllava_edge.runtimes.engine import Engine, open_bundle
from tinyllava_edge.runtimes.server.options import ServerOptions
from tinyllava_edge.runtimes.server.serve import Server, bind

from ..conftest import Pair
from .conftest import ask, call, chat_bytes, raw, served, until
from .test_chat import ENDLESS

CHILD = """
import sys
from tinyllava_edge.runtimes.engine import open_bundle
from tinyllava_edge.runtimes.server.options import ServerOptions
from tinyllava_edge.runtimes.server.serve import serve
options = ServerOptions(port=0, grace_s=float(sys.argv[2]), log_requests=True)
opened = lambda: open_bundle(sys.argv[1], n_threads=1, allow_unverified=True)
serve(opened, options, say=lambda line: print(line, flush=True))
"""


class Child:
    """A server in a process of its own."""

    def __init__(self, bundle: Path, grace_s: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(bundle), str(grace_s)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        self.port = int(self.line.split(";")[0].rpartition(":")[2])

    def ready(self) -> None:
        until(lambda: call(self, "GET", "/health")[0] == 200, 60)  # type: ignore[arg-type]

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


@pytest.fixture
def child(siglip: Pair, request: pytest.FixtureRequest) -> Iterator[Child]:
    started = Child(siglip.bundle, getattr(request, "param", 20))
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
            started.process.communicate()


def stream(child: Child) -> socket.socket:
    """A stream that has begun."""
    connection = raw(child, chat_bytes(stream=True, **ENDLESS))  # type: ignore[arg-type]
    while b"content" not in connection.recv(4096):
        pass
    return connection


def rest(connection: socket.socket) -> str:
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data.decode()


def test_sigterm_lets_answers_end(child: Child) -> None:
    child.ready()
    with stream(child) as connection:
        child.process.send_signal(signal.SIGTERM)
        codes = set()
        while b'"draining"' not in json.dumps(reply := call(child, "GET", "/health")[1]).encode():  # type: ignore[arg-type]
            codes.add(reply["status"])
        status, reply, headers = ask(child)  # type: ignore[arg-type]
        assert status == 503 and reply["error"]["code"] == "draining" and "retry-after" in headers
        text = rest(connection)
    assert '"finish_reason":"length"' in text and "[DONE]" in text and codes <= {"ok"}
    code, out, err = child.end()
    assert code == 0 and err == "" and "stopping: 1 answers have 20 s to end" in out
    assert "POST /v1/chat/completions 200" in out and "what color" not in out


@pytest.mark.parametrize("child", [0.1], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_after_the_grace_period_answers_are_cut_honestly(child: Child, number: int) -> None:
    child.ready()
    with stream(child) as connection:
        begin = time.monotonic()
        child.process.send_signal(number)
        text = rest(connection)
    last = [line for line in text.split("\n\n") if line.strip().startswith("data") or "data: " in line][-1]
    assert '"error"' in last and "shutting down" in last and "[DONE]" not in text
    code, _, err = child.end()
    assert code == 0 and err == "" and time.monotonic() - begin < 5


def test_a_second_ctrl_c_leaves_at_once(child: Child) -> None:
    child.ready()
    with stream(child):
        child.process.send_signal(signal.SIGINT)
        until(lambda: call(child, "GET", "/health")[0] == 503)  # type: ignore[arg-type]
        begin = time.monotonic()
        child.process.send_signal(signal.SIGINT)
        assert child.end()[0] == 1 and time.monotonic() - begin < 1


def test_an_idle_server_leaves_soon(child: Child) -> None:
    child.ready()
    half = chat_bytes()[:-5]
    with raw(child, b""), raw(child, b"GET / HTTP/1.1\r\n"), raw(child, half):  # type: ignore[arg-type]
        begin = time.monotonic()
        child.process.send_signal(signal.SIGTERM)
        code, _, err = child.end()
        assert code == 0 and err == "" and time.monotonic() - begin < 5


def test_sigterm_while_it_loads() -> None:
    """What native code loads can't be interrupted: after the grace period the process leaves all the same."""
    code = CHILD.replace("opened = ", "import time; opened = lambda: time.sleep(60); never = ")
    process = subprocess.Popen([sys.executable, "-c", code, "", "0.2"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and "listening" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    process.communicate(timeout=20)
    assert process.returncode == 0 and time.monotonic() - begin < 10


def test_loading(engine: Engine) -> None:
    """While the model loads the server says so; what opens it closes it."""
    go = threading.Event()

    def slow() -> Engine:
        go.wait(20)
        return engine

    server = Server(slow, ServerOptions(port=0, warm_up=False), environ={})
    closed: list[Any] = []
    server_thread = threading.Thread(target=server.run)
    real_close = engine.close
    engine.close = lambda **kw: closed.append(kw)  # type: ignore[method-assign]
    try:
        server_thread.start()
        until(lambda: call(server, "GET", "/health")[1] == {"status": "loading"})
        assert call(server, "GET", "/health")[0] == 503 and call(server, "GET", "/")[0] == 200
        status, reply, headers = ask(server)
        assert status == 503 and reply["error"]["code"] == "loading" and "retry-after" in headers
        assert call(server, "GET", "/metrics")[0] == 200
        go.set()
        until(lambda: call(server, "GET", "/health")[0] == 200)
        assert ask(server, max_tokens=1)[0] == 200
    finally:
        go.set()
        server.stop()
        server_thread.join(20)
        engine.close = real_close  # type: ignore[method-assign]
    assert closed == [{}] and not server_thread.is_alive()


def test_the_engines_failure_is_raised(tmp_path: Path) -> None:
    server = Server(lambda: open_bundle(tmp_path / "none"), ServerOptions(port=0), environ={})
    with pytest.raises(BundleError):
        server.run()


def test_stop_before_run(engine: Engine) -> None:
    server = Server(engine, ServerOptions(port=0, warm_up=False), environ={})
    server.stop()
    server.run()


def test_a_port_in_use(engine: Engine, server: Server) -> None:
    with pytest.raises(UsageError, match=f"port {server.port}: Address already in use"):
        bind("127.0.0.1", server.port)
    with pytest.raises(UsageError, match="can't listen on no.such.name.invalid"):
        bind("no.such.name.invalid", 0)
    with pytest.raises(UsageError, match="can't listen"):
        bind("x" * 300, 0)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_open_addresses_need_a_key(engine: Engine, host: str) -> None:
    with pytest.raises(UsageError, match="no API key") as found:
        Server(engine, ServerOptions(host=host, port=0), environ={})
    assert "--api-key-file" in found.value.hint and "--insecure-no-key" in found.value.hint
    with served(engine, host="0.0.0.0", insecure_no_key=True) as server:
        assert call(server, "GET", "/health", headers={"host": "evil.example"})[0] == 403
    key = "0123456789abcdef"
    with served(engine, {"TINYLLAVA_EDGE_API_KEY": key}, host="0.0.0.0") as server:
        assert call(server, "GET", "/health", headers={"host": "nas.home"})[0] == 200
        assert call(server, "GET", "/v1/models", headers={"host": "nas.home"})[0] == 401


def test_ipv6(engine: Engine) -> None:
    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists() or not Path("/proc/net/if_inet6").read_text():
        pytest.skip("no IPv6 here")
    server = Server(engine, ServerOptions(host="::1", port=0), environ={})
    assert server.url == f"http://[::1]:{server.port}"
    server.stop()
    server.run()


def test_without_the_page(engine: Engine) -> None:
    with served(engine, page=False) as server:
        assert call(server, "GET", "/")[0] == 404 and call(server, "GET", "/v1/models")[0] == 200


def test_importing_options_loads_no_server() -> None:
    code = "import sys, tinyllava_edge.runtimes.server.options; print({'uvicorn', 'h11', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "set()"
