"""`model_spec.json`, read without torch: what a checkpoint needs to be fed."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import CheckpointError
from .spec import ModelSpec

SPEC_FILE = "model_spec.json"


def load_spec(root: str | Path) -> ModelSpec:
    """Read `model_spec.json`. Raises CheckpointError that names what is missing or wrong."""
    root = Path(root)
    path = root / SPEC_FILE
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such directory", "name a checkpoint that `tinyllava-edge train` wrote")
    if not path.is_file():
        raise CheckpointError(f"{root}: no {SPEC_FILE} here", "name a checkpoint that `tinyllava-edge train` wrote")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})", "restore the file") from error
    return ModelSpec.from_dict(value, str(path))
