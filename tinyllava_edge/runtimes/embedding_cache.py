"""Image embeddings kept between questions: in memory, and on the disk where a directory is named.

The key names everything that an embedding depends on, so a hit equals a new computation. On the disk: one file per
key, float32, written under a temporary name and renamed. Several processes may share a directory; what is damaged or
foreign counts as missing, and a disk that is full or read-only costs hits, never an answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import struct
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bundle import BundleFile
from ..errors import EngineError, ImageError, UsageError
from ..image import MAX_FILE_BYTES
from .base import Picture

Floats = npt.NDArray[np.float32]

_FORMAT = 1  # part of every key: raise it when what happens to a picture before the graphs changes (image.py)
_KEY = re.compile(r"[0-9a-f]{64}")
_HEADER = struct.Struct("<8sIII32s32s")  # magic, version, rows, columns, key, SHA-256 of the payload
_MAGIC, _VERSION = b"TLEEMBED", 1
_SCAN_EVERY = 16  # files written between two looks at what other processes wrote
_FILL = 0.9  # part of max_disk_bytes that eviction leaves
_STALE_S = 3600  # age of a temporary file whose writer was killed
_CHUNK = 1 << 20  # bytes read at a time


class EmbeddingCache:
    """Embeddings by key, least recently used out first. Any number of threads may share one.

    Args:
        max_bytes: of arrays kept in memory; 0 keeps none.
        directory: where files are kept; None for memory alone. Made on demand, readable by its owner only.
        max_disk_bytes: of files in it. Several processes that write at once may pass it by 16 files each.

    Raises:
        UsageError: a negative limit.
    """

    def __init__(self, *, max_bytes: int, directory: Path | None = None, max_disk_bytes: int = 1 << 30) -> None:
        for name, value in (("max_bytes", max_bytes), ("max_disk_bytes", max_disk_bytes)):
            if value < 0:
                raise UsageError(f"{name}={value} is negative", "0 turns that cache off")
        self._max_bytes, self._max_disk_bytes = max_bytes, max_disk_bytes
        self._directory = None if directory is None or max_disk_bytes == 0 else Path(directory)
        self._lock = threading.Lock()
        self._disk_lock = threading.Lock()  # a file appears and is counted, or the directory is counted, never both
        self._arrays: OrderedDict[str, Floats] = OrderedDict()
        self._written = 0
        names = ("hits", "disk_hits", "misses", "bytes", "entries", "disk_bytes", "evictions", "disk_errors")
        self._stats = dict.fromkeys(names, 0)
        if self._directory is not None:
            self._tidy()

    def get(self, key: str) -> Floats | None:
        """The embeddings (t, d) under a key, read-only; None where there are none."""
        path = self._path(key)
        with self._lock:
            array = self._arrays.get(key)
            if array is not None:
                self._arrays.move_to_end(key)
                self._stats["hits"] += 1
        if array is None and path is not None:
            array = _read(path, key, self._max_disk_bytes)
            if array is not None:
                self._keep(key, array)
                self._count("disk_hits", 1)
        if array is None:
            self._count("misses", 1)
        elif path is not None:
            with contextlib.suppress(OSError):
                os.utime(path)  # files leave by age of use, other processes' use included
        return array

    def put(self, key: str, embeds: npt.NDArray[Any]) -> None:
        """Keep embeddings (t, d). What doesn't fit, or can't be written, is not kept."""
        path = self._path(key)
        array = np.array(embeds, dtype=np.float32, order="C")  # a copy: the caller may change its own
        if array.ndim != 2 or not array.size:
            raise EngineError(f"image embeddings of shape {array.shape} can't be cached, (t, d) expected")
        array.flags.writeable = False
        self._keep(key, array)
        if path is None or _HEADER.size + array.nbytes > self._max_disk_bytes:
            return
        with self._disk_lock:
            try:
                _write(path, key, array)
            except OSError:
                self._count("disk_errors", 1)
                return
            with self._lock:
                self._written += 1
                self._stats["disk_bytes"] += _HEADER.size + array.nbytes
                due = self._written % _SCAN_EVERY == 0 or self._stats["disk_bytes"] > self._max_disk_bytes
            if due:
                self._tidy()

    def stats(self) -> dict[str, int]:
        """Counters since the start, and what is held now.

        `hits` were answered from memory, `disk_hits` from a file, `misses` from neither; `bytes` and `entries` are in
        memory; `disk_bytes` is what the last look at the directory found and what was written since.
        """
        with self._lock:
            return dict(self._stats)

    def _path(self, key: str) -> Path | None:
        if not _KEY.fullmatch(key):
            raise EngineError(f"cache key {key[:80]!r} is not 64 hex digits", "make it with cache_key")
        return None if self._directory is None else self._directory / key

    def _count(self, name: str, by: int) -> None:
        with self._lock:
            self._stats[name] += by

    def _keep(self, key: str, array: Floats) -> None:
        if array.nbytes > self._max_bytes:
            return
        with self._lock:
            self._arrays[key] = array
            self._arrays.move_to_end(key)
            total = sum(kept.nbytes for kept in self._arrays.values())
            while total > self._max_bytes:
                total -= self._arrays.popitem(last=False)[1].nbytes
                self._stats["evictions"] += 1
            self._stats["bytes"], self._stats["entries"] = total, len(self._arrays)

    def _tidy(self) -> None:
        """Count the files; bring them under the limit, the longest unused first; drop what killed writers left."""
        try:
            found = sorted(self._files())
        except OSError:  # not made yet, or not ours to read
            return
        total = sum(size for _, size, _ in found)
        limit = self._max_disk_bytes if total <= self._max_disk_bytes else int(_FILL * self._max_disk_bytes)
        gone = 0
        for _, size, path in found:
            if total <= limit:
                break
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                total, gone = total - size, gone + 1
        with self._lock:
            self._stats["disk_bytes"] = total
            self._stats["evictions"] += gone

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of every cached file; nothing else in the directory is touched."""
        with os.scandir(str(self._directory)) as entries:
            for entry in entries:
                temporary = entry.name.startswith(".") and _KEY.fullmatch(entry.name[1:65]) is not None
                if not temporary and not _KEY.fullmatch(entry.name):
                    continue
                with contextlib.suppress(OSError):  # another process may take it away meanwhile
                    facts = entry.stat(follow_symlinks=False)
                    if not entry.is_file(follow_symlinks=False):
                        continue
                    if not temporary:
                        yield facts.st_mtime_ns, facts.st_size, Path(entry.path)
                    elif time.time() - facts.st_mtime > _STALE_S:
                        os.unlink(entry.path)


