"""Ranges and patterns in paths: `shards/{000..099}.tar`, `shards/*.tar`. Expanded here, not by a shell."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError

MAX_PATHS = 100_000
_BRACE = re.compile(r"\{(?:(\d{1,9})\.\.(\d{1,9})|([^{}]*,[^{}]*))\}")
_PATTERN = re.compile(r"[*?\[]")


def expand(path: Path, flag: str = "--data") -> tuple[Path, ...]:
    """The paths that one stands for; itself when it exists or holds neither range nor pattern.

    Raises:
        DataError: a pattern that fits nothing, or more than MAX_PATHS paths.
    """
    if path.exists() or not (_BRACE.search(str(path)) or _PATTERN.search(str(path))):
        return (path,)
    if math.prod(_count(brace) for brace in _BRACE.finditer(str(path))) > MAX_PATHS:
        raise DataError(f"{path}: stands for more than {MAX_PATHS:,} paths", "name fewer")
    found: list[Path] = []
    for text in _braces(str(path)):
        if not _PATTERN.search(text):
            found.append(Path(text))
        else:
            found += [Path(name) for name in sorted(glob.glob(text, recursive=True))]
    if not found:
        raise DataError(f"{path}: no such file", f"check the path given to {flag}")
    return tuple(found)


def _count(brace: re.Match[str]) -> int:
    first, last, words = brace.groups()
    return len(words.split(",")) if words is not None else abs(int(last) - int(first)) + 1


def _braces(text: str) -> Iterator[str]:
    """`{08..10}` is 08, 09, 10, as wide as it is written; `{a,b}` is a and b."""
    found = _BRACE.search(text)
    if found is None:
        yield text
        return
    first, last, words = found.groups()
    if words is not None:
        values: Iterator[str] = iter(words.split(","))
    else:
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        step = 1 if int(first) <= int(last) else -1
        values = (f"{k:0{width}d}" for k in range(int(first), int(last) + step, step))
    for value in values:
        yield from _braces(text[: found.start()] + value + text[found.end() :])
