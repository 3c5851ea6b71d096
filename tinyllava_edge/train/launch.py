"""What a command must know when a launcher started it several times. No torch: nothing has been set up yet."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from ..files import storage_errors


def is_first() -> bool:
    """Whether this is the process that prints and writes; always without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def quiet_libraries() -> None:
    """No remarks from packages that transformers imports by the way, about kernels that nobody asked for."""
    for name in ("DeepSpeed", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)


@contextlib.contextmanager
def one_at_a_time(target: Path) -> Iterator[None]:
    """Within the block no other process makes `target`: the first one makes it, the others find it there.

    Raises:
        StorageError: the lock beside `target` can't be written.
    """
    lock = target.parent / f".{target.name}.lock"
    with storage_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("w")
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # let go when the process ends, however it ends
        yield
        lock.unlink(missing_ok=True)  # who waits for it finds the thing made
