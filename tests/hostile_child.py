"""A process in which hostile files are opened, one forked child per case, and what its answers must look like.

Time and memory of a child are bounded: an abort in native code, a hang, or gigabytes asked for by one number in a
header are seen as such.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Reads {"call", "arguments"} per line, forks, answers {"status", "kind", "message", "hint", "code"} per line.
HARNESS = r"""
import json, os, resource, signal, sys, traceback
from pathlib import Path
import torch, transformers, onnx, gguf, numpy
torch.set_num_threads(1)
from tinyllava_edge import bundle, checkpoint
from tinyllava_edge.errors import TinyLlavaEdgeError
from tinyllava_edge.export.bundle_writer import export_bundle
from tinyllava_edge.export.verify import verify
from tinyllava_edge.importer.run import import_checkpoint
from tinyllava_edge.runtimes.edge import open_edge
CALLS = {
    "load": lambda root: checkpoint.load(Path(root)),
    "export": lambda root, out: export_bundle(Path(root), Path(out), llm=("f16",), vision=("fp32",)),
    "import": lambda root, out: import_checkpoint(Path(root), Path(out)),
    "open": lambda root: bundle.read_bundle(Path(root)),
    "edge": lambda root, hashes: open_edge(
        Path(root), "fp32+f16", n_threads=1, allow_unverified=True, check_hashes=hashes
    ).close(),
    "verify": lambda root, against, picture: verify(
        Path(root), Path(against), builds=["fp32+f16"], pictures=[Path(picture)], n_threads=1
    ),
}
for line in sys.stdin:
    asked = json.loads(line)
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        signal.alarm(60)
        resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        found = {"kind": "", "message": "", "hint": "", "code": 0}
        try:
            CALLS[asked["call"]](*asked["arguments"])
        except TinyLlavaEdgeError as error:
            kind = type(error).__name__
            found = {"kind": kind, "message": error.message, "hint": error.hint, "code": error.exit_code}
        except BaseException as error:
            text = traceback.format_exc()[-1500:]
            found = {"kind": "!" + type(error).__name__, "message": text, "hint": "", "code": 9}
        os.write(theirs, json.dumps(found).encode())
        os._exit(0)
    os.close(theirs)
    data = b""
    while chunk := os.read(ours, 65536):
        data += chunk
    os.close(ours)
    _, status = os.waitpid(pid, 0)
    print(json.dumps({"status": status, **json.loads(data or b"{}")}), flush=True)
"""
Call = Callable[..., dict[str, Any]]
JSON_THAT_IS_NONE: dict[str, bytes] = {
    "empty": b"",
    "a list": b"[1, 2]",
    "a number": b"7",
    "cut": b'{"model_type": "llava", "text',
    "nested": b'{"a":' * 100_000,
    "not unicode": b'{"name": "\xff\xfe"}',
    "an endless number": b'{"hidden_size": ' + b"9" * 10_000 + b"}",
    "binary": bytes(range(256)),
}


def forked() -> Iterator[Call]:
    """For a fixture: a function of the name of a call and its arguments; see HARNESS."""
    process = subprocess.Popen(
        [sys.executable, "-c", HARNESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdin is not None and process.stdout is not None

    def ask(name: str, *arguments: object) -> dict[str, Any]:
        asked = [value if isinstance(value, bool) else str(value) for value in arguments]
        process.stdin.write(json.dumps({"call": name, "arguments": asked}).encode() + b"\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        return dict(json.loads(process.stdout.readline()))  # type: ignore[union-attr]

    yield ask
    process.stdin.close()
    assert process.wait(timeout=60) == 0


def names(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def refused(found: dict[str, Any], *words: str) -> None:
    """An error of ours with the words in it, on one line, with a next step; the process lived."""
    assert found["status"] == 0, found
    assert found["kind"] and not found["kind"].startswith("!"), found["kind"] + "\n" + found["message"]
    assert found["code"] in (1, 2) and found["hint"], found
    assert "\n" not in found["message"] and len(found["message"]) < 2000, found
    for word in words:
        assert word in found["message"], found


def program(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tinyllava_edge.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def assert_one_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode in (1, 2) and len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr and done.stdout.strip() == "", done.stderr
    for word in words:
        assert word in errors[0], done.stderr
