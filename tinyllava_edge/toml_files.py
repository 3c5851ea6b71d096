"""TOML that people write, read within limits: a pipe would wait for ever, a sparse file fill the memory."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from .errors import TinyLlavaEdgeError, UsageError

MAX_BYTES = 1 << 20
_MAX_PLACE = 255  # characters of a path that messages repeat as it is


def read_toml(path: str | Path, hint: str, error: type[TinyLlavaEdgeError] = UsageError) -> dict[str, Any]:
    """The parsed file.

    Args:
        path: regular file of at most MAX_BYTES.
        hint: next step of a file that can't be read.
        error: class of what is raised.

    Raises:
        TinyLlavaEdgeError: of class `error`: missing, no regular file, too large, or not TOML.
    """
    where = place(path)
    try:
        file = Path(path)
        if file.exists() and not file.is_file():
            raise error(f"{where}: no regular file", "name a .toml file")
        with file.open("rb") as handle:
            data = handle.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise error(f"{where}: larger than {MAX_BYTES:,} bytes", hint)
        return tomllib.loads(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as reason:
        words = (getattr(reason, "strerror", None) or str(reason))[:200]  # str() of an OSError repeats the path
        raise error(f"{where}: can't be read as TOML ({words})", hint) from reason


def place(path: str | Path) -> str:
    """A path as messages repeat it: odd and endless ones are shortened."""
    name = str(path)
    return name if name.isprintable() and len(name) <= _MAX_PLACE else repr(name)[:40]
