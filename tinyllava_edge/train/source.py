"""Where a stage's rows and pictures come from: sets of rows, each with the folders and archives of its pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..data.llava_json import BadRow, Row
from ..data.picture_store import PictureStore, open_store
from ..data.sets import DataSet, epoch_order, read_sets, rows
from ..errors import ImageError
from ..files import sha256_file

HASHED = (".json", ".jsonl")  # whose contents count; of shards, which may be terabytes, size and time of change do


@dataclass(frozen=True)
class Source:
    """The sets of a stage, opened."""

    sets: tuple[DataSet, ...]
    """what is read together, with its weight"""
    stores: tuple[PictureStore, ...]
    """where each set's pictures are"""

    def __str__(self) -> str:
        return ", ".join(str(path) for item in self.sets for path in item.data)

    def fingerprint(self) -> str:
        """Hex SHA-256 of the sets: contents of JSON files, facts of shards and folders. Pictures have their own."""
        lines = []
        for item in self.sets:
            lines.append(f"{len(item.data)} {item.weight}")
            lines += [_fingerprint(path) for path in item.data]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def rows(self) -> Iterator[tuple[int, Row | BadRow]]:
        """Every row with the number of its set, one at a time. Raises DataError for files that can't be used."""
        for number, (item, store) in enumerate(zip(self.sets, self.stores, strict=True)):
            for row in rows(item, store):
                yield number, row

    def picture(self, number: int, name: str) -> bytes:
        """A picture of set `number`. Raises ImageError that names it."""
        return self.stores[number].read(name)

    def picture_path(self, number: int, name: str) -> str:
        """What messages call a picture."""
        origin = self.stores[number].origin(name)
        return name if origin is None else f"{origin}/{name}"

    def picture_fingerprint(self, number: int, name: str) -> str:
        """Tells most changes of a picture without reading it, or `absent`."""
        try:
            return self.stores[number].fingerprint(name)
        except ImageError:
            return "absent"

    def order(self, sizes: Sequence[int], seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """The packs that an epoch draws from `sizes` packs of each set, numbered set after set, in random order."""
        return epoch_order(sizes, [item.weight for item in self.sets], seed, epoch)


def _fingerprint(path: Path) -> str:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        facts = [f"{p.relative_to(path).as_posix()} {p.stat().st_size}" for p in files]
        return hashlib.sha256("\n".join(facts).encode("utf-8", "surrogateescape")).hexdigest()
    if not path.is_file() or path.suffix.lower() in HASHED:
        return sha256_file(path)
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def open_source(data: Path | Sequence[Path], images: Path | Sequence[Path], index: Path) -> Source:
    """The rows and pictures that a stage is given.

    Args:
        data: JSON files, shards, folders, or one .toml file of a mixture.
        images: folders and archives.
        index: directory for tables of archives.

    Raises:
        DataError, UsageError: as `read_sets` and `open_store`.
    """
    files = [data] if isinstance(data, Path) else list(data)
    folders = [images] if isinstance(images, Path) else list(images)
    sets = read_sets(files, folders)
    return Source(sets, tuple(open_store(item.images, index / "archives") for item in sets))
