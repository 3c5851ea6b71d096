"""Where a stage's rows and pictures come from: the one place that knows sets, files, folders and archives."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..data.picture_store import PictureStore, open_store
from ..data.row import BadRow, Row
from ..data.sets import DataSet, epoch_order, read_sets, rows
from ..errors import DataError, ImageError
from ..files import sha256_file


@dataclass(frozen=True)
class Source:
    """Data sets with the stores of their pictures."""

    sets: tuple[DataSet, ...]
    """what is read"""
    stores: tuple[PictureStore, ...]
    """the pictures of each set"""

    def __str__(self) -> str:
        return ", ".join(str(path) for one in self.sets for path in one.data)

    def fingerprint(self) -> str:
        """Hex SHA-256 of what rows are made of. Pictures have fingerprints of their own.

        JSON files by content; shards and folders, which may be huge, by the sizes and times of their files.
        """
        digest = hashlib.sha256()
        for one in self.sets:
            for path in one.data:
                digest.update(f"{_of(path)}\n".encode())
            digest.update(b"\0")  # the same files in other sets are other data
        return digest.hexdigest()

    def rows(self) -> Iterator[tuple[int, Row | BadRow]]:
        """Every row with the number of its set. Raises DataError for files that can't be used."""
        for number, (one, store) in enumerate(zip(self.sets, self.stores, strict=True)):
            for row in rows(one, store):
                yield number, row

    def picture(self, number: int, name: str) -> bytes:
        """A picture of set `number`. Raises ImageError that names it."""
        return self.stores[number].read(name)

    def picture_path(self, number: int, name: str) -> str:
        """What messages call a picture."""
        return str(self.stores[number].origin(name) or self.sets[number].name or "?") + f"/{name}"

    def picture_fingerprint(self, number: int, name: str) -> str:
        """Tells most changes of a picture without reading it, or `absent`."""
        try:
            return self.stores[number].fingerprint(name)
        except ImageError:
            return "absent"

    def order(self, sizes: Sequence[int], seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """The packs that an epoch draws from `sizes` packs of each set, numbered set after set, in random order."""
        whole = [*sizes, *[0] * (len(self.sets) - len(sizes))]  # the last sets may have no usable row
        return epoch_order(whole, [one.weight for one in self.sets], seed, epoch)


def open_source(data: Path | Sequence[Path], images: Path | Sequence[Path], index: Path) -> Source:
    """The rows and pictures that a stage is given.

    Args:
        index: a directory for tables of archives.

    Raises:
        DataError, UsageError: data or pictures that can't be used.
        StorageError: a table can't be written.
    """
    folders = [images] if isinstance(images, Path) else list(images)
    sets = read_sets([data] if isinstance(data, Path) else list(data), folders)
    return Source(sets, tuple(open_store(one.images, index) for one in sets))


def _of(path: Path) -> str:
    """What tells a change of a data file, a shard or a folder."""
    try:
        if path.is_dir():
            digest = hashlib.sha256()
            seen: set[str] = set()  # a link may lead in a circle
            for folder, folders, names in os.walk(path, followlinks=True):
                seen.add(os.path.realpath(folder))
                folders[:] = sorted(n for n in folders if os.path.realpath(os.path.join(folder, n)) not in seen)
                for name in sorted(names):
                    try:
                        facts = (Path(folder) / name).stat()
                    except OSError:  # a link to nowhere; if a row needs it, the row says so
                        continue
                    relative = os.path.relpath(os.path.join(folder, name), path)
                    digest.update(f"{relative}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode("utf-8", "replace"))
            return digest.hexdigest()
        if path.suffix.lower() == ".tar":
            facts = path.stat()
            return f"{path.name}\0{facts.st_size}\0{facts.st_mtime_ns}"
        return sha256_file(path)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})", "check the path given to --data") from error
