"""`model_spec.json`, read without torch: what a checkpoint needs to be fed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .spec import ModelSpec

SPEC_FILE = "model_spec.json"
_WRITTEN = "name a checkpoint that `tinyllava-edge train` or `import` wrote"


def load_spec(root: str | Path) -> ModelSpec:
    """Read `model_spec.json`. Raises CheckpointError that names what is missing or wrong."""
    root = Path(root)
    path = root / SPEC_FILE
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such directory", _WRITTEN)
    if not path.is_file():
        raise CheckpointError(f"{root}: no {SPEC_FILE} here", _hint(root))
    return ModelSpec.from_dict(read_json(path), str(path))


def _hint(root: Path) -> str:
    """What to do with a directory that is something else."""
    if (root / "bundle.json").is_file():
        return "this is a bundle: name the checkpoint that it was exported from"
    if (root / "config.json").is_file():
        return "a released model becomes a checkpoint by `tinyllava-edge import`"
    return _WRITTEN


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing", "copy the whole checkpoint again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})", "restore the file") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, not an object", "restore the file")
    return value
