"""The parts that lines of `--explain` share: one right answer, and options by letter."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from tinyllava_edge.errors import DataError

WHERE = "a line of --explain"


def right_answer(line: Mapping[str, Any]) -> str | None:
    """`answers` as one string: itself, or the one entry of a list; None where there is none.

    Raises:
        DataError: another type, or a list that does not hold exactly one string.
    """
    found = line.get("answers")
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if found is not None and not isinstance(found, str):
        raise DataError(f"{WHERE}: `answers` is not one string: {found!r}", 'write "answers": "B"')
    return found


def options_by_letter(line: Mapping[str, Any]) -> dict[str, str]:
    """`options` as letter → text, from a list or from such an object; empty where there are none.

    Raises:
        DataError: another type, texts that are no strings, keys that are no capital letters.
    """
    found = line.get("options", {})
    if isinstance(found, list) and len(found) <= len(string.ascii_uppercase):
        found = dict(zip(string.ascii_uppercase, found, strict=False))
    good = isinstance(found, dict) and all(len(key) == 1 and key in string.ascii_uppercase for key in found)
    if not good or not all(isinstance(text, str) for text in found.values()):
        raise DataError(f"{WHERE}: `options` is not a list of strings or letters with strings", "write a list")
    return dict(found)
