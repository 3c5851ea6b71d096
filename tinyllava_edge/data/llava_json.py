"""LLaVA's JSON: a list, or one object a line, of conversations about at most one picture each.

    {"id": "1", "image": "a/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                      {"from": "gpt", "value": "A cat."}]}

Every row is checked before anything is trained on it. Bad rows are counted and named, never dropped in silence.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError
from ..files import write_text
from ..prompt import IMAGE_MARKER, Turn

SPEAKERS = ("human", "gpt")  # in the order in which they take turns
BAD_ROWS_FILE = "bad_rows.jsonl"


@dataclass(frozen=True)
class Row:
    """One conversation that passed every check."""

    id: str
    """the row's `id`, integers written as text"""
    image: str | None
    """path relative to the image directory, forward slashes; None for a text-only row"""
    turns: tuple[Turn, ...]
    """questions with their answers; `<image>` stands in exactly one question when there is a picture"""
    tier: str | None = None
    """optional group that scores are also reported by"""
    question_type: str | None = None
    """optional kind of question that scores are also reported by"""
    file: str = ""
    """the JSON file it comes from"""
    number: int = 0
    """place in the list, or line of the file; the first is 1"""


@dataclass(frozen=True)
class BadRow:
    """One row that did not pass."""

    file: str
    """the JSON file"""
    row: int
    """place in the list, or line of the file; the first is 1"""
    id: str
    """the row's `id` where it has one"""
    reason: str
    """what is wrong with it"""


@dataclass(frozen=True)
class LlavaData:
    """What one or more files hold."""

    rows: tuple[Row, ...]
    """good rows in the order of the files"""
    bad: tuple[BadRow, ...]
    """bad rows in the order of the files"""


def read(path: Path | Sequence[Path], images: Path, *, max_bad: int = 0) -> LlavaData:
    """Read and check LLaVA JSON.

    Args:
        path: one file, or several that are read as one.
        images: directory that `image` is relative to. Links below it are followed: data sets are often linked.
        max_bad: how many bad rows to accept.

    Raises:
        DataError: a file is missing or not JSON, no good row is left, or more than `max_bad` rows are bad.
    """
    rows: list[Row] = []
    bad: list[BadRow] = []
    seen: dict[str, str] = {}  # picture → what is wrong with it, "" when nothing is
    paths = [path] if isinstance(path, Path) else list(path)
    for file in paths:
        for number, value in _values(file):
            try:
                rows.append(_row(value, images, seen, str(file), number))
            except _Bad as error:
                name = value.get("id", "") if isinstance(value, dict) else ""
                bad.append(BadRow(str(file), number, str(name)[:200], str(error)))
    check_bad(bad, max_bad)
    if not rows:
        raise DataError(
            f"{', '.join(map(str, paths))}: no usable row", "give LLaVA JSON with at least one conversation"
        )
    return LlavaData(tuple(rows), tuple(bad))


def check_bad(bad: Sequence[BadRow], max_bad: int) -> None:
    """Raise DataError that names the first bad row and their count when there are more than `max_bad`."""
    if len(bad) > max_bad:
        first = bad[0]
        raise DataError(
            f"{first.file}: row {first.row} (id {first.id!r}): {first.reason}; {len(bad)} bad rows, {max_bad} allowed",
            "mend the rows, or allow some with --max-bad-rows",
        )


def write_bad_rows(path: Path, bad: Sequence[BadRow]) -> None:
    """Write the bad rows, one JSON object a line, whole or not at all."""
    write_text(path, "".join(json.dumps(asdict(row), ensure_ascii=True) + "\n" for row in bad))


def bad_row(row: Row, reason: str) -> BadRow:
    """A row that passed the checks here and was refused later."""
    return BadRow(row.file, row.number, row.id[:200], reason)


class _Bad(Exception):
    """Why a row is bad."""


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    """Row numbers and parsed values; the first character tells a list from JSON lines."""
    if not path.is_file():
        raise DataError(f"{path}: no such file", "check the path given to --data")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: can't be read as UTF-8 ({error})", "get the file again, or save it as UTF-8"
        ) from error
    if not text.strip():
        raise DataError(f"{path}: empty file", "give LLaVA JSON with at least one conversation")
    if not text.lstrip().startswith("["):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, _parse(line, f"{path}: line {number}")
        return
    yield from enumerate(_parse(text, str(path)), 1)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: truncated or not valid JSON ({error})", "get the file again; it must be whole"
        ) from error


def _row(value: Any, images: Path, seen: dict[str, str], file: str, number: int) -> Row:
    if not isinstance(value, dict):
        raise _Bad(f"is a {type(value).__name__}, not an object")
    name = value.get("id")
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise _Bad("`id` is missing or neither text nor a whole number")
    image = value.get("image")
    if image is not None:
        if not isinstance(image, str):
            raise _Bad("`image` is not text")
        if image not in seen:
            seen[image] = _image_fault(image, images)
        if seen[image]:
            raise _Bad(seen[image])
    turns = _turns(value.get("conversations"))
    markers = sum(turn.question.count(IMAGE_MARKER) for turn in turns)
    if markers != (image is not None):
        raise _Bad(f"{markers} {IMAGE_MARKER} marker(s) for {int(image is not None)} picture(s)")
    labels: dict[str, str | None] = {}
    for key in ("tier", "question_type"):
        label = value.get(key)
        if label is not None and not isinstance(label, str):
            raise _Bad(f"`{key}` is not text")
        labels[key] = label
    return Row(str(name), image, turns, labels["tier"], labels["question_type"], file, number)


def _turns(talk: Any) -> tuple[Turn, ...]:
    if not isinstance(talk, list) or not talk:
        raise _Bad("`conversations` is missing, empty or not a list")
    if len(talk) % 2:
        raise _Bad(f"{len(talk)} messages: every human message needs an answer from gpt")
    values: list[str] = []
    for k, message in enumerate(talk):
        where = f"message {k + 1}"
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise _Bad(f"{where} has no text in `value`")
        if message.get("from") != SPEAKERS[k % 2]:
            raise _Bad(f"{where} is from {message.get('from')!r}, expected {SPEAKERS[k % 2]!r}")
        text = message["value"]
        if not text.strip():
            raise _Bad(f"{where} is empty")
        if not _is_unicode(text):
            raise _Bad(f"{where} holds half of a surrogate pair, which is not Unicode text")
        if k % 2 and IMAGE_MARKER in text:
            raise _Bad(f"{where} is an answer that holds {IMAGE_MARKER}")
        values.append(text)
    return tuple(Turn(question, answer) for question, answer in zip(values[::2], values[1::2], strict=True))


def _image_fault(image: str, images: Path) -> str:
    pure = PurePosixPath(image)
    if not image or "\0" in image or "\\" in image or not _is_unicode(image):
        return f"image {image[:200]!r} is not a path with forward slashes"
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or ":" in pure.parts[0]:
        return f"image {image!r} leaves the image directory"
    try:
        found = (images / pure).is_file()
    except OSError:  # a name longer than the file system takes
        found = False
    return "" if found else f"image {image[:200]!r} is not in {images}"


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
