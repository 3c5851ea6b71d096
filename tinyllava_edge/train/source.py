"""Where a stage's rows and pictures come from: the one place that knows files, folders and sets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..data.llava_json import BadRow, Row, read
from ..files import sha256_file
from ..image import read_bytes

_ANY = 1 << 62  # bad rows are counted by the caller


def picture_names(row: Row) -> tuple[str, ...]:
    """Names of a row's pictures, in order."""
    return () if row.image is None else (row.image,)


@dataclass(frozen=True)
class Source:
    """Data files and the folder of their pictures."""

    data: tuple[Path, ...]
    """files of rows"""
    images: Path
    """folder that the rows' pictures are relative to"""

    def __str__(self) -> str:
        return ", ".join(map(str, self.data))

    def fingerprint(self) -> str:
        """Hex SHA-256 of the data files' contents. Pictures have fingerprints of their own."""
        return hashlib.sha256("\n".join(sha256_file(path) for path in self.data).encode()).hexdigest()

    def rows(self) -> Iterator[tuple[int, Row | BadRow]]:
        """Every row with the number of its set. Raises DataError for files that can't be used."""
        found = read(self.data, self.images, max_bad=_ANY)
        for bad in found.bad:
            yield 0, bad
        for row in found.rows:
            yield 0, row

    def picture(self, number: int, name: str) -> bytes:
        """A picture of set `number`. Raises ImageError that names it."""
        return read_bytes(self.images / name)[1]

    def picture_path(self, number: int, name: str) -> str:
        """What messages call a picture."""
        return str(self.images / name)

    def picture_fingerprint(self, number: int, name: str) -> str:
        """Tells most changes of a picture without reading it: its size, or `absent`."""
        try:
            return str((self.images / name).stat().st_size)
        except OSError:
            return "absent"

    def order(self, sizes: Sequence[int], seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """The packs that an epoch draws from `sizes` packs of each set, numbered set after set, in random order."""
        return np.random.default_rng((seed, epoch)).permutation(sum(sizes))


def open_source(data: Path | Sequence[Path], images: Path, index: Path) -> Source:
    """The rows and pictures that a stage is given; `index` is a directory for tables of archives."""
    return Source((data,) if isinstance(data, Path) else tuple(data), images)
