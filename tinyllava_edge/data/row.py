"""One conversation of a data set, and one that was refused: every form of data comes down to these two.

Bad rows are counted, named and written to a file, never dropped in silence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import DataError, UsageError
from ..files import new_file
from ..prompt import Turn

BAD_ROWS_FILE = "bad_rows.jsonl"
NAME_LIMIT = 200  # characters of an id or a name that a message repeats


@dataclass(frozen=True)
class Row:
    """One conversation that passed every check."""

    id: str
    """the row's `id`, integers written as text; the row's number or the sample's stem where none is needed"""
    images: tuple[str, ...]
    """names of its pictures in the order of the markers, forward slashes; empty for a text-only row"""
    turns: tuple[Turn, ...]
    """questions with their answers; one picture is `<image>` and a newline in front of its question, several are
    counted by the turn's `images`"""
    tier: str | None = None
    """optional group that scores are also reported by"""
    question_type: str | None = None
    """optional kind of question that scores are also reported by"""
    file: str = ""
    """the JSON file, shard or directory it comes from"""
    number: int = 0
    """place in the list, line of the file, or sample of the shard or directory; the first is 1"""

    @property
    def image(self) -> str | None:
        """The first picture, or None: for users of one."""
        return self.images[0] if self.images else None


@dataclass(frozen=True)
class BadRow:
    """One row that did not pass."""

    file: str
    """the JSON file, shard or directory"""
    row: int
    """place in the list, line of the file, or sample of the shard or directory; the first is 1"""
    id: str
    """the row's `id` where it has one"""
    reason: str
    """what is wrong with it"""


class RowFault(Exception):
    """Why a row is bad; the reader makes a BadRow of it."""


def shown(value: object) -> str:
    """A value from a file as messages repeat it: short, and never deep."""
    return str(value)[:NAME_LIMIT] if isinstance(value, str | int | float) else f"a {type(value).__name__}"


def bad_row(row: Row, reason: str) -> BadRow:
    """A row that passed the checks here and was refused later."""
    return BadRow(row.file, row.number, row.id[:NAME_LIMIT], reason)


def bad_limit(max_bad: int | float, rows: int | None) -> int | None:
    """How many bad rows are allowed.

    Args:
        max_bad: a whole number is a count; a float from 0 to 1 is a share of all rows, good and bad (0.01 is 1 %).
        rows: all rows, good and bad; None while they are still being read.

    Returns:
        The number; None for a share as long as the number of rows is not known.

    Raises:
        UsageError: neither a count nor a share.
    """
    if isinstance(max_bad, bool) or not math.isfinite(max_bad) or max_bad < 0:
        raise UsageError(f"{max_bad} bad rows", "allow a number of rows (20) or a share of them (0.01)")
    if isinstance(max_bad, int):
        return max_bad
    if max_bad > 1:
        raise UsageError(f"{max_bad} is no share of the rows", "a share is at most 1.0; a count is a whole number")
    return None if rows is None else math.floor(max_bad * rows)


def check_bad(
    bad: Sequence[BadRow], max_bad: int | float, rows: int | None = None, *, count: int | None = None
) -> None:
    """Stop when too many rows are bad.

    Args:
        bad: the bad rows, or the first of them.
        max_bad: as for `bad_limit`.
        rows: all rows, good and bad; None while they are still being read: a share is then not judged.
        count: how many bad rows there are where `bad` holds the first of them only.

    Raises:
        DataError: more than are allowed; names the first one and their count.
    """
    found = len(bad) if count is None else count
    allowed = bad_limit(max_bad, rows)
    if allowed is not None and found > allowed:
        first = bad[0]
        limit = f"{allowed} allowed" if isinstance(max_bad, int) else f"{allowed} of {rows} allowed ({max_bad:.3g})"
        raise DataError(
            f"{first.file}: row {first.row} (id {first.id!r}): {first.reason}; {found} bad rows, {limit}",
            "mend the rows, or allow some with --max-bad-rows",
        )


def write_bad_rows(path: Path, bad: Iterable[BadRow]) -> None:
    """Write the bad rows, one JSON object a line, as they come; the file is whole or not there at all."""
    with bad_rows_writer(path) as write:
        for row in bad:
            write(row)


@contextmanager
def bad_rows_writer(path: Path) -> Iterator[Callable[[BadRow], None]]:
    """The same for rows that turn up one by one: the block gets a function that writes one."""
    with new_file(path) as temporary, temporary.open("w", encoding="ascii") as handle:

        def write(row: BadRow) -> None:
            handle.write(json.dumps(asdict(row), ensure_ascii=True) + "\n")

        yield write
        handle.flush()
