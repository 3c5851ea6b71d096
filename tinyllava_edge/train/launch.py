"""What a command must know when a launcher started it several times. No torch: nothing has been set up yet."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from .locks import alone


def place_in_run() -> tuple[int, int]:
    """Number of this process and of all in the run, as torchrun and accelerate set them; 0 and 1 without a launcher."""
    rank, count = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return int(rank) if rank.isdigit() else 0, max(1, int(count)) if count.isdigit() else 1


def is_first() -> bool:
    """Whether this is the process that prints and writes; always without a launcher."""
    return place_in_run()[0] == 0


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
    with alone(lock):
        yield
        lock.unlink(missing_ok=True)  # who waits for it finds the thing made
