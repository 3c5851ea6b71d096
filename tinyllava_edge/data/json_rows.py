"""The values of a JSON list or of JSON lines, one at a time: memory holds a row, never the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ..errors import DataError

MAX_ROW = 16 << 20  # characters of one row
_CHUNK = 1 << 20  # characters read at a time
_NEAR = 64  # characters; a fault this near to the end of what was read may only be a value cut in two
_NUMBER = 4  # characters; fewer behind a value might go on with it: 1 and e+5
_SPACE = re.compile(r"[ \t\n\r]*")
_GET_AGAIN = "get the file again; it must be whole"


def json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Numbers and parsed values of a file's rows; the first character tells a list from JSON lines.

    Yields:
        (place in the list or line of the file, the first is 1; the value).

    Raises:
        DataError: missing, empty, not UTF-8, truncated or not JSON, nested too deeply, or a row of more than MAX_ROW
            characters; names the file and the row.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file", "check the path given to --data")
    try:
        with path.open(encoding="utf-8-sig") as handle:
            start = _first_text(handle)
            if not start:
                raise DataError(f"{path}: empty file", "give LLaVA JSON with at least one conversation")
            if start[0] == "[":
                yield from _List(handle, start, path).rows()
                return
        with path.open(encoding="utf-8-sig") as handle:
            yield from _lines(handle, path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: can't be read as UTF-8 ({error})", "get the file again, or save it as UTF-8"
        ) from error


def parse(text: str | bytes, where: str) -> Any:
    """One JSON value. Raises DataError that begins with `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: truncated or not valid JSON ({error})", _GET_AGAIN) from error


def _first_text(handle: TextIO) -> str:
    """The first chunk that is not blank, from its first visible character on; empty at the end of the file."""
    while chunk := handle.read(_CHUNK):
        if text := chunk.lstrip():
            return text
    return ""


def _lines(handle: TextIO, path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    while line := handle.readline(MAX_ROW + 2):
        number += 1
        if len(line.rstrip("\n")) > MAX_ROW:
            raise _too_large(path, f"line {number}")
        if line.strip():
            yield number, parse(line, f"{path}: line {number}")


class _List:
    """A list that is decoded over a sliding buffer."""

    def __init__(self, handle: TextIO, text: str, path: Path) -> None:
        self.handle, self.text, self.path = handle, text, path
        self.at = 1  # behind the bracket
        self.number = 0
        self.whole = False  # whether the buffer reaches to the end of the file
        self.decode = json.JSONDecoder().raw_decode

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Every element, then a check that nothing follows the list."""
        if self._next() == "]":
            self.at += 1
        else:
            while True:
                self.number += 1
                yield self.number, self._value()
                mark = self._next()
                self.at += 1
                if mark == "]":
                    break
                if mark != ",":
                    raise self._fault("no comma between two rows")
                self._next()
        if self._next():
            raise self._fault("text behind the list")

    def _next(self) -> str:
        """The next visible character, which `at` is moved to; empty at the end of the file."""
        while True:
            found = _SPACE.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more(_CHUNK):
                return ""

    def _value(self) -> Any:
        """Decode the value that starts at `at`; where the buffer ends within it, read more, twice as much each time."""
        size = _CHUNK
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self.whole or self._is_certain(error):
                    raise self._fault(error.msg) from error
            except (ValueError, RecursionError) as error:  # a whole number of thousands of digits; nesting
                raise self._fault(str(error)) from error
            else:
                if end + _NUMBER <= len(self.text) or self.whole:
                    if end - self.at > MAX_ROW:
                        raise _too_large(self.path, f"row {self.number}")
                    self.at = end
                    return value
            if len(self.text) - self.at > MAX_ROW:
                raise _too_large(self.path, f"row {self.number}")
            self._more(size)
            size *= 2

    def _is_certain(self, error: json.JSONDecodeError) -> bool:
        """Whether more text can't mend it. A string that does not end is reported where it starts."""
        return error.pos < len(self.text) - _NEAR and not error.msg.startswith("Unterminated string")

    def _more(self, size: int) -> bool:
        """Drop what was decoded and read on; whether there was more."""
        chunk = "" if self.whole else self.handle.read(size)
        self.whole = not chunk
        self.text, self.at = self.text[self.at :] + chunk, 0
        return bool(chunk)

    def _fault(self, what: str) -> DataError:
        where = f"{self.path}: row {self.number}" if self.number else str(self.path)
        return DataError(f"{where}: truncated or not valid JSON ({what})", _GET_AGAIN)


def _too_large(path: Path, where: str) -> DataError:
    return DataError(
        f"{path}: {where}: more than {MAX_ROW >> 20} MiB in one row",
        "give a list of conversations or one conversation a line; pictures are named, not embedded",
    )
