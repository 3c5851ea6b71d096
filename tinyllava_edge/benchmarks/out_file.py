"""Where results may be written: nothing that stands there already is lost, and what lies beside it is known by name."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tinyllava_edge.benchmarks.results import Sample, read_results, write_results
from tinyllava_edge.errors import DataError, StorageError, TinyLlavaEdgeError, UsageError
from tinyllava_edge.files import end_of_links, storage_errors

BESIDE = (".answers.jsonl", ".replies.jsonl", ".submission.jsonl")  # endings of what `eval` writes beside `-o`


def check_target(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse a target that a new file must not take the place of.

    Args:
        path: what -o names.
        inputs: what the command reads; neither `path` nor the submission beside it may be one of them.

    Raises:
        UsageError: a directory, a device or a pipe, which a rename would replace, or one of the inputs.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: is no regular file", "name a file with -o")
    target = path.resolve()
    for source in inputs:
        real = source.resolve()
        beside = real.parent == target.parent and real.name.startswith(f"{target.stem}.submission")
        if real == target or beside:
            raise UsageError(f"{path}: would overwrite {source}, which is read", "name another file with -o")


def check_replaceable(path: Path, ours: Callable[[Sequence[Sample]], bool]) -> None:
    """Let only an older result of the same command be replaced; a cut or empty file may go, too.

    Raises:
        DataError: the file holds something else.
    """
    if not path.exists() or not path.stat().st_size:
        return
    try:
        samples = read_results([path], tolerate_cut=True)
    except DataError as error:
        raise DataError(f"{path}: stands there and is no results file", "name another file with -o") from error
    if not ours(samples):
        raise DataError(f"{path}: holds the results of another run", "name another file with -o")


def check_writable(path: Path) -> None:
    """Find out before minutes of measuring whether a results file can be written there.

    Raises:
        UsageError: no regular file.
        StorageError: its directory can't be made or written to.
    """
    check_target(end_of_links(path))
    folder = next(place for place in (path.absolute(), *path.absolute().parents)[1:] if place.exists())
    if not folder.is_dir():
        raise StorageError(f"{path}: {folder.name} is a file, no directory", "name another place with -o")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise StorageError(f"{path}: can't be written ({error.strerror})", "name another place with -o") from error


def append_results(path: Path, samples: Sequence[Sample]) -> None:
    """Add lines to a results file; of several processes that add to it, each one's lines stay.

    Raises:
        DataError: the file that stands there can't be read.
        StorageError: it can't be written. The lines are then in a temporary file, which the hint names.
    """
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.resolve().parent):
            write_results(path, [*(read_results([path]) if path.is_file() else []), *samples])
    except (TinyLlavaEdgeError, OSError) as error:
        handle, rescue = tempfile.mkstemp(prefix="tinyllava-edge-", suffix=".jsonl")
        os.close(handle)
        write_results(Path(rescue), samples)
        kept = f"the samples are kept in {rescue}"
        if isinstance(error, OSError):
            raise StorageError(f"{path}: can't be written ({error.strerror})", kept) from error
        raise type(error)(error.message, f"{error.hint}; {kept}" if error.hint else kept) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the lock ends with the process. On systems without such locks there is none."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def without_companions(paths: Sequence[Path]) -> list[Path]:
    """The paths without what `eval` wrote beside another one of them, which a pattern like `*.jsonl` also finds."""
    stems = {path.parent / path.stem for path in paths}
    return [
        path
        for path in paths
        if not any(path.name.endswith(end) and path.parent / path.name[: -len(end)] in stems for end in BESIDE)
    ]
