"""Features of a frozen tower on the disk: computed once for each picture, mapped into memory, shared between runs.

A directory `features-{key}` belongs to one tower with its preprocessing. `records.bin` holds arrays (p, v) one after
another; `index.bin` says whose: 48 bytes each with the SHA-256 of the picture's file and checksums of record and entry.
A record is written before its entry, under a lock, so a run that is killed leaves whole records or none. Any number
of processes may add to it. What is damaged is computed again.

Legend: p visual tokens before the connector, v tower width.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import struct
import weakref
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from ..files import no_space, storage_errors
from .locks import alone, hold, is_held

ENTRY = struct.Struct("<32sIIQ")  # SHA-256 of the picture, crc32 of the record, crc32 of these 48 bytes, kind
RECORD, REFUSED = 0, 1  # the second: a picture that can't be decoded; other processes needn't wait for it
RECORDS, INDEX, LOCK, USED = "records.bin", "index.bin", "lock", "used"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FeatureStore:
    """The records of one tower.

    Args:
        root: its directory, made if need be.
        shape: (p, v).
        dtype: a key of DTYPES.

    Memory: about 150 bytes a record; the records themselves stay on the disk and in the system's page cache.
    """

    def __init__(self, root: Path, shape: tuple[int, int], dtype: str) -> None:
        self.root, self.shape, self.dtype = root, shape, dtype
        self.bytes = shape[0] * shape[1] * DTYPES[dtype].itemsize
        with storage_errors(root):
            root.mkdir(parents=True, exist_ok=True)
            user = hold(root / USED)  # while it is held nobody removes the directory
            os.utime(root / USED)
        self.close = weakref.finalize(self, os.close, user)
        self.place: dict[bytes, int] = {}  # SHA-256 of a picture → its record
        self.refused: set[bytes] = set()
        self._sums: list[int] = []  # crc32 of each record
        self.refresh()

    def refresh(self) -> None:
        """Read the entries that were added since."""
        path = self.root / INDEX
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(len(self._sums) * ENTRY.size)
            found = file.read()
        for start in range(0, len(found) // ENTRY.size * ENTRY.size, ENTRY.size):
            digest, total, _, kind = ENTRY.unpack_from(found, start)
            whole = found[start : start + ENTRY.size] == _entry(digest, total, kind)
            if whole and kind == RECORD:
                self.place[digest] = len(self._sums)
            elif whole:
                self.refused.add(digest)
            self._sums.append(total)

    def is_whole(self, digest: bytes) -> bool:
        """Whether the record is there with the bytes that were written."""
        place = self.place.get(digest)
        if place is None or not (self.root / RECORDS).exists():
            return False
        with (self.root / RECORDS).open("rb") as file:
            file.seek(place * self.bytes)
            record = file.read(self.bytes)
        return len(record) == self.bytes and zlib.crc32(record) == self._sums[place]

    def add(self, digests: Sequence[bytes], features: torch.Tensor, refused: Sequence[bytes] = ()) -> None:
        """Write features (i, p, v) of pictures, and which pictures can't be decoded.

        A record that is there but damaged is written again in its place.

        Raises:
            StorageError: the disk is full; what was there before stays.
        """
        data = features.to(DTYPES[self.dtype]).contiguous().view(torch.uint8).numpy()
        with alone(self.root / LOCK), storage_errors(self.root / RECORDS):
            self.refresh()
            try:
                self._write(digests, data, refused)
            except OSError as error:
                if error.errno == errno.EFBIG:  # the process's own limit on file sizes
                    raise no_space(self.root / RECORDS) from error
                raise
        self.refresh()

    def _write(self, digests: Sequence[bytes], data: npt.NDArray[np.uint8], refused: Sequence[bytes]) -> None:
        entries: list[bytes] = []
        with _open(self.root / RECORDS) as records, _open(self.root / INDEX) as index:
            index.truncate(len(self._sums) * ENTRY.size)  # what a killed run wrote of an entry
            for digest, row in zip(digests, data, strict=True):
                if self.is_whole(digest):
                    continue  # another process was quicker
                record, known = row.tobytes(), self.place.get(digest)
                entry = _entry(digest, zlib.crc32(record), RECORD)
                _put(records, (len(self._sums) + len(entries) if known is None else known) * self.bytes, record)
                if known is None:
                    entries.append(entry)
                else:
                    _put(index, known * ENTRY.size, entry)
                    self._sums[known] = zlib.crc32(record)
            entries += [_entry(digest, 0, REFUSED) for digest in refused if digest not in self.refused]
            _put(index, len(self._sums) * ENTRY.size, b"".join(entries))


class Features:
    """Kept features of a data set's pictures, by their numbers. Mapped anew in every process that it is sent to.

    Args:
        store: held until these features are gone, so that its directory stays.
        places: (pictures,) record of each picture; -1 for one that can't be decoded.
    """

    def __init__(self, store: FeatureStore, places: npt.NDArray[np.int64]) -> None:
        self.store: FeatureStore | None = store
        self.places = torch.from_numpy(places)
        self.path, self.shape, self.dtype = store.root / RECORDS, store.shape, DTYPES[store.dtype]
        self.records = int(places.max(initial=-1)) + 1
        self._mapped: torch.Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "store": None, "_mapped": None}

    def __call__(self, pictures: Sequence[int]) -> dict[str, torch.Tensor]:
        """`image_features` (i, p, v), float32."""
        if self._mapped is None:
            count = self.records * self.shape[0] * self.shape[1]
            whole = torch.from_file(str(self.path), shared=False, size=count, dtype=self.dtype)
            self._mapped = whole.view(self.records, *self.shape)
        return {"image_features": self._mapped[self.places[list(pictures)]].float()}


def open_store(
    cache: Path, key: str, shape: tuple[int, int], dtype: str, wanted: Sequence[bytes], cache_bytes: int
) -> FeatureStore | None:
    """The store of a tower with room for the pictures `wanted`; None where there can't be room.

    Other stores in `cache` are removed for it, the longest unused first, and records of other pictures; never those
    that a running process uses. All stores of `cache` together stay within `cache_bytes`.
    """
    root = cache / f"features-{key[:32]}"
    record = shape[0] * shape[1] * DTYPES[dtype].itemsize + ENTRY.size
    if len(set(wanted)) * record > cache_bytes:
        return None
    with alone(cache / ".features.lock"):
        store = FeatureStore(root, shape, dtype)
        needed = sum(digest not in store.place for digest in set(wanted)) * record
        sizes = {path: _size(path) for path in cache.glob("features-*")}
        for path in sorted(sizes, key=lambda path: _last_use(path / USED)):
            if sum(sizes.values()) + needed <= cache_bytes:
                return store
            if path != root and not is_held(path / USED):
                shutil.rmtree(path, ignore_errors=True)
                sizes[path] = _size(path)
        if sum(sizes.values()) + needed <= cache_bytes:
            return store
        store.close()
        if is_held(root / USED) or sum(sizes.values()) - sizes[root] + len(set(wanted)) * record > cache_bytes:
            return None
        shutil.rmtree(root)
        return FeatureStore(root, shape, dtype)


def _size(root: Path) -> int:
    total = 0
    for path in (root / RECORDS, root / INDEX):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _entry(digest: bytes, total: int, kind: int) -> bytes:
    bare = ENTRY.pack(digest, total, 0, kind)
    return ENTRY.pack(digest, total, zlib.crc32(bare), kind)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """To write anywhere in it; unbuffered, so that what was written is in the file when the process dies."""
    path.touch()
    with path.open("r+b", buffering=0) as file:
        yield file


def _put(file: BinaryIO, place: int, data: bytes) -> None:
    file.seek(place)
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
