"""`eval --explain`: what answers become after normalising and parsing, line by line, and how they score."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.tasks.base import Mark, Task, check_unicode, read_lines
from tinyllava_edge.errors import DataError, UsageError

MAX_LINE = 1 << 20  # bytes of a line on stdin


def explain(task: Task, lines: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Mark each line.

    Args:
        task: under whose protocol.
        lines: place and object: `text`; `answers`, `options` where they count; `replies` of a judge.

    Yields:
        {text, steps: {name: value}, parsed, score, protocol}; score is null without a label.

    Raises:
        DataError: a line without `text`, or one that the task can't read; the place is named.
    """
    for where, line in lines:
        text = line.get("text")
        if not isinstance(text, str):
            raise DataError(f"{where}: needs `text`, a string", 'e.g. {"text": "Yes.", "answers": ["yes"]}')
        try:
            mark = _mark(task, line, text)
        except (DataError, UsageError) as error:
            raise DataError(f"{where}: {error.message}", error.hint) from error
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise DataError(
                f"{where}: {task.name or 'this task'} can't use it ({type(error).__name__}: {error})",
                "see `answers` and `options` in docs/benchmarks.md",
            ) from error
        steps = {name: value for name, value in mark.steps}
        yield {"text": text, "steps": steps, "parsed": mark.parsed, "score": mark.score, "protocol": task.protocol}


def readable(found: Mapping[str, Any]) -> str:
    """One explained line for people."""
    steps = " → ".join(f"{name} {value!r}" for name, value in found["steps"].items())
    score = "no label" if found["score"] is None else f"{found['score']:.4g}"
    return f"{found['text']!r}" + (f" → {steps}" if steps else "") + f" → {found['parsed']!r} · score {score}"


def read_input(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """JSON lines of a file, or of stdin for `-`, as they come. Raises DataError."""
    if source != "-":
        yield from read_lines(Path(source))
        return
    number = 0
    while line := sys.stdin.buffer.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise DataError(f"stdin:{number}: longer than {MAX_LINE:,} bytes", "one JSON object a line")
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
            check_unicode(line.decode("utf-8"), value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"stdin:{number}: not a JSON line ({error})", "one JSON object a line") from error
        if not isinstance(value, dict):
            raise DataError(f"stdin:{number}: not a JSON object", 'e.g. {"text": "Yes.", "answers": ["yes"]}')
        yield f"stdin:{number}", value


def _mark(task: Task, line: Mapping[str, Any], text: str) -> Mark:
    question = task.from_line(line)
    replies = line.get("replies", [line["reply"]] if "reply" in line else None)
    if task.judging is None or replies is None:
        return task.mark(question, text)
    if not isinstance(replies, list) or not all(isinstance(reply, str) for reply in replies):
        raise DataError("`replies` is no list of texts", "as the replies file has them")
    return task.judging.mark(question, text, replies)
