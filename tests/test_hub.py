"""A model by id, through huggingface_hub's real client against a small server on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tinyllava_edge.errors import CheckpointError
from tinyllava_edge.hub import local_model

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "modeling_evil.py": b"raise SystemExit", "x.pkl": b"p"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The two requests that a download makes: what is there, and each file."""

    asked: list[str] = []

    def do_HEAD(self) -> None:
        self.answer(send=False)

    def do_GET(self) -> None:
        self.answer(send=True)

    def answer(self, send: bool) -> None:
        Hub.asked.append(self.path)
        name = self.path.rpartition("/")[2].partition("?")[0]
        if "/api/models/org/tiny" in self.path:
            siblings = [{"rfilename": file, "size": len(data)} for file, data in FILES.items()]
            tree = [{"type": "file", "path": f, "size": len(d), "oid": "0" * 40} for f, d in FILES.items()]
            listing = tree if "/tree/" in self.path else {"id": "org/tiny", "sha": COMMIT, "siblings": siblings}
            body = json.dumps(listing).encode()
        elif self.path.startswith("/org/tiny/resolve/") and name in FILES:
            body = FILES[name]
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if send:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def fetch(model: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the client reads its settings once, when it is imported."""
    code = f"from tinyllava_edge.hub import local_model; print(local_model({model!r}))"
    settings = {**os.environ, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if name not in environment:
            settings.pop(name, None)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings, timeout=120)


def test_a_hub_id_is_downloaded_without_code(endpoint: str, tmp_path: Path) -> None:
    done = fetch("org/tiny", tmp_path, HF_ENDPOINT=endpoint)
    assert done.returncode == 0, done.stderr
    root = Path(done.stdout.strip())
    assert {p.name: p.read_bytes() for p in root.iterdir()} == {
        name: data for name, data in FILES.items() if name in ("config.json", "model.safetensors")
    }
    assert not [path for path in Hub.asked if "evil" in path]


def test_offline_is_respected(endpoint: str, tmp_path: Path) -> None:
    Hub.asked.clear()
    done = fetch("org/tiny", tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "CheckpointError: org/tiny" in done.stderr
    assert Hub.asked == []


def test_directories_and_nonsense(tmp_path: Path) -> None:
    assert local_model(str(tmp_path)) == tmp_path
    for given in ("no-such-place", "/no/such/place", "a/b/c", "../up", "", str(tmp_path / "x" / "y")):
        with pytest.raises(CheckpointError, match="no such directory"):
            local_model(given)
