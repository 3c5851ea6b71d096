"""Files that are either whole or absent: temporary name, fsync, rename; hashes; paths that stay inside."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import BundleError, StorageError

_CHUNK = 1 << 20  # bytes read at a time while hashing
_SPARE = 1 << 16  # bytes; a native writer that failed with less left than this failed for want of space
_FULL = 1 << 20  # bytes; with less left on the disk, a failed write is blamed on it
_ASIDE = ".old"  # the directory that is being replaced
_DEVICES = (Path("/dev"), Path("/proc"))  # as root, a rename would put a file in the place of a device
_MEMORY = Path("/dev/shm")  # files in memory; nothing there is a device
_LONG_NUMBER = re.compile(r"[0-9]{19}")  # 2**63 has 19 digits
_TMP = re.compile(r"^\.(?P<name>.+)\.tmp-(?P<pid>\d+)$")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_tree(root: Path) -> str:
    """One hex SHA-256 over the names and bytes of all regular files below `root`, in sorted order."""
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix()
        digest.update(f"{name}\0{sha256_file(path)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def safe_join(root: Path, relative: str) -> Path:
    """Path of a manifest entry. Raises BundleError if it would leave `root` (absolute, `..`, or a link out)."""
    pure = PurePosixPath(relative)
    if not relative or pure.is_absolute() or ".." in pure.parts or "\\" in relative or "\0" in relative:
        raise BundleError(f"{root}: entry {relative!r} leaves the bundle", "get the bundle again from its maker")
    path = root / pure
    if not path.resolve().is_relative_to(root.resolve()):
        raise BundleError(f"{root}: entry {relative!r} is a link out of the bundle", "copy the bundle without links")
    return path


def is_full(target: Path, needed: int = _SPARE) -> bool:
    """Whether the disk that `target` lies on has less than `needed` bytes left.

    For writers in C++ and numpy, which report a full disk without the system's error number, or not at all.
    """
    return shutil.disk_usage(target.parent).free < needed


def no_space(target: Path) -> StorageError:
    """The error to raise for a full disk, with the file's name."""
    return StorageError(f"{target}: no space left on the device", "free some space or choose another -o")


@contextlib.contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """Turn the operating system's write errors into a StorageError that names the file and the next step."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space(target) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise StorageError(f"{target}: {error.strerror}", "choose a place that you may write to with -o") from error
        raise


@contextlib.contextmanager
def new_directory(target: Path, *, force: bool = False, ours: str = "") -> Iterator[Path]:
    """A directory to fill that becomes `target` when the block ends well, and vanishes when it doesn't.

    Args:
        target: where it goes.
        force: replace what stands there.
        ours: see check_forced.

    Raises:
        StorageError: `target` exists and `force` is off, or what check_forced raises, or the disk is full.
    """
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        if force:
            check_forced(target, ours)
        if target.exists() and not force:
            raise StorageError(f"{target} exists already", "name another place with -o, or replace it with --force")
        temporary = target.parent / f".{target.name}.tmp-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            _open_up(temporary)
            _sync(temporary)
            if target.exists() and not force:
                raise StorageError(f"{target} was made by another run meanwhile", "name another place with -o")
            _swap(temporary, target)
        except Exception as error:
            if is_full(target, _FULL) and not isinstance(error, StorageError):
                raise no_space(target) from error  # native code says it in other words
            if type(error).__name__ == "SafetensorError" or getattr(error, "errno", None) == errno.EFBIG:
                raise StorageError(
                    f"{target}: can't be written ({error})", "make room, or choose another place"
                ) from error
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory for what is needed for a while, removed at the end.

    Raises:
        StorageError: the disk that holds such files is full.
    """
    with tempfile.TemporaryDirectory(prefix="tinyllava-edge-") as name:
        folder = Path(name)
        try:
            yield folder
        except Exception as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or is_full(folder, _FULL):
                raise StorageError(
                    f"{folder}: no space left for temporary files",
                    "free some space there, or set TMPDIR to another disk",
                ) from error
            raise


