"""Streaming reads what json.loads reads, in little memory, and says where a file is broken."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyllava_edge.data import json_rows as module
from tinyllava_edge.data.json_rows import json_rows
from tinyllava_edge.errors import DataError

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value is cut in two somewhere."""
    monkeypatch.setattr(module, "_CHUNK", 3)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(VALUES, max_size=6), indent=st.sampled_from([None, 1]), ascii=st.booleans())
def test_a_list_is_read_as_json_loads_reads_it(
    values: list[Any], indent: int | None, ascii: bool, tmp_path: Path, small_chunks: None
) -> None:
    path = tmp_path / "d.json"
    path.write_text(
        " \n" + json.dumps(values, indent=indent, ensure_ascii=ascii) + "\n ", encoding="utf-8", errors="replace"
    )
    found = list(json_rows(path))
    assert [value for _, value in found] == json.loads(path.read_text(encoding="utf-8"))
    assert [number for number, _ in found] == list(range(1, len(values) + 1))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_keep_their_numbers(end: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(f'\ufeff{end}{{"a": 1}}{end}  {end}{{"b": "\u2028"}}'.encode())
    assert list(json_rows(path)) == [(2, {"a": 1}), (4, {"b": "\u2028"})]


WHOLE = '[{"id": 1, "t": "a\\"b"}, {"id": 22, "v": [1, -2.5e3, true, null]}, 17]'


@pytest.mark.parametrize("cut", range(1, len(WHOLE)))
def test_a_list_that_is_cut_anywhere_is_refused(cut: int, tmp_path: Path, small_chunks: None) -> None:
    path = tmp_path / "d.json"
    path.write_text(WHOLE[:cut])
    with pytest.raises(DataError, match=r"d\.json.*truncated or not valid JSON"):
        list(json_rows(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1 2]", "row 1"),
        ("[1,]", "row 2"),
        ("[,1]", "row 1"),
        ('[{"a": 1}, {"a": nope}]', "row 2"),
        ("[1] 2", "text behind the list"),
        ("[1]]", "text behind the list"),
        ('[1, "\x00"]', "row 2"),
        ("[1, " + "[" * 100_000, "row 2"),
        ('{"a": 1}\n' + '{"a":' * 100_000, "line 2"),
        ("[1, " + "9" * 5000 + "]", "row 2"),
        ('{"a": 1}\n{"a": \x00}', "line 2"),
    ],
    ids=["comma", "last comma", "first comma", "word", "rest", "bracket", "nul", "deep", "deep line", "digits", "line"],
)
def test_broken_json_names_the_row(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(DataError, match=words) as error:
        list(json_rows(path))
    assert str(path) in error.value.message and "\n" not in error.value.message and error.value.hint


def test_rows_before_the_broken_one_are_given(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text("[1, 2, oops, 4]" + " " * 100)
    found = []
    with pytest.raises(DataError, match="row 3"):
        for _, value in json_rows(path):
            found.append(value)
    assert found == [1, 2]


@pytest.mark.parametrize("line", [False, True])
def test_a_row_of_10_mb_is_read_and_one_beyond_the_limit_refused(line: bool, tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    for size, fits in ((10 << 20, True), (17 << 20, False), (40 << 20, False)):
        row = '{"t": "' + "x" * size + '"}'
        path.write_text(row if line else f"[{row}, 1]")
        if fits:
            assert len(next(json_rows(path))[1]["t"]) == size
        else:
            with pytest.raises(DataError, match=r"(row|line) 1.*more than 16 MiB"):
                list(json_rows(path))


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Loading this file of 20 MB whole takes ten times what streaming takes."""
    row = json.dumps({"id": "x", "conversations": [{"from": "human", "value": "word " * 40}] * 6})
    path = tmp_path / "big.json"
    path.write_text("[" + ",".join([row] * 16_000) + "]")

    def peak(read: Callable[[Path], Iterable[object]]) -> float:
        tracemalloc.start()
        assert sum(1 for _ in read(path)) == 16_000
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found / (1 << 20)

    assert peak(json_rows) < 8 < 40 < peak(lambda path: json.loads(path.read_text()))
