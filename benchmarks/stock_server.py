"""llama.cpp's own llama-server as a process: started with a GGUF and an mmproj, asked over HTTP, ended.

For stock_agreement.py and tests/arm64. A runner such as qemu-user stands in front of a program for another machine.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tinyllava_edge.errors import EngineError, UsageError

HOST = "127.0.0.1"
SIGNATURES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"BM": "image/bmp"}  # what stb_image reads
# an emulated processor is 50 times slower; nothing here is a measurement
START_S, ANSWER_S, STOP_S, VERSION_S = 300.0, 600.0, 20.0, 60.0
TAIL = 2000  # characters of the log that an error shows


class StockServer:
    """A running llama-server on a free loopback port; a context manager that ends it.

    Args:
        program: llama-server.
        model: the text GGUF.
        mmproj: its mmproj GGUF.
        runner: words in front of the program, e.g. `qemu-aarch64-static -L /usr/aarch64-linux-gnu`.
        context: positions (-c).
        threads: CPU threads.
        environment: variables on top of this process's own, e.g. QEMU_CPU.
        arguments: further ones for llama-server.

    Raises:
        EngineError: it can't be started, it ended, or wasn't ready in time; the message holds the end of its log.
    """

    def __init__(
        self,
        program: Path,
        model: Path,
        mmproj: Path,
        *,
        runner: Sequence[str] = (),
        context: int = 2048,
        threads: int = 1,
        environment: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        self.program = program
        self.port = free_port()
        command = [*runner, str(program), "-m", str(model), "--mmproj", str(mmproj), "--jinja", "-c", str(context)]
        command += ["--host", HOST, "--port", str(self.port), "-t", str(threads), "--threads-http", "2", "-np", "1"]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        try:
            self._process = subprocess.Popen(
                [*command, "--no-warmup", "--offline", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
            )
        except OSError as error:
            self._log.close()
            raise EngineError(f"{command[0]}: can't be started ({error.strerror})", "see docs/native.md") from error
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            code = self._process.poll()
            if code is not None:
                raise EngineError(f"{self.program}: ended with code {code}:\n{self.log()}", "see the log above")
            try:
                if self._request("GET", "/health", None, 10)[0] == 200:
                    return
            except (OSError, http.client.HTTPException):
                pass  # not listening yet
            time.sleep(0.2)
        raise EngineError(f"{self.program}: not ready after {START_S:.0f} s:\n{self.log()}", "see the log above")

    def ask(self, picture: bytes, question: str, *, max_tokens: int = 16) -> str:
        """A picture's file and a question → the greedy answer, stripped.

        Raises:
            EngineError: the server refused, or is gone.
        """
        content = [
            {"type": "image_url", "image_url": {"url": data_url(picture)}},
            {"type": "text", "text": question},
        ]
        body = {"temperature": 0, "max_tokens": max_tokens, "messages": [{"role": "user", "content": content}]}
        status, reply = self.post("/v1/chat/completions", body)
        if status != 200:
            raise EngineError(f"llama-server said {status}: {json.dumps(reply)[:TAIL]}")
        return str(reply["choices"][0]["message"]["content"]).strip()

    def post(self, path: str, body: object) -> tuple[int, Any]:
        """Status and JSON of one request. Raises EngineError if the server is gone."""
        try:
            status, data = self._request("POST", path, json.dumps(body).encode(), ANSWER_S)
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"llama-server doesn't answer ({error}):\n{self.log()}", "see the log above") from error
        return status, json.loads(data)

    def _request(self, method: str, path: str, body: bytes | None, timeout: float) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout)
        try:
            connection.request(method, path, body, {"content-type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    def log(self) -> str:
        """The end of what the server wrote."""
        self._log.seek(0)
        return self._log.read().decode("utf-8", "replace")[-TAIL:]

    def close(self) -> None:
        """End the process; a second call does nothing."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()

    def __enter__(self) -> StockServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_program(program: Path, runner: Sequence[str]) -> None:
    """Can this machine start it? It is asked for its version.

    Raises:
        UsageError: no such program or runner, or a program for another machine without a runner.
        EngineError: it can't be started, or ended with an error.
    """
    if not program.is_file():
        raise UsageError(f"{program}: no such program", "build it: runtimes/native/build.sh")
    if runner and shutil.which(runner[0]) is None:
        raise UsageError(f"{runner[0]}: no such program", "apt-get install qemu-user-static")
    theirs, ours = _elf_machine(program), _elf_machine(Path(sys.executable))
    if not runner and None not in (theirs, ours) and theirs != ours:
        raise UsageError(
            f"{program}: built for another machine (ELF machine {theirs}, this one is {ours})",
            'pass --runner "qemu-aarch64-static -L /usr/aarch64-linux-gnu", or build for this one: build.sh --native',
        )
    command = [*runner, str(program), "--version"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=VERSION_S)
    except OSError as error:
        raise EngineError(f"{command[0]}: can't be started ({error.strerror})", "see docs/native.md") from error
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"{program}: says no version within {VERSION_S:.0f} s", "is it llama-server?") from error
    if done.returncode:
        words = " ".join(done.stderr.decode("utf-8", "replace").split())[-TAIL:] or "it said nothing"
        raise EngineError(
            f"{shlex.join(command)} ended with code {done.returncode}: {words}", "check --server and --runner"
        )


def _elf_machine(path: Path) -> int | None:
    """ELF's e_machine: 62 is x86-64, 183 arm64; None for a script."""
    with path.open("rb") as file:
        head = file.read(20)
    if len(head) < 20 or head[:4] != b"\x7fELF":
        return None
    return int.from_bytes(head[18:20], "big" if head[5] == 2 else "little")


def free_port() -> int:
    """A loopback port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def data_url(picture: bytes) -> str:
    """A picture's file as a data URL. Raises EngineError for a format that llama.cpp's decoder doesn't read."""
    for start, kind in SIGNATURES.items():
        if picture.startswith(start):
            return f"data:{kind};base64,{base64.b64encode(picture).decode()}"
    raise EngineError("llama-server reads PNG, JPEG and BMP; this picture is none of them", "convert it to PNG")


def program_facts(program: Path) -> dict[str, str]:
    """Name → SHA-256 of the program and of the libraries beside it, links left out."""
    files = [program, *sorted(program.parent.glob("*.so*"))]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if not file.is_symlink()}
