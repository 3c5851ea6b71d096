"""What `serve --web` may send: the built page's files and the files that the bundle's manifest names. Nothing else has
a path, so no request leads out of the two directories.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...bundle import MANIFEST, Bundle
from ...errors import DependencyError
from ...files import safe_join, sha256_file

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".wasm": "application/wasm",
}
ROLES = ("preprocess", "web")  # what the page asks for; a bundle's other files are not the browser's business


@dataclass(frozen=True)
class WebFile:
    """One file that can be asked for."""

    path: Path
    """where it lies"""
    content_type: str
    """its media type"""
    sha256: str
    """hex digest of its bytes: for a bundle's file the manifest's, which the page compares with what arrives"""


def default_dist() -> Path:
    """Where `make web` writes the page in a source tree."""
    return Path(__file__).parents[3] / "runtimes" / "web" / "dist"


def page_files(dist: Path) -> dict[str, WebFile]:
    """URL path → file of the built page.

    Raises:
        DependencyError: it was not built.
    """
    if not (dist / "index.html").is_file() or not (dist / "sw.js").is_file():
        raise DependencyError(
            f"{dist}: the page for browsers is not built", "run `make web` (needs Node.js), or name it with --web-dist"
        )
    found: dict[str, WebFile] = {}
    for path in sorted(dist.rglob("*")):
        name = path.relative_to(dist).as_posix()
        if path.is_file() and path.suffix in TYPES and path.resolve().is_relative_to(dist.resolve()):
            found[f"/{name}"] = WebFile(path, TYPES[path.suffix], sha256_file(path))
    found["/"] = found["/index.html"]
    return found


def bundle_files(bundle: Bundle) -> dict[str, WebFile]:
    """URL path → the manifest itself, and those of its files that the page reads, parts included."""
    found = {f"/bundle/{MANIFEST}": WebFile(safe_join(bundle.root, MANIFEST), TYPES[".json"], bundle.sha256)}
    for entry in [entry for file in bundle.files if file.role in ROLES for entry in file.entries]:
        path = bundle.path(entry)
        kind = TYPES.get(path.suffix, "application/octet-stream")
        found[f"/bundle/{entry.path}"] = WebFile(path, kind, entry.sha256)
    return found


def web_precisions(bundle: Bundle) -> list[str]:
    """The precisions that a bundle has all web files of, in its manifest's order."""
    return [build.precision for build in bundle.web_builds().values()]


def shell_id(files: Mapping[str, WebFile]) -> str:
    """One hash of the page's files: which build of the page gave a result."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name} {files[name].sha256}\n".encode())
    return digest.hexdigest()[:16]