def check_forced(target: Path, ours: str) -> None:
    """Refuse to replace what isn't known to be the command's own.

    Args:
        target: what `--force` would replace.
        ours: a file that every directory of this kind holds; "" lets any directory go.

    Raises:
        StorageError: `target` is the working directory, or is neither empty nor holds that file.
    """
    if not target.exists():
        return
    if target.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise StorageError(f"{target}: is the directory you are in", "name another place with -o")
    if ours and (not target.is_dir() or any(target.iterdir())) and not (target / ours).is_file():
        raise StorageError(
            f"{target}: holds something else (no {ours} in it), which --force does not replace",
            "name another place with -o, or remove it by hand",
        )


def _open_up(folder: Path) -> None:
    """Files that a library made for its owner alone get the directory's own rights: others may read checkpoints."""
    rights = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 == 0o600:
            path.chmod(rights)


def end_of_links(target: Path) -> Path:
    """Where a file that is written under this name would lie.

    Raises:
        StorageError: one of the links leads below /dev or /proc, e.g. /dev/stdout, or they lead in a circle.
    """
    path, seen = target.absolute(), set[Path]()
    while True:
        path = Path(os.path.realpath(path.parent)) / path.name
        if not path.is_relative_to(_MEMORY) and any(path.is_relative_to(root) for root in _DEVICES):
            raise StorageError(f"{target} is no regular file", "name a file; `> FILE` redirects what is printed")
        if not path.is_symlink():
            return path
        if path in seen:
            raise StorageError(f"{target}: its links lead in a circle", "remove them, or choose another -o")
        seen.add(path)
        path = path.parent / path.readlink()


@contextlib.contextmanager
def new_file(target: Path, *, force: bool = True) -> Iterator[Path]:
    """A file name to write to that becomes `target` when the block ends well, and vanishes when it doesn't.

    A link stays a link: what it leads to is replaced.

    Raises:
        StorageError: `target` exists and `force` is off, leads to something else than a regular file or to a place
            below /dev or /proc, or the disk is full.
    """
    given, target = target, end_of_links(target)
    if target.exists() and not force:
        raise StorageError(f"{given} exists already", "name another place with -o, or replace it with --force")
    if target.exists() and not target.is_file():  # a rename would put a file in a device's or a pipe's place
        raise StorageError(f"{given} is no regular file", "name a file; `> FILE` redirects what is printed")
    with storage_errors(given):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name}.tmp-{os.getpid()}"
        try:
            yield temporary
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with new_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any) -> None:
    """Write JSON with sorted keys left as given, two-space indent, one newline at the end."""
    write_text(target, json_text(value))


def json_text(value: Any) -> str:
    """What write_json writes."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def has_huge_integer(value: Any, text: str) -> bool:
    """Whether JSON holds a whole number of 2**63 or more, which no later calculation could take.

    Args:
        value: the parsed JSON.
        text: the same as JSON; tells quickly that there are no long numbers.
    """
    waiting = [value] if _LONG_NUMBER.search(text) else []
    while waiting:  # not by recursion: the nesting is the writer's choice
        found = waiting.pop()
        if isinstance(found, dict | list):
            waiting += found.values() if isinstance(found, dict) else found
        elif isinstance(found, int) and abs(found) >= 1 << 63:
            return True
    return False


def _swap(temporary: Path, target: Path) -> None:
    """Rename over `target`; an old directory is moved aside first, because rename can't replace a full one."""
    if not target.exists():
        temporary.rename(target)
        return
    aside = target.parent / f".{target.name}{_ASIDE}"
    target.rename(aside)
    temporary.rename(target)
    shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink()


def _sync(root: Path) -> None:
    """Bring every file below `root` to the disk, so that after a power cut the final name holds no empty files."""
    for path in [*(p for p in root.rglob("*") if p.is_file()), root]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sweep(target: Path) -> None:
    """Mend what killed runs left beside `target`: temporary names whose process is gone, an old one moved aside."""
    aside = target.parent / f".{target.name}{_ASIDE}"
    if aside.exists():  # killed between the two renames, or just after them
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(target)
    for entry in target.parent.iterdir():
        match = _TMP.match(entry.name)
        if match and match["name"] == target.name and not _alive(int(match["pid"])):
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
