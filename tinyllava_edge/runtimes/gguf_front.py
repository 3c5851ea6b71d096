"""The front of a GGUF: metadata and tensor table, in plain Python from a read-only map; weights are never touched.

Every count is held against a limit and against the file's size before anything is read, so a hostile file costs an
error and no time.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BundleError

AGAIN = "copy the file again, or export the bundle again"
_MAX_PAIRS = 4096
_MAX_ITEMS = 4 << 20
_MAX_TENSORS = 65536
_MAX_NAME = 63  # bytes of a tensor's name
_MAX_TYPE = 256  # ggml's tensor types are numbered from zero; newer ones than ours are llama.cpp's to refuse
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT16, _STRING, _ARRAY = 2, 8, 9


class Length(int):
    """Number of items of an array, which no number is mistaken for."""


class Damaged(Exception):
    """The file contradicts itself or runs past its end."""


@dataclass(frozen=True)
class TensorEntry:
    """One line of the tensor table."""

    kind: int
    """number of its type in ggml"""
    sizes: tuple[int, ...]
    """sizes, innermost first as ggml counts them"""
    offset: int
    """place of its first byte behind `Front.start`"""


@dataclass(frozen=True)
class Front:
    """What a GGUF says of itself."""

    pairs: Mapping[str, Any]
    """metadata: numbers, bytes, lists of bytes; arrays of numbers as a Length, or as a list where it was asked for"""
    tensors: Mapping[str, TensorEntry]
    """name → its entry, in the file's order"""
    start: int
    """place in the file that offsets count from"""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[mmap.mmap]:
    """A read-only map of a file. Raises BundleError: missing, empty, unreadable."""
    if not path.is_file():
        raise BundleError(f"{path}: missing", "copy the whole bundle again, or export it again")
    try:
        with path.open("rb") as handle:
            data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise BundleError(f"{path}: can't be read ({error.strerror})", "check the file's permissions") from error
    except ValueError as error:
        raise BundleError(f"{path}: empty file", AGAIN) from error
    with data:
        yield data


@contextlib.contextmanager
def damage(path: Path, what: str) -> Iterator[None]:
    """Turn what a header's reader stumbles on into one BundleError that names the file: it is not `what`."""
    try:
        yield
    except Damaged as error:
        raise BundleError(f"{path}: not {what} that can be run ({error})", AGAIN) from error
    except (struct.error, UnicodeDecodeError, OverflowError) as error:
        raise BundleError(f"{path}: truncated or damaged GGUF header", AGAIN) from error


def read_front(data: mmap.mmap, listed: int = 0) -> Front:
    """Read metadata and tensor table.

    Args:
        data: the file.
        listed: longest array of numbers whose values are kept.

    Raises:
        Damaged, struct.error, UnicodeDecodeError, OverflowError: it is not a sound GGUF.
    """
    magic, version, tensors, count = struct.unpack_from("<4sIQQ", data, 0)
    if magic != b"GGUF" or version not in (2, 3):
        raise Damaged(f"it starts with {magic!r}, version {version}")
    if count > _MAX_PAIRS or tensors > _MAX_TENSORS:
        raise Damaged(f"{count} metadata entries, {tensors} tensors")
    place, pairs = 24, dict[str, Any]()
    for _ in range(count):
        key, place = _string(data, place)
        (kind,) = struct.unpack_from("<I", data, place)
        if key == b"split.no" and kind != _UINT16:  # llama.cpp asserts this one's type
            raise Damaged(f"split.no is of type {kind}")
        pairs[key.decode("utf-8")], place = _value(data, place + 4, kind, listed)
    table: dict[str, TensorEntry] = {}
    for _ in range(tensors):
        name, entry, place = _tensor(data, place)
        if name in table:
            raise Damaged(f"two tensors are called {name!r}")
        table[name] = entry
    alignment = pairs.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 16:
        raise Damaged(f"general.alignment is {alignment!r}")
    start = -(-place // alignment) * alignment
    if any(start + entry.offset > len(data) for entry in table.values()):
        raise Damaged("a tensor lies beyond the end")
    return Front(pairs, table, start)


def _tensor(data: mmap.mmap, place: int) -> tuple[str, TensorEntry, int]:
    """Name and entry of one tensor, and where the next one's begins."""
    name, place = _string(data, place)
    if len(name) > _MAX_NAME:
        raise Damaged(f"a tensor's name of {len(name)} bytes")
    (rank,) = struct.unpack_from("<I", data, place)
    if not 1 <= rank <= 4:
        raise Damaged(f"tensor {name[:40]!r} has {rank} dimensions")
    *sizes, kind, offset = struct.unpack_from(f"<{rank}QIQ", data, place + 4)
    if min(sizes) < 1 or math.prod(sizes) >= 1 << 40 or kind >= _MAX_TYPE:
        raise Damaged(f"tensor {name[:40]!r} is {sizes} of type {kind}")
    return name.decode("utf-8"), TensorEntry(kind, tuple(sizes), offset), place + 4 + 8 * rank + 12


def _value(data: mmap.mmap, place: int, kind: int, listed: int) -> tuple[Any, int]:
    """A value and where it ends."""
    if kind in _SCALARS:
        form = "<" + _SCALARS[kind]
        return struct.unpack_from(form, data, place)[0], place + struct.calcsize(form)
    if kind == _STRING:
        return _string(data, place)
    if kind != _ARRAY:
        raise Damaged(f"metadata type {kind}")
    item, count = struct.unpack_from("<IQ", data, place)
    if count > _MAX_ITEMS:
        raise Damaged(f"an array of {count} items")
    place += 12
    if item in _SCALARS:
        end = place + count * struct.calcsize("<" + _SCALARS[item])
        if end > len(data):
            raise Damaged("an array runs past the end")
        if count > listed:
            return Length(count), end
        return list(struct.unpack_from(f"<{count}{_SCALARS[item]}", data, place)), end
    if item != _STRING:
        raise Damaged(f"an array of type {item}")
    strings = []
    for _ in range(count):
        text, place = _string(data, place)
        strings.append(text)
    return strings, place


def _string(data: mmap.mmap, place: int) -> tuple[bytes, int]:
    """Bytes of a string and where it ends."""
    (length,) = struct.unpack_from("<Q", data, place)
    end = place + 8 + length
    if end > len(data):
        raise Damaged("a string runs past the end")
    return data[place + 8 : end], end
