"""Where results may be written: nothing that stands there already is lost, and what lies beside it is known by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tinyllava_edge.benchmarks.results import Sample, read_results
from tinyllava_edge.errors import DataError, UsageError

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


def without_companions(paths: Sequence[Path]) -> list[Path]:
    """The paths without what `eval` wrote beside another one of them, which a pattern like `*.jsonl` also finds."""
    stems = {path.parent / path.stem for path in paths}
    return [
        path
        for path in paths
        if not any(path.name.endswith(end) and path.parent / path.name[: -len(end)] in stems for end in BESIDE)
    ]
