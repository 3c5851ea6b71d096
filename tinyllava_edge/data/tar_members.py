"""Members of a plain tar file, one header after the other; nothing is unpacked and no list is kept."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import DataError
from .zip_members import Member

_BLOCK = 512
_HEADER_LIMIT = 1 << 20  # bytes of one header record; a longer one is no name
_REST = 1 << 20  # bytes behind the end mark that are looked at
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def tar_members(path: Path) -> Iterator[Member | str]:
    """Every file of a tar archive in its order; in the place of a link or device its name. Folders are left out.

    Raises:
        DataError: compressed, truncated or damaged, or several archives behind one another.
    """
    try:
        with path.open("rb") as handle:
            check_plain(path, handle.read(8))
            length = handle.seek(0, 2)
            handle.seek(0)
            with _Headers(path) as headers, tarfile.open(fileobj=headers, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # else every header is kept
                    if info.isreg() and not info.issparse():
                        if info.size < 0 or info.offset_data + info.size > length:
                            raise _damaged(path, f"{info.name[:200]!r} is cut off")
                        yield Member(info.name, info.offset_data, info.size, info.size)
                    elif not info.isdir():
                        yield info.name
                    if tar.offset <= info.offset:
                        raise _damaged(path, "a size is below zero")
                _check_end(handle, tar.offset, path)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error})", "check the file and its permissions") from error


def check_plain(path: Path, start: bytes) -> None:
    """Raise DataError for a compressed archive, by its first bytes: its members can't be read one by one."""
    for magic, name in _PACKED.items():
        if start.startswith(magic):
            raise DataError(
                f"{path}: compressed with {name}, so single members can't be read",
                "unpack it, or pack it again as a plain .tar: pictures are compressed already",
            )


class _Headers(io.FileIO):
    """What tarfile reads from: a header that claims gigabytes is not read into memory."""

    def read(self, size: int | None = -1) -> bytes:
        """As a file's, with a limit."""
        if size is None or not 0 <= size <= _HEADER_LIMIT:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size) or b""


def _check_end(handle: BinaryIO, offset: int, path: Path) -> None:
    """tarfile takes anything that is no header for the end; a whole archive ends with blocks of zeros and no more."""
    handle.seek(offset)
    block = handle.read(_BLOCK)
    if len(block) < _BLOCK:
        raise _damaged(path, "it ends without an end mark")
    if any(block):
        raise _damaged(path, f"no header at byte {offset:,}")
    if handle.read(_REST).strip(b"\0"):
        raise DataError(f"{path}: more data behind the end mark", "give archives that were joined one by one")


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: truncated or damaged tar file ({what})", "get the file again; it must be whole")
