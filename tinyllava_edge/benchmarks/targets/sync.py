"""Files to another machine by content: what is there is skipped, what was cut goes on, what is wrong is mended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from tinyllava_edge.benchmarks.targets.connection import Connection, Lost
from tinyllava_edge.errors import EngineError, StorageError

ENVIRONMENT_BYTES = 400_000_000  # a virtual environment with NumPy, ONNX Runtime and llama.cpp, rounded up
SPARE_BYTES = 16_000_000  # logs, results, temporary names
_TRIES = 3  # uploads of one file whose bytes come out wrong
_CUTS = 30  # lost connections within one file
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

    def write(self, pipe: IO[bytes], offset: int) -> None:
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
    found = connection.ask("state", blobs=[[blob.sha256, blob.size] for blob in wanted]).value
    states: list[dict[str, Any]] = found["blobs"]
    missing = [(blob, there) for blob, there in zip(wanted, states, strict=True) if not there["have"]]
    need = sum(max(0, blob.size - there["part"]) for blob, there in missing) + extra_bytes + SPARE_BYTES
    if need > found["free"]:
        raise StorageError(
            f"{connection.address.place}: {need:,} bytes needed in {connection.address.directory}, "
            f"{found['free']:,} free",
            "free some space there, or measure fewer builds with --build",
        )
    whole = len(wanted) - len(missing)
    say(f"{connection.address.place}: {whole} of {len(wanted)} files are there, {len(missing)} to send")
    for blob, there in missing:
        if there["damaged"]:
            say(f"{blob.name}: damaged there; sent again")
        _send(connection, blob, there["part"], say)


def _send(connection: Connection, blob: Blob, offset: int, say: Say) -> None:
    wrong, cuts = 0, 0
    while True:
        say(f"{blob.name}: sending {blob.size - offset:,} bytes" + (f", going on at {offset:,}" if offset else ""))
        try:
            there = connection.ask_once(
                "put",
                payload=partial(blob.write, offset=offset),
                sha256=blob.sha256,
                bytes=blob.size,
                offset=offset,
            ).value
        except Lost as error:
            cuts += 1
            if cuts > _CUTS:
                raise EngineError(
                    f"{blob.name}: {cuts} connections were lost ({error})", "run the command again"
                ) from error
            say(f"{blob.name}: connection lost ({error})")
            time.sleep(min(cuts, 10))
            there = connection.ask("state", blobs=[[blob.sha256, blob.size]]).value["blobs"][0]
        if there["have"]:
            return
        offset = there["part"]
        if there.get("damaged"):
            wrong += 1
            say(f"{blob.name}: its hash is wrong after the upload; sent again")
            if wrong == _TRIES:
                raise StorageError(
                    f"{blob.name}: wrong bytes after {_TRIES} uploads",
                    "the file changes while it is read, or a disk is failing",
                )
