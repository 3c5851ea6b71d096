"""Requests to another machine through the system's OpenSSH client, one process each.

ssh_config counts, host keys are checked, nothing is asked. A lost connection is told from a refusal: the first is tried
again with growing pauses, the second is said at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from tinyllava_edge.benchmarks.targets.address import Address
from tinyllava_edge.errors import DependencyError, EngineError, StorageError, TinyLlavaEdgeError, UsageError

PATIENCE_S = 1800  # seconds without any contact after which the client gives up; the run goes on
_LONGEST_PAUSE_S = 30
_CONNECTED_S = 120  # an attempt that lasted longer had found its machine: ssh gives up sooner
_MAX_REPLY = 1 << 28  # bytes; raw samples of a day are a tenth of it
_PIECE = 1 << 16  # bytes; with each one that is taken or comes, a connection is not idle
_BOOT = "import sys;i=sys.stdin.buffer;exec(i.read(int(i.readline())))"  # reads device.py, then the request
_FIXED = (
    "BatchMode=yes",
    "StrictHostKeyChecking=yes",
    "NoHostAuthenticationForLocalhost=no",
    "RequestTTY=no",
    "RemoteCommand=none",
    "ClearAllForwardings=yes",
    "ForwardAgent=no",
    "ForwardX11=no",
    "PermitLocalCommand=no",
    "LogLevel=INFO",
)
_REFUSED = ("knownhostscommand",)  # may answer with the very key that is to be checked; ssh_config's own one counts
_DEFAULTS = ("ConnectTimeout=20", "ServerAliveInterval=15", "ServerAliveCountMax=4")
_SHOWN = 500  # characters of what another machine says
_OPTION = re.compile(r"[A-Za-z][A-Za-z0-9]{1,63}=.+")
_ERRORS: dict[str, type[TinyLlavaEdgeError]] = {
    "usage": UsageError,
    "dependency": DependencyError,
    "engine": EngineError,
    "storage": StorageError,
}
_KEYS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "probe": {"root": str, "python": str, "version": str, "machine": str, "system": str},
    "look": {"run": (str, type(None)), "state": (str, type(None)), "busy": (dict, type(None))},
    "state": {"blobs": list, "free": int},
    "put": {"have": bool},
    "start": {"run": str, "state": str},
    "wait": {"state": str},
    "fetch": {"state": str, "status": (dict, type(None)), "failure": (dict, type(None))},
    "delivered": {},
}
_NO_HOST_KEY = ("Host key verification failed", "key is known for", "REMOTE HOST IDENTIFICATION HAS CHANGED")
_FINAL = ("Could not resolve hostname", "Bad configuration option", "command-line line", "Bad owner or permissions")
_NO_LOGIN = ("Permission denied", "Too many authentication failures")


class Lost(Exception):
    """The connection ended before the answer came."""


class Idle(Lost):
    """The connection stood, but nothing went over it for too long."""


@dataclass(frozen=True)
class Reply:
    """An answer of device.py."""

    value: Mapping[str, Any]
    """its JSON object"""
    payload: bytes
    """the bytes after it"""


class Connection:
    """A machine that answers requests. Holds no process between them."""

    def __init__(
        self,
        address: Address,
        ssh_options: Sequence[str] = (),
        python: str = "python3",
        say: Callable[[str], None] = lambda line: None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Check the options; nothing is connected yet. Raises UsageError or DependencyError."""
        program = shutil.which("ssh")
        if program is None:
            raise DependencyError("there is no `ssh` program here", "install OpenSSH's client")
        if not python.isprintable() or python.startswith("-") or not python:
            raise UsageError(f"--remote-python {ascii(python[:80])}", "name an interpreter on that machine")
        self.address = address
        self._options = [check_option(option) for option in ssh_options]
        given = {option.partition("=")[0].lower() for option in self._options}
        defaults = [option for option in _DEFAULTS if option.partition("=")[0].lower() not in given]
        words = [word for option in (*_FIXED, *self._options, *defaults) for word in ("-o", option)]
        remote = f"exec {shlex.quote(python)} -I -c {shlex.quote(_BOOT)}"
        self._command = [program, "-T", *words, *address.arguments(), remote]
        self._source = Path(__file__).with_name("device.py").read_bytes()
        self.say = say
        self._patience_s = patience_s
        self._met = False

    @property
    def source(self) -> str:
        """The text that runs on the machine."""
        return self._source.decode()

    def ask(self, op: str, timeout_s: float | None = None, **request: Any) -> Reply:
        """Send a request that may safely be sent twice, until it is answered.

        Args:
            op: key of OPERATIONS of device.py.
            timeout_s: seconds without a byte after which the connection counts as lost; None waits for ever.
            request: what the operation needs.

        Raises:
            EngineError: not reachable, not allowed in, or no sensible answer.
            UsageError, DependencyError, StorageError: the machine refused.
        """
        contact, pause = time.monotonic(), 1.0
        while True:
            begun = time.monotonic()
            try:
                return self.ask_once(op, timeout_s, **request)
            except Lost as error:
                if time.monotonic() - begun > _CONNECTED_S and not isinstance(error, Idle):
                    contact, pause = time.monotonic(), 1.0
                if not self._met:
                    raise EngineError(f"{self.address.place}: {error}", self._hint()) from error
                if time.monotonic() - contact > self._patience_s:
                    raise EngineError(
                        f"{self.address.place}: no contact for {self._patience_s:g} s ({error})",
                        "what runs there goes on; the same command picks it up",
                    ) from error
                self.say(f"{self.address.place}: connection lost ({error}); again in {pause:g} s")
                time.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE_S)

    def ask_once(
        self,
        op: str,
        timeout_s: float | None = None,
        payload: Callable[[Sink], None] | None = None,
        **request: Any,
    ) -> Reply:
        """Send one request, and bytes after it. Raises Lost besides what `ask` raises."""
        nonce = secrets.token_hex(16)
        line = json.dumps({"op": op, "dir": self.address.directory, "nonce": nonce, **request}).encode() + b"\n"
        with tempfile.TemporaryFile() as talk, self._process(talk) as process, _limit(process, timeout_s) as clock:
            assert process.stdin and process.stdout  # both are pipes
            with contextlib.suppress(BrokenPipeError):  # a refusal may come before the last byte was sent
                process.stdin.write(b"%d\n" % len(self._source) + self._source + line)
                process.stdin.flush()
                if payload:
                    payload(_Pipe(process.stdin, clock.touch))
            # stdin stays open: device.py's `wait` ends with it
            printed = bytearray()
            while len(printed) <= _MAX_REPLY and (piece := process.stdout.read1(_PIECE)):  # type: ignore[attr-defined]
                clock.touch()
                printed += piece
            if len(printed) > _MAX_REPLY:
                process.kill()
                raise EngineError(f"{self.address.place}: it prints without end", "look at its login shell's files")
            code = process.wait()
            if clock.late:
                raise Idle(f"nothing came for {timeout_s:g} s")
            talk.seek(0)
            return self._read(op, bytes(printed), nonce, code, talk.read(1 << 20).decode("utf-8", "replace"))

    @contextlib.contextmanager
    def _process(self, talk: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=talk,
            env={**os.environ, "LC_ALL": "C"},
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    if pipe:
                        pipe.close()

    def _read(self, op: str, printed: bytes, nonce: str, code: int, talk: str) -> Reply:
        _, found, after = printed.partition(f"\n{nonce} ".encode())
        if found:
            line, newline, payload = after.partition(b"\n")
            if not newline:
                raise Lost("half an answer")
            value = _object(line)
            if value is None:
                raise EngineError(f"{self.address.place}: an answer that is not JSON", "try again")
            self._met = True
            if value.get("error"):
                kind = _ERRORS.get(str(value["error"]), EngineError)
                raise kind(f"{self.address.place}: {shown(value.get('message'))}", shown(value.get("hint", "")))
            odd = [key for key, kind in _KEYS[op].items() if not isinstance(value.get(key, ...), kind)]
            if odd:
                raise EngineError(f"{self.address.place}: answers {op} without {odd[0]}", "try again")
            if len(payload) < int(value["bytes"]):
                raise Lost(f"{len(payload):,} of {value['bytes']:,} bytes came")
            return Reply(value, payload[: value["bytes"]])
        self._explain(printed, code, talk)
        raise Lost(_last(talk) or f"ssh ended with {code}")

    def _explain(self, printed: bytes, code: int, talk: str) -> None:
        """Raise unless the connection was simply lost."""
        place, last = self.address.place, _last(talk)
        if code == 255 or code < 0:
            if any(text in talk for text in _NO_HOST_KEY):
                raise self._host_key(talk)
            if any(text in talk for text in _NO_LOGIN) and not self._met:
                raise EngineError(f"{place}: {last}", f"let a key log in: ssh-copy-id {self._by_hand()}")
            if any(text in talk for text in _FINAL):
                raise EngineError(f"{place}: {last}", f"check the address; try: ssh {self._by_hand()}")
            return
        if code in (126, 127):
            raise DependencyError(
                f"{place}: {last or 'no python3'}",
                "install Python 3.11 or newer there, or name it with --remote-python",
            )
        if code in (129, 137, 141, 142, 143):  # killed there, or nothing came for a minute
            return
        shown = ascii((talk or printed.decode("utf-8", "replace"))[-200:].strip())
        raise EngineError(
            f"{place}: answered something else (exit code {code}): {shown}", f"try: ssh {self._by_hand()} python3 -V"
        )

    def _host_key(self, talk: str) -> EngineError:
        place = self.address.place
        if "IDENTIFICATION HAS CHANGED" in talk or "differs from" in talk or "Offending" in talk:
            host = f"[{self.address.host}]:{self.address.port}" if self.address.port else self.address.host
            return EngineError(
                f"{place}: its host key is another one than the one that is known; nothing was sent",
                f"ask its owner; if the machine is new: ssh-keygen -R {shlex.quote(host)}",
            )
        return EngineError(
            f"{place}: its host key is not known; nothing was sent",
            f"compare the fingerprint and accept it once: ssh {self._by_hand()} true",
        )

    def _by_hand(self) -> str:
        """ssh's arguments for a person to type."""
        options = [word for option in self._options for word in ("-o", option)]
        words = self.address.arguments()
        return shlex.join([*options, *(word for word in words if word != "--")])

    def _hint(self) -> str:
        return f"check that it is on and that sshd runs; try: ssh {self._by_hand()} true"


def check_option(option: str) -> str:
    """One `Name=value` of ssh_config.

    Raises:
        UsageError: another form, or what switches the check of host keys off. A KnownHostsCommand can do that too, so
            it is not taken here; one that stands in ssh_config is its owner's choice and stays in force.
    """
    if not _OPTION.fullmatch(option) or not option.isprintable():
        raise UsageError(f"--ssh-option {ascii(option[:80])}", "write Name=value as in ssh_config, e.g. Port=8022")
    name = option.partition("=")[0].lower()
    ours = {fixed.partition("=")[0].lower() for fixed in _FIXED}
    if name in ours or name in _REFUSED:
        raise UsageError(
            f"--ssh-option {option[:80]!r} can't be changed",
            f"always in force: {', '.join(_FIXED[:3])}; accept a host key by hand",
        )
    return option


class Sink(Protocol):
    """What bytes can be written to."""

    def write(self, data: bytes, /) -> Any:
        """Take all of them."""

    def flush(self) -> None:
        """Pass on what is held back."""


class _Pipe:
    """A pipe that tells of every piece that went into it."""

    def __init__(self, pipe: IO[bytes], touch: Callable[[], None]) -> None:
        self._pipe, self._touch = pipe, touch

    def write(self, data: bytes) -> None:
        for begin in range(0, len(data), _PIECE):
            self._pipe.write(data[begin : begin + _PIECE])
            self._touch()

    def flush(self) -> None:
        self._pipe.flush()
        self._touch()


class _Clock(threading.Thread):
    """Ends a process when nothing has touched the clock for a time."""

    def __init__(self, process: subprocess.Popen[bytes], idle_s: float) -> None:
        super().__init__(daemon=True)
        self.late = False
        self._process, self._idle_s = process, idle_s
        self._touched, self._over = time.monotonic(), threading.Event()

    def touch(self) -> None:
        self._touched = time.monotonic()

    def stop(self) -> None:
        self._over.set()

    def run(self) -> None:
        while (left := self._touched + self._idle_s - time.monotonic()) > 0:
            if self._over.wait(left):
                return
        self.late = True
        self._process.kill()


@contextlib.contextmanager
def _limit(process: subprocess.Popen[bytes], idle_s: float | None) -> Iterator[_Clock]:
    """A clock that ends the process after a time without a touch; without a time it stands still."""
    clock = _Clock(process, idle_s or 0)
    if idle_s:
        clock.start()
    try:
        yield clock
    finally:
        clock.stop()


def shown(text: Any) -> str:
    """What another machine says, as one printable line of at most 500 characters: a terminal obeys none of it."""
    line = " ".join(str(text)[:_SHOWN].split())
    return "".join(c if c.isprintable() else "?" for c in line)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    good = isinstance(value, dict) and isinstance(value.get("bytes"), int) and value["bytes"] >= 0
    return value if good else None


def _last(talk: str) -> str:
    lines = [line.strip() for line in talk.splitlines() if line.strip()]
    return "".join(c if c.isprintable() else "?" for c in lines[-1])[:300] if lines else ""
