"""A file's pages in the system's page cache: putting them out, and looking how many are in."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path


def drop_cached(path: Path) -> bool:
    """Write a file's changed pages and ask the system to forget all of them; False where there is no such call.

    Pages that a process has mapped stay, and so does a file on a tmpfs.

    Raises:
        OSError: the file can't be opened.
    """
    advise, forget = getattr(os, "posix_fadvise", None), getattr(os, "POSIX_FADV_DONTNEED", None)
    if advise is None or forget is None:
        return False
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)  # changed pages can't be dropped
        advise(handle, 0, 0, forget)
    finally:
        os.close(handle)
    return True


def cached_share(path: Path) -> float | None:
    """Part of a file, 0 to 1, that lies in the page cache (mincore); None where the system doesn't tell.

    Raises:
        OSError: the file can't be opened.
    """
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (OSError, TypeError, AttributeError):  # Windows; a C library without it
        return None
    size = path.stat().st_size
    if size == 0:
        return 0.0
    pages = -(-size // mmap.PAGESIZE)
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY) as data:
        view = ctypes.c_char.from_buffer(data)  # ctypes wants a writable map; nothing is written
        found = (ctypes.c_ubyte * pages)()
        failed = mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size), found)
        del view
    return None if failed else sum(state & 1 for state in bytes(found)) / pages