def picture_digest(picture: Picture) -> str:
    """Hex SHA-256 that tells pictures apart: of a file's bytes, or of an array's type, shape and values.

    A path and the bytes of its file have the same digest. A file that may be replaced meanwhile should be read once
    and passed as bytes, here and to the runtime.

    Raises:
        ImageError: no such file, one that can't be read, or one beyond MAX_FILE_BYTES.
    """
    if isinstance(picture, np.ndarray):
        digest = hashlib.sha256(f"array {picture.dtype.str} {picture.shape}\n".encode())
        digest.update(np.ascontiguousarray(picture).data)
        return digest.hexdigest()
    digest = hashlib.sha256(b"file\n")
    if isinstance(picture, bytes):
        digest.update(picture)
        return digest.hexdigest()
    path, size = Path(picture), 0
    if not path.is_file():  # a pipe or a device would never end
        raise ImageError(f"{path}: no such file", "check the path given to --image")
    try:
        with path.open("rb") as handle:
            while chunk := handle.read(_CHUNK):
                size += len(chunk)
                if size > MAX_FILE_BYTES:
                    raise ImageError(f"{path}: more than {MAX_FILE_BYTES:,} bytes", "scale the picture down first")
                digest.update(chunk)
    except OSError as error:
        raise ImageError(f"{path}: can't be read ({error.strerror})", "check the file's permissions") from error
    return digest.hexdigest()


def file_digest(file: BundleFile) -> str:
    """One hex digest of a bundle's file and its parts, from the manifest's hashes."""
    return hashlib.sha256("\n".join(entry.sha256 for entry in file.entries).encode()).hexdigest()


def cache_key(picture_sha256: str, preprocess_sha256: str, vision_sha256: str, facts: Mapping[str, Any]) -> str:
    """Hex key of one picture's embeddings.

    Args:
        picture_sha256: picture_digest's.
        preprocess_sha256: file_digest of the preprocessing graph, which holds size, policy, padding and normalisation.
        vision_sha256: file_digest of the tower, its parts included.
        facts: JSON values of what else may move a last bit; see vision_facts.
    """
    parts = [_FORMAT, picture_sha256, preprocess_sha256, vision_sha256, dict(facts)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def vision_facts(providers: Sequence[str], n_threads: int) -> dict[str, Any]:
    """What decodes and computes: another version or processor may round otherwise, and files outlive both."""
    pillow, onnxruntime = _versions()
    return {
        "pillow": pillow,
        "onnxruntime": onnxruntime,
        "providers": list(providers),
        "n_threads": n_threads,
        "machine": platform.machine(),
    }


@lru_cache
def _versions() -> tuple[str, str]:
    import PIL

    from .vision import onnxruntime_version

    return PIL.__version__, onnxruntime_version()


def _write(path: Path, key: str, array: Floats) -> None:
    """One file, whole or absent. No fsync: what a power cut leaves is told by the payload's hash."""
    payload = array.astype("<f4", copy=False).tobytes()
    header = _HEADER.pack(_MAGIC, _VERSION, *array.shape, bytes.fromhex(key), hashlib.sha256(payload).digest())
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(prefix=f".{key}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(header)
            file.write(payload)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _read(path: Path, key: str, max_bytes: int) -> Floats | None:
    """The embeddings in a file; None unless it is ours, whole, and of this key."""
    try:
        if not path.is_file():  # a pipe would never answer
            return None
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                return None
            magic, version, rows, columns, owner, digest = _HEADER.unpack(file.read(_HEADER.size))
            if (magic, version, owner) != (_MAGIC, _VERSION, bytes.fromhex(key)):
                return None
            if not rows or not columns or size != _HEADER.size + 4 * rows * columns:
                return None
            payload = file.read(4 * rows * columns)
    except (OSError, struct.error):
        return None
    if len(payload) != 4 * rows * columns or hashlib.sha256(payload).digest() != digest:
        return None
    array: Floats = np.frombuffer(payload, "<f4").reshape(rows, columns).astype(np.float32, copy=False)
    array.flags.writeable = False
    return array
