"""A limit on bad rows, as a count or as a share; all of them in a file that is whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinyllava_edge.data.row import BadRow, bad_limit, bad_rows_writer, check_bad, write_bad_rows
from tinyllava_edge.errors import DataError, UsageError


def bad(count: int) -> list[BadRow]:
    return [BadRow("d.json", k + 1, f"i{k}", "is blank") for k in range(count)]


@pytest.mark.parametrize(
    ("count", "max_bad", "rows", "fine"),
    [
        (0, 0, 5, True), (1, 0, 5, False), (3, 3, 5, True), (4, 3, 5, False), (4, 3, None, False),
        (1, 0.01, 100, True), (2, 0.01, 100, False), (1, 0.01, 99, False), (5, 1.0, 5, True), (1, 0.0, 5, False),
        (9, 0.01, None, True),
    ],
)  # fmt: skip
def test_the_limit_is_a_count_or_a_share(count: int, max_bad: int | float, rows: int | None, fine: bool) -> None:
    for given, told in ((bad(count), None), (bad(min(count, 1)), count)):
        if fine:
            check_bad(given, max_bad, rows, count=told)
        else:
            with pytest.raises(DataError, match=rf"d\.json: row 1 \(id 'i0'\): is blank; {count} bad rows, "):
                check_bad(given, max_bad, rows, count=told)


@pytest.mark.parametrize("max_bad", [-1, -0.1, 1.5, float("nan"), float("inf"), True])
def test_a_limit_that_is_none_is_refused(max_bad: float) -> None:
    with pytest.raises(UsageError):
        bad_limit(max_bad, 10)


def test_bad_rows_are_written_as_they_come_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    write_bad_rows(path, iter(bad(3)))
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [1, 2, 3]

    def breaking() -> Iterator[BadRow]:
        yield from bad(2)
        raise DataError("d.json: cut", "")

    with pytest.raises(DataError):
        write_bad_rows(path, breaking())
    assert len(path.read_text().splitlines()) == 3 and [file.name for file in tmp_path.iterdir()] == ["bad.jsonl"]
    with bad_rows_writer(path) as write:
        write(BadRow("d.json", 7, "ü\ud800", "x"))
    assert json.loads(path.read_text())["id"] == "ü\ud800"
