"""LLaVA's JSON: a list, or one object a line, of conversations about pictures; Hugging Face's `messages` rows too.

    {"id": "1", "image": "a/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                      {"from": "gpt", "value": "A cat."}]}

Several pictures are a list, `"image": ["a.jpg", "b.jpg"]` (or `images`), with as many markers in the questions. Every
row is checked before anything is trained on it. Bad rows are counted and named, never dropped in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..prompt import IMAGE_MARKER, Turn
from .json_rows import json_rows
from .messages import from_messages
from .picture_sources import Folder
from .picture_store import PictureStore, is_unicode
from .row import BAD_ROWS_FILE, BadRow, Row, RowFault, bad_row, check_bad, shown, write_bad_rows

__all__ = ["BAD_ROWS_FILE", "BadRow", "LlavaData", "Row", "bad_row", "check_bad", "read", "write_bad_rows"]

SPEAKERS = ("human", "gpt")  # in the order in which they take turns


@dataclass(frozen=True)
class LlavaData:
    """What one or more files hold."""

    rows: tuple[Row, ...]
    """good rows in the order of the files"""
    bad: tuple[BadRow, ...]
    """bad rows in the order of the files"""


def read(path: Path | Sequence[Path], images: Path, *, max_bad: int | float = 0) -> LlavaData:
    """Read and check LLaVA JSON of a size that memory holds; `sets.rows` streams.

    Args:
        path: one file, or several that are read as one.
        images: directory that `image` is relative to. Links below it are followed: data sets are often linked.
        max_bad: how many bad rows to accept, or as a float the share of them.

    Raises:
        DataError: a file is missing or not JSON, no good row is left, or more than `max_bad` rows are bad.
    """
    rows: list[Row] = []
    bad: list[BadRow] = []
    paths = [path] if isinstance(path, Path) else list(path)
    check = PictureCheck(PictureStore((Folder(images),)))
    for file in paths:
        for number, value in json_rows(file):
            found = checked_row(value, check, str(file), number)
            if isinstance(found, Row):
                rows.append(found)
            else:
                bad.append(found)
    check_bad(bad, max_bad, len(rows) + len(bad))
    if not rows:
        raise DataError(
            f"{', '.join(map(str, paths))}: no usable row", "give LLaVA JSON with at least one conversation"
        )
    return LlavaData(tuple(rows), tuple(bad))


class PictureCheck:
    """What is wrong with a picture's name, "" when nothing is; the last answers are remembered."""

    _KEPT = 1 << 16  # names: rows about one picture mostly stand together

    def __init__(self, store: PictureStore) -> None:
        self.store = store
        self._known: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        fault = self._known.get(name)
        if fault is None:
            if len(self._known) >= self._KEPT:
                self._known.clear()
            fault = self._known[name] = self.store.fault(name)
        return fault


def checked_row(
    value: Any, check: PictureCheck, file: str, number: int, *, own: Sequence[str] = (), id: str = ""
) -> Row | BadRow:
    """The row of a parsed value, LLaVA's or `messages`.

    Args:
        value: parsed JSON.
        check: knows which pictures there are.
        file, number: where the row stands.
        own: pictures of a sample that the value belongs to; they take the place of names in the value.
        id: the sample's, for a value without one.
    """
    try:
        return _row(value, check, file, number, own, id)
    except RowFault as error:
        name = value.get("id", id) if isinstance(value, dict) else id
        return BadRow(file, number, shown(name), str(error))


def _row(value: Any, check: PictureCheck, file: str, number: int, own: Sequence[str], id: str) -> Row:
    if not isinstance(value, dict):
        raise RowFault(f"is a {type(value).__name__}, not an object")
    if "messages" in value:
        value = from_messages(value, own)
        id = id or str(number)
    name = id if value.get("id") is None and id else value.get("id")
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise RowFault("`id` is missing or neither text nor a whole number")
    images = tuple(own) or _names(value)
    for image in images:
        if fault := check(image):
            raise RowFault(fault)
    talk = _talk(value.get("conversations"))
    markers = sum(question.count(IMAGE_MARKER) for question, _ in talk)
    if markers != len(images):
        raise RowFault(f"{markers} {IMAGE_MARKER} marker(s) for {len(images)} picture(s)")
    labels: dict[str, str | None] = {}
    for key in ("tier", "question_type"):
        label = value.get(key)
        if label is not None and not isinstance(label, str):
            raise RowFault(f"`{key}` is not text")
        labels[key] = label
    turns = tuple(_turn(question, answer) for question, answer in talk)
    return Row(str(name), images, turns, labels["tier"], labels["question_type"], file, number)


def _names(value: dict[str, Any]) -> tuple[str, ...]:
    """The row's pictures: `image` or `images`, one name or a list."""
    given = [key for key in ("image", "images") if value.get(key) is not None]
    if len(given) > 1:
        raise RowFault("has both `image` and `images`")
    if not given:
        return ()
    found = value[given[0]]
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RowFault(f"`{given[0]}` is not text, nor a list of texts")
    return tuple(names)


def _talk(talk: Any) -> list[tuple[str, str]]:
    """Questions with their answers, markers as they stand."""
    if not isinstance(talk, list) or not talk:
        raise RowFault("`conversations` is missing, empty or not a list")
    if len(talk) % 2:
        raise RowFault(f"{len(talk)} messages: every human message needs an answer from gpt")
    values: list[str] = []
    for k, message in enumerate(talk):
        where = f"message {k + 1}"
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise RowFault(f"{where} has no text in `value`")
        if message.get("from") != SPEAKERS[k % 2]:
            raise RowFault(f"{where} is from {shown(message.get('from'))!r}, expected {SPEAKERS[k % 2]!r}")
        text = message["value"]
        if not text.strip():
            raise RowFault(f"{where} is empty")
        if not is_unicode(text):
            raise RowFault(f"{where} holds half of a surrogate pair, which is not Unicode text")
        if k % 2 and IMAGE_MARKER in text:
            raise RowFault(f"{where} is an answer that holds {IMAGE_MARKER}")
        values.append(text)
    return list(zip(values[::2], values[1::2], strict=True))


def _turn(question: str, answer: str) -> Turn:
    """Markers move to the front, as `prompt.build` puts them; several become a count, as `run` passes pictures."""
    markers = question.count(IMAGE_MARKER)
    if not markers:
        return Turn(question, answer)
    text = question.replace(IMAGE_MARKER, "").strip()
    if markers == 1:
        return Turn(f"{IMAGE_MARKER}\n{text}" if text else IMAGE_MARKER, answer)
    return Turn(text, answer, markers)
