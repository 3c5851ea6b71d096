"""This package as a zip file, made in memory from the files that run here, and what it needs beside it."""

from __future__ import annotations

import functools
import hashlib
import io
import re
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import tinyllava_edge
from tinyllava_edge.errors import DependencyError

_LEFT_OUT = ("__pycache__", "nano")  # nano: 14 MB of weights that only the demo uses
_EXTRA = re.compile(r"""\s*;\s*extra\s*==\s*["']([^"']+)["']\s*$""")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that zip can say


@dataclass(frozen=True)
class Package:
    """Our code, to be unpacked onto PYTHONPATH."""

    content: bytes
    """the zip file"""

    @property
    def sha256(self) -> str:
        """Hex digest of the content."""
        return hashlib.sha256(self.content).hexdigest()


def requirements() -> list[str]:
    """What a device needs, with the ranges of this installation's metadata: the base and the `cpu` extra.

    Raises:
        DependencyError: the package runs from a source tree that was never installed.
    """
    try:
        declared = metadata.requires("tinyllava-edge") or []
    except metadata.PackageNotFoundError as error:
        raise DependencyError(
            "tinyllava-edge carries no metadata here, so a device's dependencies are unknown",
            "install it: pip install -e .; or name an interpreter on the device with --remote-python",
        ) from error
    found = []
    for line in declared:
        extra = _EXTRA.search(line)
        if extra is None:
            found.append(line)
        elif extra[1] == "cpu":
            found.append(line[: extra.start()])
    return found


@functools.cache  # what runs does not change while it runs
def pack() -> Package:
    """Pack the package. The same files give the same bytes, so the hash says whether a device has this code."""
    root = Path(tinyllava_edge.__file__).parent
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*")):
            if path.is_file() and not set(_LEFT_OUT) & set(path.relative_to(root).parts):
                entry = zipfile.ZipInfo(f"{root.name}/{path.relative_to(root).as_posix()}", _EPOCH)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, path.read_bytes())
    return Package(packed.getvalue())
