"""Where a training writes: nothing that is not its own is replaced, and no two runs write the same places."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import StorageError, UsageError
from ..files import storage_errors
from .launch import is_first

PATIENCE_S = 15.0  # processes of a run that was killed notice within seconds, and hold its lock until then
CACHE_NAMES = ("tokens-", "features-", ".")  # what a cache holds, beside `archives`
STATE_NAMES = ("checkpoint-", "job.json", ".")  # what a work directory holds


def work_directory(out: Path) -> Path:
    """Where the states of a run that will write `out` are kept until it ends."""
    return out.parent / f"{out.name}.work"


def cache_directory(out: Path) -> Path:
    """Where the tokens and tower features of that run are kept until it ends, unless it is told another place."""
    return out.parent / f"{out.name}.cache"


def adapter_directory(out: Path) -> Path:
    """Where a run that trains adapters keeps them, beside the checkpoint that they are merged into."""
    return out.parent / f"{out.name}.adapter"


def start_directory(out: Path) -> Path:
    """Where the untrained checkpoint of a new model is kept that `out` is trained from."""
    return out.parent / f"{out.name}.init"


def check_places(out: Path, inputs: Iterable[Path | None]) -> None:
    """Refuse to write over what is read, or over what stands beside `out` and is no earlier run's.

    Args:
        out: checkpoint directory to write; `.init`, `.work`, `.cache` and `.adapter` are written beside it.
        inputs: every file and directory that the run reads.

    Raises:
        UsageError: `out` is no directory's name, a link, or in the way of an input.
        StorageError: something foreign stands beside it.
    """
    if not out.name or out.name == ".." or out.resolve() == Path(out.resolve().anchor):
        raise UsageError(f"-o {str(out)!r} is no name for a new directory", "name one, e.g. -o work/checkpoint")
    if out.is_symlink():
        raise UsageError(f"{out} is a link", "name the place itself with -o")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is no directory", "name another place with -o")
    given_all = [given for given in inputs if given is not None]
    for place in (out, start_directory(out), work_directory(out), cache_directory(out), adapter_directory(out)):
        for given in given_all:
            if given == place == start_directory(out):
                continue
            if given.resolve().is_relative_to(place.resolve()):
                raise UsageError(f"{given} is read, and {place} will be written", "name another place with -o")
    for place, names in ((work_directory(out), STATE_NAMES), (cache_directory(out), (*CACHE_NAMES, "archives"))):
        foreign = _foreign(place, names)
        if foreign is not None:
            raise StorageError(f"{foreign}: stands where the run keeps its own files", "move it, or name another -o")


def _foreign(place: Path, names: tuple[str, ...]) -> Path | None:
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        return place
    found = sorted(place.iterdir()) if place.is_dir() else []
    return next((entry for entry in found if not entry.name.startswith(names)), None)


def tidy(out: Path, cache: bool) -> None:
    """Remove what only a run that goes on needs; `cache` where it is the run's own."""
    shutil.rmtree(work_directory(out), ignore_errors=True)
    if cache:
        shutil.rmtree(cache_directory(out), ignore_errors=True)


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Within the block no other command trains `out`; of the processes of one run the first one asks.

    Raises:
        StorageError: another command does.
    """
    if not is_first():
        yield
        return
    path = out.parent / f".{out.name}.lock"
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _lock(handle, out)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _lock(handle: int, out: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise StorageError(
                    f"{out}: another command is training it", "wait for it, or name another place with -o"
                ) from error
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return
