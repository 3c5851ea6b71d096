"""A machine that answers our protocol with what can't be, or not at all: said in a line, never a crash or a wait."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinyllava_edge.benchmarks import targets
from tinyllava_edge.benchmarks.targets import sync
from tinyllava_edge.benchmarks.targets.address import parse_address
from tinyllava_edge.benchmarks.targets.connection import Connection
from tinyllava_edge.errors import DataError, EngineError, TinyLlavaEdgeError

from .conftest import Device

ESCAPE = "\x1b]0;owned\x07\x1b[31m"
PEER = """
import hashlib, json, os, sys, time
given, mode = sys.stdin.buffer, sys.argv[1]
given.read(int(given.readline()))
asked = json.loads(given.readline())
escape, op = "\\x1b]0;owned\\x07\\x1b[31m", asked["op"]

def answer(value, payload=b""):
    line = json.dumps({**value, "bytes": len(payload)})
    sys.stdout.buffer.write(f"\\n{asked['nonce']} {line}\\n".encode() + payload)
    sys.stdout.buffer.flush()
    os._exit(0)

if mode == f"silent {op}":
    given.read(1000)
    time.sleep(100)
if mode == f"refuses {op}":
    answer({"error": "engine", "message": escape + "no\\nerror: yes", "hint": escape + "run this"})
if op == "probe":
    system = escape if mode == "escapes" else "Linux"
    answer({"root": "/r", "python": "python3", "version": "3.11", "machine": "m", "system": system})
if op == "look":
    busy = {"run": escape, "pid": {"a": escape}, "since": None} if mode == "busy" else None
    found = {"odd run": (escape, "done"), "failed": ("0" * 16 + "-1", "done"), "results": ("0" * 16 + "-1", "done")}
    run, state = found.get(mode, (None, None))
    answer({"run": run, "state": state, "busy": busy})
if op == "state":
    entry = {"have": False, "damaged": False, "part": 0}
    odd = {"a number": 7, "have": {**entry, "have": 1}, "damaged": {**entry, "damaged": "x"},
           "no part": {"have": False}, "negative": {**entry, "part": -7},
           "text": {**entry, "part": "x"}, "half": {**entry, "part": 0.5}}
    blobs = [odd.get(mode, entry) for _ in asked["blobs"]]
    answer({"blobs": [] if mode in ("none", "escapes") else blobs, "free": 10**15})
if op == "put":
    part = {"creeps": asked["offset"] + 1, "too much": 10**30}.get(mode, 0)
    answer({"have": False} if mode == "put without part" else {"have": False, "part": part})
if op == "fetch" and mode == "failed":
    answer({"state": "failed", "status": {"step": escape, "reason": escape}, "failure": None, "log": escape})
if op == "fetch":
    line = {"schema": 1, "kind": "latency", "runtime": "edge", "build": "", "stage": escape, "value": 1, "unit": "ms",
            "sample": 0, "environment_id": "", "target": "cpu", "detail": {}}
    text = (json.dumps(line) + "\\n").encode()
    answer({"state": "done", "status": {"sha256": hashlib.sha256(text).hexdigest()}, "failure": None}, text)
answer({})
"""


@pytest.fixture
def measure(
    device: Device, place: Path, tiny_bundle: Path, forced: Any, tmp_path: Path
) -> Callable[[str], TinyLlavaEdgeError]:
    """What a client says of a machine of this kind; sshd runs it in the place of our code."""
    script = tmp_path / "peer.py"
    script.write_text(PEER)

    def run(mode: str) -> TinyLlavaEdgeError:
        forced(f"{sys.executable} {script} '{mode}'")
        with pytest.raises(TinyLlavaEdgeError) as caught:
            targets.run(device.url(place), tiny_bundle, device.options(), device.say)
        assert caught.value.message.isprintable() and ESCAPE not in caught.value.hint
        assert all(line.isprintable() for line in device.lines)
        return caught.value

    return run


@pytest.mark.parametrize("mode", ["none", "a number", "have", "damaged", "no part", "negative", "text", "half"])
def test_files_that_can_not_be(measure: Callable[[str], TinyLlavaEdgeError], mode: str) -> None:
    error = measure(mode)
    assert isinstance(error, EngineError) and "an answer about files that can't be" in error.message


def test_an_upload_that_is_never_whole_ends(
    device: Device, measure: Callable[[str], TinyLlavaEdgeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No byte more after three uploads; or one byte more with each, for ever; or more than there are."""
    monkeypatch.setattr(sync, "_CUTS", 3)
    for mode, sendings in {"loops": 3, "creeps": 4, "too much": 3}.items():
        device.lines.clear()
        error = measure(mode)
        assert isinstance(error, EngineError) and "does not become whole there" in error.message
        assert sum("sending" in line for line in device.lines) == sendings
    assert "an answer about files that can't be" in measure("put without part").message


def test_a_machine_that_falls_silent_is_left(
    device: Device, measure: Callable[[str], TinyLlavaEdgeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "_IDLE_S", 1.5)
    monkeypatch.setattr(sync, "_TRIES", 2)
    error = measure("silent put")
    assert isinstance(error, EngineError) and "does not become whole there" in error.message
    assert any("nothing came for" in line for line in device.lines)


def test_silence_is_no_contact(device: Device, place: Path, forced: Any, tmp_path: Path) -> None:
    """However long each attempt lasts, patience ends."""
    script = tmp_path / "peer.py"
    script.write_text(PEER)
    forced(f"{sys.executable} {script} 'silent look'")
    connection = Connection(parse_address(device.url(place)), device.ssh_options, say=device.say, patience_s=0.5)
    connection.ask("probe", 60)
    with pytest.raises(EngineError, match=r"no contact for 0.5 s \(nothing came for 1 s\)"):
        connection.ask("look", 1.0, id="0" * 16)


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("refuses probe", "no error: yes"),
        ("refuses state", "no error: yes"),
        ("busy", "another run is measuring"),
        ("odd run", "names a run"),
        ("failed", "failed ("),
        ("escapes", "an answer about files"),
        ("results", "unprintable text"),
    ],
)
def test_a_terminal_is_not_reached(measure: Callable[[str], TinyLlavaEdgeError], mode: str, says: str) -> None:
    error = measure(mode)
    assert says in error.message and isinstance(error, EngineError | DataError)
