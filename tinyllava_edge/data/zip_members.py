"""Members of a zip file, read one after the other from its central directory: `zipfile` keeps them all in memory."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import DataError

STORED, DEFLATED = 0, 8
_END = struct.Struct("<4s4H2LH")  # end of the central directory
_END64_PLACE = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s4B4H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_COMMENT = 1 << 16  # longest comment behind the end record, plus one
_UTF8, _ENCRYPTED = 0x800, 0x1
LOCAL_SIZE = _LOCAL.size


@dataclass(frozen=True)
class Member:
    """One file in an archive."""

    name: str
    """as the archive spells it, forward slashes"""
    offset: int
    """bytes from the start of the archive: to the local header in a zip file, to the contents in a tar file"""
    size: int
    """bytes when unpacked"""
    packed: int
    """bytes in the archive"""
    method: int = STORED
    """zip's number of the compression"""
    crc: int | None = None
    """CRC-32 of the contents; None where the archive keeps none"""
    encrypted: bool = False
    """whether a password is needed"""


def zip_members(path: Path) -> Iterator[Member]:
    """Every file of a zip archive in the order of its central directory; folders are left out.

    Raises:
        DataError: truncated, damaged, or spread over several files.
    """
    try:
        with path.open("rb") as handle:
            start, size, shift = _directory(handle, path)
            yield from _entries(handle, path, start, size, shift)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error})", "check the file and its permissions") from error


def contents_at(local: bytes) -> int | None:
    """Bytes from a local header's start to the contents. None when it is not one.

    Args:
        local: its first LOCAL_SIZE bytes.
    """
    if len(local) < LOCAL_SIZE or local[:4] != b"PK\3\4":
        return None
    *_, name, extra = _LOCAL.unpack(local)
    return LOCAL_SIZE + int(name) + int(extra)


def _directory(handle: BinaryIO, path: Path) -> tuple[int, int, int]:
    """Start and size of the central directory, and how far its offsets are off because something stands in front."""
    length = handle.seek(0, 2)
    tail_start = max(0, length - _END.size - _COMMENT)
    handle.seek(tail_start)
    tail = handle.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise _damaged(path, "it does not end as a zip file does")
    _, disk, first_disk, _, count, size, offset, _ = _END.unpack_from(tail, at)
    end = tail_start + at  # where the central directory ends
    if 0xFFFF in (disk, count) or 0xFFFFFFFF in (size, offset):
        place = end - _END64_PLACE.size
        handle.seek(max(0, place))
        found = handle.read(_END64_PLACE.size)
        if place >= 0 and found[:4] == b"PK\6\7":
            end = place - _END64.size
            handle.seek(max(0, end))
            record = handle.read(_END64.size)
            if end < 0 or record[:4] != b"PK\6\6":
                raise _damaged(path, "its 64-bit end record is missing")
            *_, disk, first_disk, _, count, size, offset = _END64.unpack(record)
    if disk or first_disk:
        raise DataError(f"{path}: one part of a zip file in several parts", "join the parts into one zip file first")
    start = end - size
    if start < 0 or start - offset < 0:
        raise _damaged(path, "its directory does not fit into the file")
    return start, size, start - offset


def _entries(handle: BinaryIO, path: Path, start: int, size: int, shift: int) -> Iterator[Member]:
    handle.seek(start)
    left = size
    while left:
        head = handle.read(_ENTRY.size) if left >= _ENTRY.size else b""
        if len(head) < _ENTRY.size or head[:4] != b"PK\1\2":
            raise _damaged(path, "its directory is cut off or damaged")
        fields = _ENTRY.unpack(head)
        flags, method, crc, packed, unpacked = fields[5], fields[6], fields[9], fields[10], fields[11]
        name_size, extra_size, comment_size, offset = fields[12], fields[13], fields[14], fields[-1]
        rest = name_size + extra_size + comment_size
        left -= _ENTRY.size + rest
        data = handle.read(rest) if left >= 0 else b""
        if len(data) < rest or left < 0:
            raise _damaged(path, "its directory is cut off or damaged")
        extra = data[name_size : name_size + extra_size]
        unpacked, packed, offset = _wide(extra, unpacked, packed, offset, path)
        name = _name(data[:name_size], flags)
        if not name.endswith("/"):
            yield Member(name, offset + shift, unpacked, packed, method, crc, bool(flags & _ENCRYPTED))


def _wide(extra: bytes, unpacked: int, packed: int, offset: int, path: Path) -> tuple[int, int, int]:
    """Sizes and offset of more than 32 bits stand in an extra field, those that need it in this order."""
    values = [unpacked, packed, offset]
    if 0xFFFFFFFF not in values:
        return unpacked, packed, offset
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = extra[at + 4 : at + 4 + length]
            for k, value in enumerate(values):
                if value == 0xFFFFFFFF:
                    if len(wide) < 8:
                        raise _damaged(path, "a 64-bit size is missing")
                    values[k] = int.from_bytes(wide[:8], "little")
                    wide = wide[8:]
            if max(values) >= 1 << 62:
                raise _damaged(path, "a size is beyond any file")
            break
        at += 4 + length
    return values[0], values[1], values[2]


def _name(raw: bytes, flags: int) -> str:
    """UTF-8 where it is marked so, or is no ASCII and yet UTF-8, as common packers write it unmarked; else DOS's."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("utf-8", "replace") if flags & _UTF8 else raw.decode("cp437")


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: truncated or damaged zip file ({what})", "get the file again; it must be whole")
