"""Files to another machine by content: what is there is skipped, what was cut goes on, what is wrong is mended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.targets.connection import Connection, Idle, Lost, Sink
from tinyllava_edge.errors import EngineError, StorageError

ENVIRONMENT_BYTES = 400_000_000  # a virtual environment with NumPy, ONNX Runtime and llama.cpp, rounded up
SPARE_BYTES = 16_000_000  # logs, results, temporary names
_TRIES = 3  # uploads of one file whose bytes come out wrong, or after which no more of it is there
_CUTS = 30  # lost connections within one file, or answers that it is not whole yet
_IDLE_S = 240.0  # seconds without a byte; longer than device.py waits for two locks
_HASH_BYTES_PER_S = 5e6  # a slow board's, from an SD card: no byte comes while it hashes
_CHUNK = 1 << 20
Say = Callable[[str], None]


@dataclass(frozen=True)
class Blob:
    """Bytes that the other machine shall have."""

    sha256: str
    """hex digest"""
    size: int
    """size"""
    source: Path | bytes
    """where they are here"""
    name: str
    """for messages"""

    def write(self, pipe: Sink, offset: int) -> None:
        """Copy everything from `offset` on."""
        if isinstance(self.source, bytes):
            pipe.write(self.source[offset:])
        else:
            with self.source.open("rb") as handle:
                handle.seek(offset)
                left = self.size - offset
                while left and (chunk := handle.read(min(_CHUNK, left))):
                    pipe.write(chunk)
                    left -= len(chunk)
        pipe.flush()


def upload(connection: Connection, blobs: Sequence[Blob], extra_bytes: int, say: Say) -> None:
    """Bring every blob over.

    Args:
        connection: the machine.
        blobs: what it shall have; equal ones are sent once.
        extra_bytes: room that is needed besides.
        say: receives a line per file that is sent.

    Raises:
        StorageError: too little room there, or bytes that come out wrong again and again.
        EngineError: the connection does not hold, or a run is measuring there.
    """
    wanted = list({blob.sha256: blob for blob in blobs}.values())
    states, free = _states(connection, wanted)
    missing = [(blob, there) for blob, there in zip(wanted, states, strict=True) if not there.have]
    need = sum(blob.size - there.part for blob, there in missing) + extra_bytes + SPARE_BYTES
    if need > free:
        raise StorageError(
            f"{connection.address.place}: {need:,} bytes needed in {connection.address.directory}, {free:,} free",
            "free some space there, or measure fewer builds with --build",
        )
    whole = len(wanted) - len(missing)
    say(f"{connection.address.place}: {whole} of {len(wanted)} files are there, {len(missing)} to send")
    for blob, there in missing:
        if there.damaged:
            say(f"{blob.name}: damaged there; sent again")
        _send(connection, blob, there.part, say)


def _send(connection: Connection, blob: Blob, offset: int, say: Say) -> None:
    wrong, fruitless, unfinished, cuts = 0, 0, 0, 0
    while True:
        say(f"{blob.name}: sending {blob.size - offset:,} bytes" + (f", going on at {offset:,}" if offset else ""))
        try:
            reply = connection.ask_once(
                "put",
                idle_s([blob]),
                payload=partial(blob.write, offset=offset),
                sha256=blob.sha256,
                bytes=blob.size,
                offset=offset,
            ).value
            there, lost = _there(connection, reply, blob), None
        except Lost as error:
            lost, cuts = error, cuts + 1
            if cuts > _CUTS:
                raise EngineError(
                    f"{blob.name}: {cuts} connections were lost ({error})", "run the command again"
                ) from error
            say(f"{blob.name}: connection lost ({error})")
            time.sleep(min(cuts, 10))
            there = _states(connection, [blob])[0][0]
        if there.have:
            return
        unfinished += lost is None
        if there.damaged:
            wrong += 1
            say(f"{blob.name}: its hash is wrong after the upload; sent again")
            if wrong == _TRIES:
                raise StorageError(
                    f"{blob.name}: wrong bytes after {_TRIES} uploads",
                    "the file changes while it is read, or a disk is failing",
                )
        elif there.part <= offset and (lost is None or isinstance(lost, Idle)):  # a line that was cut may be tried on
            fruitless += 1
        if fruitless == _TRIES or unfinished > _CUTS:
            raise EngineError(
                f"{connection.address.place}: {blob.name} does not become whole there, "
                f"{there.part:,} of {blob.size:,} bytes",
                "look at that machine's disk and processes, then run the command again",
            )
        offset = there.part


@dataclass(frozen=True)
class _There:
    """What the other machine says of one blob."""

    have: bool
    """it is whole"""
    damaged: bool
    """its bytes were wrong and were thrown away"""
    part: int
    """bytes of it that can be gone on from"""


def idle_s(blobs: Sequence[Blob]) -> float:
    """Seconds without a byte that are no sign of trouble where these are hashed."""
    return _IDLE_S + sum(blob.size for blob in blobs) / _HASH_BYTES_PER_S


def _states(connection: Connection, blobs: Sequence[Blob]) -> tuple[list[_There], int]:
    """What is there of each blob, and the free bytes. Raises EngineError for an answer that can't be."""
    found = connection.ask("state", idle_s(blobs), blobs=[[blob.sha256, blob.size] for blob in blobs]).value
    if len(found["blobs"]) != len(blobs):
        raise _odd(connection, f"{len(found['blobs'])} files, {len(blobs)} were asked for")
    states = [_there(connection, entry, blob) for entry, blob in zip(found["blobs"], blobs, strict=True)]
    return states, int(found["free"])


def _there(connection: Connection, entry: Any, blob: Blob) -> _There:
    """One checked entry of an answer. Raises EngineError."""
    if not isinstance(entry, Mapping):
        raise _odd(connection, entry)
    have, damaged, part = entry.get("have"), entry.get("damaged", False), entry.get("part", 0)
    if not isinstance(have, bool) or not isinstance(damaged, bool) or type(part) is not int or part < 0:
        raise _odd(connection, dict(entry))
    if not have and "part" not in entry:
        raise _odd(connection, dict(entry))
    return _There(have, damaged, part if part <= blob.size else 0)  # one that is too long is thrown away there


def _odd(connection: Connection, entry: Any) -> EngineError:
    return EngineError(
        f"{connection.address.place}: an answer about files that can't be: {ascii(entry)[:120]}",
        "another program answers there, or its disk is failing",
    )
