"""Pictures by name, in folders, zip files and plain tar files: nothing has to be unpacked, no list is in memory.

    store = open_store([Path("coco.zip"), Path("more/")], Path("work/index"))
    data = store.read("train2017/000000000009.jpg")

The first source that holds a name counts. A member of an archive also answers to `ARCHIVE.tar/MEMBER`, which is how the
pictures of shards are named.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError, ImageError
from .archive_index import Progress, index_of, plain_parts, state_of
from .picture_sources import Archive, Folder, Source
from .row import NAME_LIMIT

ARCHIVES = (".zip", ".tar")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:")  # of two letters and more; a drive has one


@dataclass(frozen=True)
class PictureStore:
    """Several sources as one. Can be pickled; each process opens the archives for itself."""

    sources: tuple[Source, ...]
    """folders and archives, in the order in which they are asked"""

    def __contains__(self, name: str) -> bool:
        """Whether a source holds the picture."""
        return not name_fault(name) and self._find(name) is not None

    def fault(self, name: str) -> str:
        """Why a row can't use this picture: a bad name, missing, encrypted, too large; "" when it can."""
        if fault := name_fault(name):
            return fault
        found = self._find(name)
        if found is None:
            return f"image {name[:NAME_LIMIT]!r} is not in {self._where()}"
        fault = found[0].fault(found[1])
        return f"image {name[:NAME_LIMIT]!r}: {fault}" if fault else ""

    def read(self, name: str) -> bytes:
        """A picture file's bytes.

        Raises:
            ImageError: missing, damaged (its CRC-32 is checked), encrypted, larger than image.MAX_FILE_BYTES, or the
                archive changed since it was opened; names archive and member.
        """
        source, member = self._get(name)
        return source.read(member)

    def size(self, name: str) -> int:
        """Bytes of the picture file. Raises ImageError when it is missing."""
        source, member = self._get(name)
        return source.size(member)

    def fingerprint(self, name: str) -> str:
        """Changes when the picture does, without reading it. Raises ImageError when it is missing."""
        source, member = self._get(name)
        return source.fingerprint(member)

    def origin(self, name: str) -> Path | None:
        """The folder or archive that a name leads to; None when there is none."""
        found = None if name_fault(name) else self._find(name)
        return found[0].path if found else None

    def _get(self, name: str) -> tuple[Source, str]:
        fault = name_fault(name)
        found = None if fault else self._find(name)
        if found is None:
            raise ImageError(
                fault or f"image {name[:NAME_LIMIT]!r} is not in {self._where()}", "check the path given to --images"
            )
        return found

    def _find(self, name: str) -> tuple[Source, str] | None:
        """The source that holds a name that was checked, and what it is called there."""
        plain = "/".join(plain_parts(name))
        first, slash, rest = plain.partition("/")
        if slash and first.lower().endswith(ARCHIVES):
            for source in self.sources:
                if source.path.name == first and isinstance(source, Archive) and source.has(rest):
                    return source, rest
        for source in self.sources:
            if source.has(plain):
                return source, plain
        return None

    def _where(self) -> str:
        if not self.sources:
            return "any --images: none is given"
        names = [str(source.path) for source in self.sources]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def open_store(images: Sequence[Path], index: Path, *, on_progress: Progress | None = None) -> PictureStore:
    """Open folders and archives to look pictures up in; `DataSet.images` of one set.

    Args:
        images: folders, .zip and .tar files; the first that holds a name counts.
        index: directory of the archives' tables, which are built once and shared by all runs.
        on_progress: called with an archive and the members read so far while its table is built.

    Raises:
        DataError: one is missing, neither folder nor plain archive, truncated or damaged.
        StorageError: a table can't be written.
    """
    sources: list[Source] = []
    for path in images:
        if path.is_dir():
            sources.append(Folder(path))
        elif not path.exists():
            raise DataError(f"{path}: no such folder or archive", "check the path given to --images")
        elif path.suffix.lower() in ARCHIVES:
            state = state_of(path)
            sources.append(Archive(path, index_of(path, index, on_progress), state))
        else:
            raise DataError(
                f"{path}: neither a folder nor a .zip or .tar file",
                "unpack it, or pack it again as a plain .tar: pictures are compressed already",
            )
    return PictureStore(tuple(sources))


def name_fault(name: str) -> str:
    """Why a picture's name can't be looked up; "" when it can."""
    shown = name[:NAME_LIMIT]
    if not name or "\0" in name or "\\" in name or not is_unicode(name):
        return f"image {shown!r} is not a path with forward slashes"
    if _SCHEME.match(name):
        return f"image {shown!r} is a URL; nothing is fetched, so give the path of a file"
    parts = plain_parts(name)
    if not parts or name.startswith("/") or ".." in parts or ":" in parts[0]:
        return f"image {shown!r} leaves the image directory"
    return ""


def is_unicode(text: str) -> bool:
    """Whether there is no half of a surrogate pair in it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
