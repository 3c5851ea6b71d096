"""`import.json`: what a checkpoint was imported from, so that importing the same again does nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint_spec import read_json
from ..errors import CheckpointError
from ..files import sha256_file, write_json

FILE = "import.json"
VERSION = 1  # of the importer: raised when it would write another checkpoint from the same bytes
_FOLDERS = ("", "language_model", "vision_tower", "connector")
_PATTERNS = ("*.json", "*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*.model", "merges.txt")
_UNREAD = ("trainer_state.json", "all_results.json", "train_results.json")


def fingerprint(
    source: Path, given: Mapping[str, Path | None], options: Mapping[str, Any], progress: Callable[[str], None] | None
) -> dict[str, Any]:
    """Hashes of every file that an import may read, and the options.

    Args:
        source: directory of the model.
        given: flag → directory that it names.
        options: other options.
        progress: told each large file.
    """
    files: dict[str, str] = {}
    for label, root in (("source", source), *((flag, path) for flag, path in given.items() if path is not None)):
        for folder in _FOLDERS if label == "source" else ("",):
            for path in sorted({path for pattern in _PATTERNS for path in (root / folder).glob(pattern)}):
                if path.is_file() and path.name not in _UNREAD:
                    if progress and path.stat().st_size > 1 << 28:
                        progress(f"reading {path.name}")
                    files[f"{label}/{path.relative_to(root).as_posix()}"] = sha256_file(path)
    return {"version": VERSION, "files": files, "options": dict(options)}


def is_unchanged(out: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether `out` was imported from these bytes with these options and still has every file at its size."""
    try:
        found = read_json(out / FILE)
    except CheckpointError:
        return False
    sizes = found.get("sizes")
    if not isinstance(sizes, dict) or any(found.get(key) != value for key, value in wanted.items()):
        return False
    return all((out / name).is_file() and (out / name).stat().st_size == size for name, size in sizes.items())


def write_record(out: Path, wanted: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    """Write import.json beside the finished files."""
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    write_json(out / FILE, {**wanted, **extra, "sizes": sizes})
