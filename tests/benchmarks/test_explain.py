"""`--explain`: every step by name, the score, and lines that can't be used named by their place."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tinyllava_edge.benchmarks.explain import explain, read_input, readable
from tinyllava_edge.benchmarks.tasks import TASKS, find
from tinyllava_edge.errors import DataError, UsageError


def lines(*values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((f"x:{number}", value) for number, value in enumerate(values, 1))


def test_exact_match() -> None:
    found = list(explain(find(""), lines({"text": " Red ", "answers": "red"}, {"text": "a", "answers": ["b"]})))
    assert [(f["parsed"], f["score"]) for f in found] == [("red", 1.0), ("a", 0.0)]
    assert readable(found[0]) == "' Red ' → compared as 'red' → with 'red' → 'red' · score 1"


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("text", ["", "\n", "Yes. No", "é\u2028", "A" * 10_000, "(Z)", "B.", "5.", "yes"])
def test_every_task_explains_hostile_answers(name: str, text: str) -> None:
    """Without any label: a text becomes something, and the score is a number or none."""
    options = {"options": ["red", "green", "blue"]} if name == "mmbench_en_dev" else {}  # its parser reads their texts
    (found,) = explain(find(name), lines({"text": text, **options}))
    assert isinstance(found["parsed"], str) and found["protocol"] == find(name).protocol
    assert found["score"] is None or 0 <= found["score"] <= 1
    json.dumps(found, allow_nan=False)
    assert readable(found)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    "line",
    [
        {},
        {"text": None},
        {"text": 5},
        {"text": "x", "answers": 5},
        {"text": "x", "answers": {}},
        {"text": "x", "answers": [[]]},
        {"text": "x", "options": 3, "answers": "A"},
        {"text": "x", "options": [None], "answers": "A"},
        {"text": "x", "replies": 3},
    ],
)
def test_unusable_lines_are_errors_or_answers_but_never_tracebacks(name: str, line: dict[str, Any]) -> None:
    try:
        (found,) = explain(find(name), lines(line))
    except DataError as error:
        assert error.message.startswith("x:1")
    else:
        assert isinstance(line["text"], str) and isinstance(found["parsed"], str)


def test_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        buffer = io.BytesIO(b'{"text": "a"}\n\n{"text": "b"}\nnope\n')

    monkeypatch.setattr(sys, "stdin", Stream())
    found = read_input("-")
    assert [next(found)[0], next(found)[0]] == ["stdin:1", "stdin:3"]
    with pytest.raises(DataError, match="stdin:4: not a JSON line"):
        next(found)


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n[1]\n')
    found = read_input(str(tmp_path / "a.jsonl"))
    assert next(found)[1] == {"text": "a"}
    with pytest.raises(DataError, match="a.jsonl:2: not a JSON object"):
        next(found)
    with pytest.raises(UsageError, match="unknown task 'nope'"):
        find("nope")
