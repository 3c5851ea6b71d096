"""What pictures are looked up in: a folder, or an archive with the table of its members."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import ImageError
from ..image import MAX_FILE_BYTES, read_bytes
from .archive_index import Table
from .packed import method_fault, read_member
from .row import NAME_LIMIT
from .zip_members import Member

_OPEN = 64  # archives that a thread keeps open at a time


class Source(Protocol):
    """A folder or an archive."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    def has(self, name: str) -> bool:
        """Whether it holds this plain name."""

    def fault(self, name: str) -> str:
        """Why a picture that it holds can't be read, as far as it can be told without reading it; "" when it can."""

    def read(self, name: str) -> bytes:
        """The picture's bytes. Raises ImageError."""

    def size(self, name: str) -> int:
        """Bytes when unpacked. Raises ImageError."""

    def fingerprint(self, name: str) -> str:
        """Changes when the picture does. Raises ImageError."""


@dataclass(frozen=True)
class Folder:
    """A directory; links below it are followed."""

    path: Path
    """the directory"""

    def has(self, name: str) -> bool:
        """Whether it is a file there; a name longer than the file system takes is not."""
        try:
            return (self.path / name).is_file()
        except OSError:
            return False

    def fault(self, name: str) -> str:
        """Nothing that can be told from the name."""
        return ""

    def read(self, name: str) -> bytes:
        """The file's bytes."""
        return read_bytes(self.path / name)[1]

    def size(self, name: str) -> int:
        """The file's size."""
        try:
            return (self.path / name).stat().st_size
        except OSError as error:
            raise ImageError(
                f"{self.path / name}: can't be read ({error.strerror})", "check the file and its permissions"
            ) from error

    def fingerprint(self, name: str) -> str:
        """The file's size: times change when data are copied."""
        return str(self.size(name))


@dataclass(frozen=True)
class Archive:
    """A zip or tar file with the table of its members."""

    path: Path
    """the archive"""
    table: Path
    """its table"""
    state: tuple[int, int]
    """size and time of the archive when the table was built"""

    def has(self, name: str) -> bool:
        """Whether the table holds it."""
        return self._member(name) is not None

    def fault(self, name: str) -> str:
        """Encrypted, packed in a way that is not read here, or too large."""
        member = self._known(name)
        return method_fault(member) or (
            f"{member.size:,} bytes, limit {MAX_FILE_BYTES:,}" if member.size > MAX_FILE_BYTES else ""
        )

    def read(self, name: str) -> bytes:
        """The unpacked bytes, checked."""
        member, where = self._known(name), f"{self.path}: {name}"
        if fault := self.fault(name):
            raise ImageError(f"{where}: {fault}", "pack it anew without a password, stored or deflated")
        return read_member(_opened(self).file.fileno(), member, where)

    def size(self, name: str) -> int:
        """The unpacked size as the archive tells it."""
        return self._known(name).size

    def fingerprint(self, name: str) -> str:
        """Size and CRC-32; in a tar file, which keeps none, size and place."""
        return fingerprint_of(self._known(name))

    def _member(self, name: str) -> Member | None:
        return _opened(self).table.find(name)

    def _known(self, name: str) -> Member:
        member = self._member(name)
        if member is None:
            raise ImageError(f"{self.path}: {name[:NAME_LIMIT]}: no such member", "check the row's picture name")
        return member


def fingerprint_of(member: Member) -> str:
    """What `fingerprint` gives for a member of an archive."""
    return f"{member.size}@{member.offset}" if member.crc is None else f"{member.size}-{member.crc:08x}"


class _Opened:
    """An archive and its table, open in this process."""

    def __init__(self, archive: Archive) -> None:
        path = archive.path
        try:
            self.file = path.open("rb", buffering=0)
            found = os.fstat(self.file.fileno())
        except OSError as error:
            raise ImageError(f"{path}: can't be read ({error.strerror})", "is it still in its place?") from error
        if (found.st_size, found.st_mtime_ns) != archive.state:
            raise ImageError(f"{path}: changed since this run began", "start again, which reads its table anew")
        self.table = Table(archive.table)

    def close(self) -> None:
        """Give the files back."""
        self.file.close()
        self.table.close()


class _Handles(threading.local):
    """What this thread has open, the latest last."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.opened: OrderedDict[Archive, _Opened] = OrderedDict()


_handles = _Handles()
_of_the_parent: list[object] = []  # SQLite's handles must not be used across a fork, nor closed


def _opened(archive: Archive) -> _Opened:
    if _handles.process != os.getpid():
        _of_the_parent.append(_handles.opened)
        _handles.process, _handles.opened = os.getpid(), OrderedDict()
    opened = _handles.opened
    if archive in opened:
        opened.move_to_end(archive)
        return opened[archive]
    found = opened[archive] = _Opened(archive)
    while len(opened) > _OPEN:
        _, oldest = opened.popitem(last=False)
        oldest.close()
    return found
