"""A file of JSON lines that grows with a training: whole lines only, and each step once, whatever ended a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import no_space, storage_errors, write_text


class Lines:
    """Appends JSON objects that hold their `step`."""

    def __init__(self, path: Path, keep: int) -> None:
        """Make the file, or take what is there.

        Args:
            path: file; lines of steps after `keep`, and what is no whole line, are dropped from it.
            keep: last step that counts; 0 starts anew.

        Raises:
            StorageError: the file can't be written.
        """
        self.path = path
        self.last: dict[str, Any] = {}
        kept = []
        for line, value in whole_lines(path) if keep else ():
            if self.last.get("step", -1) <= value["step"] <= keep:
                kept.append(line + "\n")
                self.last = value
        write_text(path, "".join(kept))

    def add(self, values: Mapping[str, Any]) -> None:
        """Append one object; numbers that JSON has no word for become null. Raises StorageError on a full disk."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = (json.dumps(clean, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")
        with storage_errors(self.path), self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(line) != len(line):  # one call, so that a kill leaves all of it or nothing
                    raise no_space(self.path)
            except BaseException:
                file.truncate(size)
                raise


def whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines that are JSON objects with a whole `step`, as text and as values; a torn last line is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.split("\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and type(value.get("step")) is int:
            yield line, value
