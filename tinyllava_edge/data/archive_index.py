"""Where the members of an archive lie, in a table on the disk: millions of names take no memory.

One SQLite file for each archive. It is built once, under another name until it is whole, and anew when the archive's
size or time has changed. Readers need no lock.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from ..errors import DataError, StorageError
from ..files import is_full, new_file, no_space, storage_errors, sweep
from .tar_members import tar_members
from .zip_members import Member, zip_members

Progress = Callable[[Path, int], None]
VERSION = 1
EVERY = 10_000  # members between two calls of a progress callback
_COLUMNS = "name, offset, size, packed, method, crc, encrypted"
_SCHEMA = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE archive (version INTEGER, path TEXT, size INTEGER, mtime INTEGER, members INTEGER);
CREATE TABLE members (name TEXT PRIMARY KEY, offset INTEGER, size INTEGER, packed INTEGER, method INTEGER,
                      crc INTEGER, encrypted INTEGER) WITHOUT ROWID;
"""


def state_of(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns. Raises DataError when the archive is missing."""
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})", "check the path given to --images") from error
    return found.st_size, found.st_mtime_ns


def index_of(archive: Path, directory: Path, on_progress: Progress | None = None) -> Path:
    """The table of an archive, built if it is missing or of an earlier state of the archive.

    Raises:
        DataError: the archive is missing, truncated, damaged or compressed as a whole.
        StorageError: the table can't be written.
    """
    resolved = archive.resolve()
    state = state_of(archive)
    key = hashlib.sha256(os.fsencode(resolved)).hexdigest()[:16]
    target = directory / f"{archive.name[:100]}-{key}.sqlite"
    if _is_of(target, str(resolved), state):
        return target
    with storage_errors(target):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise StorageError(f"{directory}: no directory", "name another place for the tables") from error
        sweep(target)
    with new_file(target) as temporary:
        temporary.unlink(missing_ok=True)  # of a killed process with this number
        try:
            _build(temporary, archive, str(resolved), state, on_progress)
        except sqlite3.Error as error:
            if is_full(target):
                raise no_space(target) from error
            raise DataError(f"{target}: can't be written ({error})", "check the disk, or use another place") from error
    return target


def plain_parts(name: str) -> list[str]:
    """Parts of a name with forward slashes as PurePosixPath has them, faster and without interning each."""
    return [part for part in name.split("/") if part not in ("", ".")]


def plain_name(name: str) -> str | None:
    """A member's name as rows may ask for it, `./` and `//` taken out. None when it leaves the archive's folder."""
    parts = plain_parts(name)
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        return None
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return None
    return "/".join(parts)


class Table:
    """A table that is open for reading; belongs to the process that opened it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = _open(path)

    def find(self, name: str) -> Member | None:
        """A member by its plain name. Raises DataError when the table is damaged."""
        try:
            row = self._db.execute(f"SELECT {_COLUMNS} FROM members WHERE name = ?", (name,)).fetchone()
        except sqlite3.Error as error:
            raise DataError(f"{self.path}: damaged ({error})", "delete it; it is built again") from error
        return Member(row[0], row[1], row[2], row[3], row[4], row[5], bool(row[6])) if row else None

    def close(self) -> None:
        """Give the file back; Python alone would do so much later."""
        self._db.close()


def _open(path: Path) -> sqlite3.Connection:
    """Read-only, without locks: a finished table never changes."""
    db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False)
    db.execute("PRAGMA cache_size = -256")  # KiB; many archives may be open
    return db


def _is_of(target: Path, path: str, state: tuple[int, int]) -> bool:
    if not target.is_file():
        return False
    try:
        with closing(_open(target)) as db:
            version, *found = db.execute("SELECT version, path, size, mtime FROM archive").fetchone()
            return bool(version == VERSION and found == [path, *state])
    except (sqlite3.Error, TypeError, ValueError):
        return False


def _build(file: Path, archive: Path, path: str, state: tuple[int, int], on_progress: Progress | None) -> None:
    members = _plain(tar_members(archive) if archive.suffix.lower() == ".tar" else zip_members(archive))
    with closing(sqlite3.connect(file)) as db:
        db.executescript(_SCHEMA)
        count = 0
        for count, member in enumerate(members, 1):
            values = (member.name, member.offset, member.size, member.packed, member.method, member.crc)
            # of two members with one name the later counts, as when the archive is unpacked
            db.execute("INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?, ?, ?, ?)", (*values, member.encrypted))
            if on_progress is not None and count % EVERY == 0:
                on_progress(archive, count)
        if on_progress is not None:
            on_progress(archive, count)
        if state_of(archive) != state:
            raise DataError(f"{archive}: changed while it was read", "wait until it is whole, then start again")
        db.execute("INSERT INTO archive VALUES (?, ?, ?, ?, ?)", (VERSION, path, *state, count))
        db.commit()


def _plain(members: Iterator[Member | str] | Iterator[Member]) -> Iterator[Member]:
    """Members that a row can ask for."""
    for member in members:
        name = None if isinstance(member, str) else plain_name(member.name)
        if name is not None and not isinstance(member, str):
            yield Member(name, member.offset, member.size, member.packed, member.method, member.crc, member.encrypted)
