"""A full disk behind native code: C++ and numpy report it without the system's error number, or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import StorageError

SPARE_BYTES = 1 << 16  # a writer that failed with less than this left failed for want of space


def is_full(target: Path, needed: int = SPARE_BYTES) -> bool:
    """Whether the disk that `target` lies on has less than `needed` bytes left."""
    return shutil.disk_usage(target.parent).free < needed


def no_space(target: Path) -> StorageError:
    """The error to raise, with the file's name."""
    return StorageError(f"{target}: no space left on the device", "free some space or choose another -o")
