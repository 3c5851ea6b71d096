"""One member's bytes out of an archive, checked; what is unpacked never exceeds what the archive announced."""

from __future__ import annotations

import os
import zlib

from ..errors import ImageError
from .zip_members import DEFLATED, LOCAL_SIZE, STORED, Member, contents_at

_METHODS = {1: "shrunk", 6: "imploded", 9: "deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "XZ", 99: "AES"}
_GET_AGAIN = "get the archive again, or pack it anew"


def method_fault(member: Member) -> str:
    """Why a member can't be unpacked here; "" when it can."""
    if member.encrypted:
        return "encrypted"
    if member.method not in (STORED, DEFLATED):
        return f"packed with {_METHODS.get(member.method, f'method {member.method}')}, which is not read here"
    return ""


def read_member(descriptor: int, member: Member, where: str) -> bytes:
    """The unpacked bytes. The descriptor's position is not used, so that processes may share it.

    Args:
        member: of a size that memory holds, neither encrypted nor packed in an unknown way.
        where: what messages begin with.

    Raises:
        ImageError: cut off, damaged, or more bytes than the archive announced.
    """
    offset = member.offset
    if member.crc is not None:  # a zip file: the local header stands in front
        header = contents_at(_read(descriptor, LOCAL_SIZE, offset, where))
        if header is None:
            raise ImageError(f"{where}: damaged (no header at byte {offset:,})", _GET_AGAIN)
        offset += header
    limit = member.size + member.size // 100 + 1024  # deflate adds far less to bytes that it can't pack
    if member.packed > limit or (member.method == STORED and member.packed != member.size):
        raise ImageError(f"{where}: damaged ({member.packed:,} bytes for {member.size:,})", _GET_AGAIN)
    data = _read(descriptor, member.packed, offset, where)
    if member.method == DEFLATED:
        data = _inflate(data, member.size, where)
    if member.crc is not None and zlib.crc32(data) != member.crc:
        raise ImageError(f"{where}: damaged (its CRC-32 differs)", _GET_AGAIN)
    return data


def _inflate(data: bytes, size: int, where: str) -> bytes:
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        found = unpacker.decompress(data, size + 1)
    except zlib.error as error:
        raise ImageError(f"{where}: damaged ({error})", _GET_AGAIN) from error
    if len(found) != size or not unpacker.eof:
        more = "more" if len(found) > size else "fewer"
        raise ImageError(f"{where}: damaged ({more} bytes than the {size:,} announced)", _GET_AGAIN)
    return found


def _read(descriptor: int, size: int, offset: int, where: str) -> bytes:
    try:
        data = os.pread(descriptor, size, offset)
    except (OSError, OverflowError, ValueError) as error:
        raise ImageError(f"{where}: can't be read ({error})", _GET_AGAIN) from error
    if len(data) != size:
        raise ImageError(f"{where}: cut off at {len(data):,} of {size:,} bytes", _GET_AGAIN)
    return data
