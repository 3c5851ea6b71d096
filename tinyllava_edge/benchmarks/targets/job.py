"""The keyword arguments of `bench` as JSON, and back on the other machine; files travel by their hash."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyllava_edge.errors import DataError, UsageError
from tinyllava_edge.files import sha256_file

_FILE = "$file"  # key of an object that stands for a file: `{sha256}-{name}` below the run's inputs/


def encode(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Path]]:
    """Make options into JSON.

    Returns:
        The JSON object, and the files it names: name below inputs/ → place on this machine.

    Raises:
        UsageError: a value that is neither JSON nor a file's path, or a file that is not there.
    """
    files: dict[str, Path] = {}
    return {key: _encode(key, value, files) for key, value in sorted(options.items())}, files


def decode(value: Any, inputs: Path) -> Any:
    """Make JSON into options again; the files lie in `inputs`. Raises DataError for a file that is not there."""
    if isinstance(value, dict) and _FILE in value:
        name = str(value[_FILE])
        if "/" in name or not (inputs / name).is_file():
            raise DataError(f"{inputs}: no {name[:80]!r}", "run the command again")
        return inputs / name
    if isinstance(value, dict):
        return {key: decode(entry, inputs) for key, entry in value.items()}
    if isinstance(value, list):
        return [decode(entry, inputs) for entry in value]
    return value


def _encode(key: str, value: Any, files: dict[str, Path]) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Path):
        if not value.is_file():
            raise UsageError(f"{key}: {value} is not a file", "name a file that can be copied to the device")
        readable = re.sub(r"[^A-Za-z0-9._-]", "_", value.name)[-60:]
        name = f"{sha256_file(value)}-{readable}"
        files[name] = value
        return {_FILE: name}
    if isinstance(value, Mapping):
        return {str(inner): _encode(key, entry, files) for inner, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(key, entry, files) for entry in value]
    raise UsageError(f"{key}: a {type(value).__name__} can't be sent to another machine", "measure it there")
